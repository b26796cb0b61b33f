"""Messages to token ids and a reason for each, through the model's own chat template.

The template is the only authority on what a conversation looks like, at training time and at serving time. Reasons come
from character offsets of the rendered text; nothing ever searches for an answer inside it (`str.find` masks the first
occurrence, which may stand in the prompt). What is trained is held to what is served, turn by turn: data/twin.py.

Shape suffixes: T tokens of a conversation, P parts of its text.
"""

import enum
import functools
import hashlib
import importlib.metadata
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from data.twin import Tokens, Turn, check_turn, first_difference

IGNORE_INDEX = -100
RENDERER_VERSION = 3
"""Of what encode_conversation makes of the same messages, tokenizer and template: raised with every change of it, so that what
was rendered before is rendered again."""
_RENDERING_LIBRARIES = ("transformers", "tokenizers", "jinja2")


class Reason(enum.IntEnum):
    """Why a token is trained or masked: one byte, as renderings store it."""

    OTHER = 0
    """Of a turn whose role is none of these."""
    TRAINED = 1
    """The model's own: reasoning, answer and stop of an assistant turn."""
    SYSTEM = 2
    """Of a system turn, and what the template writes before and around it; likewise the next two."""
    USER = 3
    TOOL = 4
    GENERATION_PROMPT = 5
    """The header of an assistant turn, which the server writes."""
    AFTER_STOP = 6
    """What the template writes after the stop, and no model ever does."""
    FIRST_TOKEN = 7
    """Nothing predicts it."""


MASKED = tuple(reason for reason in Reason if reason is not Reason.TRAINED)
_ROLES = {"system": Reason.SYSTEM, "user": Reason.USER, "tool": Reason.TOOL}


class Encoded(NamedTuple):
    """ids and reasons have equal length; reasons[i] is token i's Reason, as a byte when encode_conversation made it. A list of
    booleans will do where it only matters what is trained."""

    ids: list[int]
    reasons: Sequence[int]

    @property
    def mask(self) -> list[bool]:
        """True where the token is the model's own and is trained."""
        return [reason == 1 for reason in self.reasons]  # Reason.TRAINED; an enum's member takes twice the time of the number

    @property
    def trained(self) -> list[int]:
        """The model's own ids, in order."""
        return [token for token, reason in zip(self.ids, self.reasons, strict=True) if reason == 1]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one model family ends its turns.

    stop_tokens: strings whose ids end a generation. For GLM the first is the next role marker, because an assistant
    turn has no end token of its own; for ChatML-like templates it is the end-of-turn token the template writes.
    prompt_opens_think: True when the generation prompt already holds `<think>`, so that an output starts inside it.
    """

    stop_tokens: tuple[str, ...]
    prompt_opens_think: bool

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        return tuple(tokenizer.convert_tokens_to_ids(list(self.stop_tokens)))  # type: ignore[arg-type]


GLM_STOPS = ("<|user|>", "<|observation|>", "<|endoftext|>")
CHATML_STOPS = ("<|im_end|>", "<|endoftext|>")


def dialect_of(tokenizer: PreTrainedTokenizerBase) -> Dialect:
    """Reads the dialect off the tokenizer: role-marker stops, a ChatML end of turn, or the plain eos token. Once for each
    template and eos token, which may be changed in place."""
    eos_token: str | None = tokenizer.eos_token  # type: ignore[assignment]
    return _dialect_of(tokenizer, _template_text(tokenizer), eos_token)


@functools.lru_cache(maxsize=8)
def _dialect_of(tokenizer: PreTrainedTokenizerBase, template: str, eos_token: str | None) -> Dialect:
    vocabulary: dict[str, int] = tokenizer.get_added_vocab()  # type: ignore[operator]  (PreTrainedTokenizerBase's __getattr__ hides it)
    if all(marker in vocabulary for marker in ("<|user|>", "<|observation|>")):
        stops = GLM_STOPS
    elif "<|im_end|>" in vocabulary:
        stops = CHATML_STOPS
    elif eos_token:
        stops = (eos_token,)
    else:
        raise UnusableInput(f"{tokenizer.name_or_path}: tokenizer has no end-of-turn marker and no eos token; set eos_token")
    probe = render(tokenizer, [{"role": "user", "content": "x"}], add_generation_prompt=True)
    return Dialect(tuple(stop for stop in stops if stop in tokenizer.get_vocab()), probe.rstrip().endswith("<think>"))


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template, or all of them by name where there are several."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def rendering_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Whatever decides, besides the messages, what encode_conversation gives, by name: hashes of the tokenizer, its template and
    its special tokens; versions of this code and of the libraries. Where the tokenizer was loaded from is no part of it.

    Raises:
        UnusableInput: a tokenizer without offsets (no tokenizer.json), which encode_conversation cannot use either.
    """
    if not tokenizer.is_fast:
        raise UnusableInput(f"{tokenizer.name_or_path}: tokenizer without character offsets; add its tokenizer.json")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    state = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}  # left there by the last call
    special = [tokenizer.special_tokens_map, tokenizer.split_special_tokens]  # type: ignore[attr-defined]
    named = {"tokenizer": state, "chat_template": _template_text(tokenizer), "special_tokens": special}
    hashes = {name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for name, value in named.items()}
    libraries = {name: importlib.metadata.version(name) for name in _RENDERING_LIBRARIES}
    return {**hashes, "renderer": str(RENDERER_VERSION), **libraries}


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, object]],
    *,
    add_generation_prompt: bool = False,
    tools: str = "",
) -> str:
    """The conversation as text. Messages have `role`, `content` and, on assistant turns, `reasoning_content`. tools: JSON
    text of a list of tool schemas, or ""."""
    text = tokenizer.apply_chat_template(
        list(messages),  # type: ignore[arg-type]
        tools=json.loads(tools) if tools else None,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    assert isinstance(text, str)
    return text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, object]], tools: str = "") -> list[int]:
    """The ids a server would feed the model, generation prompt included. The template owns BOS: none is added twice.

    Raises:
        UnusableInput: the template drops the reasoning of an earlier turn, or the tool schemas. What the teacher does not
            see, its traces teach the student to leave empty.
    """
    text = render(tokenizer, messages, add_generation_prompt=True, tools=tools)
    _require_earlier_reasoning(tokenizer, messages, tools, text)
    if tools and text == render(tokenizer, messages, add_generation_prompt=True):
        raise _tools_left_out()
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def _tools_left_out() -> UnusableInput:
    return UnusableInput("chat template: the prompt's tool schemas do not appear in it; use a template that renders tools")


