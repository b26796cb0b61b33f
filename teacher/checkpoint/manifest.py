"""What a folder of prepared shards says of itself: where the weights came from, for which ranks they are cut, and the hash of
every file, its own content included. No torch: a trace's identity needs the source's fingerprint, and nothing else of it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from configs.errors import UnusableInput
from data.store import read_json
from teacher.checkpoint.partition import Cut, Layout
from teacher.folders import IDENTITY, sha256_of

MANIFEST, DIGEST = "prepared.json", "sha256"
FORMAT = 2
Dtype = Literal["fp32", "bf16"]
COMPANIONS = (
    *IDENTITY,
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""What an engine reads of a checkpoint beside its weights."""


class FileSum(NamedTuple):
    """Size and hash of one file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint that was prepared. revision: its commit where it was downloaded from, or `unknown`. fingerprint: what
    traces carry, the same whether an engine loads the checkpoint or these shards."""

    folder: str
    revision: str
    fingerprint: str
    files: dict[str, FileSum]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Shards, whole and sealed. ranks: the files of each rank; ranks that hold the same numbers share a file. companions: those
    of COMPANIONS that the checkpoint has. cuts: how each of the engine's tensors is spread."""

    source: Source
    model_type: str
    layout: Layout
    dtype: Dtype
    files: dict[str, FileSum]
    ranks: tuple[tuple[str, ...], ...]
    cuts: dict[str, Cut]
    companions: dict[str, FileSum]
    code_revision: str
    versions: dict[str, str]
    format: int = FORMAT


def is_prepared(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """What the shards in `folder` are, once it and every companion have the hash that was sealed. The shards themselves are
    verified by the rank that reads them.

    Raises:
        UnusableInput: no manifest, one of another format, or a damaged one; a companion that is missing, was changed or added.
    """
    manifest = parse_manifest(folder)
    check_companions(folder, manifest)
    return manifest


def readable_manifest(folder: Path) -> Manifest | None:
    """None for a missing, damaged or older one: preparing again is the remedy for all three. Companions are not looked at."""
    try:
        return parse_manifest(folder) if is_prepared(folder) else None
    except UnusableInput:
        return None


def parse_manifest(folder: Path) -> Manifest:
    """The manifest alone, verified by its own hash. Raises UnusableInput as `read_manifest`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UnusableInput(f"{folder}: no {MANIFEST} there, so no finished shards; make them with: tracestill prepare CONFIG")
    said = read_json(path)
    if said.get("format") != FORMAT:
        raise UnusableInput(f"{path}: format {said.get('format')}, expected {FORMAT}; run tracestill prepare CONFIG again")
    expected = said.pop(DIGEST, "none")
    if (found := digest_of(said)) != expected:
        raise UnusableInput(
            f"{path}: sha256 of its content {found[:12]}, expected {str(expected)[:12]} as sealed: something in it was changed; "
            "copy it again, or run: tracestill prepare CONFIG"
        )
    try:
        return Manifest(
            **{
                **said,
                "source": Source(**{**said["source"], "files": _sums(said["source"]["files"])}),
                "layout": Layout(**said["layout"]),
                "files": _sums(said["files"]),
                "ranks": tuple(tuple(names) for names in said["ranks"]),
                "companions": _sums(said["companions"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise UnusableInput(f"{path}: damaged ({error}); run tracestill prepare CONFIG again") from error


def _sums(said: Mapping[str, tuple[int, str]]) -> dict[str, FileSum]:
    return {name: FileSum(*values) for name, values in said.items()}


def as_json(manifest: Manifest) -> dict[str, object]:
    """With the hash of everything else in it, as `parse_manifest` wants it."""
    said = dataclasses.asdict(manifest)
    return {**said, DIGEST: digest_of(said)}


def digest_of(said: Mapping[str, object]) -> str:
    """Hex sha256 of the values, whatever the order of keys and the white space of the file that held them."""
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_companions(folder: Path, manifest: Manifest) -> None:
    """Raises UnusableInput when what an engine reads beside the shards is not what was prepared: one changed number of
    config.json (routed_scaling_factor) changes every answer and fails nowhere. A file that was added counts too: a template
    beside the tokenizer wins over the one in it."""
    for name in COMPANIONS:
        path, expected = folder / name, manifest.companions.get(name)
        if expected is None:
            if path.exists():
                raise UnusableInput(f"{path}: not part of what was prepared; move it away, or run: tracestill prepare CONFIG")
            continue
        found = FileSum(path.stat().st_size, sha256_of(path)) if path.is_file() else None
        if found != expected:
            state = f"sha256 {found.sha256[:12]}" if found else "missing"
            raise UnusableInput(
                f"{path}: {state}, expected {expected.sha256[:12]} by the manifest; restore it with: tracestill prepare CONFIG"
            )


def check_layout(folder: Path, manifest: Manifest, layout: Layout, dtype: Dtype) -> None:
    """Raises UnusableInput when the shards are cut for other ranks or in another dtype than this launch wants."""
    if (manifest.layout, manifest.dtype) != (layout, dtype):
        raise UnusableInput(
            f"{folder}: prepared for {manifest.layout} in {manifest.dtype}, but this launch is {layout} in {dtype}; "
            "make shards for it with: tracestill prepare CONFIG --output ANOTHER_FOLDER"
        )


def check_source(folder: Path, manifest: Manifest, model: Path) -> None:
    """Raises UnusableInput when the checkpoint in `model` is plainly another than the one that was prepared: sizes of all its
    files, hashes of the small ones. Where it is gone from this machine there is nothing to compare."""
    for name, expected in manifest.source.files.items():
        path = model / name
        if path.is_file() and (
            path.stat().st_size != expected.num_bytes or (name in IDENTITY and sha256_of(path) != expected.sha256)
        ):
            raise UnusableInput(
                f"{folder}: prepared from another checkpoint than teacher.model {model} ({name} differs); "
                "prepare it again with: tracestill prepare CONFIG"
            )


def fingerprint_of(hashes: Mapping[str, str]) -> str:
    """Hex digest (16 characters) over file names and their sha256, of the files that decide what a model answers."""
    digest = hashlib.sha256()
    for name in sorted(hashes):
        digest.update(f"{name}:{hashes[name]};".encode())
    return digest.hexdigest()[:16]
