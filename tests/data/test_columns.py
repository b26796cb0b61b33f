"""Columns of sidecars come back as they went in, and are counted without being taken apart."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.columns import coded, num_rows, tally, words_of
from data.copies import keys_of

WORDS = st.lists(st.sampled_from(["stop", "length", "abort", "", "naïve", *map(str, range(60))]), max_size=80)


@given(WORDS, st.data())
def test_words_survive_and_are_counted(words: list[str], data: st.DataObject) -> None:
    column = coded(words)
    keep = data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words)))
    assert words_of(column) == words_of(words) == words and num_rows(column) == num_rows(words) == len(words)
    assert tally(column) == tally(words) == Counter(words)
    assert tally(column, keep) == tally(words, keep) == Counter(word for word, kept in zip(words, keep, strict=True) if kept)


def test_identities_in_one_string_are_those_of_a_list() -> None:
    identities = ["ab" * 16, "0f" * 16]
    assert words_of("".join(identities)) == identities and num_rows("".join(identities)) == 2
    assert keys_of("".join(identities)).tolist() == keys_of(identities).tolist()


@pytest.mark.parametrize("wrong", [None, 3, {"names": ["a"], "codes": "01"}, {"names": ["a"]}, "abc"])
def test_what_is_no_column_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="is no column"):
        words_of(wrong)  # type: ignore[arg-type]
    assert num_rows(wrong) in (-1, 0, 2)
