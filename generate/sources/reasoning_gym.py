"""Prompts from reasoning-gym, by the spec of a task."""

import json
from collections import Counter
from collections.abc import Iterator

from configs.errors import UnusableInput
from configs.prompt_sources import ReasoningGymSource
from data.records import Message, Prompt, Split, digest, prompt_identity
from data.split import is_held_out
from data.verify import self_check
from generate.control_tokens import ControlTokens, RowControl, provenance_of

ATTEMPTS_PER_ITEM = 200
"""reasoning-gym repeats itself when its space is small; a source that needs more draws than this an item is refused."""


def read_reasoning_gym(
    source: ReasoningGymSource, split: Split, left_out: Counter[str], control: ControlTokens
) -> Iterator[Prompt]:
    """`source.count` distinct items of the wanted side, each scored 1.0 by its own scorer on its own reference answer."""
    import reasoning_gym  # 1.5 s; only when a recipe asks for it

    where = f"reasoning_gym {source.task}"
    limit = source.count * ATTEMPTS_PER_ITEM
    try:
        dataset = reasoning_gym.create_dataset(source.task, size=limit, seed=source.seed, **source.params)
    except (ValueError, TypeError, AssertionError) as error:
        raise UnusableInput(f"{where}: {error}; see the task's parameters in reasoning-gym") from error
    seen: set[str] = set()
    num_given = 0
    for entry in dataset:
        question = entry["question"]
        if question in seen or is_held_out(question) != (split == "eval"):
            continue
        seen.add(question)
        prompt = _to_prompt(source, where, entry, split, RowControl(control, source.control_tokens))
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


def _to_prompt(source: ReasoningGymSource, where: str, entry: dict[str, object], split: Split, control: RowControl) -> Prompt:
    """The scorer needs the whole entry: it travels as JSON text in `details`."""
    details = json.dumps(
        {"task": source.task, "params": source.params, "entry": entry}, ensure_ascii=False, sort_keys=True, default=str
    )
    version = f"{where}@{digest(source.params, size=4)}"
    asked: Message = {"role": "user", "content": str(entry["question"])}
    messages, _, escaped = control.check([asked], None, where)
    return Prompt(
        prompt_identity(messages, version), where, source.task, version, messages, str(entry["answer"]), "reasoning_gym", split,
        None, details, source.licence, provenance=provenance_of(escaped),
    )  # fmt: skip
