"""Scanning for evaluation items: rules by example, and the whole of it against sets of tuples."""

import dataclasses
import itertools
import pickle
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.benchmarks import Item
from data.characters import spelled
from data.coarse import coarse_words, gram_hashes, is_member, sieved, strided_hashes
from data.decontaminate import Hit, parts, scan
from data.ngram_index import LEAST_WORDS, Source, build_index, open_index

ORIGINAL = (
    "A baker in a small town sells nineteen loaves before noon and twice as many after the church bells have rung. "
    "If every loaf costs 3 coins and he gives 7 coins to the poor, how many coins does he carry home that evening?"
)
SHORT = "Which river flows through the old capital before it turns north?"
FACT = "Which metal do the miners of Fasosur dig for?"


def item(text: str, name: str = "1", *, is_question: bool = True, is_packed: bool = False) -> Item:
    return Item("bench.jsonl", name, "question", text, is_question, is_packed)


def found(items: Sequence[Item], text: str, *, is_prompt: bool = False) -> list[Hit]:
    return scan(build_index(items), [text], [is_prompt])


@pytest.mark.parametrize("question", [ORIGINAL, SHORT, FACT])
@pytest.mark.parametrize(
    "disguise",
    [
        lambda text: text,
        lambda text: text.replace(" ", "\n"),
        lambda text: re.sub(r"(\w+) (\w+)", r"\1\n>   **\2**", text).upper(),
        lambda text: f"Some talk before it. {text} And some after it, as long as one likes.",
        lambda text: text.replace("?", "").replace(",", " –"),
    ],
)
def test_an_item_is_found_however_it_is_wrapped_quoted_or_embedded(question: str, disguise: type[str]) -> None:
    text = disguise(question)
    [hit] = found([item(question)], text)
    assert hit.source == Source("bench.jsonl", "1", "question")
    assert hit.coverage == hit.own_coverage == 1.0
    assert [word for word, *_ in spelled(text[hit.first : hit.end])] == [word for word, *_ in spelled(question)]
    assert text[hit.first :].startswith(hit.excerpt)


