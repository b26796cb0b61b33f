"""The run folder and its commit protocol: whatever has its final name is whole, hashed and on disk.

Everything is written under a temporary name, fsynced, and only then linked or renamed to its final name; the folder is
fsynced last. A segment is an immutable Arrow IPC file plus a sidecar manifest, and the sidecar is the commit: a data
file without one does not exist for any reader. A finished stage seals a roll-up, manifest.json, that names the hash of
every file it made and of every manifest it read; a stage whose roll-up matches its inputs has nothing to do.

No torch here: planning, status and Slurm read run folders too.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from configs.errors import UnusableInput
from data.checksum import checked_json, parse_checked
from data.columns import words_of
from data.copies import counting_rows, segment_keys
from data.schema import SCHEMA_VERSION, check_version, is_outdated, schema_hash, upgraded

ROLLUP = "manifest.json"
_VERSIONED = ("torch", "transformers", "deepspeed", "datasets", "peft", "accelerate", "pyarrow", "reasoning-gym", "math-verify")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The places of a run, by name. Creates nothing."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts"

    @property
    def traces(self) -> Path:
        return self.root / "traces"

    @property
    def logits(self) -> Path:
        return self.root / "logits"

    @property
    def verdicts(self) -> Path:
        return self.root / "verdicts"

    @property
    def dataset(self) -> Path:
        return self.root / "dataset"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def headroom(self) -> Path:
        return self.root / "headroom"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def logs(self) -> Path:
        return self.root / "logs"


# --- files -------------------------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes, *, replace: bool = True) -> None:
    """`path` holds `content`, whole and durable, or is untouched. With replace=False an existing file wins and
    FileExistsError is raised (link, not rename: two writers cannot both succeed)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            _link(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names none
        raise
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # Over NFS a retransmitted link says EEXIST of the link it has just made.
        if not (path.exists() and path.samefile(temporary)):
            raise


def write_json(path: Path, value: object, *, replace: bool = True) -> None:
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(), replace=replace)


def read_json(path: Path) -> dict:
    """Raises UnusableInput when the file is missing or not a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UnusableInput(f"{path}: no such file; run the stage that makes it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnusableInput(f"{path}: not valid JSON ({error}); restore it or run its stage in another --run-dir") from error
    if not isinstance(value, dict):
        raise UnusableInput(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def table_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_table(path: Path, *, sha256: str) -> pa.Table:
    """The table in `path`, verified before it is parsed; of a record of an earlier version, under the current schema. Raises
    UnusableInput when the hash differs."""
    return upgraded(_read_as_written(path, sha256))


def _read_as_written(path: Path, sha256: str) -> pa.Table:
    if not path.is_file():
        raise UnusableInput(f"{path}: missing, though its manifest names it; restore it, or run its stage again")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UnusableInput(
            f"{path}: sha256 {found[:12]}, expected {sha256[:12]}: the file changed after it was committed; "
            "restore it from a backup, or delete it with its manifest and run its stage again"
        )
    return pa.ipc.open_file(pa.BufferReader(content)).read_all()


# --- provenance --------------------------------------------------------------------------------------------------


@functools.cache
def code_revision() -> str:
    """Git revision of this source tree (with `+changes` when edited), or the version when it is not a checkout."""
    here = Path(__file__).parent
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        edited = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        ).stdout
        return revision + ("+changes" if edited.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unversioned"


@functools.cache
def versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# --- segments ----------------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """A committed segment: its data file and what its sidecar says."""

    path: Path
    rows: int
    sha256: str
    schema_hash: str
    facts: dict
    """Stage-specific: for traces `trace_ids`, `finish_reasons` and `tasks` as columns (data/columns.py), and numbers."""


def commit_segment(folder: Path, table: pa.Table, *, worker: str, facts: Mapping[str, object]) -> Segment:
    """`table` is durable under a new name in `folder`. Names sort by commit time, then worker: the total order of the log."""
    stem = f"{time.time_ns():020d}-{worker}-{uuid.uuid4().hex[:8]}"
    content = table_bytes(table)
    data = folder / f"{stem}.arrow"
    write_bytes(data, content, replace=False)
    sidecar = {
        "schema_version": SCHEMA_VERSION,
        "rows": table.num_rows,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "schema_hash": schema_hash(table.schema),
        "code_revision": code_revision(),
        "versions": versions(),
        "facts": dict(facts),
    }
    write_bytes(data.with_suffix(".json"), checked_json(sidecar), replace=False)
    return _segment(data, sidecar)


def _segment(data: Path, sidecar: dict) -> Segment:
    try:
        return Segment(data, sidecar["rows"], sidecar["sha256"], sidecar["schema_hash"], sidecar["facts"])
    except KeyError as error:
        raise UnusableInput(f"segment {data.stem}: its manifest has no {error}; restore it from a backup") from error


def segments(folder: Path) -> list[Segment]:
    """The committed segments in log order, from their sidecars alone: of a sealed stage those that its roll-up names, whatever
    a worker that was stopped in the meantime has added since. Raises UnusableInput for one without its data."""
    committed, rollup = SegmentLog(folder).look(), read_rollup(folder)
    if rollup is None:
        return list(committed)
    sealed = {Path(path).name for path in rollup.files}
    return [segment for segment in committed if segment.path.name in sealed]


class SegmentLog:
    """A folder of segments that grows while it is read: each look gives those that were committed since the last."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._seen = folder, {ROLLUP}

    def look(self) -> Iterator[Segment]:
        """In log order, each read when it is asked for: the sidecars of a million traces are 70 MB. Raises UnusableInput for a
        segment without its data, or of a version that this release does not read."""
        try:
            names = set(os.listdir(self.folder))  # noqa: PTH208  (one listing for both files of a segment)
        except FileNotFoundError:
            return
        for name in sorted(name for name in names - self._seen if name.endswith(".json") and not name.startswith(".")):
            self._seen.add(name)
            yield self._read(self.folder / name, names)

    def _read(self, path: Path, names: set[str]) -> Segment:
        sidecar, data = _read_manifest(path, f"segment {path.stem}"), path.with_suffix(".arrow")
        if data.name not in names and not data.is_file():  # a listing is not of one moment
            raise UnusableInput(
                f"segment {path.stem}: {data.name} is missing beside its manifest; "
                "restore it, or delete the manifest and generate again"
            )
        return _segment(data, sidecar)