def _require_earlier_reasoning(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, object]], tools: str, text: str
) -> None:
    """Each turn's reasoning is in `text`, and not only because its words stand elsewhere too: rendered with a marker of
    its own in its place, the marker is there as well."""
    reasoned = [index for index, message in enumerate(messages) if str(message.get("reasoning_content") or "").strip()]
    if not reasoned:
        return
    markers = {index: f"reasoning of turn {index} {uuid.uuid4().hex}" for index in reasoned}
    marked = [
        {**message, "reasoning_content": markers[index]} if index in markers else message
        for index, message in enumerate(messages)
    ]
    probe = render(tokenizer, marked, add_generation_prompt=True, tools=tools)
    for index in reasoned:
        if markers[index] not in probe or str(messages[index]["reasoning_content"]).strip() not in text:
            raise UnusableInput(
                f"chat template: the reasoning of turn {index} is missing from the prompt; "
                "use a template that keeps earlier reasoning"
            )


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, object]],
    *,
    finish_reason: str | None = "stop",
    tools: str = "",
) -> Encoded:
    """Ids of the whole conversation, and every token's reason: every assistant turn is trained, with its reasoning and its stop.

    finish_reason: of the last turn. "stop": it has a stop, appended where the template leaves that to the next turn (GLM). None:
    nobody knows; it has one only if the template writes it. Anything else: it was cut; what it has may end anywhere, and none
    is appended. tools: JSON text of the schemas that stood in the prompt, or "".

    Raises:
        UnusableInput: the ids of a turn do not continue those it was or would be prompted with; reasoning, content or stop of
            one are not whole among the trained tokens; BOS stands there twice; tool schemas are not in the text; or nothing at
            all would be trained. Turn and token are named.
    """
    dialect = dialect_of(tokenizer)
    layout = _layout(tokenizer, messages, dialect, append_stop=finish_reason == "stop", tools=tools)
    encoded = tokenizer(layout.text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]  # type: ignore[assignment]
    offsets_T2 = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    tokens = Tokens(layout.text, ids, np.ascontiguousarray(offsets_T2[:, 0]), np.ascontiguousarray(offsets_T2[:, 1]))
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise UnusableInput(f"chat template: BOS {tokenizer.bos_token!r} stands twice at tokens 0 and 1; expected it once")
    reasons = _reasons(layout.parts, tokens.left_T)
    if Reason.TRAINED not in reasons and finish_reason in ("stop", None):
        raise UnusableInput("conversation has no assistant token to train on; expected at least one assistant turn with content")
    stop_ids = dialect.stop_ids(tokenizer)
    for turn in layout.turns:
        is_open = turn.index == len(messages) - 1 and finish_reason != "stop"
        check_turn(tokenizer, tokens, turn, messages[turn.index], () if is_open else stop_ids)
    return Encoded(ids, reasons)


