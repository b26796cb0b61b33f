"""What a built dataset is made of, and single traces with everything that was said about them. Values only:
the command prints."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import pyarrow as pa

from configs.errors import UnusableInput
from data.counts import Counts, TaskCounts
from data.judge import completed_traces
from data.ledger import Ledger, read_ledger
from data.records import Trace, Verdict
from data.schema import VERDICT, from_table
from data.select import VIEW, VIEW_FILE, Decision, Fate
from data.store import Rollup, RunFolder, read_rollup, read_table


@dataclass(frozen=True, slots=True)
class Stats:
    """tasks: name -> counts, in name order. total: the same over all. ledger: both balances as they stand now."""

    tasks: Mapping[str, TaskCounts]
    total: Counts
    ledger: Ledger
    dataset_sha256: str


def dataset_stats(run: RunFolder) -> Stats:
    """The figures of the sealed dataset, from manifests alone. Raises UnusableInput when there is none."""
    rollup = _sealed(run)
    total = cast(Counts, rollup.counts)
    return Stats(total["by_task"], total, read_ledger(run), dataset_hash(rollup))


def dataset_hash(rollup: Rollup) -> str:
    """One sha256 for the whole dataset: over the names and hashes of its files, in name order."""
    named = [f"{path} {sha256}" for path, sha256 in sorted(rollup.files.items()) if path.startswith("dataset/")]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()


class Shown(NamedTuple):
    """One trace, its fate, and every verdict on it by the name of the judge's file (`length-v1`)."""

    trace: Trace
    decision: Decision
    verdicts: dict[str, Verdict]


def show(
    run: RunFolder, *, trace_id: str = "", task: str = "", fate: Fate | None = None, reason: str = "", limit: int = 5
) -> list[Shown]:
    """Up to `limit` traces in log order that match everything given. trace_id and task match by prefix.

    Raises UnusableInput when no dataset is sealed, or a verdict file or segment is not what was committed.
    """
    rollup = _sealed(run)
    decisions = {row["trace_id"]: Decision(**row) for row in _read(run, rollup, VIEW_FILE, VIEW).to_pylist()}

    def wanted(identity: str, its_task: str) -> bool:
        decision = decisions.get(identity)
        if decision is None or not (identity.startswith(trace_id) and its_task.startswith(task)):
            return False
        return (fate is None or decision.fate == fate) and (not reason or decision.reason == reason)

    traces: list[Trace] = []
    for table in completed_traces(run):
        mask = [wanted(*row) for row in zip(table["trace_id"].to_pylist(), table["task"].to_pylist(), strict=True)]
        traces += from_table(table.filter(pa.array(mask, pa.bool_())).slice(0, limit - len(traces)), Trace)
        if len(traces) == limit:
            break
    verdicts = _verdicts(run, rollup, {trace.trace_id for trace in traces})
    return [Shown(trace, decisions[trace.trace_id], verdicts[trace.trace_id]) for trace in traces]


def _verdicts(run: RunFolder, rollup: Rollup, trace_ids: set[str]) -> dict[str, dict[str, Verdict]]:
    found: dict[str, dict[str, Verdict]] = {trace_id: {} for trace_id in trace_ids}
    names = sorted(path.removeprefix("verdicts/") for path in rollup.files if path.startswith("verdicts/"))
    for name in names:
        if name == VIEW_FILE:
            continue
        table = _read(run, rollup, name, VERDICT)
        mask = [identity in trace_ids for identity in table["trace_id"].to_pylist()]
        for verdict in from_table(table.filter(pa.array(mask, pa.bool_())), Verdict):
            found[verdict.trace_id][name.removesuffix(".arrow")] = verdict
    return found


def _read(run: RunFolder, rollup: Rollup, name: str, schema: pa.Schema) -> pa.Table:
    path = run.verdicts / name
    table = read_table(path, sha256=rollup.files[f"verdicts/{name}"])
    if table.schema != schema:
        raise UnusableInput(f"{path}: columns {table.schema.names}, expected {schema.names}; run tracestill data build again")
    return table


def _sealed(run: RunFolder) -> Rollup:
    rollup = read_rollup(run.dataset)
    if rollup is None:
        raise UnusableInput(f"{run.dataset}: no dataset yet; run: tracestill data build")
    return rollup
