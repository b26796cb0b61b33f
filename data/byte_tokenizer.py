"""The byte-level tokenizer of the embedded pair: 256 byte tokens, then the markers of one dialect."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def build_byte_tokenizer(markers: Sequence[str], *, eos: str, pad: str, chat_template: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids 0 to 255 are the bytes (in byte-level BPE's alphabet order) and 256.. are `markers`.

    Two dialects built from different markers share every byte id, as real teacher and student share their text.
    `<think>` and `</think>` are markers but not special: decoding with `skip_special_tokens` keeps them, as GLM and
    Qwen tokenizers do.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_tokens([AddedToken(marker, special="think>" not in marker, normalized=False) for marker in markers])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, chat_template=chat_template, clean_up_tokenization_spaces=False
    )
