"""Hours and dollars: what a number of traces takes on a launch of known rates, and against an API's price per token."""

from typing import NamedTuple

from configs.lengths import Lengths
from configs.planning import ApiPrices, Workload

HOURS_A_MONTH = 730.0


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