class Part(NamedTuple):
    """A stretch of the text, from the last one's end to its own, all of one reason."""

    end: int
    reason: Reason


class Layout(NamedTuple):
    """A conversation as text. parts: in order, up to its end. turns: the assistant's."""

    text: str
    parts: list[Part]
    turns: list[Turn]


def _layout(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, object]],
    dialect: Dialect,
    *,
    append_stop: bool,
    tools: str,
) -> Layout:
    """append_stop: to a last turn that the template leaves without one."""
    rendered = functools.partial(render, tokenizer, tools=tools)
    text, parts, turns = rendered(messages), list[Part](), list[Turn]()
    if tools and text == render(tokenizer, messages):
        raise _tools_left_out()
    for index, message in enumerate(messages):
        is_last = index == len(messages) - 1
        if message["role"] != "assistant":
            end = len(text) if is_last else _end_of_given(rendered, messages[: index + 1], text)
            parts.append(Part(end, _ROLES.get(str(message["role"]), Reason.OTHER)))
            continue
        if index == 0:
            raise UnusableInput("turn 0 is an assistant's: nothing prompts it; begin the conversation with a system or user turn")
        prompt = rendered(messages[:index], add_generation_prompt=True)
        until = text if is_last else rendered(messages[: index + 1])
        for served in (prompt, until):
            if not text.startswith(served):
                raise _rendered_differently(tokenizer, index, text, served)
        turn = _turn(text, index, len(prompt), len(until), dialect)
        if turn.stop == turn.end and is_last and append_stop:
            text += dialect.stop_tokens[0]
            turn = turn._replace(end=len(text))
        turns.append(turn)
        parts += [
            Part(turn.start, Reason.GENERATION_PROMPT),
            Part(turn.end, Reason.TRAINED),
            Part(max(turn.end, len(until)), Reason.AFTER_STOP),
        ]
    return Layout(text, parts, turns)


def _end_of_given(rendered: Callable[..., str], messages: Sequence[Mapping[str, object]], text: str) -> int:
    """Where the last of these turns ends in the text, as far as the template tells: some refuse a system turn alone, or close
    behind a tool's what they leave open before another's. Only the reason of masked tokens hangs on it."""
    try:
        given = rendered(messages)
    except jinja2.TemplateError:
        return 0
    if text.startswith(given):
        return len(given)
    pairs = enumerate(zip(given, text, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(given), len(text)))


def _turn(text: str, index: int, start: int, until: int, dialect: Dialect) -> Turn:
    """until: where the template ends the turn. Its stop is the last one before that; or, where an assistant turn has none of its
    own (GLM), the role marker of the user or tool that follows, which must be learnt."""
    own = dialect.stop_tokens[0]
    if (stop := text.rfind(own, start, until)) >= 0:
        return Turn(index, start, stop, stop + len(own))  # a newline that the template writes after the stop is never generated
    following = next((marker for marker in dialect.stop_tokens if text.startswith(marker, until)), "")
    return Turn(index, start, until, until + len(following))


def _rendered_differently(tokenizer: PreTrainedTokenizerBase, index: int, text: str, served: str) -> UnusableInput:
    trained_ids, served_ids = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in (text, served))
    return UnusableInput(
        f"chat template: turn {index} is rendered differently inside the conversation than it was prompted: "
        f"{first_difference(tokenizer, trained_ids, served_ids)}; "  # type: ignore[arg-type]
        "use a template that keeps earlier reasoning and ends its prompt where the turn begins"
    )


def _reasons(parts: Sequence[Part], left_T: np.ndarray) -> bytes:
    """A Reason a token, of the part in which it begins. left_T: int64 offsets."""
    if not len(left_T):
        return b""
    ends = np.maximum.accumulate([part.end for part in parts])  # a stop may lie in the turn after it
    places_T = np.searchsorted(ends, left_T, side="right").clip(max=len(parts) - 1)
    reasons_T = np.array([part.reason for part in parts], np.uint8)[places_T]
    reasons_T[0] = Reason.FIRST_TOKEN
    return reasons_T.tobytes()


def ends_with_stop(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> bool:
    """Whether the last trained token ends a generation."""
    last = bytes(encoded.reasons).rfind(Reason.TRAINED)
    return last >= 0 and encoded.ids[last] in dialect_of(tokenizer).stop_ids(tokenizer)
