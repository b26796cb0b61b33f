import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.dedup import conversation_key, originals


def key(answer: str, reasoning: str = "r", question: str = "q") -> bytes:
    return conversation_key(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "reasoning_content": reasoning}]
    )


def test_whitespace_makes_no_difference_and_everything_else_does() -> None:
    assert key("a  b\n", " r") == key("a b", "r ")
    assert len({key("a"), key("A"), key("a."), key("a", "s"), key("a", question="p")}) == 5


def test_text_cannot_move_between_reasoning_and_answer_unseen() -> None:
    assert key("a b", "c") != key("b", "c a") != key("a b c", "")


def found(keys: str, preference: list[int], eligible: set[int]) -> dict[int, int]:
    """Each copy and the trace that it repeats."""
    keys_N = np.array([letter.encode() for letter in keys], "S16")
    original_N = originals(keys_N, np.array(preference), np.isin(np.arange(len(keys)), list(eligible)))
    return {row: int(original_N[row]) for row in np.flatnonzero(original_N >= 0).tolist()}


def test_the_preferred_eligible_copy_is_the_one_that_stays() -> None:
    assert found("xxyx", [0, 1, 2, 3], {0, 1, 2, 3}) == {1: 0, 3: 0}
    assert found("xxyx", [3, 1, 2, 0], {0, 1, 2, 3}) == {0: 3, 1: 3}
    assert found("xxyx", [0, 1, 2, 3], {1, 2, 3}) == {3: 1}
    assert found("xxyx", [0, 1, 2, 3], set()) == {}


@given(st.text("abcd", min_size=1, max_size=20), st.data())
def test_originals_are_what_a_dictionary_would_find_in_any_order(keys: str, data: st.DataObject) -> None:
    preference = data.draw(st.permutations(range(len(keys))))
    eligible = data.draw(st.sets(st.integers(0, len(keys) - 1)))
    best: dict[str, int] = {}
    for row in sorted(eligible, key=lambda row: preference[row]):
        best.setdefault(keys[row], row)
    expected = {row: best[keys[row]] for row in eligible - set(best.values())}
    assert found(keys, list(preference), eligible) == expected
