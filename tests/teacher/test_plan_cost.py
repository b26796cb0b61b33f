"""Hours and dollars against hand calculation, and the length distribution against drawn lengths."""

import math
import random

import pytest
from pydantic import ValidationError

from configs.lengths import output_lengths
from configs.load import load_recipe
from configs.planning import ApiPrices, Workload
from teacher.plan import plan_recipe
from teacher.planning.workload import api_dollars_a_trace, cost

WORKLOAD = Workload(traces=1000, prompt_tokens=2000, output_tokens_median=4000, output_tokens_p99=32000)


def drawn(count: int, cut: float) -> list[float]:
    draw = random.Random(1)
    sigma = math.log(8) / 2.3263
    return [min(cut, draw.lognormvariate(math.log(4000), sigma)) for _ in range(count)]


@pytest.mark.parametrize("cut", [5_000, 65_536])
def test_mean_and_live_tokens_are_those_of_drawn_lengths(cut: int) -> None:
    """A slot refilled at once holds, at a random moment, a trace chosen in proportion to its length, half written."""
    lengths, found = drawn(100_000, cut), output_lengths(WORKLOAD, cut)
    assert found.mean == pytest.approx(sum(lengths) / len(lengths), rel=0.01)
    live = sum(length * length / 2 for length in lengths) / sum(lengths)
    assert found.live == pytest.approx(live, rel=0.02)
    assert found.live > found.mean / 2


def test_one_length_for_all_is_the_limit_of_a_narrow_distribution() -> None:
    narrow = WORKLOAD.model_copy(update={"output_tokens_p99": 4001})
    assert output_lengths(narrow, 10**6) == pytest.approx((4000, 2000), rel=1e-3)


def test_a_tail_below_the_median_is_refused() -> None:
    with pytest.raises(ValidationError, match="output_tokens_p99 3000 is not above output_tokens_median 4000"):
        Workload(output_tokens_p99=3000)


def test_hours_and_dollars_are_worked_out_by_hand() -> None:
    """1,000 traces of 5,000 tokens at 1,000 tokens/s: 5,000 s. Prompts: 1,000 x 3.6 s over 4 replicas: 900 s. 8 GPUs at $3."""
    found = cost(
        WORKLOAD, output_lengths(WORKLOAD, 10**6)._replace(mean=5000.0), ApiPrices(), samples_per_prompt=4,
        tokens_per_s=1000.0, prefill_s=3.6, replicas=4, dollars_per_hour=24.0,
    )  # fmt: skip
    assert found.decode_hours == pytest.approx(5000 / 3600) and found.prefill_hours == pytest.approx(0.25)
    assert found.dollars == pytest.approx(5900 / 3600 * 24)
    assert found.cost_per_million_output_tokens == pytest.approx(5900 / 3600 * 24 / 5)
    api = (2000 * (1.40 + 3 * 0.26) / 4 + 5000 * 4.40) / 1e6
    assert found.api_dollars == pytest.approx(1000 * api)
    assert found.break_even_tokens_per_month == pytest.approx(730 * 24 / api * 5000)
    assert found.capacity_tokens_per_month == pytest.approx(730 * 3600 / 5900 * 5e6)
    assert not found.cheaper_than_api


def test_at_the_break_even_volume_the_api_costs_what_the_launch_costs() -> None:
    lengths = output_lengths(WORKLOAD, 65_536)
    found = cost(
        WORKLOAD, lengths, ApiPrices(), samples_per_prompt=1, tokens_per_s=9e4, prefill_s=0.1, replicas=16, dollars_per_hour=48.0
    )
    traces = found.break_even_tokens_per_month / lengths.mean
    assert traces * api_dollars_a_trace(WORKLOAD, lengths, ApiPrices(), 1) == pytest.approx(730 * 48)
    assert found.cheaper_than_api


def test_a_million_output_tokens_cost_the_gpus_that_decode_them() -> None:
    plan = plan_recipe(load_recipe("glm52-fp8-16xh200", ["plan.price_per_gpu_hour=2.5"]).recipe)
    rate, dollars = plan.decode_tokens_per_s_per_gpu, plan.cost_per_million_output_tokens
    assert rate and dollars and dollars == pytest.approx(2.5 / 3600 / rate * 1e6)
    assert plan.cost is not None and plan.cost.cost_per_million_output_tokens > dollars  # prompts included