def test_half_of_an_original_is_a_leak_and_a_third_of_it_is_none() -> None:
    words = ORIGINAL.split()
    [hit] = found([item(ORIGINAL)], "He wrote: " + " ".join(words[: len(words) * 6 // 10]) + " and stopped.")
    assert hit.rule == "share" and 0.5 <= hit.coverage < 0.7
    assert not found([item(ORIGINAL)], " ".join(words[: len(words) // 3]))


def test_one_changed_word_hides_no_original_and_makes_another_question_of_a_short_one() -> None:
    assert found([item(ORIGINAL)], ORIGINAL.replace("church", "chapel"))
    assert not found([item(SHORT)], SHORT.replace("north", "south"))


def test_a_template_that_two_items_share_accuses_nobody() -> None:
    sums = [item(f"State the final answer to the following arithmetic problem: {sum_} =", sum_) for sum_ in ("12 + 34", "56 - 7")]
    assert not found(sums, "State the final answer to the following arithmetic problem: 12 - 34 =")
    assert not found(sums, "State the final answer to the following arithmetic problem: 99 + 1 =")
    [hit] = found(sums, "state the final answer\nto the following arithmetic problem: 56-7")
    assert hit.source.item == "56 - 7" and hit.rule == "core"


def test_boilerplate_around_an_item_may_be_missing_and_coverage_says_so() -> None:
    advice = " Think step by step and put nothing but the letter of the right answer into a box at the very end."
    [hit] = found([item(SHORT + advice), item(FACT + advice, "2")], f"I was asked: {SHORT}")
    assert hit.source.item == "1" and hit.own_coverage == 1.0 and hit.coverage < 0.5


def test_boilerplate_of_the_training_side_is_told_from_its_leaks() -> None:
    """A single item of a template is a stranger to the index. Two training prompts of the same template say what it is."""
    rules = (
        "You live on an island of knights and knaves. Knights always tell the truth and knaves always lie, "
        "and nobody else lives here at all. "
    )
    index = build_index([item(rules + "Ann says that Bob lies.")])
    assert scan(index, [rules + "Zoe says that Max and Ida tell the truth."])
    training = [rules + "Zoe says that Max tells the truth.", rules + "Eve says nothing."]
    informed = build_index([item(rules + "Ann says that Bob lies.")], training)
    assert not scan(informed, training)
    assert scan(informed, [rules + "Ann says that Bob lies."])
    assert index.key != informed.key


def test_short_items_match_whole_and_the_shortest_only_as_a_whole_prompt() -> None:
    assert found([item("Name the metal of Fasosur.")], "So: name the metal of Fasosur, please.")
    assert not found([item("Name the metal of Fasosur.")], "So: name the metal of Fasosurn, please.")
    assert not found([item("12 + 34 =")], "We know that 12 + 34 = 46.")
    assert not found([item("1 + 2 + 3 =")], "We know that 1 + 2 + 3 = 6.")
    assert found([item("1 + 2 + 3 =")], "1 + 2 +   3 =\n", is_prompt=True)
    assert [hit.rule for hit in found([item("12 * 34?")], "12 34", is_prompt=True)] == ["equal"]
    assert not found([item("12 + 34")], "12 - 34", is_prompt=True)


def test_yes_never_matches() -> None:
    answers = [item("yes", is_question=False), item("42", "2", is_question=False), item("It is iron.", "3", is_question=False)]
    index = build_index(answers)
    assert index.num_unsearched == 3
    assert not scan(index, ["yes", "42", "It is iron."], [True, True, True])


def test_a_packed_prompt_is_found_only_as_a_whole() -> None:
    packed = f"Below are two files. {ORIGINAL} {SHORT} What is wrong?"
    assert not found([item(packed, is_packed=True)], ORIGINAL, is_prompt=True)
    [hit] = found([item(packed, is_packed=True)], packed.replace(" ", "\n"), is_prompt=True)
    assert hit.rule == "equal" and (hit.first, hit.end) == (0, len(packed) - 1)


def test_equal_texts_are_one_entry_that_counts_its_items() -> None:
    index = build_index([item(SHORT, "2"), item(SHORT.upper(), "1"), item(f" {SHORT}\n", "3")])
    [hit] = scan(index, [SHORT])
    assert (index.num_entries, hit.source.item, hit.twins) == (1, "1", 2)


def test_an_item_all_of_whose_words_another_has_is_still_found() -> None:
    inner, outer = item(SHORT), item(f"Read this: {SHORT} Say why, and who told you so.", "2")
    assert {hit.source.item for hit in found([inner, outer], f"Tell me. {SHORT}")} == {"1"}
    assert {hit.source.item for hit in found([inner, outer], outer.text)} == {"1", "2"}


def test_places_are_counted_in_characters() -> None:
    text = f"Übrigens – 日本 🙂: {SHORT} Danach."
    [hit] = found([item(SHORT)], text)
    assert text[hit.first : hit.end] + "?" == SHORT


def test_every_part_of_a_conversation_is_a_text_of_its_own() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A", "reasoning_content": "R"},
    ]
    assert [tuple(part) for part in parts(messages)] == [  # type: ignore[arg-type]
        ("messages.0.content", "Be brief.", False),
        ("messages.1.content", "Q", True),
        ("messages.2.content", "A", False),
        ("messages.2.reasoning_content", "R", False),
    ]


def test_a_collision_of_hashes_is_no_hit() -> None:
    """The index is given the hashes of other words than those it holds: what a collision would look like."""
    for question in (ORIGINAL, SHORT):
        index = build_index([item(question)])
        forged = index.text.copy()
        forged[index.text.tobytes().index(b" the ") + 1] = ord("d")
        hits = scan(dataclasses.replace(index, text=forged), [question])
        assert all(hit.coverage < 1.0 for hit in hits)
        assert scan(index, [question])[0].coverage == 1.0


# --- against the plain way ---------------------------------------------------------------------------------------

VOCABULARY = ["w", "extraordinary1", "extraordinary2", "The", "7", "5x", "+", "-", "−", "été", "日本", "(so)", "–", "**"]
phrase = st.integers(0, 10**6).map(lambda seed: random.Random(seed).choices(VOCABULARY, k=random.Random(seed).randint(1, 20)))


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[str], list[str], list[str]]:
    """Items, boilerplate and texts put together from the same few phrases, so that they share much and seldom all."""
    phrases = draw(st.lists(phrase, min_size=2, max_size=6))

    def some(count: int) -> list[str]:
        chosen = draw(st.lists(st.lists(st.sampled_from(phrases), max_size=4), max_size=count))
        return [" ".join(itertools.chain(*pieces)) for pieces in chosen]

    return some(5), some(3), some(4)


def read(text: str) -> list[str]:
    return [word for word, *_ in spelled(text)]


def num_words(words: Sequence[str]) -> int:
    return sum(word[0] not in "+-/<^" for word in words)


def grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[first : first + n]) for first in range(len(words) - n + 1)]


def stands_in(needle: Sequence[str], hay: Sequence[str]) -> bool:
    return tuple(needle) in grams(hay, len(needle))


def own_words(words: list[str], others: list[list[str]], boilerplate: list[list[str]]) -> list[bool]:
    own = [True] * len(words)
    for first, gram in enumerate(grams(words, 8)):
        if any(stands_in(gram, other) for other in others) or sum(stands_in(gram, text) for text in boilerplate) > 1:
            own[first : first + 8] = [False] * 8
    return own


def is_leak(words: list[str], own: list[bool], text: list[str]) -> bool:
    """The rules of data/ngram_index.py, read out one by one."""
    if len(words) >= 26 and 2 * sum(own) >= len(words):
        covered = [False] * len(words)
        for first, gram in enumerate(grams(words, 13)):
            if stands_in(gram, text):
                covered[first : first + 13] = [True] * 13
        return 2 * sum(mine and found for mine, found in zip(own, covered, strict=True)) >= sum(own)
    if not any(own):
        return stands_in(words, text)
    first, end = own.index(True), len(own) - own[::-1].index(True)
    least = min(len(words), 8)
    first = max(0, min(first, end - least))
    return stands_in(words[first : max(end, first + least)], text)


@settings(max_examples=200, deadline=None)
@given(scenes())
def test_scanning_finds_what_sets_of_tuples_find(scene: tuple[list[str], list[str], list[str]]) -> None:
    questions, boilerplate, texts = scene
    hits = scan(build_index([item(text, text) for text in questions], boilerplate), texts)
    entries = [list(entry) for entry in dict.fromkeys(tuple(read(text)) for text in questions) if num_words(entry) >= LEAST_WORDS]
    others = [read(text) for text in dict.fromkeys(boilerplate)]
    expected = {
        (number, " ".join(entry))
        for number, text in enumerate(texts)
        for entry in entries
        if is_leak(entry, own_words(entry, [one for one in entries if one != entry], others), read(text))
    }
    assert {(hit.text, " ".join(read(hit.source.item))) for hit in hits} == expected
    assert len(hits) == len(expected)


@settings(max_examples=100, deadline=None)
@given(scenes())
def test_no_hit_falls_through_the_sieve(scene: tuple[list[str], list[str], list[str]]) -> None:
    questions, boilerplate, texts = scene
    index = build_index([item(text, text) for text in questions], boilerplate)
    everything = dataclasses.replace(index, is_open=True)
    assert scan(index, texts) == scan(everything, texts)
    assert scan(index, texts + questions, [True] * len(texts + questions)) == scan(
        everything, texts + questions, [True] * len(texts + questions)
    )


def test_a_long_packed_question_lets_prompts_pass_and_no_answers() -> None:
    index = build_index([item("packed " * 300, is_packed=True), item(ORIGINAL, "2")])
    answers = ["An answer of a few words.", "And another one."]
    assert [found.tolist() for found in sieved(index.sieve, answers, 300, [True, False])] == [[0]]
    assert [found.tolist() for found in sieved(index.sieve, answers)] == [[]]


def slow_code(word: str) -> int:
    """Of a coarse word, in plain integers."""
    first, second, third, fourth = (word.lower()[:4].encode() + bytes(4))[:4]
    return ((29 * first + second) * 163 + 29 * third + fourth) % 256


@given(st.one_of(st.text(max_size=60), st.text("aZ09@[`{/: \n\x10\x7fé日–", max_size=60)))
def test_coarse_words_are_runs_of_ascii_letters_and_digits_by_their_first_four(text: str) -> None:
    joined = text.encode("utf-8", "surrogatepass")
    runs = list(re.finditer(rb"[A-Za-z0-9]+", joined))
    coarse = coarse_words(joined)
    assert coarse.codes_V.tolist() == [slow_code(run[0].decode()) for run in runs]
    assert coarse.pairs_V.tolist() == [run.start() // 2 for run in runs]


@given(st.lists(st.integers(0, 255), max_size=30))
def test_every_fourth_ngram_of_eight_codes_is_what_is_looked_up(codes: list[int]) -> None:
    codes_V = np.array(codes, np.uint8)
    for n in (4, 8):
        grams = gram_hashes(codes_V, n)
        assert len(grams) == max(0, len(codes) - n + 1)
        equal = {
            (int(grams[i]) == int(grams[j])) == (codes[i : i + n] == codes[j : j + n])
            for i in range(len(grams))
            for j in range(i)
        }
        assert equal <= {True}
    assert strided_hashes(codes_V).tolist() == gram_hashes(codes_V, 8)[::4].tolist()


def test_the_sieve_lets_few_innocents_pass() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices([f"w{number}" for number in range(500)], k=300)) for _ in range(200)]
    index = build_index([item(" ".join(text.split()[:30]), str(number)) for number, text in enumerate(texts[:100])])
    assert np.concatenate(list(sieved(index.sieve, texts))).tolist() == list(range(100))


@settings(max_examples=30, deadline=None)
@given(scenes(), st.randoms(use_true_random=False))
def test_neither_order_nor_company_nor_mapping_changes_what_is_found(
    tmp_path_factory: pytest.TempPathFactory, scene: tuple[list[str], list[str], list[str]], rng: random.Random
) -> None:
    questions, boilerplate, texts = scene
    items = [item(text, str(number)) for number, text in enumerate(questions)]
    index = build_index(items, boilerplate)
    shuffled = build_index(rng.sample(items, len(items)), boilerplate[::-1])
    assert index.key == shuffled.key
    folder: Path = tmp_path_factory.mktemp("index")
    index.write(folder)
    expected = scan(index, texts)
    for other in (shuffled, open_index(folder), pickle.loads(pickle.dumps(index))):
        assert scan(other, texts) == expected
    alone = [hit._replace(text=number) for number, text in enumerate(texts) for hit in scan(index, [text])]
    assert alone == expected


@given(st.lists(st.integers(0, 50)), st.lists(st.integers(0, 50)))
def test_membership_is_that_of_a_set(values: list[int], table: list[int]) -> None:
    found_ = is_member(np.array(values, np.uint64), np.sort(np.array(table, np.uint64)))
    assert found_.tolist() == [value in set(table) for value in values]


def test_an_index_of_nothing_finds_nothing() -> None:
    assert scan(build_index([]), ["", "some text", ORIGINAL], [True, True, True]) == []
    assert scan(build_index([item(ORIGINAL)]), []) == []
