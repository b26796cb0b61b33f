"""Prompts from a file with one JSON object a line."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from configs.errors import UnusableInput
from configs.prompt_sources import JsonlSource
from generate.control_tokens import ControlTokens
from generate.sources.paths import find_file
from generate.sources.rows import Candidate, Row, Side, select


def read_jsonl(
    source: JsonlSource, side: Side, folders: Sequence[Path], left_out: Counter[str], control: ControlTokens
) -> Iterator[Candidate]:
    """The prompts of one side, a line in memory at a time. Raises UnusableInput naming file and line."""
    path = find_file(source.path, folders)
    return select(source, path.name, side, folders, left_out, control, lambda: json_lines(path))


def json_lines(path: Path) -> Iterator[Row]:
    """The objects of a file, empty lines left out. Raises UnusableInput naming file and line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Row(f"{path.name} line {number}", _parse(line, f"{path.name} line {number}"))
    except OSError as error:
        raise UnusableInput(f"{path.name}: {error.strerror}; expected a file that can be read") from error


def _parse(line: bytes, where: str) -> dict[str, object]:
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise UnusableInput(f"{where}: expected a JSON object, found {type(values).__name__}")
        if b"\\u" in line:  # only an escape can say half a character
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UnusableInput(
            f"{where}: text that is no valid Unicode ({error.reason}); expected UTF-8 without lone surrogates"
        ) from error
    except UnusableInput:
        raise
    except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits, and brackets 1,000 deep
        raise UnusableInput(f"{where}: not valid JSON ({error}); expected one object a line") from error
    return values
