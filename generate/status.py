"""The ledger of a run and who is at it, at any time and from any machine: sidecars and workers' own words, no trace."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table

from configs.errors import UnusableInput
from configs.schema import Budget
from data.ledger import Ledger, fates_of, generation_ledger
from data.store import RunFolder, read_rollup, segments
from data.work import WorkFolder, ages, read_facts
from generate.budget import Spent, number_of, others, spent

STRAGGLERS = 5
SHOWN_WORKERS = 40


class WorkerLine(NamedTuple):
    """One worker. silent_s: since its last beat; None of one that has ended in order."""

    name: str
    state: str
    silent_s: float | None
    finished: int
    in_flight: int
    tokens_per_s: float


class Straggler(NamedTuple):
    """A request in flight. seconds: since this worker took it."""

    trace_id: str
    task: str
    seconds: float
    tokens: int
    attempt: int
    worker: str


@dataclass(frozen=True, slots=True)
class Status:
    """in_flight, uncommitted: of living workers; both are pending in the ledger. eta_s: None while nothing can be said."""

    ledger: Ledger
    in_flight: int
    uncommitted: int
    output_tokens: int
    spent: Spent
    tokens_per_s: float
    traces_per_s: float
    eta_s: float | None
    workers: list[WorkerLine]
    stragglers: list[Straggler]
    sealed: bool


def read_status(run: RunFolder, ttl_s: float) -> Status:
    """Raises UnusableInput when the prompts stage has not finished."""
    prompts = read_rollup(run.prompts)
    if prompts is None:
        raise UnusableInput(f"{run.root}: no prompt set yet; run: tracestill prompts")
    requested = prompts.counts["requests"]
    assert isinstance(requested, int)
    committed, folder = segments(run.traces), WorkFolder.of(run)
    facts, silent = read_facts(folder), ages(folder)
    ledger = generation_ledger(fates_of(committed), requested)
    living = {name: facts[name] for name, age in silent.items() if age <= ttl_s and name in facts}
    lines = [_line(name, told, silent.get(name), ttl_s) for name, told in facts.items()]
    rate, tokens = sum(_rate(told, "finished") for told in living.values()), sum(line.tokens_per_s for line in lines)
    output_tokens = sum(sum(segment.facts["output_tokens"]) for segment in committed)
    cost = sum(float(segment.facts.get("cost", 0.0)) for segment in committed)
    return Status(
        ledger=ledger,
        in_flight=sum(int(number_of(told, "in_flight")) for told in living.values()),
        uncommitted=sum(int(number_of(told, "uncommitted")) for told in living.values()),
        output_tokens=output_tokens,
        spent=spent(cost, output_tokens, others(facts, living)),
        tokens_per_s=tokens,
        traces_per_s=rate,
        eta_s=ledger.pending / rate if rate and ledger.pending else None,
        workers=lines,
        stragglers=_stragglers(living),
        sealed=read_rollup(run.traces) is not None,
    )


def _line(name: str, told: Mapping[str, object], silent_s: float | None, ttl_s: float) -> WorkerLine:
    is_alive = silent_s is not None and silent_s <= ttl_s
    state = str(told.get("state", "?")) if is_alive or silent_s is None else "dead"
    if silent_s is None and state != "ended":
        state = "ended"
    return WorkerLine(
        name, state, silent_s, int(number_of(told, "finished")), int(number_of(told, "in_flight")) if is_alive else 0,
        _rate(told, "tokens") if is_alive else 0.0,
    )  # fmt: skip


def _rate(told: Mapping[str, object], what: str) -> float:
    """Since the worker began."""
    seconds = number_of(told, "seen_at") - number_of(told, "started_at")
    return number_of(told, what) / seconds if seconds > 0 else 0.0


def _stragglers(living: Mapping[str, Mapping[str, object]]) -> list[Straggler]:
    now, found = time.time(), list[Straggler]()
    for name, told in living.items():
        oldest = told.get("oldest")
        for one in oldest if isinstance(oldest, list) else ():
            found.append(Straggler(one["trace_id"], one["task"], now - one["since"], one["tokens"], one["attempt"], name))
    return sorted(found, key=lambda one: -one.seconds)[:STRAGGLERS]


# --- shown -------------------------------------------------------------------------------------------------------


def status_json(status: Status) -> dict[str, object]:
    """JSON values, seconds and dollars as numbers."""
    return asdict(status) | {
        "spent": status.spent._asdict(),
        "workers": [line._asdict() for line in status.workers],
        "stragglers": [one._asdict() for one in status.stragglers],
    }


def status_tables(status: Status, budget: Budget) -> RenderableType:
    """What a person wants to know at night, most important first."""
    return Group(_ledger_table(status, budget), *([_workers_table(status)] if status.workers else []),
                 *([_stragglers_table(status)] if status.stragglers else []))  # fmt: skip


def _ledger_table(status: Status, budget: Budget) -> Table:
    ledger = status.ledger
    table = Table(title="generation" + (" (sealed)" if status.sealed else ""), title_justify="left", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column(justify="left")
    share = f"{ledger.completed / max(1, ledger.requested):.1%} of all"
    table.add_row("requested", f"{ledger.requested:,}", "= completed + failed + pending")
    table.add_row("completed", f"{ledger.completed:,}", share)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in ledger.failed_by_reason.items())
    table.add_row("failed", f"{ledger.failed:,}", reasons)
    table.add_row(
        "pending", f"{ledger.pending:,}", f"{status.in_flight:,} in flight, {status.uncommitted:,} finished, in a journal"
    )
    if ledger.superseded:
        table.add_row("superseded", f"{ledger.superseded:,}", "copies finished twice")
    table.add_row("output tokens", f"{status.output_tokens:,}", _of(status.spent.tokens, budget.max_tokens, "{:,}"))
    table.add_row("cost", f"$ {status.spent.cost:,.2f}", _of(status.spent.cost, budget.max_cost, "$ {:,.2f}"))
    table.add_row("hours", f"{status.spent.hours:,.2f}", _of(status.spent.hours, budget.max_hours, "{:,.2f}"))
    table.add_row("rate", f"{status.tokens_per_s:,.0f} tokens/s", f"{status.traces_per_s:,.2f} traces/s")
    table.add_row("left", "" if status.eta_s is None else _duration(status.eta_s), "")
    return table


def _of(value: float, limit: float | None, form: str) -> str:
    return "" if limit is None else f"{value / limit:.0%} of the budget's {form.format(limit)}"


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes else f"{seconds:.0f} s"


def _workers_table(status: Status) -> Table:
    table = Table("worker", "state", "silent", "finished", "in flight", "tokens/s", title="workers", title_justify="left")
    shown = sorted(status.workers, key=lambda line: (line.silent_s is None, line.silent_s or 0.0))[:SHOWN_WORKERS]
    for line in shown:
        silent = "" if line.silent_s is None else f"{line.silent_s:.0f} s"
        table.add_row(line.name, line.state, silent, f"{line.finished:,}", f"{line.in_flight:,}", f"{line.tokens_per_s:,.0f}")
    if len(status.workers) > len(shown):
        table.caption = f"and {len(status.workers) - len(shown):,} more that have ended or died"
    return table


def _stragglers_table(status: Status) -> Table:
    table = Table("trace", "task", "for", "tokens", "attempt", "worker", title="longest in flight", title_justify="left")
    for one in status.stragglers:
        table.add_row(one.trace_id, one.task, _duration(one.seconds), f"{one.tokens:,}", str(one.attempt), one.worker)
    return table
