"""What an evaluation asks, how, and what its gates demand."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from configs.prompt_sources import PromptSource
from configs.sampling import Sampling
from configs.section import Section


class Gate(Section):
    """Bounds of one metric of the student; either side may be left open."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _some_bound(self) -> "Gate":
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min or max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"gate min {self.min} is above max {self.max}")
        return self


MetricName = Literal[
    "accuracy", "hallucination_rate", "abstention_rate", "omniscience_index", "reasoning_tokens_per_correct",
    "accuracy_of_teacher", "hallucination_above_teacher",
]  # fmt: skip


class Evaluate(Section):
    suites: tuple[PromptSource, ...] = ()
    """Held-out items: reasoning_gym sources take the held-out side of the hash, JSONL ones the rows with split `eval`."""
    sampling: Sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=8192)
    samples: PositiveInt = 1
    """Attempts at each item; intervals draw an item with all its attempts."""
    batch_size: PositiveInt = 64
    seed: NonNegativeInt = 0
    gates: dict[MetricName, Gate] = Field(default={})
    """`accuracy_of_teacher`: student's accuracy over teacher's; `hallucination_above_teacher`: the difference of their rates."""

    @model_validator(mode="after")
    def _samples_differ(self) -> "Evaluate":
        if self.samples > 1 and self.sampling.temperature == 0.0:
            raise ValueError(f"samples {self.samples} of greedy decoding are all the same; expected sampling.temperature above 0")
        return self
