"""Repetition, loops and restarts: shares by hand, slow references, and what reasoning rightly says again."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.filters import LoopFilter, RepetitionFilter, RestartsFilter
from data.filters import apply
from data.filters.loop import ending_period
from data.filters.repetition import _most_repeated, repeated_ngrams, repeated_share
from data.filters.restarts import announced, begun_again
from tests.data.make_run import make_prompt, make_trace

PROMPT = make_prompt("What is 2 + 2?")
WORDS = (
    "we", "then", "have", "that", "sum", "of", "both", "sides", "equals", "some", "other", "value", "so", "let", "us", "check",
    "it", "once", "more", "by", "hand",
)  # fmt: skip


def prose(num_words: int, seed: int = 0) -> str:
    """Sentences of 12 words drawn by chance, 5 to a paragraph."""
    chance = random.Random(seed)
    words = [f"{chance.choice(WORDS)}{chance.randrange(50) or ''}" for _ in range(num_words)]
    sentences = [" ".join(words[start : start + 12]) + "." for start in range(0, num_words, 12)]
    return "\n\n".join("\n".join(sentences[start : start + 5]) for start in range(0, len(sentences), 5))


def chain_sum(num_steps: int, seed: int = 0) -> str:
    """A long sum digit by digit, as the embedded teacher writes it: every line has the same form."""
    chance = random.Random(seed)
    steps = [(chance.randrange(1000), chance.randrange(1000)) for _ in range(num_steps)]
    return "\n".join(f"Now: {a} + {b}. So {a} plus {b} is {a + b}, carry {a % 10}." for a, b in steps)


def code(num_functions: int) -> str:
    """Functions of one form: signatures, a guard, a loop, a return."""
    return "\n\n".join(
        f"def step_{index}(values: list[int]) -> int:\n    if not values:\n        return {index}\n    total = 0\n"
        f"    for value in values:\n        total += value * {index}\n    return total"
        for index in range(num_functions)
    )


def repeats(text: str, **settings: float) -> str:
    return apply(make_trace(PROMPT, reasoning=text), RepetitionFilter.model_validate(settings))


# --- shares ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "share"),
    [(["ab", "ab"], 0.5), (["ab", " ab ", "", "cd"], 1 / 3), (["a", "b"], 0.0), ([], 0.0), (["", " "], 0.0), (["x"] * 4, 0.75)],
)
def test_the_repeated_share_is_that_of_the_characters_that_stood_before(parts: list[str], share: float) -> None:
    assert repeated_share(parts) == pytest.approx(share)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(2, 6))
def test_repeated_ngrams_are_those_that_a_set_of_tuples_finds(words: list[str], size: int) -> None:
    ngrams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    expected = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
    assert repeated_ngrams(words, size) == pytest.approx(expected)
    assert repeated_ngrams("".join(words), size) == pytest.approx(expected)
    assert _most_repeated(words, size) >= expected - 1e-12


def test_a_text_said_k_times_has_one_minus_one_over_k_of_repeated_ngrams() -> None:
    words = [str(number) for number in range(1_000)]
    assert repeated_ngrams(words * 4, 10) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (prose(600), ""),
        ("So the answer is four, or is it?\n" * 60, "repeated_lines"),
        ("\n\n".join([prose(60, 1).replace("\n", " ")] * 2 + [prose(60, 2).replace("\n", " ")] * 2 + ["end"]), ""),
        ("\n\n".join([prose(60, 1).replace("\n", " ")] * 6), "repeated_lines"),
        (" ".join([prose(120, 1).replace("\n", " ")] * 4), "repeated_ngrams"),
        ("因此答案是四，让我们再检查一次这个结果是否正确。" * 40, "repeated_ngrams"),
        (prose(190), ""),
        ("So the answer is four.\n" * 30, ""),  # 150 words are too few to judge
    ],
)
def test_a_text_that_says_most_of_itself_again_is_repetition(text: str, expected: str) -> None:
    assert repeats(text) == expected


def test_each_bound_is_the_recipe_s_and_the_bound_itself_is_allowed() -> None:
    twice = "\n\n".join([prose(300, 3)] * 2)
    assert repeats(twice, max_repeated_lines=0.5, max_repeated_paragraphs=0.5, max_repeated_ngrams=0.5) == ""
    assert repeats(twice, max_repeated_lines=0.49) == "repeated_lines"
    assert repeats(twice, max_repeated_paragraphs=0.49) == "repeated_paragraphs"
    assert repeats(twice, max_repeated_ngrams=0.45) == "repeated_ngrams"


LEGITIMATE = {
    "prose": prose(3_000),
    "a long sum": chain_sum(400),
    "a short sum": chain_sum(9),
    "spelling": "\n".join(f"letter {index} of the word is {chr(97 + index % 26)}" for index in range(300)),
    "functions": code(60),
    "a table": "\n".join(f"| {n} | {n * n} | {n**3} | {'even' if n % 2 == 0 else 'odd'} |" for n in range(300)),
    "cases": "\n\n".join(f"Case {n}: suppose that x = {n}. Then x squared is {n * n}, which is not prime." for n in range(120)),
    "a draft said again": "\n\n".join([prose(400, 5), "Let me write it down properly.", prose(400, 5)]),
    "checks": "\n".join(f"Check {n} mod 7 = {n % 7}. Good." for n in range(250)),
    "a proof": "\n\n".join(f"Step {n}. By the induction hypothesis for {n}, S({n}) = {n * (n + 1) // 2}." for n in range(100)),
    "a matrix": "\n".join(" ".join(str((row * column) % 31) for column in range(30)) for row in range(30)),
    "hex": "\n".join(f"{n:08x} {n * 2654435761 % 2**32:08x}" for n in range(200)),
    "rules of dashes": "\n\n".join(f"Section {n}\n{'-' * 80}\n{prose(24, n)}" for n in range(20)),
    "thirds": "1/3 = 0." + "3" * 300,
    "zeros": "x = [" + ", ".join(["0"] * 100) + "]",
    "a chorus": "\n\n".join(f"{prose(48, n)}\n\nRow, row, row your boat, gently down the stream." for n in range(12)),
    "dialogue": "\n".join(f"{'AB'[n % 2]}: {prose(12, n)}" for n in range(120)),
    "wait": "\n\n".join(f"Wait, {prose(36, n)} Hmm, let me check that again." for n in range(40)),
    "Chinese": "".join(chr(0x4E00 + (n * 7919) % 5000) for n in range(2_000)),
    "one restart": prose(600, 7) + "\n\nLet me start over.\n\n" + prose(600, 8),
    "a server": "\n".join(f"Then restart the service {n} and wait. It was written from scratch by team {n}." for n in range(40)),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_reasoning_that_repeats_its_form_is_neither_repetition_nor_loop_nor_restart(name: str) -> None:
    trace = make_trace(PROMPT, reasoning=LEGITIMATE[name], answer=LEGITIMATE[name])
    assert [apply(trace, chosen) for chosen in (RepetitionFilter(), LoopFilter(), RestartsFilter())] == ["", "", ""]


def test_an_answer_that_repeats_the_reasoning_s_draft_is_no_repetition() -> None:
    draft = prose(400)
    assert apply(make_trace(PROMPT, reasoning=draft, answer=draft), RepetitionFilter(max_repeated_ngrams=0.3)) == ""


# --- loops -------------------------------------------------------------------------------------------------------


def shortest_period(text: str, min_repeats: int, min_characters: int, max_period: int) -> int:
    """The definition, period by period and character by character."""
    text = text.rstrip()
    for period in range(1, min(max_period, len(text)) + 1):
        reach = max(min_repeats * period, min_characters)
        end = text[len(text) - reach :] if reach <= len(text) else ""
        if end and all(end[at] == end[at + period] for at in range(len(end) - period)):
            return period
    return 0


@settings(max_examples=60, deadline=None)
@given(
    st.text("ab", max_size=12), st.text("ab ", min_size=1, max_size=9), st.integers(0, 12), st.text("ab", max_size=3),
    st.integers(2, 4), st.integers(1, 30), st.integers(1, 12),
)  # fmt: skip
def test_the_period_is_the_shortest_that_the_definition_finds(
    start: str, cycle: str, times: int, tail: str, min_repeats: int, min_characters: int, max_period: int
) -> None:
    text = start + cycle * times + tail
    bounds = (min_repeats, min_characters, max_period)
    assert ending_period(text, *bounds) == shortest_period(text, *bounds)


@pytest.mark.parametrize(
    ("reasoning", "expected"),
    [
        ("It is 4. " + "Wait, no. " * 60, "ends_in_loop"),
        ("It is 4. " + "Wait, no. " * 60 + "Wait", "ends_in_loop"),  # a cycle cut short
        ("So: " + "\n".join(["0"] * 600), "ends_in_loop"),
        ("It is 4. " + (prose(60) + "\n") * 9, "ends_in_loop"),
        ("It is 4. " + (prose(60) + "\n") * 6, ""),
        ("Wait, no. " * 60 + "So it is 4.", ""),
        ("It is 4. " + "Wait, no. " * 40, ""),  # 400 characters
    ],
)
def test_a_text_that_ends_in_one_cycle_is_a_loop(reasoning: str, expected: str) -> None:
    assert apply(make_trace(PROMPT, reasoning=reasoning), LoopFilter()) == expected


def test_an_answer_that_loops_is_found_behind_sound_reasoning() -> None:
    assert apply(make_trace(PROMPT, "4! " * 300), LoopFilter()) == "ends_in_loop"


# --- restarts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Wait, let me start over. Hmm. Let's start again, from the top. I'll begin anew.", 3),
        ("Okay, starting over. I should restart. LET ME START OVER", 3),
        ("不对，重新开始。让我从头开始。", 2),
        ("Restart the server, then start the job again.", 0),
        ("He wrote it from scratch; the film starts over after the credits.", 0),
        ("The loop will start over the list from index 0.", 0),
        ("Let me check again. Let me try again.", 0),
    ],
)
def test_only_what_the_writer_says_of_itself_is_a_restart(text: str, count: int) -> None:
    assert announced(text) == count


def test_the_same_long_passage_begun_again_is_counted_by_its_opening() -> None:
    opening = prose(60, 4).replace("\n", " ")
    text = "\n\n".join(f"{opening} and then {n}" for n in range(4))
    assert begun_again(text, 100) == 3 and begun_again("\n\n".join(["short"] * 9), 100) == 0 and begun_again("", 100) == 0


def test_more_restarts_than_allowed_are_a_reason() -> None:
    text = " ".join(f"Attempt {n} failed. Wait, let me start over." for n in range(6))
    assert apply(make_trace(PROMPT, reasoning=text), RestartsFilter()) == "restarts"
    assert apply(make_trace(PROMPT, reasoning=text), RestartsFilter(max_restarts=6)) == ""
    again = "\n\n".join([prose(60, 4).replace("\n", " ")] * 7)
    assert apply(make_trace(PROMPT, reasoning=again), RestartsFilter()) == "restarts"
