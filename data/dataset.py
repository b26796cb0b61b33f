"""The dataset of a run in the layout of `datasets.load_from_disk`, put in place whole and verified before it is read.

Arrow and `datasets` do not notice damage: a truncated save_to_disk folder read back 3,500 of 5,000 rows without an
error. Reading therefore starts with the sha256 of every file in the roll-up.

    dataset/dataset_dict.json, {train,validation}/{data-*.arrow,dataset_info.json,state.json}     datasets.load_from_disk
    dataset/parquet/{train,validation}-*.parquet                                                  any reader of Parquet
    dataset/README.md                                                                             the dataset card
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from configs.errors import UnusableInput
from configs.progress import Count, Report
from data.processes import map_unordered
from data.relabel import Relabelling
from data.shards import ROW, Shard, Spill, Written, assemble, fsync_file, num_shards, spill
from data.store import ROLLUP, RunFolder, Segment, fsync_folder, read_rollup, verify_files

if TYPE_CHECKING:
    from datasets import DatasetDict

SPLITS = ("train", "validation")
PARQUET = "parquet"
INLINE_BYTES = 16 << 20
"""So little text is written by this process: a worker takes a second to start."""
SPILLED_SEGMENTS = 64
"""Segments whose rows one worker spills into one set of files."""


def save_dataset(
    run: RunFolder,
    committed: Sequence[Segment],
    places: Sequence[np.ndarray],
    text_bytes: Mapping[str, int],
    *,
    relabels: Sequence[np.ndarray],
    relabelling: Relabelling,
    card: str,
    parquet: bool,
    num_workers: int,
    tell: Report,
) -> list[Path]:
    """run.dataset holds exactly the placed rows when this returns, every byte on disk; its files, for the roll-up.

    places: for each segment, int8 a completed row: position in SPLITS, or -1. relabels: likewise int16, position in
    relabelling.grades, or -1. text_bytes: of the rows of each split; it decides
    the number of shards. The same rows give the same bytes. Written beside its place and renamed: whoever is killed here leaves
    either the old folder, or none, or the new one, and a leftover that the next call removes.
    """
    with _replacing(run) as fresh:
        shards = _shards(fresh, text_bytes, parquet=parquet)
        written = _fill(_spills(shards, committed, places, relabels, relabelling), shards, text_bytes, num_workers, tell)
        _describe(fresh, written)
        (fresh / "README.md").write_text(card)
        for path in [path for path in fresh.rglob("*") if path.suffix in (".json", ".md")]:
            fsync_file(path)
        for folder, _, _ in os.walk(fresh, topdown=False):
            fsync_folder(Path(folder))
    return dataset_files(run)


@contextmanager
def _replacing(run: RunFolder) -> Iterator[Path]:
    """A new folder that takes the place of the dataset, its roll-up included, when everything in it is written."""
    run.root.mkdir(parents=True, exist_ok=True)
    for leftover in run.root.glob(f".{run.dataset.name}.*.tmp"):
        shutil.rmtree(leftover)
    fresh, old = (run.root / f".{run.dataset.name}.{uuid.uuid4().hex}.tmp" for _ in range(2))
    fresh.mkdir()
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)  # on a full disk, room for whoever makes some
        raise
    if run.dataset.exists():
        run.dataset.rename(old)  # POSIX renames onto an empty folder only
    fresh.rename(run.dataset)
    fsync_folder(run.root)
    shutil.rmtree(old, ignore_errors=True)


def _shards(fresh: Path, text_bytes: Mapping[str, int], *, parquet: bool) -> list[Shard]:
    """Every file that there will be; a split without rows has an empty one, or `datasets` 5.2 could not load it (IndexError)."""
    spilled = fresh / "spilled"
    spilled.mkdir()
    shards = []
    for split in SPLITS:
        (fresh / split).mkdir()
        of = num_shards(text_bytes[split])
        for number in range(of):
            name = f"{number:05d}-of-{of:05d}"
            other = fresh / PARQUET / f"{split}-{name}.parquet" if parquet else None
            shards.append(Shard(split, number, of, spilled, fresh / split / f"data-{name}.arrow", other))
    if parquet:
        (fresh / PARQUET).mkdir()
    return shards


def _spills(
    shards: Sequence[Shard],
    committed: Sequence[Segment],
    places: Sequence[np.ndarray],
    relabels: Sequence[np.ndarray],
    relabelling: Relabelling,
) -> list[Spill]:
    of = tuple(max(shard.of for shard in shards if shard.split == split) for split in SPLITS)
    cuts = [slice(start, start + SPILLED_SEGMENTS) for start in range(0, len(committed), SPILLED_SEGMENTS)]
    return [
        Spill(number, tuple(committed[cut]), tuple(places[cut]), tuple(relabels[cut]), relabelling, SPLITS, of, shards[0].spilled)
        for number, cut in enumerate(cuts)
    ]


def _fill(
    spills: Sequence[Spill], shards: Sequence[Shard], text_bytes: Mapping[str, int], num_workers: int, tell: Report
) -> list[Written]:
    """Two passes over workers: out of the log, into the shards."""
    num_workers = 0 if sum(text_bytes.values()) < INLINE_BYTES else num_workers
    total, done = len(spills) + len(shards), 0
    for _ in map_unordered(spill, spills, num_workers=num_workers):
        tell(Count(done := done + 1, total, "writing dataset", unit="files"))
    written = []
    for one in map_unordered(assemble, shards, num_workers=num_workers):
        written.append(one)
        tell(Count(done := done + 1, total, "writing dataset", unit="files"))
    shards[0].spilled.rmdir()
    return sorted(written, key=lambda one: (one.shard.split, one.shard.number))


def _describe(fresh: Path, written: Sequence[Written]) -> None:
    """The JSON files beside the shards, as `datasets` 5.2 writes them, except that the fingerprint, by which it keys its caches,
    is a hash of the rows: left alone it is drawn at random, and identities alone would serve a stale tokenisation."""
    _write_json(fresh / "dataset_dict.json", {"splits": list(SPLITS)})
    for split in SPLITS:
        shards = [one for one in written if one.shard.split == split]
        info = {"citation": "", "description": "", "features": features(ROW), "homepage": "", "license": ""}
        state = {
            "_data_files": [{"filename": one.shard.arrow.name} for one in shards],
            "_fingerprint": hashlib.sha256(" ".join(one.sha256 for one in shards).encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        _write_json(fresh / split / "dataset_info.json", info)
        _write_json(fresh / split / "state.json", state)


def features(schema: pa.Schema) -> dict[str, object]:
    """The schema in the JSON of `datasets.Features`, without its import of a second and 100 MB."""
    return {field.name: _feature(field.type) for field in schema}


def _feature(kind: pa.DataType) -> dict[str, object]:
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    name = {"double": "float64", "float": "float32"}.get(str(kind), str(kind))
    return {"dtype": name, "_type": "Value"}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2))


def dataset_files(run: RunFolder) -> list[Path]:
    """Every file of the dataset except its roll-up, in a fixed order."""
    return sorted(path for path in run.dataset.rglob("*") if path.is_file() and path != run.dataset / ROLLUP)


def load_dataset(run: RunFolder) -> "DatasetDict":
    """The sealed dataset (`train`, `validation`), memory-mapped, every file's hash checked first.

    Raises:
        UnusableInput: not built yet, a file changed or cut short, or rows that do not match the manifest's count.
    """
    from datasets import DatasetDict

    rollup = read_rollup(run.dataset)
    if rollup is None:
        raise UnusableInput(f"{run.dataset}: no dataset yet; run: tracestill data build")
    verify_files(run, rollup)
    loaded = DatasetDict.load_from_disk(run.dataset)
    for split, rows in loaded.items():
        if (expected := rollup.counts.get(f"{split}_rows")) != len(rows):
            raise UnusableInput(
                f"{run.dataset}/{split}: {len(rows)} rows, expected {expected} by its manifest; run tracestill data build again"
            )
    return loaded
