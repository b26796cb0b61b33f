"""Text that looks like a token of the teacher's dialect: found, refused, or escaped by one visible rule.

A file that holds `<|user|>` would open a turn of its own inside the prompt, for our engines and for a server alike: servers
render their template from text, so that only another text helps everywhere. The rule: a backslash after the token's first
character. `<|user|>` becomes `<\\|user|>` and `</think>` becomes `<\\/think>`, which no tokenizer takes for the token and every
reader still knows. What is escaped already stays as it is.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from configs.errors import UnusableInput
from configs.prompt_sources import ControlTokenRule
from data.records import Message
from data.structure import CLOSE, OPEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING_TAGS = (OPEN, CLOSE)


class Escaped(NamedTuple):
    """A text without control tokens. count: how many there were."""

    text: str
    count: int


class ControlTokens:
    """The strings that one tokenizer turns into ids which text alone cannot have, as one compiled pattern.

    A token of a single character has no place for the backslash and is taken for text; no chat model has one.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens: tuple[str, ...] = tuple(sorted({token for token in tokens if len(token) > 1}))
        # The first character, and the rest behind a lookahead: a match ends where the backslash goes, and of two tokens that
        # overlap both are found. The search skips to the next first character in C.
        branches = [f"{re.escape(first)}(?={_any_of(rests)})" for first, rests in _by_first(self.tokens).items()]
        self._pattern = re.compile("|".join(branches)) if branches else None

    def find(self, text: str) -> str:
        """The control token that stands first in `text` (of those that begin there the longest), or ""."""
        found = self._pattern.search(text) if self._pattern else None
        if found is None:
            return ""
        return max((token for token in self.tokens if text.startswith(token, found.start())), key=len)

    def escape(self, text: str) -> Escaped:
        """No control token is left. Lines stay lines: no newline is added or taken."""
        total = 0
        # Once more than there is to do: a backslash could complete a token that has one itself.
        while self._pattern and (found := self._pattern.subn(r"\g<0>\\", text))[1]:
            text, total = found[0], total + found[1]
        return Escaped(text, total)


def _any_of(words: Sequence[str]) -> str:
    """A pattern for the shortest of the words that stands here. What they share is tried once: one branch a word took 5 ms
    instead of 0.2 for 16 KB of HTML where a tokenizer reserves 256 tokens."""
    if "" in words:
        return ""
    return f"(?:{'|'.join(re.escape(first) + _any_of(rests) for first, rests in _by_first(words).items())})"


def _by_first(words: Sequence[str]) -> dict[str, list[str]]:
    """First character -> what follows it."""
    found: dict[str, list[str]] = {}
    for word in words:
        found.setdefault(word[0], []).append(word[1:])
    return found


NO_CONTROL_TOKENS = ControlTokens(())
"""For texts that are taken as they are."""


_MARKER = re.compile(r"\s*[^\w\s].*\w", re.DOTALL)
"""A marker begins with punctuation and holds a word: an added token `system` is text, though every template mentions it."""


def control_tokens_of(tokenizer: "PreTrainedTokenizerBase") -> ControlTokens:
    """Of the added tokens those that are flagged special, and the markers among the others that the chat template writes; the
    tokenizer's end of text and the like; and the reasoning tags of a model that has them.

    The flag alone is not enough: DeepSeek's role markers, and the think and tool tags of GLM and Qwen, are not flagged. Nor is
    being added: Phi adds runs of blanks, and Gemma adds HTML tags, which are text.
    """
    template = _template_text(tokenizer.chat_template)
    found = set(map(str, tokenizer.all_special_tokens))
    for added in tokenizer.added_tokens_decoder.values():  # type: ignore[attr-defined]  (hidden by __getattr__)
        token = str(added)
        if added.special or token in REASONING_TAGS or (_MARKER.match(token) and token in template):
            found.add(token)
    found.update(tag for tag in REASONING_TAGS if tag in template)
    return ControlTokens(token for token in found if token.strip())


def _template_text(template: object) -> str:
    """A tokenizer may have several templates by name."""
    return "\n".join(map(str, template.values())) if isinstance(template, dict) else str(template or "")


def refuse_in(text: str, control: ControlTokens, where: str, remedy: str) -> None:
    """Raises UnusableInput when `text` holds a control token."""
    if token := control.find(text):
        raise UnusableInput(f"{where} holds {token!r}, a control token of the teacher's tokenizer; {remedy}")


# --- rows --------------------------------------------------------------------------------------------------------


class Checked(NamedTuple):
    """The turns and tool schemas of a row without control tokens. escaped: how many there were."""

    messages: tuple[Message, ...]
    tools: object
    escaped: int


class RowControl(NamedTuple):
    """What a source does about control tokens in its rows."""

    control: ControlTokens
    rule: ControlTokenRule

    def check(self, messages: Sequence[Message], tools: object, where: str) -> Checked:
        """Turns and tool schemas (JSON values) as the teacher may see them.

        Raises:
            UnusableInput: a control token under the rule `refuse`; under either rule a reasoning tag in an assistant turn,
                because a turn's reasoning has a key of its own, and the template writes the tags.
        """
        total = 0

        def cleaned(text: str, where: str) -> str:
            nonlocal total
            if self.rule == "refuse":
                refuse_in(text, self.control, where, "take it out, or set control_tokens: escape for its source")
                return text
            text, count = self.control.escape(text)
            total += count
            return text

        turns = []
        for message in messages:
            role = message.get("role", "")
            if role == "assistant":
                self._refuse_tags(message, where)
            said = {key: cleaned(str(text), f"{where}: the {role} message") for key, text in message.items() if key != "role"}
            turns.append(cast(Message, message | said))
        return Checked(tuple(turns), mapped(tools, lambda text: cleaned(text, f"{where}: a tool schema")), total)

    def _refuse_tags(self, message: Message, where: str) -> None:
        said = message.get("content", "") + message.get("reasoning_content", "")
        if found := next((tag for tag in REASONING_TAGS if tag in self.control.tokens and tag in said), ""):
            raise UnusableInput(
                f"{where}: an assistant message holds {found!r}; expected its reasoning in reasoning_content, without tags"
            )


def mapped(value: object, change: Callable[[str], str]) -> object:
    """A JSON value with every string in it changed, keys too: templates write them all."""
    match value:
        case str():
            return change(value)
        case list():
            return [mapped(item, change) for item in value]
        case dict():
            return {change(key): mapped(item, change) for key, item in value.items()}
        case _:
            return value


def provenance_of(escaped: int) -> str:
    """Prompt.provenance of a row, of which so many control tokens were escaped."""
    return json.dumps({"escaped": escaped}) if escaped else ""
