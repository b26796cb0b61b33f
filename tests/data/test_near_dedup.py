import hashlib
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data import minhash, words
from data.copies import keys_of
from data.minhash import LEAST_SHINGLES, NUM_SLOTS, SHINGLE_WORDS, Signatures, signatures, similarity
from data.near_dedup import (
    NearDuplicates,
    candidate_probability,
    find_buckets,
    least_agreeing,
    least_shingles,
    near_duplicates,
    rows_per_band,
)

REPOSITORY = Path(__file__).parents[2]
VOCABULARY = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "eno", "ist", "orum", "ul")]


def make_text(num_words: int, seed: int) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=num_words)


def changed(text: Sequence[str], places: Sequence[int]) -> list[str]:
    return [f"other{place}" if place in places else word for place, word in enumerate(text)]


def shingle_set(text: str) -> set[tuple[str, ...]]:
    """Of a text that has nothing to normalise."""
    spelled = text.split()
    return {tuple(spelled[first : first + SHINGLE_WORDS]) for first in range(len(spelled) - SHINGLE_WORDS + 1)}


def jaccard(one: str, other: str) -> float:
    first, second = shingle_set(one), shingle_set(other)
    return len(first & second) / len(first | second)


def compare(
    texts: Sequence[str],
    preference: Sequence[Sequence[float]] = (),
    threshold: float = 0.8,
    eligible: Sequence[bool] | None = None,
) -> list[int]:
    """original_N of the texts, whose trace_ids are their row numbers."""
    keys_N2 = keys_of([f"{row:032x}" for row in range(len(texts))])
    eligible_N = np.ones(len(texts), np.bool_) if eligible is None else np.array(eligible)
    found = near_duplicates(signatures(texts), eligible_N, [np.array(column) for column in preference], keys_N2, threshold)
    return found.original_N.tolist()


# --- signatures --------------------------------------------------------------------------------------------------


def slow_signature(text: str) -> bytes:
    """One shingle and one slot at a time, in Python's integers."""
    hashes = words.ngram_hashes(words.words([text]), SHINGLE_WORDS).hashes_G.tolist()
    slots: dict[int, int] = {}
    turn = 0
    while len(slots) < NUM_SLOTS:
        thrown: dict[int, int] = {}
        for shingle in hashes:
            drawn = shingle * 0x9E3779B97F4A7C15 ** (turn + 1) % (1 << 64)
            slot, value = drawn >> 57, drawn >> 26 & 0x7FFFFFFF
            thrown[slot] = min(value, thrown.get(slot, value))
        if turn == 0 and -NUM_SLOTS * np.log1p(-len(thrown) / NUM_SLOTS) < LEAST_SHINGLES:
            return bytes(NUM_SLOTS)
        slots = thrown | slots
        turn += 1
    return bytes(slots[slot] & 0xFF for slot in range(NUM_SLOTS))


