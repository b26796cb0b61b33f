"""Prompts from Parquet files: columns are the keys of a row, null is an absent key."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import UnusableInput
from configs.prompt_sources import ParquetSource
from generate.control_tokens import ControlTokens
from generate.sources.paths import find_parts
from generate.sources.rows import Candidate, Row, Side, select, without_nulls

ROWS_AT_ONCE = 64


def read_parquet(
    source: ParquetSource, side: Side, folders: Sequence[Path], left_out: Counter[str], control: ControlTokens
) -> Iterator[Candidate]:
    """The prompts of one side, ROWS_AT_ONCE rows in memory at a time. Raises UnusableInput naming file and row."""
    parts = find_parts(source.path, folders, ".parquet", "prompt file")
    return select(source, Path(source.path).name, side, folders, left_out, control, lambda: parquet_rows(parts))


def parquet_rows(parts: Sequence[Path]) -> Iterator[Row]:
    """The rows of files, in order; counted from 1 in each file. Page checksums are verified where the writer left them."""
    for path in parts:
        number = 0
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                require_json_text(file.schema_arrow, path.name)
                for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                    for values in batch.to_pylist():
                        number += 1
                        yield column_row(values, f"{path.name} row {number}")
        except UnicodeDecodeError as error:
            raise UnusableInput(f"{path.name}: text after row {number} is not UTF-8 ({error.reason})") from error
        except (pa.ArrowException, OSError) as error:
            said = " ".join(str(error).split())
            raise UnusableInput(f"{path.name}: no readable Parquet after row {number}: {said}") from error


def require_json_text(schema: pa.Schema, where: str) -> None:
    """Raises UnusableInput where tool schemas or details are structs: Arrow has merged their fields, so that one row's keys stand
    as nulls in every other's. Nobody can tell those from nulls that were meant (a test that expects None, `const: null` in a
    schema); it has also put all keys in one order, and made whole numbers floats where one row has a float."""
    for name in ("tools", "details"):
        index = schema.get_field_index(name)
        if index >= 0 and not _is_text(schema.field(index).type):
            kind = _shortened(schema.field(index).type)
            raise UnusableInput(f"{where}: column {name} is {kind}, expected JSON text: structs are merged over rows")


def _shortened(kind: pa.DataType) -> str:
    text = " ".join(str(kind).split())
    return text if len(text) <= 80 else f"{text[:80]}..."


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def column_row(values: Mapping[str, object], where: str) -> Row:
    """A row of a columnar table, in which every row has every column."""
    return Row(where, without_nulls(values))
