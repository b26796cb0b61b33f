"""The training curve and its figures for the page, from metrics/train.jsonl."""

import json
import statistics

from data import plots
from data.store import RunFolder

MEDIANS = ("perf/tokens_per_s", "perf/mfu", "perf/waste_share")


def training_rows(run: RunFolder) -> list[dict[str, float]]:
    """The rows of metrics/train.jsonl by step, each step's last; a line that a kill has cut is left out."""
    path = run.metrics / "train.jsonl"
    if not path.is_file():
        return []
    by_step: dict[float, dict[str, float]] = {}
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        by_step[row["step"]] = by_step.get(row["step"], {}) | row
    return [by_step[step] for step in sorted(by_step)]


def training_plot(run: RunFolder) -> str | None:
    rows = training_rows(run)
    names = {"training loss": "loss/nats_per_token", "validation loss": "validation/nats_per_token"}
    curves = {
        name: ([row["step"] for row in rows if key in row], [row[key] for row in rows if key in row])
        for name, key in names.items()
        if any(key in row for row in rows)
    }
    return plots.training_curves(curves, ylabel="nats per token") if curves else None


def training_facts(run: RunFolder) -> tuple[tuple[str, str], ...]:
    """Figures beside the curve: only those that were logged."""
    rows = training_rows(run)
    facts: list[tuple[str, str]] = [("optimizer steps", f"{rows[-1]['step']:,.0f}")] if rows else []
    for label, key, form in (
        ("final training loss", "loss/nats_per_token", "{:.4f} nats"),
        ("final validation loss", "validation/nats_per_token", "{:.4f} nats"),
        ("answers right in validation", "validation/accuracy", "{:.1%}"),
        ("steps not applied", "optim/skipped_steps", "{:,.0f}"),
        ("peak learning rate", "optim/lr", "{:.2e}"),
        ("median speed", "perf/tokens_per_s", "{:,.0f} tokens/s"),
        ("median share of peak arithmetic", "perf/mfu", "{:.1%}"),
        ("median share of rows unused", "perf/waste_share", "{:.1%}"),
    ):
        values = [row[key] for row in rows if key in row]
        if values:
            value = max(values) if key == "optim/lr" else statistics.median_high(values) if key in MEDIANS else values[-1]
            facts.append((label, form.format(value)))
    return tuple(facts)