def _read_manifest(path: Path, what: str) -> dict:
    """What a manifest or sidecar says. Raises UnusableInput when it is damaged, or of a version that this release does not
    read; manifests of version 1 had no checksum."""
    content = path.read_bytes()
    try:
        value = parse_checked(path, content)
    except UnusableInput:
        if (value := _of_version_1(content)) is None:
            raise
    check_version(what, value.get("schema_version"), value.get("code_revision"))
    return value


def _of_version_1(content: bytes) -> dict | None:
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) and value.get("schema_version") == 1 and "checksum" not in value else None


def read_segment(segment: Segment) -> pa.Table:
    """The rows of one segment under the current schema, whichever readable version wrote them. Verified first: hash, row count,
    schema, and that the sidecar speaks of these very rows.

    The sidecar has no hash of its own, and the ledger believes it; a bit flipped in there shows here.
    """
    table = _read_as_written(segment.path, segment.sha256)
    if table.num_rows != segment.rows or schema_hash(table.schema) != segment.schema_hash:
        raise UnusableInput(
            f"segment {segment.path.stem}: {table.num_rows} rows, expected {segment.rows} by its manifest; "
            "restore it from a backup"
        )
    for fact, column in (("trace_ids", "trace_id"), ("finish_reasons", "finish_reason")):
        if fact in segment.facts and not _agrees(segment.facts[fact], table[column].to_pylist()):
            raise UnusableInput(
                f"segment {segment.path.stem}: {fact} of its manifest are not those of its rows; "
                f"restore {segment.path.stem}.json from a backup"
            )
    return upgraded(table)


def _agrees(column: object, words: list[str]) -> bool:
    try:
        return words_of(column) == words  # type: ignore[arg-type]
    except ValueError:
        return False


def read_first_copies(folder: Path, key: str = "trace_id") -> Iterator[pa.Table]:
    """Tables of the log in order, each row's first copy only: two workers may finish the same request, and one copy counts
    for every reader. Of traces, whose sidecars know how they ended, that is the one of data/copies.py."""
    committed = segments(folder)
    if key == "trace_id" and all("trace_ids" in segment.facts for segment in committed):
        counts_N, start = counting_rows(*segment_keys(committed)), 0
        for segment in committed:
            keep, start = counts_N[start : start + segment.rows], start + segment.rows
            table = read_segment(segment)
            yield table if keep.all() else table.filter(pa.array(keep))
        return
    seen: set[str] = set()
    for segment in committed:
        table = read_segment(segment)
        keep = []
        for identity in table.column(key).to_pylist():
            keep.append(identity not in seen)
            seen.add(identity)
        yield table if all(keep) else table.filter(pa.array(keep))


# --- roll-ups ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rollup:
    """What a finished stage says of itself. inputs and files map a path relative to the run folder to its sha256."""

    stage: str
    fingerprint: str
    inputs: dict[str, str]
    files: dict[str, str]
    sizes: dict[str, int]
    counts: dict[str, object]
    seconds: float
    created_at: float
    code_revision: str
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION


