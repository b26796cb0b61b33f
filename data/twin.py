"""What is trained is what is served: each assistant turn of an encoded conversation, against the ids that a server would feed.

A token that spans the end of the prompt, a newline too many, a letter that the tokenizer does not know, an answer that the
template cuts: each teaches the student something that it will never be asked, or never hear. The first such token is named.

Shape suffix: T tokens of a conversation.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput

SHORT_CHARACTERS = 256
"""Of what is worth remembering: the header of a turn is the same few characters in every conversation."""


class Tokens(NamedTuple):
    """A rendered conversation and its T ids. left_T, right_T: int64, where each begins and ends in the text, not descending."""

    text: str
    ids: list[int]
    left_T: np.ndarray
    right_T: np.ndarray


class Turn(NamedTuple):
    """Message `index`, an assistant's. Generation starts at character `start` of the text; its stop token is text[stop:end], and
    is not there when they are equal."""

    index: int
    start: int
    stop: int
    end: int


def check_turn(
    tokenizer: PreTrainedTokenizerBase, tokens: Tokens, turn: Turn, message: Mapping[str, object], stop_ids: Collection[int]
) -> None:
    """The ids before the turn are those that a server feeds for it, and what it trains is all that the message says and one of
    stop_ids; of a turn that may have no stop there are none.

    Raises:
        UnusableInput: names the turn, the token's place, its id and its text.
    """
    first = int(np.searchsorted(tokens.left_T, turn.start))
    _check_prompt(tokenizer, tokens, turn, first)
    _check_message(tokens, turn, message, first)
    last = int(np.searchsorted(tokens.left_T, turn.end)) - 1
    if stop_ids and (last < first or tokens.ids[last] not in stop_ids or tokens.right_T[last] != turn.end):
        raise UnusableInput(
            f"turn {turn.index}: its stop is not trained: it ends with {_named(tokenizer, tokens.ids, last)}, expected "
            f"{' or '.join(repr(_text_of(tokenizer, one)) for one in stop_ids)}; use a template that writes one"
        )
    if first <= last:
        _check_decoded(tokenizer, tokens, turn, slice(first, last + 1))


# --- before the turn ---------------------------------------------------------------------------------------------


def _check_prompt(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, turn: Turn, first: int) -> None:
    """first: the token that the turn begins with."""
    if first == 0:
        raise UnusableInput(
            f"turn {turn.index}: its first token is the conversation's, which nothing predicts; use a template that writes "
            "something before an assistant turn"
        )
    begin, served = served_ids(tokenizer, tokens, turn.start, first)
    trained = tokens.ids[begin:first]
    if trained != served:
        raise UnusableInput(
            f"turn {turn.index}: training continues other ids than a server feeds: "
            f"{first_difference(tokenizer, trained, served, begin)}; use a template that ends its prompt with a token of its own"
        )


def served_ids(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, start: int, first: int) -> tuple[int, list[int]]:
    """(begin, ids from there on) of tokenizer(text[:start]); before `begin` they are those of the whole text. first: the token
    that begins at `start` or after it.

    A tokenizer looks for added tokens first, leftmost and longest, and treats what lies between two of them alone. Those in the
    prompt are the same with what follows it and without, so that its ids can differ only behind its last one.
    """
    anchors = _anchors(tokenizer, len(tokenizer), bool(tokenizer.split_special_tokens))  # type: ignore[attr-defined]
    begin = first - 1
    while begin > 0 and not (tokens.ids[begin] in anchors and tokens.right_T[begin] <= start):
        begin -= 1
    behind = tokens.text[int(tokens.left_T[begin]) if begin else 0 : start]
    return begin, list(_ids_of(tokenizer, len(tokenizer), behind)) if len(behind) <= SHORT_CHARACTERS else _ids(tokenizer, behind)


@functools.lru_cache(maxsize=8)
def _anchors(tokenizer: PreTrainedTokenizerBase, size: int, splits_special: bool) -> frozenset[int]:
    """Added tokens that part the text before anything else looks at it; none where one of them takes its neighbours into
    account. size: of the vocabulary, to which tokens may be added."""
    added = tokenizer.added_tokens_decoder  # type: ignore[attr-defined]
    if splits_special or any(token.lstrip or token.rstrip or token.single_word for token in added.values()):
        return frozenset()
    return frozenset(number for number, token in added.items() if not token.normalized)


@functools.lru_cache(maxsize=64)
def _ids_of(tokenizer: PreTrainedTokenizerBase, size: int, text: str) -> tuple[int, ...]:
    return tuple(_ids(tokenizer, text))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


# --- in the turn -------------------------------------------------------------------------------------------------


def _check_message(tokens: Tokens, turn: Turn, message: Mapping[str, object], first: int) -> None:
    """Reasoning and then content stand in the turn, whole but for white space around them; the content right before the stop."""
    said = tokens.text[turn.start : turn.stop].strip()
    content, reasoning = (str(message.get(part) or "").strip() for part in ("content", "reasoning_content"))
    if not said.endswith(content):
        raise UnusableInput(
            f"chat template: the content of turn {turn.index}, which begins at token {first}, is not whole: it ends with "
            f"{said[-24:]!r}, expected {content[-24:]!r}; use a template that writes content as it is"
        )
    before = said[: len(said) - len(content)].strip().removeprefix("<think>").removesuffix("</think>")
    if reasoning not in before:
        raise UnusableInput(
            f"chat template: the reasoning of turn {turn.index} is missing: its first token, {first}, is followed by "
            f"{said[:24]!r}, expected {reasoning[:24]!r}; use a template that writes reasoning_content"
        )


def _check_decoded(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, turn: Turn, trained: slice) -> None:
    """The trained ids say what the text says, up to what the tokenizer's own normalizer makes equal."""
    said = tokens.text[turn.start : turn.end]
    found = _decoded(tokenizer, tokens.ids[trained])
    if found in (said, said.lstrip(" ")):  # SentencePiece decodes a leading blank to nothing
        return
    found, said = _normalized(tokenizer, found), _normalized(tokenizer, said)
    if found == said:
        return
    same = next((place for place, pair in enumerate(zip(found, said, strict=False)) if pair[0] != pair[1]), len(found))
    token = max(trained.start, int(np.searchsorted(tokens.left_T, turn.start + same, side="right")) - 1)
    raise UnusableInput(
        f"turn {turn.index}: {_named(tokenizer, tokens.ids, token)} stands for {said[same : same + 24]!r} but says "
        f"{found[same : same + 24]!r}; use a tokenizer that knows these characters"
    )


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _normalized(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    normalizer = tokenizer.backend_tokenizer.normalizer  # type: ignore[attr-defined]
    return text if normalizer is None else normalizer.normalize_str(text)


# --- naming tokens -----------------------------------------------------------------------------------------------


def first_difference(tokenizer: PreTrainedTokenizerBase, trained: Sequence[int], served: Sequence[int], begin: int = 0) -> str:
    """`token 7 is trained as 12 'a', served as 13 'b'`. begin: the place of the first ones."""
    pairs = zip(trained, served, strict=False)
    place = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(trained), len(served)))
    one, other = (
        f"{ids[place]} {_text_of(tokenizer, ids[place])!r}" if place < len(ids) else "nothing" for ids in (trained, served)
    )
    return f"token {begin + place} is trained as {one}, served as {other}"


def _named(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], place: int) -> str:
    return f"token {place} ({ids[place]} {_text_of(tokenizer, ids[place])!r})"


def _text_of(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    return _decoded(tokenizer, [number])
