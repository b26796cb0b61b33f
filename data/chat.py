"""Messages to token ids and a loss mask, through the model's own chat template.

The template is the only authority on what a conversation looks like, at training time and at serving time. Masks come
from character offsets of the rendered text; nothing ever searches for an answer inside it (`str.find` masks the first
occurrence, which may stand in the prompt).
"""

import functools
import hashlib
import importlib.metadata
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput

IGNORE_INDEX = -100
RENDERER_VERSION = 1
"""Of what encode_conversation makes of the same messages, tokenizer and template: raised with every change of it, so that what
was rendered before is rendered again."""
_RENDERING_LIBRARIES = ("transformers", "tokenizers", "jinja2")


class Encoded(NamedTuple):
    """ids and mask have equal length; mask[i] is True where token i is the model's own and is trained."""

    ids: list[int]
    mask: list[bool]


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
        raise UnusableInput("chat template: the prompt's tool schemas do not appear in it; use a template that renders tools")
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


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


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, object]]) -> Encoded:
    """Ids of the whole conversation, and the mask of every assistant turn with its reasoning and its stop token.

    Raises:
        UnusableInput: when the template does not render earlier turns the way it prompted for them (a template that
            strips reasoning from the history, say), or when nothing at all would be trained.
    """
    dialect = dialect_of(tokenizer)
    text, spans = render(tokenizer, messages), []
    stop = dialect.stop_tokens[0]
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(prefix := render(tokenizer, messages[:index], add_generation_prompt=True))
        until = render(tokenizer, messages[: index + 1])
        if not (text.startswith(prefix) and text.startswith(until)):
            raise UnusableInput(
                f"chat template: turn {index} is rendered differently inside the conversation than it was prompted; "
                "use a template that keeps earlier reasoning"
            )
        end = len(until)
        if (turn_end := until.rfind(stop, start)) >= 0:
            end = turn_end + len(stop)  # a newline that the template writes after the stop is never generated
        elif following := next((marker for marker in dialect.stop_tokens if text.startswith(marker, end)), ""):
            end += len(following)  # GLM: the next role marker, of a user or of a tool, is the stop, and must be learnt
        elif index == len(messages) - 1:
            text, end = text + stop, end + len(stop)
        spans.append((start, end))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]  # type: ignore[assignment]
    mask = [any(start <= left and right <= end and left < right for start, end in spans) for left, right in offsets]
    if not any(mask):
        raise UnusableInput("conversation has no assistant token to train on; expected at least one assistant turn with content")
    return Encoded(encoded["input_ids"], mask)  # type: ignore[arg-type]


def pad_batch(batch: Sequence[Encoded], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids_BT and labels_BT (int64); labels are IGNORE_INDEX where the mask is False or the row is padding.

    Labels are not shifted: labels[b, t] is the id at t, to be predicted from t - 1.
    """
    length = max(len(row.ids) for row in batch)
    ids_BT = torch.full((len(batch), length), pad_id, dtype=torch.long)
    labels_BT = torch.full((len(batch), length), IGNORE_INDEX, dtype=torch.long)
    for index, row in enumerate(batch):
        ids = torch.tensor(row.ids)
        ids_BT[index, : len(row.ids)] = ids
        labels_BT[index, : len(row.ids)] = torch.where(torch.tensor(row.mask), ids, IGNORE_INDEX)
    return ids_BT, labels_BT
