"""When a step is not applied, and which validation is the best. Pure: numbers in, decisions out; Progress remembers."""

import math
import statistics
from collections.abc import Sequence
from typing import Literal

HISTORY = 64
"""Norms that the median is taken of."""
LEAST_HISTORY = 16
"""Norms before anything is called a spike: at first lora_B is zero, lora_A has no gradient, and norms grow by themselves."""


def norm_limit(recent_norms: Sequence[float], spike_factor: float | None) -> float:
    """The gradient norm above which the next step is not applied; infinity while nobody can say."""
    if spike_factor is None or len(recent_norms) < LEAST_HISTORY:
        return math.inf
    return spike_factor * statistics.median(recent_norms)


def remember(recent_norms: Sequence[float], norm: float) -> tuple[float, ...]:
    """With the norm of an applied step; one that was not applied is no measure of what is usual."""
    return (*recent_norms, norm)[-HISTORY:]


def is_better(metric: Literal["loss", "accuracy"], value: float, best: float | None) -> bool:
    """Strictly: of equal validations the first stays. A value that is no number is never better."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best if metric == "loss" else value > best
