"""Evaluation items asked once more in other words, with the same answer and the same judge.

A model that has learned a task answers both; one that has learned a wording answers one. Two kinds: rows that say whose twin they
are (`twin_of`), and frames that a recipe puts around the questions of a suite (`twins`). Everything is decided by hashes, so
that the same recipe has the same twins.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import nsmallest
from typing import NamedTuple

from configs.errors import UnusableInput
from configs.prompt_sources import Twins
from data.records import Message, Prompt, Split, digest, prompt_identity
from generate.control_tokens import ControlTokens, refuse_in

# --- frames ------------------------------------------------------------------------------------------------------


class Framing:
    """Chooses among the items of a suite as they pass. With `count` about twice that many prompts are held, with `share` the
    chosen ones; without settings none."""

    def __init__(self, settings: Twins | None, control: ControlTokens) -> None:
        """Raises UnusableInput for a frame that holds a control token of the teacher."""
        self._settings = settings
        self._chosen: list[tuple[str, Prompt]] = []
        for frame in settings.frames if settings else ():
            refuse_in(frame, control, f"evaluate.suites twins: the frame {frame!r}", "take it out of the frame")

    def see(self, item: Prompt) -> None:
        """Items that are twins themselves get none."""
        if self._settings is None or item.twin_of:
            return
        rank, count = digest(item.prompt_id, "twin"), self._settings.count
        if self._settings.share is None or int(rank, 16) < self._settings.share * 2**128:
            self._chosen.append((rank, item))
        if count is not None and len(self._chosen) > 2 * count:
            self._chosen = _lowest(self._chosen, count)

    def twins(self) -> Iterator[Prompt]:
        """Of the chosen ones among all that were seen."""
        if self._settings is None:
            return
        frames, count = self._settings.frames, self._settings.count
        for _, item in self._chosen if count is None else _lowest(self._chosen, count):
            yield framed(item, frames[int(digest(item.prompt_id, "frame"), 16) % len(frames)])


def _lowest(ranked: Sequence[tuple[str, Prompt]], count: int) -> list[tuple[str, Prompt]]:
    return nsmallest(count, ranked, key=lambda one: one[0])


def framed(item: Prompt, frame: str) -> Prompt:
    """The item with the frame around its last user turn, under an id of its own. Answer, verifier and details are the original's:
    a reasoning-gym scorer reads its entry, not the question."""
    last = max(index for index, message in enumerate(item.messages) if message.get("role") == "user")
    question = item.messages[last].get("content", "")
    said: Message = {**item.messages[last], "content": frame.replace("{question}", question)}
    messages = (*item.messages[:last], said, *item.messages[last + 1 :])
    version = f"{item.prompt_version}+twin@{digest(frame, size=4)}"
    return dataclasses.replace(
        item, prompt_id=prompt_identity(messages, version), prompt_version=version, messages=messages, twin_of=item.prompt_id
    )


# --- rows --------------------------------------------------------------------------------------------------------


class Named(NamedTuple):
    """A row that has an id: its place, its prompt, and whether it is a twin itself."""

    where: str
    prompt_id: str
    split: Split
    is_twin: bool


class Originals:
    """The rows of a file by their own ids, read when the first twin asks for one: files without twins are read once."""

    def __init__(self, read: Callable[[], Iterator[tuple[str, Mapping[str, object], Prompt]]]) -> None:
        """read: place, values and prompt of each row."""
        self._read, self._named = read, dict[str, Named]()

    def resolved(self, prompt: Prompt, values: Mapping[str, object], where: str) -> Prompt:
        """The prompt, as a twin of its original where the row names one. It stands on its original's side: by the hash of its own
        words one in ten twins of a training prompt would be an evaluation item, and most twins of an item training prompts.

        Raises:
            UnusableInput: no row has that id, or its row is a twin or on another side.
        """
        if "twin_of" not in values:
            return prompt
        wanted = row_id(values, "twin_of", where)
        if not self._named:
            self._named = named_rows(self._read())
        if (original := self._named.get(wanted)) is None:
            raise UnusableInput(f"{where}: twin_of {wanted!r}: no row of the file has this id; expected the id of its original")
        if original.is_twin:
            raise UnusableInput(
                f"{where}: twin_of {wanted!r}: {original.where} is a twin itself; expected the id of its original"
            )
        if "split" in values and prompt.split != original.split:
            raise UnusableInput(
                f"{where}: split {prompt.split}, but its original, {original.where}, is on the side {original.split}; "
                "expected both on one side"
            )
        if prompt.prompt_id == original.prompt_id:
            raise UnusableInput(f"{where}: it asks in the same words as its original, {original.where}; expected other words")
        return dataclasses.replace(prompt, split=original.split, twin_of=original.prompt_id)


def named_rows(rows: Iterable[tuple[str, Mapping[str, object], Prompt]]) -> dict[str, Named]:
    """By id. Raises UnusableInput for an id that stands twice."""
    named: dict[str, Named] = {}
    for where, values, prompt in rows:
        if "id" not in values:
            continue
        name = row_id(values, "id", where)
        if name in named:
            raise UnusableInput(f"{where}: id {name!r} is also that of {named[name].where}; expected each once")
        named[name] = Named(where, prompt.prompt_id, prompt.split, "twin_of" in values)
    return named


def row_id(values: Mapping[str, object], key: str, where: str) -> str:
    """As text: 7 and "7" are one id. Raises UnusableInput for what is neither a text nor a whole number."""
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UnusableInput(f"{where}: {key} is {value!r}, expected a text or a whole number")
    return str(value)
