"""Prompts from a folder that Hugging Face `datasets` saved."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pyarrow as pa

from configs.errors import UnusableInput
from configs.prompt_sources import DatasetsSource
from generate.control_tokens import ControlTokens
from generate.sources.parquet import ROWS_AT_ONCE, column_row, require_json_text
from generate.sources.paths import find_folder
from generate.sources.rows import Candidate, Row, Side, select

if TYPE_CHECKING:
    from datasets import Dataset


def read_datasets(
    source: DatasetsSource, side: Side, folders: Sequence[Path], left_out: Counter[str], control: ControlTokens
) -> Iterator[Candidate]:
    """The prompts of one side, ROWS_AT_ONCE rows in memory at a time. Raises UnusableInput naming folder and row."""
    folder = find_folder(source.path, folders, "datasets folder")
    return select(source, folder.name, side, folders, left_out, control, lambda: dataset_rows(folder, source.split_name))


def dataset_rows(folder: Path, split_name: str | None) -> Iterator[Row]:
    """The rows of a saved dataset, counted from 1."""
    dataset, number = open_dataset(folder, split_name), 0
    require_json_text(dataset.data.schema, folder.name)
    try:
        for start in range(0, len(dataset), ROWS_AT_ONCE):
            table = dataset.with_format("arrow")[start : start + ROWS_AT_ONCE]
            for values in cast(pa.Table, table).to_pylist():
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
            known = ", ".join(map(str, found))
            raise UnusableInput(f"datasets folder {folder.name}: {asked}; expected split_name to be one of {known}")
        found = found[split_name]
    elif split_name is not None:
        raise UnusableInput(f"datasets folder {folder.name}: it holds a single dataset, not splits; leave out split_name")
    _require_all_rows(found, folder)
    return found


_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def _require_all_rows(dataset: "Dataset", folder: Path) -> None:
    """An Arrow stream cut between two batches reads short without an error; only its end mark is missing. (The counts in
    dataset_info.json do not tell: those of a dataset that was filtered before it was saved are the unfiltered one's.)"""
    for part in dataset.cache_files:
        path = Path(part["filename"])
        if _last_bytes(path, len(_END_OF_STREAM)) != _END_OF_STREAM:
            raise UnusableInput(f"datasets folder {folder.name}: {path.name} is cut short; copy the folder again")


def _last_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - count))
        return file.read()
