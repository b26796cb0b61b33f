"""How tokens are drawn: one section, for generation and evaluation alike."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from configs.section import Section


class LoopGuard(Section):
    """What counts as a loop: the output's end is one cycle of at most longest_period tokens, `repeats` times over."""

    longest_period: PositiveInt = 128
    repeats: Annotated[int, Field(ge=3)] = 16


class Sampling(Section):
    temperature: NonNegativeFloat = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    max_tokens: PositiveInt = 65536
    """Output tokens, reasoning included. A trace that reaches it ends with finish_reason `length`."""
    top_k: NonNegativeInt = 0
    """Only this many of the likeliest tokens; 0 is off. Applied before top_p, and both before min_p."""
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Only tokens at least this many times as likely as the likeliest; 0 is off."""
    min_tokens: NonNegativeInt = 0
    """Nothing ends an output before it has this many tokens."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """An output also ends where one of these is complete in its text. The chat template's own stops need no mention."""
    loop_guard: LoopGuard | None = None
    """Ends an output that repeats itself, with finish_reason `loop`; absent, it runs into max_tokens."""

    @model_validator(mode="after")
    def _temperature_is_usable(self) -> "Sampling":
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature {self.temperature:g} is neither 0 (greedy) nor at least 0.001")
        return self

    @model_validator(mode="after")
    def _min_below_max(self) -> "Sampling":
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self
