"""tracestill prepare: a checkpoint becomes the shards of every rank of one layout, once.

Source tensors stream through memory a few rows at a time and are appended to the files of all ranks that hold them, so the
memory it takes does not grow with the model. Each file is committed by a record of its own; a killed run goes on with the
files that have none. The manifest comes last, and without it there are no shards for any reader.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from configs.errors import UnusableInput
from configs.progress import Count, Report
from data.store import code_revision, read_json, sha256_file, versions, write_bytes, write_json
from teacher.checkpoint.files import Checkpoint
from teacher.checkpoint.manifest import FORMAT, MANIFEST, Dtype, FileSum, Manifest, Source, as_json, is_prepared, read_manifest
from teacher.checkpoint.partition import Layout, Part
from teacher.checkpoint.shard_plan import SHARDS, Piece, ShardFile, ShardPlan, plan_shards
from teacher.checkpoint.shards import ShardWriter
from teacher.checkpoint.source import check_unchanged, describe_source
from teacher.folders import IDENTITY, read_config_json

RECORDS, LOCK = ".done", ".lock"
COMPANIONS = (
    *IDENTITY,
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""What an engine reads of a checkpoint beside its weights."""


class Prepared(NamedTuple):
    """What a run of prepare did. written: files made now; 0 when all were there already."""

    folder: Path
    manifest: Manifest
    written: int


def prepare(folder: Path, output: Path, layout: Layout, dtype: Dtype, report: Report = lambda count: None) -> Prepared:
    """Shards of the checkpoint in `folder` stand in `output`, sealed. Nothing is done where they already do; after a kill it
    goes on with the first file that was not committed. Finished shards of anything else are never overwritten.

    Raises:
        UnusableInput: an unusable checkpoint, finished shards of another checkpoint or layout in `output`, no room, or another
            prepare at work.
    """
    plan = plan_shards(folder, layout, dtype)
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        _check_purpose(output, plan)
        source = describe_source(folder, output, report)
        if (manifest := _readable_manifest(output)) is not None:
            _check_same_source(output, manifest, source)
            if _is_whole(output, manifest):
                return Prepared(output, manifest, written=0)
        (output / MANIFEST).unlink(missing_ok=True)
        return _write_all(plan, source, output, report)


def _write_all(plan: ShardPlan, source: Source, output: Path, report: Report) -> Prepared:
    identity = _identity(plan, source)
    _make_folders(output, plan)
    sums = {file.name: found for file in plan.files if (found := _committed(output, file, identity)) is not None}
    _check_room(output, sum(file.num_bytes for file in plan.files if file.name not in sums))
    already, done = len(sums), sum(found.num_bytes for found in sums.values())
    for unit in dict.fromkeys(file.unit for file in plan.files):
        missing = [file for file in plan.files if file.unit == unit and file.name not in sums]
        for name, found in _write_unit(plan.checkpoint, missing, output, identity):
            sums[name] = found
            done += found.num_bytes
            report(Count(done >> 20, plan.num_bytes >> 20, name))
    check_unchanged(plan.checkpoint.folder, output)
    manifest = Manifest(
        source=source, model_type=plan.model_type, layout=plan.layout, dtype=plan.dtype, files=sums, ranks=plan.ranks,
        cuts={target.name: target.cut for target in plan.targets}, companions=_copy_companions(plan.checkpoint.folder, output),
        code_revision=code_revision(), versions=versions(),
    )  # fmt: skip
    write_json(output / MANIFEST, as_json(manifest))
    return Prepared(output, manifest, written=len(sums) - already)


# --- one unit ------------------------------------------------------------------------------------------------------


def _write_unit(checkpoint: Checkpoint, files: Sequence[ShardFile], output: Path, identity: str) -> Iterator[tuple[str, FileSum]]:
    """Each source row of the unit is read once and goes to all files that hold some of it."""
    if not files:
        return
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(ShardWriter(output / file.name, [piece.stored for piece in file.pieces])) for file in files
        ]
        for pieces in zip(*(file.pieces for file in files), strict=True):  # the same target in every file
            _stream(checkpoint, pieces, writers)
        for file, writer in zip(files, writers, strict=True):
            found = writer.commit()
            write_json(_record(output, file), {"identity": identity, "num_bytes": found.num_bytes, "sha256": found.sha256})
            yield file.name, found


