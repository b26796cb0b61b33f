"""The learning rate of a step: linear warm-up, then half a cosine down to zero."""

import math


def learning_rate(step: int, total_steps: int, peak: float, warmup_share: float) -> float:
    """Rate of optimizer step `step` (from 0). It rises to `peak` over the first warmup_share of the steps and reaches
    zero one step after the last, so no step is spent at a rate of zero."""
    warmup_steps = round(total_steps * warmup_share)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
