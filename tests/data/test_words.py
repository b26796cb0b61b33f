"""The vectorised word hashes against the plain reading of a text, character by character."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data import words as module
from data.characters import UNICODE, normal_form, spelled
from data.words import Words, batches, hash_word, ngram_hashes, words

REPOSITORY = Path(__file__).parents[2]
# Dense in what boundaries and normal forms trip over; plain st.text() seldom puts a digit next to a minus.
TRICKY = "ab Zé9 0\n\t.,'*_-+/<^=>#−–÷½²①日本ィ゛กำ๑ǅßſK\u00ad\u200b\u200d\ufeff\ufe0f\u0301\u20e3🙂١ΐ\x00\x1f\x7f\u2028\u00a0"
texts = st.lists(st.one_of(st.text(max_size=40), st.text(TRICKY, max_size=40)), max_size=6)


def read(found: Words, text: int) -> list[tuple[str, int]]:
    """(raw word, hash) of the words of one text."""
    first, end = found.text_offsets_N1[text : text + 2]
    return [(found.raw(word), int(found.hashes_W[word])) for word in range(first, end)]


@given(texts)
@example(["3 -", "5", "- 3", "x - 3", "3 - x", "− −3", "3 + - 4", "+", "\u00ad", "日3日", "\u200b-\u20093"])
@example(["−"])
def test_words_are_those_of_the_plain_reading_with_their_places_and_hashes(some: list[str]) -> None:
    found = words(some)
    for index, text in enumerate(some):
        spelled_out = spelled(text)
        assert read(found, index) == [(text[first:end], hash_word(normal.encode())) for normal, first, end in spelled_out]
        first_word = found.text_offsets_N1[index]
        for place, (_, first, end) in enumerate(spelled_out, int(first_word)):
            before = found.joined[found.text_starts_N1[index] : found.starts_W[place]]
            assert len(before.decode("utf-8", "surrogatepass")) == first
            assert found.ends_W[place] - found.starts_W[place] == len(text[first:end].encode("utf-8", "surrogatepass"))


@given(texts, st.integers(1, 30))
def test_words_do_not_depend_on_what_else_is_read_nor_on_the_batches(some: list[str], batch_bytes: int) -> None:
    whole = words(some)
    apart = module._joined([words([some[index] for index in batch]) for batch in batches(some, batch_bytes)] or [words([])])
    assert apart.joined == whole.joined
    assert all(np.array_equal(one, other) for one, other in zip(apart[:5], whole[:5], strict=True))
    assert whole.text_starts_N1[-1] == len(whole.joined) + 1 or not some


@given(st.text(max_size=60))
def test_a_word_is_what_survives_wrapping_case_and_typography(text: str) -> None:
    plain = [normal for normal, _, _ in spelled(text)]
    wrapped = text.replace(" ", "\n   ").replace("'", "’")
    assert [normal for normal, _, _ in spelled(wrapped)] == plain
    assert all(normal_form(normal) == normal for normal in plain)


@pytest.mark.parametrize(
    ("text", "read_as"),
    [
        ("Don't **stop**, well-known_names!", "don t stop well known names"),
        ("3 + 4 - 5*6 = x^2/7 < y", "3 + 4 - 5 6 x ^ 2 / 7 < y"),
        ("- bullet\n> quote\n# head a+b a<b", "bullet quote head a b a b"),
        ("−3 – 4 ÷ 5", "- 3 - 4 / 5"),
        ("STRASSE straße ＡＢＣ ﬁne e\u0301 é", "strasse strasse abc fine é é"),
        ("co\u00adoperate zero\u200bwidth 1\ufe0f\u20e3", "cooperate zero width 1\u20e3"),
        ("日本語 text 東京3", "日 本 語 text 東 京 3"),
        ("हिन्दी 한국어", "हिन्दी 한국어"),
    ],
)
def test_how_texts_are_read(text: str, read_as: str) -> None:
    assert " ".join(normal for normal, _, _ in spelled(text)) == read_as
    assert words([text]).hashes_W.tolist() == [hash_word(word.encode()) for word in read_as.split()]


def test_operators_never_look_into_another_text() -> None:
    assert [len(read(words(["3", "- x", "-", "4"]), index)) for index in range(4)] == [1, 1, 0, 1]


def test_hashes_are_the_same_in_every_process_and_on_every_machine() -> None:
    """The constants are what a version 1 of these hashes is; another value means another VERSION."""
    program = "from data.words import words; print(words(['Hello, extraordinarily 日 naïve world 3-4']).hashes_W.tolist())"
    for seed in ("0", "12345"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(PINNED)
    assert unicodedata.unidata_version == UNICODE


PINNED = [
    5080636040097930502, 9198942720498202103, 15964488530234681880, 311438967081058131,
    15778807517041683749, 18373812336840929140, 1411906215446565115, 724075451513816374,
]  # fmt: skip


def test_short_words_never_collide() -> None:
    """The mixing is a bijection of 8 bytes: 100,000 different numbers stay different."""
    numbers = np.random.default_rng(0).integers(1, 2**63, 100_000, dtype=np.uint64)
    assert len(set(module._mix(numbers.copy()).tolist())) == len(set(numbers.tolist()))
    found = words([" ".join(f"{first}{second}{third}" for first in "abc0" for second in "xyz1" for third in "klm2")])
    assert len(set(found.hashes_W.tolist())) == 64


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_a_hash_is_what_plain_integers_make_of_eight_bytes_at_a_time(letters: list[int]) -> None:
    word = bytes(97 + letter % 26 for letter in letters)
    hash_ = 0
    for first in range(0, len(word), 8):
        hash_ ^= int.from_bytes(word[first : first + 8], "little")
        hash_ = hash_ * 0xBF58476D1CE4E5B9 % 2**64
        hash_ = (hash_ ^ hash_ >> 32) * 0x94D049BB133111EB % 2**64
        hash_ ^= hash_ >> 29
    assert hash_word(word) == hash_


@given(texts, st.integers(1, 14))
def test_ngrams_are_all_of_each_text_and_none_of_two(some: list[str], n: int) -> None:
    found = words(some)
    grams = ngram_hashes(found, n)
    expected = []
    for index in range(len(some)):
        hashes = [hash_ for _, hash_ in read(found, index)]
        for first in range(len(hashes) - n + 1):
            total = 0
            for hash_ in hashes[first : first + n]:
                total = (total * module._BASE + hash_) % 2**64
            expected.append((total, int(found.text_offsets_N1[index]) + first, index))
    assert list(zip(*(column.tolist() for column in grams), strict=True)) == expected
    assert grams.hashes_G.dtype == np.uint64 and grams.first_G.dtype == grams.text_G.dtype == np.int64


def test_an_ngram_of_no_word_is_refused() -> None:
    with pytest.raises(ValueError, match="n-grams of 0 words"):
        ngram_hashes(words(["a"]), 0)


@given(texts, st.integers(1, 50))
def test_batches_cover_everything_once_and_in_order(some: list[str], batch_bytes: int) -> None:
    found = list(batches(some, batch_bytes))
    assert [index for batch in found for index in batch] == list(range(len(some)))
    assert all(len(batch) == 1 or sum(len(some[index]) + 1 for index in batch) <= batch_bytes for batch in found)
