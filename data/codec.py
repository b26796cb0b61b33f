"""A tokenizer as data/asking.py wants it. Apart from it, because transformers takes a second to import."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from data.asking import Codec
from data.chat import dialect_of, encode_conversation, encode_prompt
from data.records import Message
from data.row_check import TrainedIds
from data.structure import count_reasoning_tokens


def codec_of(tokenizer: PreTrainedTokenizerBase) -> Codec:
    """What a model is asked and says, through its own template."""
    dialect = dialect_of(tokenizer)
    stop_ids = dialect.stop_ids(tokenizer)

    def decode(ids: Sequence[int]) -> str:
        spoken = list(ids[:-1] if ids and ids[-1] in stop_ids else ids)
        text = tokenizer.decode(spoken, skip_special_tokens=False)
        assert isinstance(text, str)
        return text

    def row_tokens(messages: tuple[Message, ...]) -> tuple[int, int]:
        own = encode_conversation(tokenizer, messages).trained
        reasoning = count_reasoning_tokens(own, tokenizer, prompt_opens_think=dialect.prompt_opens_think)
        return reasoning, len(own) - reasoning

    return Codec(lambda messages: encode_prompt(tokenizer, messages), decode, stop_ids, dialect.prompt_opens_think, row_tokens)


def trained_ids_of(tokenizer: PreTrainedTokenizerBase) -> TrainedIds:
    def trained_ids(messages: Sequence[Mapping[str, object]], finish_reason: str, tools: str) -> Sequence[int]:
        return encode_conversation(tokenizer, messages, finish_reason=finish_reason, tools=tools).trained

    return trained_ids
