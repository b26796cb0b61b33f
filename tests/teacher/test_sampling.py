"""Sampling against slow references: Python integers for the generator, a sorted walk for the nucleus."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.sampling import Noise, inverse_cdf, nucleus_mask, sample, uniforms

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


def sample_reference(logits: list[float], temperature: float, top_p: float, uniform: float) -> int:
    """One row, one loop: the likeliest ids until top_p is reached, then a walk in id order."""
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    total = math.fsum(weights)
    kept, mass = set[int](), 0.0
    for index in sorted(range(len(logits)), key=lambda index: (-weights[index], index)):
        if mass >= top_p and kept:
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
    return logits, Noise(temperatures, top_p, torch.rand(rows, generator=generator, dtype=torch.float64))


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
    assert nucleus_mask(probabilities, torch.tensor([top_p], dtype=torch.float64)).tolist() == [kept]


def test_equal_probabilities_enter_the_nucleus_by_id() -> None:
    probabilities = torch.full((1, 4), 0.25, dtype=torch.float64)
    assert nucleus_mask(probabilities, torch.tensor([0.4], dtype=torch.float64)).tolist() == [[True, True, False, False]]


def test_the_inverse_cdf_never_picks_an_id_without_weight() -> None:
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64).expand(4, -1)
    picked = inverse_cdf(weights, torch.tensor([0.0, 0.4999, 0.5, 1.0], dtype=torch.float64))
    assert picked.tolist() == [1, 1, 3, 3]


def test_a_batch_equals_the_slow_reference_row_by_row() -> None:
    logits, noise = random_rows(300, 40)
    assert noise.top_p_B is not None
    expected = [
        sample_reference(row, temperature, top_p, uniform)
        for row, temperature, top_p, uniform in zip(
            logits.double().tolist(),
            noise.temperatures_B.tolist(),
            noise.top_p_B.tolist(),
            noise.uniforms_B.tolist(),
            strict=True,
        )
    ]
    assert sample(logits, noise).ids_B.tolist() == expected


def test_a_row_does_not_see_its_neighbours() -> None:
    logits, noise = random_rows(64, 50)
    assert noise.top_p_B is not None
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    together = sample(logits, noise).ids_B
    shuffled = sample(logits[order], Noise(noise.temperatures_B[order], noise.top_p_B[order], noise.uniforms_B[order])).ids_B
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
    for way in (None, noise, noise._replace(top_p_B=None)):
        assert not set(sample(logits, way, banned).ids_B.tolist()) & {0, 5, 11}
