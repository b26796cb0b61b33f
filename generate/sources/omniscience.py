"""Closed-book facts with leave to decline, in the columns of AA-Omniscience (arXiv 2511.13029): question, answer, domain.

Optional are topic, aliases (a list; in CSV its JSON text, or forms parted by `|`), answerable and split. A fact that nobody can
know (`answerable: false`) has no answer: declining is the best that can be said to it.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from configs.errors import UnusableInput
from configs.prompt_sources import OmniscienceSource
from data.records import Split
from data.verify.exact import is_abstention
from generate.control_tokens import ControlTokens
from generate.sources.jsonl import json_lines
from generate.sources.paths import find_file
from generate.sources.rows import Candidate, Row, Side, select
from generate.templates import Template, load_template

REQUIRED = ("question", "answer", "domain")
OPTIONAL = ("topic", "aliases", "answerable", "split")
COLUMNS = (*REQUIRED, *OPTIONAL)
FAMILY = "facts"
DECLINED = "I don't know"
"""The reference of what nobody can know."""
_READ = ("question", "domain", "topic", "aliases", "answerable")
"""What a template may use as the file has it; answer and split it must not show."""


def read_omniscience(
    source: OmniscienceSource, side: Side, folders: Sequence[Path], left_out: Counter[str], control: ControlTokens
) -> Iterator[Candidate]:
    """The facts of one side; a row that names no split is on the side that the source is read for.

    Raises:
        UnusableInput: one line with the file and the line of the first row that is no fact.
    """
    path = find_file(source.path, folders)
    template = load_template(source.template, folders).require(_READ)
    if path.suffix not in (".jsonl", ".csv"):
        raise UnusableInput(f"{path.name}: expected a file that ends in .jsonl or .csv")
    lines = partial(csv_lines if path.suffix == ".csv" else json_lines, path)
    return select(
        source, path.name, side, folders, left_out, control,
        lambda: (fact_row(row, template, source.verifier, side.split) for row in lines()),
    )  # fmt: skip


def csv_lines(path: Path) -> Iterator[Row]:
    """The rows of a file with a header; an empty cell is an absent key. Raises UnusableInput naming file and line."""
    start = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # Excel writes a byte order mark
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _require_header(header, path.name)
            start = reader.line_num + 1
            for cells in reader:
                where, start = f"{path.name} line {start}", reader.line_num + 1  # a quoted cell may go over several lines
                if not any(cells):
                    continue
                if len(cells) != len(header):
                    raise UnusableInput(f"{where}: {len(cells)} cells, expected {len(header)} as in the header; quote commas")
                yield Row(where, {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()})
    except csv.Error as error:
        raise UnusableInput(f"{path.name} line {start}: not valid CSV ({error}); expected quotes to be closed") from error
    except UnicodeDecodeError as error:
        raise UnusableInput(f"{path.name} after line {start - 1}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise UnusableInput(f"{path.name}: {error.strerror}; expected a file that can be read") from error


def _require_header(header: Sequence[str], name: str) -> None:
    if missing := [column for column in REQUIRED if column not in header]:
        raise UnusableInput(f"{name} line 1: no column {missing[0]!r}; expected a header with {', '.join(REQUIRED)}")
    if twice := [column for column, count in Counter(header).items() if count > 1]:
        raise UnusableInput(f"{name} line 1: column {twice[0]!r} stands twice; expected each once")


def fact_row(row: Row, template: Template, verifier: str, split: Split) -> Row:
    """The same fact as a row that generate.sources.rows understands, with what the template shows. Raises UnusableInput."""
    values, where = row.values, row.where
    if unknown := sorted(values.keys() - set(COLUMNS)):
        raise UnusableInput(f"{where}: unknown column {unknown[0]!r}; known columns: {', '.join(COLUMNS)}")
    question, domain = _text(row, "question"), _text(row, "domain")
    known, aliases = _answerable(row), _aliases(row)
    if known:
        answer = _text(row, "answer")
        if is_abstention(answer):
            raise UnusableInput(f"{where}: the answer {answer!r} declines; expected a fact, or answerable false")
    else:
        answer = _unanswered(values, where)
        if aliases:
            raise UnusableInput(f"{where}: aliases of an answer that nobody can know; expected none with answerable false")
    said: dict[str, object] = {"question": question, "answer": answer, "task": f"{FAMILY}/{domain}", "known": known}
    said |= {"verifier": verifier if known else "exact", "split": values.get("split", split)}
    if aliases:
        said["details"] = {"aliases": aliases}
    shown = {"domain": domain, "topic": values.get("topic", ""), "aliases": aliases, "answerable": known}
    return Row(where, said | {name: value for name, value in shown.items() if name in template.variables})


def _text(row: Row, key: str) -> str:
    value = row.values.get(key)
    if not isinstance(value, str) or not value.strip():
        found = "missing or empty" if value is None or isinstance(value, str) else type(value).__name__
        raise UnusableInput(f"{row.where}: {key} is {found}, expected a text that is not empty")
    return value.strip()


def _answerable(row: Row) -> bool:
    value = row.values.get("answerable", True)
    if isinstance(value, bool):
        return value
    words = {"true": True, "false": False}
    if not isinstance(value, str) or value.strip().lower() not in words:
        raise UnusableInput(f"{row.where}: answerable is {value!r}, expected true or false")
    return words[value.strip().lower()]


def _unanswered(values: Mapping[str, object], where: str) -> str:
    answer = values.get("answer") or DECLINED
    if not isinstance(answer, str) or not is_abstention(answer):
        raise UnusableInput(f"{where}: answerable is false and the answer is {answer!r}; expected an empty answer")
    return DECLINED


def _aliases(row: Row) -> list[str]:
    value = row.values.get("aliases", [])
    if isinstance(value, str):
        value = _aliases_of_text(value, row.where)
    if not isinstance(value, list) or not all(isinstance(alias, str) and alias.strip() for alias in value):
        raise UnusableInput(f"{row.where}: aliases is {value!r}, expected a list of texts, or texts parted by |")
    return [alias.strip() for alias in value]


def _aliases_of_text(text: str, where: str) -> object:
    if not text.lstrip().startswith("["):
        return [alias for alias in text.split("|") if alias.strip()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableInput(f"{where}: aliases is not valid JSON ({error}); expected a list of texts") from error