def input_hashes(run: RunFolder, inputs: Sequence[Path]) -> dict[str, str]:
    """Path (relative to the run where it lies inside it) -> sha256 of every input manifest or file."""
    return {_relative(run, path): sha256_file(path) for path in inputs}


def _relative(run: RunFolder, path: Path) -> str:
    return str(path.relative_to(run.root)) if path.is_relative_to(run.root) else path.name


def seal(
    run: RunFolder, folder: Path, *, stage: str, fingerprint: str, inputs: Mapping[str, str], files: Sequence[Path],
    counts: Mapping[str, object], seconds: float,
) -> Rollup:  # fmt: skip
    """The stage is complete: its roll-up stands in `folder`, the last file to appear there."""
    hashes = {_relative(run, path): sha256_file(path) for path in files}
    sizes = {_relative(run, path): path.stat().st_size for path in files}
    rollup = Rollup(
        stage, fingerprint, dict(inputs), hashes, sizes, dict(counts), round(seconds, 3), time.time(), code_revision(), versions()
    )
    write_bytes(folder / ROLLUP, checked_json(dataclasses.asdict(rollup), indent=1))
    return rollup


def read_rollup(folder: Path) -> Rollup | None:
    """The stage's roll-up, or None when the stage has not finished. Raises UnusableInput when it is damaged, or of a version
    that this release does not read."""
    path = folder / ROLLUP
    if not path.is_file():
        return None
    value = _read_manifest(path, str(path))
    for field in dataclasses.fields(Rollup):
        kind = _JSON_KINDS.get(field.name, dict)
        if not isinstance(value.get(field.name), kind):
            raise UnusableInput(
                f"{path}: {field.name} is missing or damaged; restore the manifest, or delete it and run its stage again"
            )
    return Rollup(**{field.name: value[field.name] for field in dataclasses.fields(Rollup)})


_NUMBER = (int, float)
_JSON_KINDS: dict[str, type | tuple[type, ...]] = {
    "stage": str,
    "fingerprint": str,
    "code_revision": str,
    "seconds": _NUMBER,
    "created_at": _NUMBER,
    "schema_version": int,
}


def is_complete(run: RunFolder, folder: Path, *, fingerprint: str, inputs: Mapping[str, str]) -> bool:
    """True when the roll-up was made by this configuration from these inputs, and every file of it is there at its size and
    need not be made again for being of an old version.

    Hashes of the files are checked by whoever reads them; here a stage that made a terabyte must answer at once.
    """
    rollup = read_rollup(folder)
    if rollup is None or rollup.fingerprint != fingerprint or rollup.inputs != dict(inputs):
        return False
    if is_outdated(rollup.stage, rollup.schema_version):
        return False
    return all((run.root / path).is_file() and (run.root / path).stat().st_size == size for path, size in rollup.sizes.items())


def verify_files(run: RunFolder, rollup: Rollup) -> None:
    """Raises UnusableInput naming the first file whose bytes are not the ones the stage sealed."""
    for path, expected in rollup.files.items():
        file = run.root / path
        if not file.is_file():
            raise UnusableInput(f"{file}: missing, though the {rollup.stage} stage sealed it; {_remedy(run, path)}")
        if (found := sha256_file(file)) != expected:
            raise UnusableInput(
                f"{file}: sha256 {found[:12]}, expected {expected[:12]} by the {rollup.stage} stage; {_remedy(run, path)}"
            )


def _remedy(run: RunFolder, path: str) -> str:
    """How to get a sealed file back. A damaged segment has to go with its sidecar, or it would be taken for committed."""
    folder = Path(path).parts[0]
    if path.startswith(f"{run.verdicts.name}/replies/"):
        stem = (run.root / path).with_suffix("")
        return (
            f"restore it, or delete {stem}.arrow and .json with {run.dataset / ROLLUP} and run tracestill data build again: "
            "what it holds is asked, and paid for, once more"
        )
    if (run.root / folder) == run.traces:
        stem = (run.root / path).with_suffix("")
        return f"restore it, or delete {stem}.arrow and .json with {run.traces / ROLLUP} and run tracestill generate again"
    if (run.root / folder) == run.metrics:
        return (
            f"restore it, or delete it with {run.traces / ROLLUP} and run tracestill generate again: it is made of the segments"
        )
    if (run.root / folder) in (run.verdicts, run.dataset):
        return f"restore it, or delete {run.dataset / ROLLUP} and run tracestill data build again: it is made of the traces"
    return f"restore it, or delete {run.root / folder / ROLLUP} and run the stage again"
