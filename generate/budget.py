"""What a run may spend, and what it has: committed traces by their sidecars, and what living workers say they have in hand.

The hours are wall-clock hours in which at least one worker was at it: a requeued job that waits for its nodes spends none.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from configs.schema import Budget


class Spent(NamedTuple):
    """Dollars, output tokens and hours."""

    cost: float = 0.0
    tokens: int = 0
    hours: float = 0.0

    def exceeds(self, budget: Budget) -> str:
        """The limit that is reached, in words; "" while there is room."""
        for name, spent in zip(("max_cost", "max_tokens", "max_hours"), self, strict=True):
            limit = getattr(budget, name)
            if limit is not None and spent >= limit:
                return f"generate.budget.{name} {limit:g} is reached ({spent:,.4g} spent)"
        return ""


def spent(cost: float, tokens: int, workers: Mapping[str, Mapping[str, object]], living: Iterable[str]) -> Spent:
    """cost, tokens: of what is committed. workers: what each told last. A worker's uncommitted part counts while it lives;
    a dead one's is in its journal. GPUs of our own cost what they cost while their worker lives, loading the teacher and
    what a kill lost included: that is more than the traces were charged with."""
    for name in living:
        tokens += int(number_of(workers.get(name, {}), "tokens_in_hand"))
        cost += number_of(workers.get(name, {}), "cost_in_hand")
    spans = [(number_of(facts, "started_at"), number_of(facts, "seen_at")) for facts in workers.values()]
    gpus = sum(
        (end - start) * number_of(facts, "price_per_second") for (start, end), facts in zip(spans, workers.values(), strict=True)
    )
    return Spent(max(cost, gpus), tokens, union_seconds(spans) / 3600)


def union_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def number_of(facts: Mapping[str, object], name: str) -> float:
    value = facts.get(name, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0