texts_of_any_kind = st.lists(
    st.one_of(
        st.builds(lambda count, seed: " ".join(make_text(count, seed)), st.integers(0, 90), st.integers(0, 5)),
        st.text(st.sampled_from("aAbé 1.\n漢"), max_size=80),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(texts_of_any_kind)
def test_signatures_equal_those_of_a_slow_loop_over_shingles_and_slots(texts: list[str]) -> None:
    found = signatures(texts)
    assert found.slots_NS.shape == (len(texts), NUM_SLOTS)
    assert [row.tobytes() for row in found.slots_NS] == [slow_signature(text) for text in texts]


def test_a_signature_depends_on_its_own_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(make_text(20 * row, row)) for row in range(12)]
    together = signatures(texts)
    monkeypatch.setattr(minhash, "_BATCH_CHARACTERS", 500)
    for row, text in enumerate(texts):
        np.testing.assert_array_equal(signatures([text]).slots_NS[0], together.slots_NS[row])
    np.testing.assert_array_equal(signatures(texts).slots_NS, together.slots_NS)


def test_another_process_with_another_hash_seed_finds_the_same_bytes() -> None:
    program = (
        "from data.minhash import signatures; "
        "print(signatures([' '.join(f'w{i % 91}é' for i in range(60))]).slots_NS.tobytes().hex())"
    )
    command, environment = [sys.executable, "-c", program], {"PYTHONHASHSEED": "1234"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    here = signatures([" ".join(f"w{number % 91}é" for number in range(60))]).slots_NS
    assert bytes.fromhex(done.stdout) == here.tobytes()


def test_a_changed_signature_needs_a_new_version() -> None:
    found = signatures([" ".join(make_text(200, 7))]).slots_NS.tobytes()
    assert (minhash.VERSION, hashlib.sha256(found).hexdigest()[:16]) == GOLDEN


GOLDEN = (101, "e7a4b82fb4c1a221")


def test_case_punctuation_and_line_breaks_leave_no_trace() -> None:
    plain = " ".join(make_text(120, 1))
    dressed = textwrap.fill(plain.upper(), 31).replace(" ", ", ").replace("\n", '\n> "')
    np.testing.assert_array_equal(signatures([plain]).slots_NS, signatures([dressed]).slots_NS)


@pytest.mark.parametrize("num_words", [64, 340, 1500])
def test_agreement_estimates_the_exact_jaccard_similarity_better_than_128_permutations_would(num_words: int) -> None:
    rng = random.Random(num_words)
    pairs = []
    for seed in range(100):
        text = make_text(num_words, seed)
        places = rng.sample(range(num_words), rng.randrange(1, num_words // 20 + 2))
        pairs.append((" ".join(text), " ".join(changed(text, places))))
    exact_N = np.array([jaccard(one, other) for one, other in pairs])
    one_NS, other_NS = (signatures(side).slots_NS for side in zip(*pairs, strict=True))
    error_N = similarity(np.count_nonzero(one_NS == other_NS, axis=1)) - exact_N
    classical = np.sqrt(np.mean(exact_N * (1 - exact_N)) / NUM_SLOTS)
    assert abs(error_N.mean()) < 3 * classical / np.sqrt(len(pairs))
    assert np.sqrt(np.mean(error_N**2)) < 1.05 * classical  # 100 pairs know it to 7 %


def test_texts_that_share_nothing_are_estimated_at_nothing() -> None:
    found = signatures([" ".join(make_text(300, seed)) for seed in range(60)]).slots_NS
    agreeing = (found[:, None] == found[None]).sum(axis=2)[np.triu_indices(60, 1)]
    assert abs(similarity(agreeing).mean()) < 0.001
    assert similarity(np.array([NUM_SLOTS]))[0] == 1.0


def test_different_shingles_are_counted_and_repeated_ones_are_not() -> None:
    counted = [signatures([" ".join(make_text(49, seed))]).shingles_N[0] for seed in range(40)]
    assert abs(np.mean(counted) - 45) < 3 * 3 / np.sqrt(40)
    assert signatures(["0 1 " * 400]).shingles_N[0] < 3
    assert signatures([" ".join(make_text(20_000, 1))]).shingles_N[0] == pytest.approx(621, abs=1)


# --- which texts are compared ------------------------------------------------------------------------------------


def test_from_least_shingles_on_a_changed_word_in_the_middle_can_be_a_near_duplicate() -> None:
    for threshold in (0.6, 0.7, 0.8, 0.9, 0.95):
        enough = least_shingles(threshold)
        assert (enough - 5) / (enough + 5) >= threshold - 1e-12 > (enough - 1 - 5) / (enough - 1 + 5) - 1e-12
        assert enough >= LEAST_SHINGLES
    assert least_shingles(0.8) == 45


def test_short_texts_that_differ_in_their_last_number_are_two_lessons() -> None:
    work = make_text(30, 2)
    assert compare([" ".join([*work, "65"]), " ".join([*work, "66"])]) == [-1, -1]


def test_grids_that_share_all_their_few_shingles_are_left_alone() -> None:
    grids = [" ".join(random.Random(seed).choices("01", k=400)) for seed in (1, 2)]
    assert jaccard(*grids) == 1.0
    assert compare(grids) == [-1, -1]


def test_two_answers_to_one_long_prompt_are_compared_without_it() -> None:
    prompt, answers = " ".join(make_text(2000, 1)), [" ".join(make_text(150, seed)) for seed in (2, 3)]
    assert compare(answers) == [-1, -1]
    assert compare([f"{prompt}\n{answer}" for answer in answers]) == [-1, 0]  # what the docstring warns of


# --- who is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_changes", [0, 1, 4])
def test_a_lightly_edited_copy_names_its_original(num_changes: int) -> None:
    text = make_text(340, 1)
    copy = changed(text, range(10, 340, 80)[:num_changes])
    assert compare([" ".join(make_text(340, 9)), " ".join(text), " ".join(copy)]) == [-1, -1, 1]


def test_a_copy_with_a_tenth_of_its_words_changed_is_no_duplicate() -> None:
    text = make_text(340, 1)
    assert compare([" ".join(text), " ".join(changed(text, range(0, 340, 10)))]) == [-1, -1]


def test_the_preferred_copy_stays_by_the_first_column_then_the_next_then_the_trace_id() -> None:
    text = make_text(340, 1)
    copies = [" ".join(changed(text, [place])) for place in (40, 120, 200, 280)]
    not_verified, tokens = [1, 0, 0, 1], [10, 30, 20, 5]
    assert compare(copies, [not_verified, tokens]) == [2, 2, -1, 2]
    assert compare(copies, [not_verified]) == [1, -1, 1, 1]
    assert compare(copies, [tokens]) == [3, 3, 3, -1]
    assert compare(copies) == [-1, 0, 0, 0]


def test_a_rejected_copy_is_neither_original_nor_duplicate() -> None:
    text = " ".join(make_text(100, 1))
    assert compare([text, text, text], eligible=[False, True, True]) == [-1, -1, 1]
    assert compare([text, text], eligible=[False, False]) == [-1, -1]


def test_of_a_chain_more_than_one_link_is_kept() -> None:
    """Each link redraws twelve slots of the one before, so neighbours stand at 0.91, the next but one at 0.81, and so on."""
    rng = np.random.default_rng(0)
    chain_NS = np.repeat(rng.integers(0, 256, (1, NUM_SLOTS), dtype=np.uint8), 5, axis=0)
    for link in range(1, 5):
        chain_NS[link:, 12 * link : 12 * link + 12] += 1
    for order in permutations(range(5)):
        found = decide(chain_NS, order, 0.85).original_N
        assert np.count_nonzero(found < 0) in (2, 3)


def test_in_doubt_both_stay() -> None:
    assert least_agreeing(0.8) == 107
    for threshold in (0.6, 0.7, 0.8, 0.9, 0.95):
        estimate = float(similarity(np.array([least_agreeing(threshold)]))[0])
        assert 0.01 < estimate - threshold < 0.05
        assert least_agreeing(threshold) <= NUM_SLOTS


def test_a_threshold_that_signatures_cannot_serve_is_refused() -> None:
    for threshold in (0.5, 0.99, float("nan")):
        with pytest.raises(ValueError, match=r"expected 0\.6 to 0\.95"):
            compare(["a"], threshold=threshold)


def test_no_traces_have_no_duplicates() -> None:
    assert compare([]) == []
    assert compare([""]) == [-1]


# --- against the obvious way -------------------------------------------------------------------------------------


def slow_near_duplicates(slots_NS: NDArray[np.uint8], order: Sequence[int], threshold: float) -> list[int]:
    """Every trace, best first, against every trace kept before it."""
    original, kept, rows = [-1] * len(slots_NS), list[int](), rows_per_band(threshold)
    for row in order:
        found = [
            (np.count_nonzero(slots_NS[row] == slots_NS[other]), -rank, other)
            for rank, other in enumerate(kept)
            if any(
                (slots_NS[row, first : first + rows] == slots_NS[other, first : first + rows]).all()
                for first in range(0, NUM_SLOTS - rows + 1, rows)
            )
        ]
        if found and max(found)[0] >= least_agreeing(threshold):
            original[row] = max(found)[2]
        else:
            kept.append(row)
    return original


@st.composite
def families(draw: st.DrawFn) -> NDArray[np.uint8]:
    """At most 16 signatures, mutants of a few: the bound on comparisons in a bucket is never met."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_rows, num_sources = draw(st.integers(1, 16)), draw(st.integers(1, 4))
    sources = rng.integers(0, 256, (num_sources, NUM_SLOTS), dtype=np.uint8)
    slots_NS = sources[rng.integers(0, num_sources, num_rows)]
    mutated = rng.random(slots_NS.shape) < draw(st.sampled_from([0.02, 0.1, 0.15, 0.2]))
    return np.where(mutated, rng.integers(0, 256, slots_NS.shape, dtype=np.uint8), slots_NS)


def decide(slots_NS: NDArray[np.uint8], order: Sequence[int], threshold: float) -> NearDuplicates:
    """In the order of preference given; trace keys would decide the other way round."""
    num_rows = len(slots_NS)
    rank_N = np.empty(num_rows)
    rank_N[list(order)] = np.arange(num_rows)
    keys_N2 = np.repeat(np.arange(num_rows, 0, -1, dtype=np.uint64)[:, None], 2, axis=1)
    found = Signatures(slots_NS, np.full(num_rows, 400, np.float32))
    return near_duplicates(found, np.ones(num_rows, np.bool_), [np.zeros(num_rows), rank_N], keys_N2, threshold)


@settings(max_examples=150, deadline=None)
@given(families(), st.randoms(use_true_random=False), st.sampled_from([0.6, 0.7, 0.8, 0.9]))
def test_decisions_equal_those_of_a_slow_loop_over_all_pairs(
    slots_NS: NDArray[np.uint8], shuffler: random.Random, threshold: float
) -> None:
    order = shuffler.sample(range(len(slots_NS)), len(slots_NS))
    found = decide(slots_NS, order, threshold)
    assert found.original_N.tolist() == slow_near_duplicates(slots_NS, order, threshold)
    for row, original in enumerate(found.original_N.tolist()):
        if original >= 0:
            assert found.original_N[original] == -1
            assert order.index(original) < order.index(row)
            assert found.similarity_N[row] >= np.float32(threshold)


@settings(max_examples=60, deadline=None)
@given(families(), st.randoms(use_true_random=False))
def test_the_order_of_rows_decides_nothing(slots_NS: NDArray[np.uint8], shuffler: random.Random) -> None:
    num_rows = len(slots_NS)
    order = shuffler.sample(range(num_rows), num_rows)
    keys_N2 = np.repeat(np.random.default_rng(1).permutation(num_rows).astype(np.uint64)[:, None], 2, axis=1)

    def run(rows: list[int]) -> dict[int, int]:
        found = Signatures(slots_NS[rows], np.full(num_rows, 400, np.float32))
        original_N = near_duplicates(found, np.ones(num_rows, np.bool_), [], keys_N2[rows]).original_N.tolist()
        return {rows[row]: original if original < 0 else rows[original] for row, original in enumerate(original_N)}

    assert run(order) == run(list(range(num_rows)))


def test_a_bucket_holds_exactly_the_traces_that_agree_in_its_band() -> None:
    rng = np.random.default_rng(4)
    slots_NS = rng.integers(0, 3, (60, NUM_SLOTS), dtype=np.uint8)
    rows_R = rng.permutation(60)[:50]
    buckets = find_buckets(slots_NS, rows_R, rows=3)
    members: dict[int, set[int]] = {}
    for rank in range(50):
        for bucket in buckets.bucket_M[buckets.first_R1[rank] : buckets.first_R1[rank + 1]].tolist():
            members.setdefault(bucket, set()).add(rank)
    expected: dict[tuple[int, bytes], set[int]] = {}
    for rank, row in enumerate(rows_R):
        for band in range(NUM_SLOTS // 3):
            expected.setdefault((band, slots_NS[row, 3 * band : 3 * band + 3].tobytes()), set()).add(rank)
    assert sorted(members) == list(range(buckets.num_buckets))
    assert sorted(map(sorted, members.values())) == sorted(sorted(ranks) for ranks in expected.values() if len(ranks) > 1)


def test_the_candidate_probability_at_the_threshold_is_98_percent_or_more() -> None:
    assert candidate_probability(0.5, 1) == 1 - 0.5**128
    for threshold in (0.6, 0.7, 0.8, 0.83, 0.95):
        assert candidate_probability(threshold, rows_per_band(threshold)) >= 0.98
    assert [rows_per_band(threshold) for threshold in (0.6, 0.7, 0.8, 0.83)] == [4, 5, 7, 8]


# --- many --------------------------------------------------------------------------------------------------------


def planted(num_rows: int, num_copies: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random signatures, of which the last `num_copies` are those of the first with a tenth of the slots drawn anew."""
    slots_NS = rng.integers(0, 256, (num_rows, NUM_SLOTS), dtype=np.uint8)
    copies = slots_NS[num_rows - num_copies :]
    copies[:] = slots_NS[:num_copies]
    redrawn = rng.random(copies.shape, dtype=np.float32) < 0.1
    copies[redrawn] = rng.integers(0, 256, int(redrawn.sum()), dtype=np.uint8)
    return slots_NS


def test_a_template_shared_by_thousands_takes_no_quadratic_time() -> None:
    rng = np.random.default_rng(0)
    slots_NS = rng.integers(0, 256, (4000, NUM_SLOTS), dtype=np.uint8)
    slots_NS[:, :70] = slots_NS[0, :70]  # ten bands of all 4,000; similarity 0.55
    slots_NS[3000:3100] = slots_NS[:100]
    started = time.process_time()
    found = decide(slots_NS, range(4000), 0.8)
    assert np.flatnonzero(found.original_N >= 0).tolist() == list(range(3000, 3100))
    assert found.original_N[3000:3100].tolist() == list(range(100))
    assert time.process_time() - started < 5  # 0.1 ms a trace; all pairs take minutes


@pytest.mark.long
def test_200_000_traces_take_few_bytes_each() -> None:
    """A process of its own: its highest resident memory above what stood before, with half of all traces copies."""
    program = """
import numpy as np, re
from pathlib import Path
from tests.data.test_near_dedup import decide, planted
def megabytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
slots_NS = planted(200_000, 100_000, np.random.default_rng(0))
decide(slots_NS[:100], range(100), 0.8)
Path("/proc/self/clear_refs").write_text("5")
before = megabytes("VmRSS")
found = decide(slots_NS, range(200_000), 0.8)
assert (found.original_N[100_000:] >= 0).mean() > 0.98  # slots drawn one by one are noisier than shingles
print(megabytes("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 80  # measured 45; 200,000 x (60 + 9 x 12) = 34 MB and the order given as a list
