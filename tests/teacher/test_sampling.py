"""Sampling against slow references: Python integers for the generator, a sorted walk for the nucleus."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from teacher.sampling import Noise, Pairs, Truncation, best_logits, inverse_cdf, kept_mask, sample, uniforms

MASK = (1 << 64) - 1


def splitmix64_reference(state: int) -> int:
    """On Python's unbounded integers, reduced to 64 bits by hand."""
    state &= MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def uniform_reference(seed: int, position: int) -> float:
    bits = splitmix64_reference(splitmix64_reference(seed) + (position + 1) * 0x9E3779B97F4A7C15)
    return (bits >> 11) / 2**53


def sample_reference(
    logits: list[float], temperature: float, top_p: float, uniform: float, top_k: int = 0, min_p: float = 0.0
) -> int:
    """One row, one loop: the likeliest ids until top_p of the top_k's mass is reached, then a walk in id order."""
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    ranked = sorted(range(len(logits)), key=lambda index: (-weights[index], index))[: top_k or None]
    total = math.fsum(weights[index] for index in ranked)
    kept, mass = set[int](), 0.0
    for index in ranked:
        if kept and ((top_p < 1 and mass >= top_p) or weights[index] < min_p * weights[ranked[0]]):
            break
        kept.add(index)
        mass += weights[index] / total
    target = uniform * math.fsum(weights[index] for index in kept)
    running = 0.0
    for index in sorted(kept):
        running += weights[index]
        if running > target:
            return index
    return max(kept)


def random_rows(rows: int, vocab: int, seed: int = 0) -> tuple[torch.Tensor, Noise]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    temperatures = torch.rand(rows, generator=generator, dtype=torch.float64) * 1.5 + 0.2
    top_p = torch.rand(rows, generator=generator, dtype=torch.float64) * 0.95 + 0.05
    top_p[::3] = 1.0
    top_k = torch.randint(0, 8, (rows,), generator=generator)
    min_p = (torch.rand(rows, generator=generator, dtype=torch.float64) - 0.5).clamp(min=0) * 0.4
    truncation = Truncation(top_p, top_k, min_p)
    return logits, Noise(temperatures, truncation, torch.rand(rows, generator=generator, dtype=torch.float64))


def only_top_p(top_p: float) -> Truncation:
    zero = torch.zeros(1, dtype=torch.float64)
    return Truncation(torch.tensor([top_p], dtype=torch.float64), zero.long(), zero)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**20))
def test_uniforms_equal_the_generator_written_with_python_integers(seed: int, position: int) -> None:
    assert uniforms(torch.tensor([seed]), torch.tensor([position])).item() == uniform_reference(seed, position)


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    drawn = uniforms(torch.arange(100).repeat_interleave(200), torch.arange(200).repeat(100))
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, bins=20, min=0, max=1)
    assert (counts - 1000).abs().max() < 5 * 1000**0.5  # 20,000 draws, five standard deviations


def test_neighbouring_seeds_do_not_share_shifted_noise() -> None:
    first = uniforms(torch.full((50,), 7), torch.arange(50))
    second = uniforms(torch.full((50,), 8), torch.arange(50))
    assert not set(first.tolist()) & set(second.tolist())


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.79, [True, False, True, False]), (0.81, [True, True, True, False]), (1e-9, [False, False, True, False])],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: list[bool]) -> None:
    probabilities = torch.tensor([[0.3, 0.15, 0.5, 0.05]], dtype=torch.float64)
    assert kept_mask(probabilities, *only_top_p(top_p)).tolist() == [kept]


def test_equal_probabilities_enter_the_nucleus_by_id() -> None:
    probabilities = torch.full((1, 4), 0.25, dtype=torch.float64)
    assert kept_mask(probabilities, *only_top_p(0.4)).tolist() == [[True, True, False, False]]


def test_the_inverse_cdf_never_picks_an_id_without_weight() -> None:
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64).expand(4, -1)
    picked = inverse_cdf(weights, torch.tensor([0.0, 0.4999, 0.5, 1.0], dtype=torch.float64))
    assert picked.tolist() == [1, 1, 3, 3]


def test_a_batch_equals_the_slow_reference_row_by_row() -> None:
    logits, noise = random_rows(300, 40)
    assert noise.truncation is not None
    columns = (
        noise.temperatures_B,
        noise.truncation.top_p_B,
        noise.uniforms_B,
        noise.truncation.top_k_B,
        noise.truncation.min_p_B,
    )
    rows = zip(logits.double().tolist(), *(column.tolist() for column in columns), strict=True)
    expected = [sample_reference(*row) for row in rows]
    assert sample(logits, noise).ids_B.tolist() == expected