def _stream(checkpoint: Checkpoint, pieces: Sequence[Piece], writers: Sequence[ShardWriter]) -> None:
    """Appends one target to every file: the part that each wants, then ZeRO's padding, which is zeros here."""
    target, dtype = pieces[0].target, pieces[0].stored.dtype
    row = 0
    for rows in target.sources:
        height = rows.last - rows.first
        if any(row < part.row_end and part.row < row + height for _, part, _ in pieces):
            for chunk_RC in checkpoint.read(rows, dtype):
                _append(chunk_RC, row, pieces, writers)
                row += len(chunk_RC)
        else:
            row += height
    for (_, part, stored), writer in zip(pieces, writers, strict=True):
        writer.append(torch.zeros(stored.num_bytes // dtype.itemsize - (part.last - part.first), dtype=dtype))


def _append(chunk_RC: Tensor, row: int, pieces: Sequence[Piece], writers: Sequence[ShardWriter]) -> None:
    for (_, part, _), writer in zip(pieces, writers, strict=True):
        if (wanted := cut_chunk(chunk_RC, row, part)) is not None:
            writer.append(wanted)


def cut_chunk(chunk_RC: Tensor, first_row: int, part: Part) -> Tensor | None:
    """What `part` takes of a chunk whose first row is row `first_row` of the target: flat, or None when nothing."""
    top, bottom = max(first_row, part.row), min(first_row + len(chunk_RC), part.row_end)
    if top >= bottom:
        return None
    block = chunk_RC[top - first_row : bottom - first_row, part.column : part.column_end].reshape(-1)
    start = (top - part.row) * (part.column_end - part.column)
    taken = block[max(0, part.first - start) : max(0, part.last - start)]
    return taken if len(taken) else None


# --- what is already there -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    with (output / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UnusableInput(f"{output}: another tracestill prepare is writing there; wait for it") from error
        yield


def _check_purpose(output: Path, plan: ShardPlan) -> None:
    if (found := _readable_manifest(output)) is not None and (found.layout, found.dtype) != (plan.layout, plan.dtype):
        raise UnusableInput(
            f"{output}: holds shards for {found.layout} in {found.dtype}, not {plan.layout} in {plan.dtype}; "
            "give another folder: tracestill prepare CONFIG --output FOLDER"
        )


def _check_same_source(output: Path, manifest: Manifest, source: Source) -> None:
    """A checkpoint of a terabyte is not replaced because of a slip in --output."""
    if manifest.source.files != source.files:
        raise UnusableInput(
            f"{output}: holds finished shards of another checkpoint ({manifest.source.folder}, {manifest.source.fingerprint}; "
            f"asked for {source.folder}, {source.fingerprint}); give another --output, or delete {output / MANIFEST} to "
            "replace them"
        )


def _readable_manifest(output: Path) -> Manifest | None:
    """None for a missing, damaged or older one: preparing again is the remedy for all three."""
    try:
        return read_manifest(output) if is_prepared(output) else None
    except UnusableInput:
        return None


def _make_folders(output: Path, plan: ShardPlan) -> None:
    """Both stand; what a killed run left behind, or one for another layout, is gone."""
    for name in (SHARDS, RECORDS):
        (output / name).mkdir(exist_ok=True)
    for stale in (output / SHARDS).glob(".*.tmp"):  # nobody else is at work here
        stale.unlink()
    planned = {Path(file.name).stem for file in plan.files}
    for record in (output / RECORDS).glob("*.json"):
        if record.stem not in planned:
            (output / SHARDS / f"{record.stem}.safetensors").unlink(missing_ok=True)
            record.unlink()


def _identity(plan: ShardPlan, source: Source) -> str:
    """Of what a committed file is made; a record with another one does not count."""
    said = [FORMAT, dataclasses.asdict(plan.layout), plan.dtype, {name: found.sha256 for name, found in source.files.items()}]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _record(output: Path, file: ShardFile) -> Path:
    return output / RECORDS / f"{Path(file.name).stem}.json"


def _committed(output: Path, file: ShardFile, identity: str) -> FileSum | None:
    record, path = _record(output, file), output / file.name
    if not record.is_file() or not path.is_file():
        return None
    said = read_json(record)
    if said.get("identity") != identity or path.stat().st_size != said.get("num_bytes"):
        return None
    return FileSum(said["num_bytes"], said["sha256"])


def _is_whole(output: Path, manifest: Manifest) -> bool:
    """By sizes; hashes of the shards are checked by every rank that loads them."""
    files = {**manifest.files, **manifest.companions}
    return all((output / name).is_file() and (output / name).stat().st_size == found.num_bytes for name, found in files.items())


def _check_room(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output).free
    if needed > free:
        raise UnusableInput(f"{output}: needs {_size(needed)}, {_size(free)} are free; make room or give another --output")


def _copy_companions(folder: Path, output: Path) -> dict[str, FileSum]:
    """Tokenizer and template as they are; config.json without its quantisation, for these weights have none."""
    for name in COMPANIONS:
        if (folder / name).is_file() and name != "config.json":
            write_bytes(output / name, (folder / name).read_bytes())
    config = read_config_json(folder)
    config.pop("quantization_config", None)
    write_json(output / "config.json", config)
    found = [output / name for name in COMPANIONS if (output / name).is_file()]
    return {path.name: FileSum(path.stat().st_size, sha256_file(path)) for path in found}


# --- what the command says -----------------------------------------------------------------------------------------


class Said(NamedTuple):
    """The same for people and for programs."""

    text: str
    values: dict[str, object]


def describe_plan(plan: ShardPlan, output: Path) -> Said:
    """A dry run: what would be written where."""
    ranks = plan.bytes_per_rank
    text = (
        f"prepare   {plan.checkpoint.folder} -> {output}\n"
        f"          {plan.layout} in {plan.dtype}: {len(plan.files)} files, {_size(plan.num_bytes)}; "
        f"a rank reads {_size(max(ranks))} at most"
    )
    if plan.ignored:
        text += f"\n          not in the model and left out: {len(plan.ignored)} tensors, such as {plan.ignored[0]}"
    return Said(text, {"output": str(output), "files": len(plan.files), "bytes": plan.num_bytes, "bytes_per_rank": ranks})


def describe_prepared(done: Prepared) -> Said:
    manifest = done.manifest
    num_bytes = sum(found.num_bytes for found in manifest.files.values())
    how = f"{done.written} of {len(manifest.files)} files written" if done.written else "already there, nothing to do"
    text = (
        f"prepare   {manifest.layout} in {manifest.dtype}: {_size(num_bytes)}, {how}\n"
        f"          load them with -s teacher.engine.prepared={done.folder}"
    )
    values: dict[str, object] = {
        "output": str(done.folder), "files": len(manifest.files), "bytes": num_bytes, "written": done.written,
        "fingerprint": manifest.source.fingerprint, "revision": manifest.source.revision,
    }  # fmt: skip
    return Said(text, values)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
