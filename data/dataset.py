"""The dataset of a run in the layout of `datasets.load_from_disk`, put in place whole and verified before it is read.

Arrow and `datasets` do not notice damage: a truncated save_to_disk folder read back 3,500 of 5,000 rows without an
error. Reading therefore starts with the sha256 of every file in the roll-up.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from configs.errors import UnusableInput
from data.schema import TRACE
from data.store import ROLLUP, RunFolder, fsync_folder, read_rollup, table_bytes, verify_files

if TYPE_CHECKING:
    from datasets import DatasetDict

SHARD_BYTES = 1 << 30

ROW = pa.schema(
    [
        TRACE.field(name)
        for name in (
            "trace_id", "prompt_id", "task", "messages", "finish_reason", "prompt_tokens", "reasoning_tokens", "answer_tokens",
            "teacher_licence", "source_licence",
        )
    ]
)  # fmt: skip
"""One row a kept trace. messages: the whole conversation, the assistant last, its reasoning in reasoning_content."""


def save_dataset(run: RunFolder, splits: Mapping[str, pa.Table]) -> list[Path]:
    """run.dataset holds exactly `splits` when this returns, every byte on disk; its files, for the roll-up.

    Equal tables give equal bytes. Written beside its place and renamed: whoever is killed here leaves either the old
    folder, or none, or the new one, and a leftover that the next call removes. The old roll-up goes with the old folder.
    """
    run.root.mkdir(parents=True, exist_ok=True)
    for leftover in run.root.glob(f".{run.dataset.name}.*.tmp"):
        shutil.rmtree(leftover)
    fresh, old = (run.root / f".{run.dataset.name}.{uuid.uuid4().hex}.tmp" for _ in range(2))
    _write_splits(splits, fresh)
    for folder, _, files in os.walk(fresh, topdown=False):
        for name in files:
            _fsync_file(Path(folder) / name)
        fsync_folder(Path(folder))
    if run.dataset.exists():
        run.dataset.rename(old)  # POSIX renames onto an empty folder only
    fresh.rename(run.dataset)
    fsync_folder(run.root)
    shutil.rmtree(old, ignore_errors=True)
    return dataset_files(run)


def _write_splits(splits: Mapping[str, pa.Table], folder: Path) -> None:
    from datasets import Dataset, DatasetDict, disable_progress_bars, enable_progress_bars
    from datasets.utils import are_progress_bars_disabled

    # Left alone, `datasets` draws a random fingerprint and writes it into state.json: other bytes every time.
    made = DatasetDict({name: Dataset(_one_chunk(table), fingerprint=_fingerprint(table)) for name, table in splits.items()})
    # The count of shards is given because an empty split otherwise gets none, and then cannot be loaded (5.2: IndexError).
    num_shards: dict = {name: 1 + table.nbytes // SHARD_BYTES for name, table in splits.items()}
    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        made.save_to_disk(folder, num_shards=num_shards)
    finally:
        if not quiet:
            enable_progress_bars()


def _one_chunk(table: pa.Table) -> pa.Table:
    """Chunks become record batches on disk; how the log was cut into segments must not show in the bytes."""
    return pa.Table.from_batches(table.combine_chunks().to_batches(), schema=table.schema)


def _fingerprint(table: pa.Table) -> str:
    """Of the content, because `datasets` keys its caches by it: identities alone would serve a stale tokenisation."""
    return hashlib.sha256(table_bytes(table)).hexdigest()[:16]


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