def test_a_row_does_not_see_its_neighbours() -> None:
    logits, noise = random_rows(64, 50)
    assert noise.truncation is not None
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    together = sample(logits, noise).ids_B
    truncation = Truncation(*(column[order] for column in noise.truncation))
    shuffled = sample(logits[order], Noise(noise.temperatures_B[order], truncation, noise.uniforms_B[order])).ids_B
    assert torch.equal(together[order], shuffled)


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    logits, noise = random_rows(20, 50)
    temperatures = noise.temperatures_B.clone()
    temperatures[::2] = 0
    mixed = sample(logits, noise._replace(temperatures_B=temperatures)).ids_B
    assert torch.equal(mixed[::2], logits[::2].argmax(-1))
    assert torch.equal(mixed[1::2], sample(logits, noise).ids_B[1::2])


def test_frequencies_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, -1)
    temperatures = torch.full((20_000,), 0.7, dtype=torch.float64)
    noise = Noise(temperatures, None, uniforms(torch.full((20_000,), 3), torch.arange(20_000)))
    found = torch.bincount(sample(logits, noise).ids_B, minlength=4) / 20_000
    assert torch.allclose(found, (logits[0] / 0.7).softmax(-1), atol=0.015)  # four standard deviations of a half


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits, noise = random_rows(30, 50)
    banned = torch.zeros(50, dtype=torch.bool)
    banned[40:] = True
    sampled = sample(logits, noise, banned)
    expected = logits.double().log_softmax(-1).gather(-1, sampled.ids_B[:, None])[:, 0]
    assert torch.allclose(sampled.logprobs_B, expected, atol=2e-6)  # float32 sum over the vocabulary


def test_banned_ids_are_never_emitted() -> None:
    logits, noise = random_rows(200, 12)
    banned = torch.zeros(12, dtype=torch.bool)
    banned[torch.tensor([0, 5, 11])] = True
    for way in (None, noise, noise._replace(truncation=None)):
        assert not set(sample(logits, way, banned).ids_B.tolist()) & {0, 5, 11}


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (9, 0.8, 0.0), (9, 0.9, 0.05), (1, 0.5, 0.5)]
)
def test_what_is_kept_is_what_transformers_keeps(top_k: int, top_p: float, min_p: float) -> None:
    """Its processors in its order: top-k, top-p, min-p, each on what the one before left."""
    logits = random_rows(200, 40)[0].double()
    processors = [
        *([TopKLogitsWarper(top_k)] if top_k else []),
        *([TopPLogitsWarper(top_p)] if top_p < 1 else []),
        *([MinPLogitsWarper(min_p)] if min_p else []),
    ]
    expected = logits
    for processor in processors:
        expected = processor(torch.empty(0), expected)  # type: ignore[arg-type]
    wide = torch.ones(200, dtype=torch.float64)
    kept = kept_mask(logits.softmax(-1), wide * top_p, (wide * top_k).long(), wide * min_p)
    assert torch.equal(kept, expected.isfinite())


def test_a_row_that_takes_everything_takes_it_beside_any_neighbour() -> None:
    """With a mass of 1e-30 the last id is below the rounding of the running sum, and still possible."""
    probabilities = torch.tensor([[1.0, 1e-30]] * 2, dtype=torch.float64)
    top_p, zero = torch.tensor([1.0, 0.5], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert kept_mask(probabilities, top_p, zero.long(), zero).tolist() == [[True, True], [True, False]]


def test_forbidden_pairs_are_never_emitted_and_hold_for_their_row_only() -> None:
    logits = torch.tensor([[5.0, 4.0, 0.0]] * 2)
    assert sample(logits, None, forbidden=Pairs(torch.tensor([1]), torch.tensor([0]))).ids_B.tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_kept_logits_and_log_z_rebuild_the_distribution(temperature: float) -> None:
    logits = random_rows(20, 50)[0]
    best = best_logits(logits, 7, (1.0, temperature))
    exact = (logits.double() / temperature).log_softmax(-1)
    rebuilt = best.logits_BK.double() / temperature - best.log_z_BC[:, 1:]
    assert torch.allclose(rebuilt, exact.gather(-1, best.ids_BK.long()), atol=2e-6)  # float32 logsumexp
    tail = 1 - rebuilt.exp().sum(-1)
    left_out = exact.exp().sum(-1) - exact.gather(-1, best.ids_BK.long()).exp().sum(-1)
    assert torch.allclose(tail, left_out, atol=1e-5)
