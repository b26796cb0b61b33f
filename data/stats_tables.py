"""`tracestill data stats` on a terminal of 60 columns or more: names fold, figures never do."""

import math
from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from data.calibration_metrics import Estimate
from data.counts import TaskCounts
from data.stats import Contamination, Cost, Duplicates, Stats
from data.verdict_files import WIDE_SPREAD_RATIO, ViewFacts
from data.viewer import printable

QUANTILE_NAMES = ("5 %", "25 %", "50 %", "75 %", "95 %", "most")


def stats_tables(found: Stats) -> Iterator[Table]:
    """In reading order: what there is, why the rest is not, what it cost, how far to trust it. Empty ones are left out."""
    yield _fates(found)
    yield _rows(found)
    yield _lengths(found)
    yield _judges(found)
    yield from (table for table in (_reasons(found), _duplicates(found), _contamination(found.contamination)) if table.row_count)
    yield _cost(found.cost)
    yield _view(found)


def _table(title: str, *figures: str) -> Table:
    """First column: a name. figures: heads of the others."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add(table: Table, name: str, *figures: int | float | str) -> None:
    table.add_row(Text(printable(name)), *(Text(one if isinstance(one, str) else f"{one:,}") for one in figures))


# --- traces ------------------------------------------------------------------------------------------------------


def _fates(found: Stats) -> Table:
    table = _table("traces", "completed", "kept", "rejected", "unjudged")
    for name, counts in _by_task(found):
        _add(table, name, counts["completed"], counts["kept"], counts["rejected"], counts["unjudged"])
    return table


def _rows(found: Stats) -> Table:
    relabels = found.total.get("relabelled", 0) > 0  # "I don't know" rows: most datasets have none
    table = _table("rows of the dataset", "train", "validation", "tokens", *(["relabelled"] if relabels else []))
    for name, counts in _by_task(found):
        tokens = counts["prompt_tokens"] + counts["reasoning_tokens"] + counts["answer_tokens"]
        relabelled = [counts["relabelled"]] if relabels else []
        _add(table, name, counts["train_rows"], counts["validation_rows"], tokens, *relabelled)
    return table


def _by_task(found: Stats) -> Sequence[tuple[str, TaskCounts]]:
    return [*found.tasks.items(), ("all", found.total)]


def _lengths(found: Stats) -> Table:
    table = _table("tokens of a trace", *QUANTILE_NAMES)
    for part, completed, kept in found.lengths:
        _add(table, part, *completed)
        _add(table, f"{part}, kept", *kept)
    return table


# --- verdicts ----------------------------------------------------------------------------------------------------


def _judges(found: Stats) -> Table:
    """Each over everything that it looked at; the reasons that decided are in the table below."""
    table = _table("verdicts", "pass", "fail", "unjudged")
    for one in found.judges:
        _add(table, one.judge, one.passed, one.failed, one.unjudged)
    return table


def _reasons(found: Stats) -> Table:
    table = _table("why not kept", "fate", "traces", "share")
    for fate, reasons in (("rejected", found.total["rejected_by_reason"]), ("unjudged", found.total["unjudged_by_reason"])):
        for reason, count in reasons.items():
            _add(table, reason, fate, count, f"{100 * count / found.total['completed']:.1f} %")
    return table


def _duplicates(found: Stats) -> Table:
    table = _table("duplicates", "copies", "originals")
    for kind, copies in (("exact", found.exact_copies), ("near", found.near_copies)):
        if copies is not None and copies.copies:
            _add_copies(table, kind, copies)
    return table


def _add_copies(table: Table, kind: str, copies: Duplicates) -> None:
    _add(table, kind, copies.copies, copies.originals)
    for original, task, count in copies.largest:
        if count > 1:
            _add(table, f"  {original[:12]} {task}", count, "")


def _contamination(found: Contamination) -> Table:
    table = _table("contamination", "traces", "most of it")
    for benchmark, traces in found.by_benchmark.items():
        _add(table, benchmark, traces, "")
    for item, traces, coverage in found.worst:
        _add(table, f"  {item}", traces, f"{100 * coverage:.0f} %")
    return table


# --- what it cost, and how far to trust it -----------------------------------------------------------------------


def _cost(cost: Cost) -> Table:
    table = _table("cost of all attempts", "in all", "per kept trace")
    for row in cost_rows(cost):
        _add(table, *row)
    return table


def cost_rows(cost: Cost) -> Iterator[tuple[str, str, str]]:
    """What, in all, and per kept trace."""
    yield "dollars", f"{cost.dollars:,.2f}", _each(cost, cost.dollars, ",.4f")
    yield "generated tokens", f"{cost.tokens:,}", _each(cost, cost.tokens, ",.0f")
    yield "seconds in flight", f"{cost.seconds:,.0f}", _each(cost, cost.seconds, ",.2f")
    if cost.wall_seconds is not None:
        yield "seconds of the stage", f"{cost.wall_seconds:,.0f}", _each(cost, cost.wall_seconds, ",.2f")


def _each(cost: Cost, spent: float, form: str) -> str:
    each = cost.per_kept(spent)
    return format(each, form) if math.isfinite(each) else "infinite"


def _view(found: Stats) -> Table:
    table = Table(title="view", title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold", style="dim")
    table.add_column(overflow="fold")
    for name, text in view_lines(found.view, found.num_wide_spread):
        table.add_row(name, Text(printable(text)))
    return table


def view_lines(facts: ViewFacts, num_wide_spread: int) -> Iterator[tuple[str, str]]:
    """Names and sentences: the view, its model and its report, and what met nothing."""
    yield "name", facts.view
    if facts.report is None:
        yield "p(correct)", f"not fitted: {facts.reason}"
    else:
        report = facts.report
        others = f"{report.num_report:,} of {report.num_report_prompts:,} other prompts"
        yield "p(correct)", f"fitted on {report.num_fit:,} verified traces, measured on {others}"
        yield "ECE", f"{_figure(report.ece)} (equal-mass {_figure(report.adaptive_ece)})"
        yield "Brier", f"{_figure(report.brier)} (a constant forecast {_figure(report.base_brier)})"
        yield "AUROC", _figure(report.auroc)
        yield "error margin", _percent(report.error_margin)
    if (kept := facts.kept_error) is not None:
        yield "expected error", f"{_interval(kept.expected)} of {kept.num_rows:,} kept traces"
        if kept.measured is not None:
            yield "measured error", f"{_interval(kept.measured)} of {kept.num_measured:,} held-out traces forecast as high"
    else:
        yield "expected error", "none: a verifier has passed every kept trace"
    if facts.num_kept_unknown:
        yield "unknown", f"p(correct) of {facts.num_kept_unknown:,} kept traces"
    if num_wide_spread:
        ratio = f"more than {WIDE_SPREAD_RATIO:g} times as long as others"
        yield "wide spread", f"{num_wide_spread:,} traces, of prompts with right ones {ratio}"
    if facts.abstention is not None:
        yield "closed book", ", ".join(f"{name} {count:,}" for name, count in facts.abstention.items())
    if facts.idle_quotas:
        yield "idle quotas", f"no trace answers to {', '.join(facts.idle_quotas)}"
    if facts.num_unsearched:
        yield "not searched", f"{facts.num_unsearched:,} benchmark answers that are too short to look for"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _interval(estimate: Estimate | None) -> str:
    """With its 95 % interval over prompts."""
    if estimate is None:
        return "-"
    return f"{_percent(estimate.value)} ({_percent(estimate.low)} to {_percent(estimate.high)})"
