"""Ids back to text: what the tokenizer itself would say, byte for byte."""

import random

from configs.schema import Teacher
from data.decoding import decode
from teacher.engines import load_tokenizer

TOKENIZER = load_tokenizer(Teacher())


def test_decoding_equals_the_tokenizers_own_for_any_ids() -> None:
    """Halves of characters, ids beyond the vocabulary and special tokens included."""
    draw = random.Random(0)
    for _ in range(3000):
        ids = [draw.randrange(len(TOKENIZER) + 3) for _ in range(draw.randrange(30))]
        assert decode(TOKENIZER, ids) == TOKENIZER.decode(ids, skip_special_tokens=False)


def test_text_comes_back_as_it_was() -> None:
    text = "naïve – 日本語 🙂 <think>a</think>\n\t  b"
    assert decode(TOKENIZER, TOKENIZER.encode(text, add_special_tokens=False)) == text
