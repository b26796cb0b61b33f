"""Prompts from a folder that Hugging Face `datasets` saved."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from configs.errors import UnusableInput
from configs.prompt_sources import DatasetsSource
from data.records import Prompt
from generate.sources.parquet import ROWS_AT_ONCE, column_row, require_plain_tools
from generate.sources.paths import find_folder
from generate.sources.rows import Row, Side, select

if TYPE_CHECKING:
    from datasets import Dataset


def read_datasets(source: DatasetsSource, side: Side, folders: Sequence[Path], left_out: Counter[str]) -> Iterator[Prompt]:
    """The prompts of one side, ROWS_AT_ONCE rows in memory at a time. Raises UnusableInput naming folder and row."""
    folder = find_folder(source.path, folders, "datasets folder")
    return select(source, folder.name, side, folders, left_out, lambda: dataset_rows(folder, source.split_name))


def dataset_rows(folder: Path, split_name: str | None) -> Iterator[Row]:
    """The rows of a saved dataset, counted from 1."""
    dataset, number = open_dataset(folder, split_name), 0
    require_plain_tools(dataset.data.schema, folder.name)
    try:
        for start in range(0, len(dataset), ROWS_AT_ONCE):
            table = dataset.with_format("arrow")[start : start + ROWS_AT_ONCE]
            assert isinstance(table, pa.Table)
            for values in table.to_pylist():
                number += 1
                yield column_row(values, f"{folder.name} row {number}")
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UnusableInput(f"{folder.name}: not readable after row {number}: {' '.join(str(error).split())}") from error


def open_dataset(folder: Path, split_name: str | None) -> "Dataset":
    """The dataset in `folder`. Raises UnusableInput when it is none, has another split, or lost rows since it was saved."""
    from datasets import DatasetDict, load_from_disk  # 1 s; only when a recipe asks for it

    try:
        found = load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged folder makes of it: missing files, torn JSON, bad Arrow
        raise UnusableInput(
            f"datasets folder {folder.name}: {' '.join(str(error).split())}; expected what save_to_disk writes"
        ) from error
    if isinstance(found, DatasetDict):
        if split_name not in found:
            asked = "no split_name is set" if split_name is None else f"it has no split {split_name!r}"
            raise UnusableInput(f"datasets folder {folder.name}: {asked}; expected split_name to be one of {', '.join(found)}")
        found = found[split_name]
    elif split_name is not None:
        raise UnusableInput(f"datasets folder {folder.name}: it holds a single dataset, not splits; leave out split_name")
    _require_all_rows(found, folder)
    return found


def _require_all_rows(dataset: "Dataset", folder: Path) -> None:
    """A stream cut between two batches reads short without an error; the folder's own count, where it has one, tells."""
    splits = dataset.info.splits or {}
    expected = sum(split.num_examples for name, split in splits.items() if dataset.split is None or name == str(dataset.split))
    if expected and len(dataset) < expected:
        raise UnusableInput(f"datasets folder {folder.name}: {len(dataset)} rows, expected {expected}; copy the folder again")
