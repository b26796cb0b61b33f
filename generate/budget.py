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


class Others(NamedTuple):
    """What workers say of themselves: dollars and tokens in the hands of the living, and, of all there ever were, dollars for
    GPUs of our own and hours."""

    cost: float = 0.0
    tokens: int = 0
    gpus: float = 0.0
    hours: float = 0.0


def others(workers: Mapping[str, Mapping[str, object]], living: Iterable[str]) -> Others:
    """workers: what each told last. A worker's uncommitted part counts while it lives; a dead one's is in its journal. GPUs of
    our own cost what they cost while their worker lives, loading the teacher and what a kill lost included."""
    told = [workers[name] for name in living if name in workers]
    spans = [(number_of(facts, "started_at"), number_of(facts, "seen_at")) for facts in workers.values()]
    gpus = sum(
        (end - start) * number_of(facts, "price_per_second") for (start, end), facts in zip(spans, workers.values(), strict=True)
    )
    return Others(
        sum(number_of(facts, "cost_in_hand") for facts in told),
        sum(int(number_of(facts, "tokens_in_hand")) for facts in told),
        gpus,
        union_seconds(spans) / 3600,
    )


def spent(cost: float, tokens: int, said: Others) -> Spent:
    """cost, tokens: of what is committed, and in our own hand. Traces are charged with less than our GPUs cost."""
    return Spent(max(cost + said.cost, said.gpus), tokens + said.tokens, said.hours)


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
