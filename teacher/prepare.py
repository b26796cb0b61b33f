"""tracestill prepare: a checkpoint becomes the shards of every rank of one layout, once.

Source tensors stream through memory a few rows at a time and are appended to the files of all ranks that hold them, so the
memory it takes does not grow with the model. Each file is committed by a record of its own; a killed run goes on with the
files that have none. The manifest comes last, and without it there are no shards for any reader.
"""

import contextlib
import dataclasses
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
from teacher.checkpoint.manifest import (
    COMPANIONS,
    FORMAT,
    MANIFEST,
    Dtype,
    FileSum,
    Manifest,
    Source,
    as_json,
    check_companions,
    readable_manifest,
)
from teacher.checkpoint.output import RECORDS, check_output, held_alone
from teacher.checkpoint.partition import Layout, Part
from teacher.checkpoint.shard_plan import SHARDS, Piece, ShardFile, ShardPlan, plan_shards
from teacher.checkpoint.shards import ShardWriter, label_of
from teacher.checkpoint.source import check_unchanged, describe_source
from teacher.folders import read_config_json


class Prepared(NamedTuple):
    """What a run of prepare did. written: shard files made now. is_new: the manifest is of now; where it is not, all was there
    already."""

    folder: Path
    manifest: Manifest
    written: int
    is_new: bool = True


def prepare(folder: Path, output: Path, layout: Layout, dtype: Dtype, report: Report = lambda count: None) -> Prepared:
    """Shards of the checkpoint in `folder` stand in `output`, sealed. Nothing is done where they already do; after a kill it
    goes on with the first file that was not committed. Finished shards of anything else are never overwritten, nor is any file
    that prepare did not make.

    Raises:
        UnusableInput: an unusable checkpoint, an `output` that check_output refuses or that holds finished shards of another
            checkpoint or layout, no room, or another prepare at work.
    """
    check_output(output, folder)
    plan = plan_shards(folder, layout, dtype)
    _check_purpose(output, plan)
    with held_alone(output):
        _check_purpose(output, plan)  # again: another one may have finished in the meantime
        source = describe_source(folder, output, report)
        if (manifest := readable_manifest(output)) is not None:
            _check_same_source(output, manifest, source)
            if _is_whole(output, manifest):
                return Prepared(output, manifest, written=0, is_new=False)
        elif (output / MANIFEST).exists():
            _check_records(output, _identity(plan, source))
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
        for name, found in _write_unit(plan, missing, output, identity):
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


def _write_unit(plan: ShardPlan, files: Sequence[ShardFile], output: Path, identity: str) -> Iterator[tuple[str, FileSum]]:
    """Each source row of the unit is read once and goes to all files that hold some of it."""
    if not files:
        return
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(_writer(plan, file, output)) for file in files]
        for pieces in zip(*(file.pieces for file in files), strict=True):  # the same target in every file
            _stream(plan.checkpoint, pieces, writers)
        for file, writer in zip(files, writers, strict=True):
            found = writer.commit()
            write_json(_record(output, file), {"identity": identity, "num_bytes": found.num_bytes, "sha256": found.sha256})
            yield file.name, found


def _writer(plan: ShardPlan, file: ShardFile, output: Path) -> ShardWriter:
    return ShardWriter(output / file.name, [piece.stored for piece in file.pieces], label_of(plan.layout, file.ranks))


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


def _check_purpose(output: Path, plan: ShardPlan) -> None:
    if (found := readable_manifest(output)) is not None and (found.layout, found.dtype) != (plan.layout, plan.dtype):
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


def _check_records(output: Path, identity: str) -> None:
    """A manifest that cannot be read says no longer whose shards these are; the records of the files do."""
    for path in (output / RECORDS).glob("*.json"):
        if read_json(path).get("identity") != identity:
            raise UnusableInput(
                f"{output}: {MANIFEST} is damaged or of another release, and its shards are of another checkpoint, layout or "
                f"dtype; give another --output, or delete {output / MANIFEST} to replace them"
            )


def _make_folders(output: Path, plan: ShardPlan) -> None:
    """Both stand; what a killed run left behind, or one for another layout, is gone."""
    for name in (RECORDS, SHARDS):  # in this order: output.py takes shards without records for somebody else's
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
    """Companions by their hashes, shards by their sizes: every rank that loads them checks the rest."""
    try:
        check_companions(output, manifest)
    except UnusableInput:
        return False
    files = manifest.files.items()
    return all((output / name).is_file() and (output / name).stat().st_size == found.num_bytes for name, found in files)


def _check_room(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output).free
    if needed > free:
        raise UnusableInput(f"{output}: needs {_size(needed)}, {_size(free)} are free; make room or give another --output")


def _copy_companions(folder: Path, output: Path) -> dict[str, FileSum]:
    """Tokenizer and template as they are; config.json without its quantisation, for these weights have none. What the
    checkpoint no longer has is gone here too: an engine would read it."""
    for name in COMPANIONS:
        if not (folder / name).is_file():
            (output / name).unlink(missing_ok=True)
        elif name != "config.json":
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
    """A dry run: what would be written where. Raises UnusableInput where prepare would, before it has written anything."""
    check_output(output, plan.checkpoint.folder)
    _check_purpose(output, plan)
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
    how = f"{done.written} of {len(manifest.files)} files written" if done.is_new else "already there, nothing to do"
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
