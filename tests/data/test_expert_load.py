"""Expert load: figures by hand, against slow references, and as properties of any counts."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import ExpertAlarm
from data.expert_load import (
    CountedLoad,
    collapses,
    hottest,
    js_by_chance,
    js_divergence,
    load_metrics,
    rank_loads,
    summarise,
    top_share,
)

LN2 = math.log(2)
Counts = st.lists(st.integers(0, 10_000), min_size=2, max_size=40)


def figures(*counts: int) -> tuple[float, ...]:
    """cv, max over mean, effective share, dead share of one layer."""
    return tuple(float(figure) for figure in load_metrics(np.array(counts)))


# --- by hand -----------------------------------------------------------------------------------------------------


def test_a_skewed_layer_by_hand() -> None:
    """4, 2, 2, 0: mean 2, variance (4 + 0 + 0 + 4) / 4 = 2, H = 0.5 ln 2 + 2 x 0.25 ln 4 = 1.5 ln 2, exp(H) / 4 = 0.7071."""
    assert figures(4, 2, 2, 0) == pytest.approx((math.sqrt(2) / 2, 2.0, 2**1.5 / 4, 0.25))


def test_nothing_routed_is_no_load() -> None:
    assert figures(0, 0) == (0.0, 0.0, 0.0, 0.0)


def test_ranks_hold_contiguous_blocks_of_experts() -> None:
    assert rank_loads(np.array([[1, 2, 3, 4, 5, 6]]), expert_parallel=3).tolist() == [[3, 7, 11]]
    with pytest.raises(ValueError, match="4 does not divide 6 experts"):
        rank_loads(np.array([1, 2, 3, 4, 5, 6]), expert_parallel=4)


def test_experts_that_are_uneven_can_be_even_over_ranks() -> None:
    counts_E = np.array([9, 1, 5, 5])
    assert figures(*counts_E)[1] == pytest.approx(1.8) and figures(*rank_loads(counts_E, 2)) == pytest.approx((0, 1, 1, 0))


def test_the_busiest_two_take_their_share() -> None:
    assert top_share(np.array([[4, 1, 3, 2], [5, 0, 5, 0]]), 2).tolist() == pytest.approx([0.7, 1.0])


def test_ties_among_the_hottest_keep_their_order() -> None:
    assert hottest(np.array([[1, 5, 5, 0, 7]])).tolist() == [[4, 1, 2]]


def test_divergence_of_a_known_pair() -> None:
    """(1, 0) against (1/2, 1/2): the mixture is (3/4, 1/4), so H(mixture) = 0.5623 and half of H(1/2, 1/2) = 0.3466."""
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - LN2 / 2
    assert float(js_divergence(np.array([8, 0]), np.array([1, 1]))) == pytest.approx(expected) == pytest.approx(0.2157616)


def test_a_side_without_tokens_has_no_divergence() -> None:
    assert np.isnan(js_divergence(np.array([[0, 0], [1, 2]]), np.array([[3, 1], [1, 2]]))).tolist() == [True, False]


def test_a_requests_summary_averages_layers_and_keeps_the_counts() -> None:
    load = summarise(np.array([[4, 2, 2, 0], [2, 2, 2, 2]]))
    assert isinstance(load, CountedLoad) and load.counts == ((4, 2, 2, 0), (2, 2, 2, 2))
    assert load.max_over_mean == pytest.approx(1.5) and load.entropy == pytest.approx((2**1.5 / 4 + 1) / 2)
    assert load.hottest == ((0, 0), (0, 1), (0, 2))


# --- properties of any counts ------------------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.integers(2, 300))
def test_an_even_load_is_one_everywhere(each: int, num_experts: int) -> None:
    assert figures(*[each] * num_experts) == pytest.approx((0.0, 1.0, 1.0, 0.0), abs=1e-9)


@given(st.integers(1, 10_000), st.integers(2, 300), st.data())
def test_one_expert_for_everything_is_the_far_end(total: int, num_experts: int, data: st.DataObject) -> None:
    counts = [0] * num_experts
    counts[data.draw(st.integers(0, num_experts - 1))] = total
    dead = (num_experts - 1) / num_experts
    assert figures(*counts) == pytest.approx((math.sqrt(num_experts - 1), num_experts, 1 / num_experts, dead))


@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 1000))
def test_a_router_that_always_picks_the_same_k_experts_reaches_e_over_k(top_k: int, more: int, tokens: int) -> None:
    num_experts = top_k + more
    cv, max_over_mean, effective, dead = figures(*[tokens] * top_k, *[0] * more)
    assert max_over_mean == pytest.approx(num_experts / top_k) and effective == pytest.approx(top_k / num_experts)
    assert dead == pytest.approx(more / num_experts) and cv == pytest.approx(math.sqrt(more / top_k))


def slow_metrics(counts: list[int]) -> tuple[float, ...]:
    total, num_experts = sum(counts), len(counts)
    mean = total / num_experts
    variance = sum((count - mean) ** 2 for count in counts) / num_experts
    entropy = -math.fsum(count / total * math.log(count / total) for count in counts if count)
    return (math.sqrt(variance) / mean, max(counts) / mean, math.exp(entropy) / num_experts, counts.count(0) / num_experts)


def slow_divergence(one: list[int], other: list[int]) -> float:
    """Half of KL(p || m) and half of KL(q || m), summed term by term."""
    halves = []
    for left, right in ((one, other), (other, one)):
        for count, its in zip(left, right, strict=True):
            p, q = count / sum(left), its / sum(right)
            halves.append(0.5 * p * math.log(2 * p / (p + q)) if p else 0.0)
    return math.fsum(halves)


@given(Counts.filter(any))
def test_figures_equal_the_slow_ones(counts: list[int]) -> None:
    assert figures(*counts) == pytest.approx(slow_metrics(counts), abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=30))
def test_divergence_is_the_slow_one_symmetric_and_at_most_ln_2(pairs: list[tuple[int, int]]) -> None:
    one, other = [left for left, _ in pairs], [right for _, right in pairs]
    if not (any(one) and any(other)):
        return
    found = float(js_divergence(np.array(one), np.array(other)))
    assert 0 <= found <= LN2 and found == float(js_divergence(np.array(other), np.array(one)))
    assert found == pytest.approx(slow_divergence(one, other), abs=1e-12)


@given(Counts.filter(any), st.integers(1, 50))
def test_equal_shares_have_no_divergence_whatever_their_size(counts: list[int], times: int) -> None:
    assert float(js_divergence(np.array(counts), times * np.array(counts))) == pytest.approx(0.0, abs=1e-12)


@given(Counts.filter(any))
def test_experts_of_their_own_are_ln_2_apart(counts: list[int]) -> None:
    nobody = [0] * len(counts)
    assert float(js_divergence(np.array(counts + nobody), np.array(nobody + counts))) == pytest.approx(LN2)


def test_two_samples_of_one_load_differ_as_much_as_chance_says() -> None:
    rng = np.random.default_rng(0)
    draws = rng.multinomial([2_000, 500], np.full(16, 1 / 16), size=(4_000, 2))
    found = js_divergence(draws[:, 0], draws[:, 1]).mean()
    assert found == pytest.approx(js_by_chance(np.array(2_000), np.array(500), 16), rel=0.05)  # 4,000 draws, next order left out


# --- collapse ----------------------------------------------------------------------------------------------------


def routed(num_experts: int, top_k: int, tokens: int, seed: int = 0) -> np.ndarray:
    """[1, E] of a router that knows nothing: each token goes to any top_k different experts."""
    rng, counts = random.Random(seed), [0] * num_experts
    for _ in range(tokens):
        for expert in rng.sample(range(num_experts), top_k):
            counts[expert] += 1
    return np.array([counts])


@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 2), (8, 2), (256, 8), (128, 8)])
def test_collapse_rings_and_random_routing_does_not(num_experts: int, top_k: int) -> None:
    tokens = 100 * num_experts // top_k
    assert collapses(routed(num_experts, top_k, tokens), ExpertAlarm()) == []
    collapsed = np.array([[tokens] * top_k + [0] * (num_experts - top_k)])
    assert {found.figure for found in collapses(collapsed, ExpertAlarm())} >= {"dead_share"}


def test_a_layer_as_uneven_as_a_healthy_teacher_on_one_task_does_not_ring() -> None:
    """Made up to match the embedded teacher's worst layer and task: 3.24 x the mean, 75 % effective, nobody dead."""
    counts_E = [324, 240, 200, 150, 120, 100, 80, 70, 60, 50, 48, 45, 40, 30, 23, 20]
    assert figures(*counts_E)[1:] == pytest.approx((3.24, 0.75, 0.0), abs=0.03)
    assert collapses(100 * np.array([counts_E]), ExpertAlarm()) == []


