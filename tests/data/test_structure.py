import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.structure import count_reasoning_tokens, split_reasoning


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("2+2=4.</think>4", True, ("2+2=4.", "4", "")),
        (" a\n b </think>\n\n4 \n", True, ("a\n b", "4", "")),
        ("</think>4", True, ("", "4", "")),
        ("2+2=4.</think>", True, ("2+2=4.", "", "")),
        ("2+2=4. So the answer is 4", True, ("", "", "think_unclosed")),
        ("", True, ("", "", "think_unclosed")),
        ("<think>r</think>4", True, ("<think>r", "4", "think_reopened")),
        ("r</think>4<think>more", True, ("r", "4<think>more", "think_reopened")),
        ("r</think>4</think>5", True, ("r", "4</think>5", "think_reclosed")),
        ("<think>r</think>4", False, ("r", "4", "")),
        ("\n<think>\nr\n</think>\n4", False, ("r", "4", "")),
        ("<think>r, and r, and r", False, ("", "", "think_unclosed")),
        ("<think>r<think>s</think>4", False, ("r<think>s", "4", "think_reopened")),
        ("Sure. <think>r</think>4", False, ("r", "4", "think_misplaced")),
        ("r</think>4", False, ("r", "4", "think_misplaced")),
        ("r</think>4<think>s</think>5", False, ("r", "4<think>s</think>5", "think_misplaced")),
        (" just 4 ", False, ("", "just 4", "")),
        ("", False, ("", "", "")),
    ],
)
def test_outputs_are_taken_apart_as_written(text: str, opened: bool, expected: tuple[str, str, str]) -> None:
    assert tuple(split_reasoning(text, prompt_opens_think=opened)) == expected


pieces = st.lists(st.sampled_from(["<think>", "</think>", "4", " ", "so", "\n"]), max_size=8).map("".join)


@given(pieces, st.booleans())
def test_an_answer_never_comes_out_of_a_block_that_did_not_close(text: str, opened: bool) -> None:
    parsed = split_reasoning(text, prompt_opens_think=opened)
    if "</think>" not in text and (opened or "<think>" in text):
        assert parsed == ("", "", "think_unclosed")


@given(pieces, st.booleans())
def test_nothing_is_invented_and_a_clean_parse_holds_no_tag(text: str, opened: bool) -> None:
    parsed = split_reasoning(text, prompt_opens_think=opened)
    assert parsed.reasoning in text and parsed.answer in text
    if not parsed.problem:
        assert "think>" not in parsed.reasoning + parsed.answer


class ThreeTokenTags:
    """A vocabulary in which a tag is three ids."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [7, 8, 9] if text == "</think>" else [7, 9]


class OneTokenTags:
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [90] if text == "</think>" else [80]


def test_reasoning_tokens_run_up_to_and_including_the_first_close() -> None:
    assert count_reasoning_tokens([1, 2, 90, 3, 90], OneTokenTags(), prompt_opens_think=True) == 3
    assert count_reasoning_tokens([80, 2, 90, 3], OneTokenTags(), prompt_opens_think=False) == 3
    assert count_reasoning_tokens([1, 7, 8, 7, 8, 9, 4], ThreeTokenTags(), prompt_opens_think=True) == 6


def test_a_block_that_never_closes_is_all_reasoning_and_no_block_is_none() -> None:
    assert count_reasoning_tokens([1, 2, 3], OneTokenTags(), prompt_opens_think=True) == 3
    assert count_reasoning_tokens([80, 2, 3], OneTokenTags(), prompt_opens_think=False) == 3
    assert count_reasoning_tokens([1, 2, 3], OneTokenTags(), prompt_opens_think=False) == 0
    assert count_reasoning_tokens([], OneTokenTags(), prompt_opens_think=True) == 0
