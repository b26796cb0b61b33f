"""From the recipe's sources to one prompt set: what the teacher is asked, and what the evaluation holds back.

Which side an item falls on is decided by the hash of its text (data/split.py) or by its own `split` field, never by the
order or the seed of a source, and the finished set is checked: no evaluation item is a training prompt.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from configs.errors import UnusableInput
from configs.schema import JsonlSource, PromptSource, ReasoningGymSource
from data.records import Message, Prompt, Split, digest, prompt_identity
from data.split import is_held_out
from data.store import sha256_file
from data.verify import VERIFIERS, self_check

log = logging.getLogger(__name__)

ATTEMPTS_PER_ITEM = 200
"""reasoning-gym repeats itself when its space is small; a source that needs more draws than this an item is refused."""


class PromptSet(NamedTuple):
    """Prompts in source order, without duplicates; and how many candidates were left out, by reason."""

    prompts: list[Prompt]
    left_out: Counter[str]


def build_prompt_set(training: Sequence[PromptSource], suites: Sequence[PromptSource], folders: Sequence[Path]) -> PromptSet:
    """Every training prompt and every evaluation item of a recipe. `folders` are tried in turn for relative paths.

    Raises:
        UnusableInput: for a source that cannot be read, yields nothing, or puts one text on both sides.
    """
    left_out: Counter[str] = Counter()
    sides: dict[Split, dict[str, Prompt]] = {"train": {}, "eval": {}}
    plan: tuple[tuple[Split, Sequence[PromptSource]], ...] = (("train", training), ("eval", suites))
    for split, sources in plan:
        for source in sources:
            for prompt in _read(source, split, folders, left_out):
                if prompt.prompt_id in sides[split]:
                    left_out["duplicate"] += 1
                else:
                    sides[split][prompt.prompt_id] = prompt
    if not sides["train"]:
        raise UnusableInput("generate.prompts: the prompt set is empty; expected at least one source with a training prompt")
    _refuse_overlap(sides["train"].values(), sides["eval"].values())
    return PromptSet([*sides["train"].values(), *sides["eval"].values()], left_out)


def _refuse_overlap(training: object, evaluation: object) -> None:
    """Compared by text, not by prompt_id: the same question under another template version would still be a leak."""
    taught = {_text(prompt): prompt for prompt in training}  # type: ignore[attr-defined]
    for item in evaluation:  # type: ignore[attr-defined]
        if (twin := taught.get(_text(item))) is not None:
            raise UnusableInput(
                f"evaluation item {item.prompt_id} of {item.source} is also a training prompt of {twin.source}: "
                f"{_text(item)[:60]!r}; mark its rows with one split"
            )


def _text(prompt: Prompt) -> str:
    return " ".join(" ".join(message.get("content", "").split()) for message in prompt.messages)


def _read(source: PromptSource, split: Split, folders: Sequence[Path], left_out: Counter[str]) -> Iterator[Prompt]:
    if isinstance(source, ReasoningGymSource):
        return _read_reasoning_gym(source, split, left_out)
    return _read_jsonl(source, split, folders)


# --- reasoning-gym -----------------------------------------------------------------------------------------------


def _read_reasoning_gym(source: ReasoningGymSource, split: Split, left_out: Counter[str]) -> Iterator[Prompt]:
    """`source.count` distinct items of the wanted side, each scored 1.0 by its own scorer on its own reference answer."""
    import reasoning_gym  # 1.5 s; only when a recipe asks for it

    where = f"reasoning_gym {source.task}"
    limit = source.count * ATTEMPTS_PER_ITEM
    try:
        dataset = reasoning_gym.create_dataset(source.task, size=limit, seed=source.seed, **source.params)
    except (ValueError, TypeError, AssertionError) as error:
        raise UnusableInput(f"{where}: {error}; see the task's parameters in reasoning-gym") from error
    version = f"{where}@{digest(source.params, size=4)}"
    seen: set[str] = set()
    num_given = 0
    for entry in dataset:
        question = entry["question"]
        if question in seen or is_held_out(question) != (split == "eval"):
            continue
        seen.add(question)
        details = json.dumps(
            {"task": source.task, "params": source.params, "entry": entry}, ensure_ascii=False, sort_keys=True, default=str
        )
        prompt = _prompt(
            where,
            source.task,
            version,
            ({"role": "user", "content": question},),
            str(entry["answer"]),
            "reasoning_gym",
            split,
            None,
            details,
            source.licence,
        )
        if not self_check(prompt):
            left_out["fails_self_check"] += 1
            continue
        yield prompt
        num_given += 1
        if num_given == source.count:
            return
    raise UnusableInput(
        f"{where}: only {len(seen)} distinct {split} items in {limit} draws, expected count {source.count}; "
        "widen params or lower count"
    )


# --- JSONL -------------------------------------------------------------------------------------------------------

_ROLES = ("system", "user", "assistant", "tool")
_JSONL_KEYS = {"question", "messages", "answer", "task", "verifier", "split", "known", "domain"}


def _find(path: str, folders: Sequence[Path]) -> Path:
    for folder in folders:
        if (folder / path).is_file():
            return folder / path
    raise UnusableInput(
        f"prompt file {path}: no such file beside the recipe or in the working directory; correct generate.prompts path"
    )


def source_hashes(sources: Sequence[PromptSource], folders: Sequence[Path]) -> dict[str, str]:
    """Path as the recipe writes it -> sha256 of the file it means. Raises UnusableInput for a missing file."""
    return {source.path: sha256_file(_find(source.path, folders)) for source in sources if isinstance(source, JsonlSource)}


def _read_jsonl(source: JsonlSource, split: Split, folders: Sequence[Path]) -> Iterator[Prompt]:
    path = _find(source.path, folders)
    prompts = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                prompt = _parse_row(line, f"{path.name} line {number}", path, source)
                if prompt.split == split:
                    prompts.append(prompt)
    if source.count is not None:  # chosen by hash: adding a line elsewhere in the file changes no other choice
        chosen = {prompt.prompt_id for prompt in sorted(prompts, key=lambda prompt: digest(prompt.prompt_id))[: source.count]}
        prompts = [prompt for prompt in prompts if prompt.prompt_id in chosen]
    return iter(prompts)


def _parse_row(line: bytes, where: str, path: Path, source: JsonlSource) -> Prompt:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnusableInput(f"{where}: not valid JSON ({error}); expected one object a line") from error
    if not isinstance(row, dict):
        raise UnusableInput(f"{where}: expected a JSON object, found {type(row).__name__}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UnusableInput(
            f"{where}: text that is no valid Unicode ({error.reason}); expected UTF-8 without lone surrogates"
        ) from error
    if unknown := row.keys() - _JSONL_KEYS:
        raise UnusableInput(f"{where}: unknown key {sorted(unknown)[0]!r}; known keys: {', '.join(sorted(_JSONL_KEYS))}")
    messages = _messages(row, where)
    answer = row.get("answer", "")
    if not isinstance(answer, str):
        raise UnusableInput(f"{where}: answer is {type(answer).__name__}, expected a string")
    verifier = row.get("verifier", "exact" if answer else "")
    known_verifiers = [name for name in VERIFIERS if name != "reasoning_gym"]  # that one needs the generator's own entry
    if verifier and verifier not in known_verifiers:
        raise UnusableInput(f"{where}: unknown verifier {verifier!r}; known: {', '.join(known_verifiers)}")
    text = " ".join(message.get("content", "") for message in messages)
    split = row.get("split", "eval" if is_held_out(text) else "train")
    if split not in ("train", "eval"):
        raise UnusableInput(f"{where}: split {split!r}, expected train or eval")
    known = row.get("known")
    if known is not None and not isinstance(known, bool):
        raise UnusableInput(f"{where}: known is {known!r}, expected true or false")
    task = row.get("task", path.stem)
    if not isinstance(task, str):
        raise UnusableInput(f"{where}: task is {type(task).__name__}, expected a string")
    return _prompt(
        path.name, task, f"jsonl@{digest('plain', size=4)}", messages, answer, verifier, split, known, "", source.licence
    )


def _messages(row: dict, where: str) -> tuple[Message, ...]:
    if ("question" in row) == ("messages" in row):
        raise UnusableInput(f"{where}: expected either question or messages")
    if "question" in row:
        messages: object = [{"role": "user", "content": row["question"]}]
    else:
        messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UnusableInput(f"{where}: messages is not a non-empty list")
    for message in messages:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise UnusableInput(f"{where}: each message needs a role and a content, both strings")
        if message["role"] not in _ROLES:
            raise UnusableInput(f"{where}: role {message['role']!r}, expected one of {', '.join(_ROLES)}")
        if message["role"] == "user" and not message["content"].strip():
            raise UnusableInput(f"{where}: empty question")
    if messages[-1]["role"] == "assistant":
        raise UnusableInput(f"{where}: the last message is the assistant's; expected the turn it must answer")
    return cast(tuple[Message, ...], tuple(messages))


def _prompt(
    source: str, task: str, version: str, messages: tuple[Message, ...], answer: str, verifier: str, split: Split,
    known: bool | None, details: str, licence: str,
) -> Prompt:  # fmt: skip
    return Prompt(
        prompt_identity(messages, version), source, task, version, messages, answer, verifier, split, known, details, licence
    )
