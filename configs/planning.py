"""What a recipe may say of a plan: the assumptions from which `tracestill plan` calculates capacity, throughput and cost."""

from typing import Annotated

from pydantic import Field, model_validator

from configs.section import Section

PlannedCount = Annotated[int, Field(ge=1, le=10**12)]
"""Bounded, as every rate and price of a plan is: its figures are products of them and have to stay finite."""


class ApiPrices(Section):
    """List price of the same model behind somebody else's API, in dollars per million tokens."""

    input: Annotated[float, Field(ge=0.0, le=1e6)] = 1.40
    cached_input: Annotated[float, Field(ge=0.0, le=1e6)] = 0.26
    """A prompt's second and later samples."""
    output: Annotated[float, Field(ge=1e-6, le=1e6)] = 4.40


class Workload(Section):
    """What the launch is to produce; lengths of outputs are log-normal, cut at generate.sampling.max_tokens."""

    traces: PlannedCount = 10_000
    prompt_tokens: PlannedCount = 4_000
    """Mean; a request of this prompt and an output of p99 length must fit."""
    output_tokens_median: PlannedCount = 4_000
    output_tokens_p99: PlannedCount = 32_000
    """Eight times the median: reasoning traces have a long tail."""

    @model_validator(mode="after")
    def _tail_is_long(self) -> "Workload":
        if self.output_tokens_p99 <= self.output_tokens_median:
            raise ValueError(
                f"output_tokens_p99 {self.output_tokens_p99} is not above output_tokens_median {self.output_tokens_median}"
            )
        return self


class Planning(Section):
    """What `tracestill plan` assumes; no other command reads it."""

    context_lengths: tuple[PlannedCount, ...] = (8_192, 32_768, 131_072, 1_048_576)
    """Rows of the table; those above the model's positions are left out."""
    context_tokens: PlannedCount | None = None
    """Prompt and output of a long request that has to fit; absent: the workload's prompt and its p99 output. Beside it, our own
    engines have to hold the prompt and generate.sampling.max_tokens: they refuse a request that might outgrow the cache."""
    concurrency: PlannedCount | None = None
    """Requests in flight over the whole launch, which then have to fit; absent: as many as fit and the engine takes."""
    efficiency: Annotated[float, Field(ge=0.0001, le=1.0)] = 0.15
    """Expected decode rate over the bound. A public server reaches 0.16 of its weights-only bound: GLM-5.2 FP8 on 8 x H200,
    256 requests, 267 output tokens/s per GPU."""
    prefill_efficiency: Annotated[float, Field(ge=0.0001, le=1.0)] = 0.4
    """Share of the peak arithmetic that prefill reaches: large matrix products with their attention, in practice 0.3 to 0.5."""
    prefill_chunk_tokens: PlannedCount = 8_192
    """Prompt tokens of one prefill pass: its activations and score buffers grow with it, its reads of the weights shrink."""
    train_efficiency: Annotated[float, Field(ge=0.0001, le=1.0)] = 0.3
    """Share of the peak arithmetic that training reaches, activations computed again counted as work. torchtitan publishes 33 to
    39 % for Llama-3.1-8B on 8 H100 (docs/performance.md, FSDP without float8; 5,762 tokens/s a GPU uncompiled); the adapters'
    small products take their part."""
    price_per_gpu_hour: Annotated[float, Field(ge=0.0001, le=1e6)] = 3.0
    """Dollars. Put your own: rented H200s cost 2 to 4 an hour."""
    api: ApiPrices = ApiPrices()
    workload: Workload = Workload()
