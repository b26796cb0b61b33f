"""The evaluation items that no trace may hold: the user's benchmark files, and the pipeline's own evaluation prompts.

What of an item counts is said by the item. A benchmark file's questions and answers both do: who trained on the worked
solution has seen the item. Of the pipeline's own evaluation prompts the question alone does, because a declared split may share
the answer on purpose: closed-book facts are split by phrasing (data/curriculum.py), so that training and evaluation ask for the
same metal in other words. There the metal in a trace is the lesson, and the evaluation's phrasing is the leak.
"""

import glob
import heapq
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from configs.errors import UnusableInput
from data.records import Prompt

QUESTIONS = (
    "question", "prompt", "problem", "input", "instruction", "query", "task", "text", "passage", "context", "ctx", "premise",
    "sentence", "messages",
)  # fmt: skip
ANSWERS = ("answer", "solution", "output", "response", "completion", "canonical_solution", "target", "rationale", "explanation")
IDENTITIES = ("id", "task_id", "question_id", "item_id", "problem_id", "unique_id", "uid", "idx", "index")
OWN = "evaluation"
"""What the pipeline's own evaluation prompts have for a file's name."""

MOST_BOILERPLATE = 20_000
"""Training prompts that are looked at for templates: an instruction that stands in one prompt of 10,000 is still seen."""

Row = Mapping[str, object]


class Item(NamedTuple):
    """One text of one benchmark item. file: its path as given. item: the row's own id, or its number from 1 on.
    field: which of the row's fields. is_question: it is what the model is asked, so a prompt equal to it is a leak however short.
    is_packed: long text put together from shared files; only the prompt as a whole is the item."""

    file: str
    item: str
    field: str
    text: str
    is_question: bool = True
    is_packed: bool = False


def evaluation_items(prompts: Iterable[Prompt]) -> Iterator[Item]:
    """The questions of the prompts on the evaluation side; their answers do not count, nor do system prompts.

    Packed prompts (those with a provenance) are split by what is asked about their files, and share the files with training.
    """
    for prompt in prompts:
        if prompt.split == "eval":
            text = "\n".join(message.get("content", "") for message in prompt.messages if message.get("role") == "user")
            yield Item(OWN, prompt.prompt_id, "prompt", text, is_packed=bool(prompt.provenance))


def boilerplate_sample(prompts: Iterable[Prompt], most: int = MOST_BOILERPLATE) -> list[str]:
    """Training prompts from which an index learns what is boilerplate: what two of them have in common. Those with the lowest
    ids, which are hashes: an even sample that depends on no order. Packed prompts are left out, they share files."""
    training = (prompt for prompt in prompts if prompt.split == "train" and not prompt.provenance)
    chosen = heapq.nsmallest(most, training, key=lambda prompt: prompt.prompt_id)
    return [message.get("content", "") for prompt in chosen for message in prompt.messages if message.get("role") == "user"]


def find_benchmarks(patterns: Sequence[str], folders: Sequence[Path]) -> dict[str, Path]:
    """Name (path from the folder it was found in) -> file, sorted: all that paths and patterns mean, each looked up in
    `folders` in turn. Raises UnusableInput for one that means no file, or a file that is neither JSONL nor Parquet."""
    found: dict[str, Path] = {}
    for pattern in patterns:
        found |= _matches(pattern, folders)
    for name, path in found.items():
        if path.suffix not in _READERS:
            raise UnusableInput(f"benchmark {name}: expected one of {', '.join(_READERS)}; correct data.decontaminate")
    return dict(sorted(found.items()))


def _matches(pattern: str, folders: Sequence[Path]) -> dict[str, Path]:
    for folder in folders:
        paths = [Path(path) for path in glob.glob(str(folder / pattern), recursive=True)]  # noqa: PTH207 (absolute patterns)
        if files := [path for path in paths if path.is_file()]:
            return {str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path): path for path in files}
    raise UnusableInput(
        f"benchmark {pattern}: no such file beside the recipe or in the working directory; correct data.decontaminate"
    )


def read_benchmark(path: Path, name: str, fields: Sequence[str] = ()) -> list[Item]:
    """The items of one file, in its order. fields: those that hold text; without any, those called as in QUESTIONS and ANSWERS.

    Text is a string, a list of strings or a list of messages, of which the user's count. A row that declares itself
    `split: train` is no evaluation item and is left out.

    Raises:
        UnusableInput: naming the file (and the row) that cannot be read, has none of the fields, or holds no text in them.
    """
    items, seen, identities = [], set(), set[str]()
    for number, row in enumerate(_READERS[path.suffix](path, name), 1):
        seen |= row.keys()
        if row.get("split") != "train":
            identity = _identity(row, number)
            if identity in identities:  # a hit has to say which of them it is
                identity = f"{identity} (row {number})"
            identities.add(identity)
            items += _items(row, name, identity, fields)
    if missing := [field for field in fields if field not in seen]:
        raise UnusableInput(f"benchmark {name}: no field {missing[0]} (found: {_listed(seen)}); correct data.decontaminate")
    if not seen:
        raise UnusableInput(f"benchmark {name}: no rows; expected at least one item, or leave it out of data.decontaminate")
    if not items:
        wanted = _listed(fields or (*QUESTIONS, *ANSWERS))
        raise UnusableInput(
            f"benchmark {name}: no evaluation text in any of the fields {wanted} (found: {_listed(seen)}); "
            "give the field that holds it one of these names"
        )
    return items


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _identity(row: Row, number: int) -> str:
    return next((str(row[key]) for key in IDENTITIES if isinstance(row.get(key), str | int)), str(number))


def _items(row: Row, name: str, identity: str, fields: Sequence[str]) -> Iterator[Item]:
    for field in fields or (*QUESTIONS, *ANSWERS):
        text = _text(row.get(field))
        if text.strip():
            yield Item(name, identity, field, text, is_question=field not in ANSWERS)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(filter(None, map(_text, value)))
    if isinstance(value, dict) and value.get("role") == "user":
        return _text(value.get("content"))
    return ""


def _json_lines(path: Path, name: str) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse(line, f"benchmark {name} line {number}")
    except OSError as error:
        raise UnusableInput(f"benchmark {name}: {error.strerror}; expected a file that can be read") from error


def _parse(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnusableInput(f"{where}: not valid JSON ({error}); expected one object a line") from error
    if not isinstance(row, dict):
        raise UnusableInput(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UnusableInput(f"benchmark {name}: not readable as Parquet ({str(error).splitlines()[0]})") from error


_READERS = {".jsonl": _json_lines, ".parquet": _parquet_rows}