def test_a_collapse_names_layer_figure_and_threshold() -> None:
    counts_LE = np.array([[500] * 4, [2000, 0, 0, 0], [600, 500, 500, 400]])
    found = collapses(counts_LE, ExpertAlarm(max_over_mean=3.5, effective_share=0.3, dead_share=0.8))
    assert [str(one) for one in found] == [
        "sparse layer 1: max_over_mean 4, above 3.5",
        "sparse layer 1: effective_share 0.25, below 0.3",
    ]


def test_a_layer_with_too_few_tokens_is_not_judged() -> None:
    """Random routing leaves (1 - 1/E)^n of E experts dead after n assignments: a third of them when n = E."""
    alarm, few, enough = ExpertAlarm(), routed(256, 8, 32), routed(256, 8, 3200)
    assert float(load_metrics(few).dead_share[0]) == pytest.approx((1 - 1 / 256) ** 256, abs=0.05)
    assert float(load_metrics(few).dead_share[0]) > alarm.dead_share and collapses(few, alarm) == []
    assert few.mean() == 1 < alarm.minimum_mean_load == enough.mean()
    assert float(load_metrics(enough).max_over_mean[0]) < 1.4 and collapses(enough, alarm) == []


def test_expected_dead_share_falls_as_the_recipe_says() -> None:
    expected = [(1 - 1 / 256) ** (256 * mean) for mean in (1, 5, 100)]
    assert expected == pytest.approx([0.37, 0.007, 0.0], abs=0.003) and all(more > less for more, less in pairwise(expected))
