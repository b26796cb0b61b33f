"""From a row of a table (JSONL, Parquet, datasets) to a prompt: what a row may say, and the words that refuse it."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from heapq import nsmallest
from pathlib import Path
from typing import NamedTuple, cast

from configs.errors import UnusableInput
from configs.prompt_sources import RowSource
from data.records import Message, Prompt, Split, digest, prompt_identity
from data.split import is_held_out
from generate.control_tokens import ControlTokens, RowControl, provenance_of
from generate.sources.details import JUDGES, details_text, require_judgeable
from generate.templates import Template, load_template
from generate.twins import Originals

KEYS = frozenset(
    {
        "question", "messages", "answer", "task", "verifier", "details", "split", "known", "domain", "tools", "max_tokens",
        "reasoning_budget", "id", "twin_of",
    }
)  # fmt: skip
PLAIN_VERSION = f"jsonl@{digest('plain', size=4)}"
"""Of rows without a template, in whichever container: the same row is the same prompt in JSONL and in Parquet."""
MAX_TOKENS = 2**31 - 1
_ROLES = ("system", "user", "assistant", "tool")


class Row(NamedTuple):
    """One row as it was read, and how an error calls it (`tasks.jsonl line 7`)."""

    where: str
    values: Mapping[str, object]


class Candidate(NamedTuple):
    """A prompt that may come into the set, and where it stands (`tasks.jsonl line 7`); "" for one that no row describes."""

    prompt: Prompt
    where: str = ""


class Side(NamedTuple):
    """Which prompts a source is read for. alone: nobody reads its other side, so that what falls there is left out."""

    split: Split
    alone: bool


OTHER_SIDE: dict[Split, str] = {"train": "held_out", "eval": "not_held_out"}
"""Reasons of rows left out of a source that is read for one side alone."""


def select(
    source: RowSource,
    name: str,
    side: Side,
    folders: Sequence[Path],
    left_out: Counter[str],
    control: ControlTokens,
    read: Callable[[], Iterator[Row]],
) -> Iterator[Candidate]:
    """The prompts of `side`, in the order of `read()`; with source.count, those whose ids hash lowest, so that a row added
    elsewhere changes no other choice. Rows are read once more then: choosing holds `count` hashes, not the prompts. Twins are
    not counted: they come and go with their originals.

    Raises:
        UnusableInput: naming the first row that is no prompt.
    """
    template = None if source.template is None else load_template(source.template, folders)
    made = partial(
        to_prompt, source=name, licence=source.licence, template=template, control=RowControl(control, source.control_tokens)
    )
    originals = Originals(lambda: ((row.where, row.values, made(row)) for row in read() if "id" in row.values))

    def prompts() -> Iterator[tuple[Row, Prompt]]:
        return ((row, originals.resolved(made(row), row.values, row.where)) for row in read())

    last = None
    if source.count is not None:
        last = _last_chosen(source.count, side.split, (prompt for _, prompt in prompts()))
    for row, prompt in prompts():
        if prompt.split != side.split:
            if side.alone:
                left_out[OTHER_SIDE[side.split]] += 1
        elif last is None or digest(prompt.twin_of or prompt.prompt_id) <= last:
            yield Candidate(prompt, row.where)


def _last_chosen(count: int, split: Split, prompts: Iterable[Prompt]) -> str:
    """The highest hash that is still among the `count` lowest; "" when there is no row at all."""
    ranked = (digest(prompt.prompt_id) for prompt in prompts if prompt.split == split and not prompt.twin_of)
    return max(nsmallest(count, ranked), default="")


def to_prompt(row: Row, source: str, licence: str, template: Template | None, control: RowControl) -> Prompt:
    """The prompt that a row describes. source: file or folder name; its stem is the task of rows that name none. The text as the
    row has it decides the side, before anything is escaped in it.

    Raises:
        UnusableInput: one line with the row's place.
    """
    values, where = row.values, row.where
    _require_known_keys(row, template)
    said = _messages(row) if template is None else _templated(row, template)
    answer = _text(row, "answer")
    messages, schemas, escaped = control.check(said, _tools(row), where)
    tools = json.dumps(schemas, ensure_ascii=False) if schemas else ""
    version = PLAIN_VERSION if template is None else template.version
    if tools:  # part of what is rendered, and so of the identity
        version += f"+tools@{digest(tools, size=4)}"
    verifier = _verifier(row, "exact" if answer else "")
    max_tokens, reasoning_budget = _tokens(row, "max_tokens"), _tokens(row, "reasoning_budget")
    if max_tokens and reasoning_budget >= max_tokens:
        raise UnusableInput(
            f"{where}: reasoning_budget {reasoning_budget} leaves no room for an answer within max_tokens {max_tokens}"
        )
    task = _text(row, "task") if "task" in values else Path(source).stem
    known = values.get("known")
    if known is not None and not isinstance(known, bool):
        raise UnusableInput(f"{where}: known is {known!r}, expected true or false")
    prompt = Prompt(
        prompt_identity(messages, version), source, task, version, messages, answer, verifier,
        _split(row, said), known, _details(row), licence, tools, max_tokens, reasoning_budget, provenance=provenance_of(escaped),
    )  # fmt: skip
    require_judgeable(prompt, where)
    return prompt


def _require_known_keys(row: Row, template: Template | None) -> None:
    known = KEYS if template is None else KEYS - {"messages"} | template.variables
    if unknown := row.values.keys() - known:
        raise UnusableInput(f"{row.where}: unknown key {sorted(unknown)[0]!r}; known keys: {', '.join(sorted(known))}")


def _templated(row: Row, template: Template) -> tuple[Message, ...]:
    if missing := sorted(template.variables - row.values.keys()):
        raise UnusableInput(f"{row.where}: no {missing[0]!r}, which template {template.name} needs")
    try:
        text = template.render(row.values)
    except UnusableInput as error:
        raise UnusableInput(f"{row.where}: {error}") from error
    if not text.strip():
        raise UnusableInput(f"{row.where}: empty question")
    return ({"role": "user", "content": text},)


def _text(row: Row, key: str, default: str = "") -> str:
    value = row.values.get(key, default)
    if not isinstance(value, str):
        raise UnusableInput(f"{row.where}: {key} is {type(value).__name__}, expected a string")
    return value


def _tokens(row: Row, key: str) -> int:
    """0 when the row does not say."""
    if key not in row.values:
        return 0
    value = row.values[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_TOKENS:
        raise UnusableInput(f"{row.where}: {key} is {value!r}, expected a positive whole number of tokens")
    return value


def _verifier(row: Row, default: str) -> str:
    verifier = _text(row, "verifier", default)
    if verifier and verifier not in JUDGES:
        raise UnusableInput(f"{row.where}: unknown verifier {verifier!r}; known: {', '.join(JUDGES)}")
    return verifier


def _details(row: Row) -> str:
    """Canonical JSON text, or "". Details that nobody is named to read are refused: with an answer and no verifier, code would be
    compared with code letter by letter, and every trace of the row be wrong."""
    text = details_text(row.values["details"], row.where) if "details" in row.values else ""
    if text and "verifier" not in row.values:
        raise UnusableInput(f"{row.where}: details without a verifier; expected verifier to be one of {', '.join(JUDGES)}")
    return text


def _split(row: Row, messages: Sequence[Message]) -> Split:
    text = " ".join(message.get("content", "") for message in messages)
    split = row.values["split"] if "split" in row.values else "eval" if is_held_out(text) else "train"
    if split not in ("train", "eval"):
        raise UnusableInput(f"{row.where}: split {split!r}, expected train or eval")
    return cast(Split, split)


def _tools(row: Row) -> list[dict[str, object]]:
    """Tool schemas as JSON values. Anything but a list of objects is refused."""
    value = row.values.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise UnusableInput(f"{row.where}: tools is not valid JSON ({error}); expected a list of schemas") from error
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UnusableInput(f"{row.where}: tools is not a list of schemas, nor its JSON text")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UnusableInput(f"{row.where}: tools hold text that is no valid Unicode ({error.reason})") from error
    return value


def _messages(row: Row) -> tuple[Message, ...]:
    values, where = row.values, row.where
    if ("question" in values) == ("messages" in values):
        raise UnusableInput(f"{where}: expected either question or messages")
    messages = [{"role": "user", "content": values["question"]}] if "question" in values else values["messages"]
    if not isinstance(messages, list) or not messages:
        raise UnusableInput(f"{where}: messages is not a non-empty list")
    # Writers of other formats put null for what a turn does not have.
    messages = [without_nulls(message) if isinstance(message, dict) else message for message in messages]
    for message in messages:
        _require_message(message, where)
    if messages[-1]["role"] == "assistant":
        raise UnusableInput(f"{where}: the last message is the assistant's; expected the turn it must answer")
    return cast(tuple[Message, ...], tuple(messages))


def without_nulls(values: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in values.items() if value is not None}


def _require_message(message: object, where: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
        raise UnusableInput(f"{where}: each message needs a role and a content, both strings")
    if message["role"] not in _ROLES:
        raise UnusableInput(f"{where}: role {message['role']!r}, expected one of {', '.join(_ROLES)}")
    if message["role"] == "user" and not message["content"].strip():
        raise UnusableInput(f"{where}: empty question")
    if unknown := sorted(message.keys() - {"role", "content", "reasoning_content"}):
        raise UnusableInput(
            f"{where}: a message has the key {unknown[0]!r}, which would be lost; known keys: role, content, reasoning_content"
        )
    if not isinstance(message.get("reasoning_content", ""), str):
        raise UnusableInput(f"{where}: reasoning_content is {type(message['reasoning_content']).__name__}, expected a string")
    if "reasoning_content" in message and message["role"] != "assistant":
        raise UnusableInput(f"{where}: a {message['role']} message has reasoning_content, expected it on assistant turns alone")
