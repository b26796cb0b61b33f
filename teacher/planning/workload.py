"""Hours and dollars: what a number of traces takes on a launch of known rates, and against an API's price per token.

Output lengths are log-normal, given by their median and 99th percentile and cut at the longest allowed output.
"""

from math import exp, inf, log
from statistics import NormalDist
from typing import NamedTuple

from configs.planning import ApiPrices, Workload

HOURS_A_MONTH = 730.0
_NORMAL = NormalDist()
_Z99 = _NORMAL.inv_cdf(0.99)


class Lengths(NamedTuple):
    """Output tokens a trace. live: tokens of output that a slot in use holds on average over time. A trace of length L
    holds its slot for L steps with L / 2 tokens on average, so long ones weigh more: E[L^2] / 2 E[L], not E[L] / 2."""

    mean: float
    live: float


def output_lengths(workload: Workload, max_tokens: int) -> Lengths:
    """Of min(L, max_tokens) for log-normal L."""
    mu = log(workload.output_tokens_median)
    sigma = (log(workload.output_tokens_p99) - mu) / _Z99
    mean, square = (_moment(power, mu, sigma, max_tokens) for power in (1, 2))
    return Lengths(mean, square / mean / 2)


def _moment(power: int, mu: float, sigma: float, cut: float) -> float:
    """E[min(L, cut)^power] = e^(p mu + p^2 sigma^2 / 2) F(z - p sigma) + cut^p (1 - F(z)), with z the cut in sigmas."""
    if cut == inf:
        return exp(power * mu + (power * sigma) ** 2 / 2)
    z = (log(cut) - mu) / sigma
    below = exp(power * mu + (power * sigma) ** 2 / 2) * _NORMAL.cdf(z - power * sigma)
    return below + cut**power * (1 - _NORMAL.cdf(z))


class Cost(NamedTuple):
    """traces of the workload on the whole launch: every token generated and every prompt read in, one prompt a replica at
    a time, on the same GPUs. cost_per_million_output_tokens: of that, prompts included (the plan's key of the same name
    is for decoding alone).

    break_even_tokens_per_month: output tokens that cost as much behind the API, prompts included, as the rented launch
    costs in a month of 730 hours. capacity_tokens_per_month: what the launch writes of this workload in that time.
    cheaper_than_api: the second is above the first."""

    traces: int
    output_tokens: float
    prompt_tokens: float
    decode_hours: float
    prefill_hours: float
    hours: float
    dollars: float
    cost_per_million_output_tokens: float
    api_dollars: float
    break_even_tokens_per_month: float
    capacity_tokens_per_month: float
    cheaper_than_api: bool


def cost(
    workload: Workload,
    lengths: Lengths,
    api: ApiPrices,
    *,
    samples_per_prompt: int,
    tokens_per_s: float,
    prefill_s: float,
    replicas: int,
    dollars_per_hour: float,
) -> Cost:
    """tokens_per_s: of the whole launch. prefill_s: of the workload's prompt on one replica. dollars_per_hour: of all GPUs."""
    output, prompt = workload.traces * lengths.mean, float(workload.traces * workload.prompt_tokens)
    decode_hours = output / tokens_per_s / 3600
    prefill_hours = workload.traces * prefill_s / replicas / 3600
    hours = decode_hours + prefill_hours
    per_trace = api_dollars_a_trace(workload, lengths, api, samples_per_prompt)
    break_even = HOURS_A_MONTH * dollars_per_hour / per_trace * lengths.mean
    capacity = HOURS_A_MONTH / hours * output
    return Cost(
        traces=workload.traces,
        output_tokens=output,
        prompt_tokens=prompt,
        decode_hours=decode_hours,
        prefill_hours=prefill_hours,
        hours=hours,
        dollars=hours * dollars_per_hour,
        cost_per_million_output_tokens=hours * dollars_per_hour / output * 1e6,
        api_dollars=workload.traces * per_trace,
        break_even_tokens_per_month=break_even,
        capacity_tokens_per_month=capacity,
        cheaper_than_api=capacity > break_even,
    )


def api_dollars_a_trace(workload: Workload, lengths: Lengths, api: ApiPrices, samples_per_prompt: int) -> float:
    """Output at its price; of a prompt's samples the first pays for the prompt, the others for a cached one."""
    prompt_price = (api.input + (samples_per_prompt - 1) * api.cached_input) / samples_per_prompt
    return (workload.prompt_tokens * prompt_price + lengths.mean * api.output) / 1e6
