"""The two balances of a run, from manifests alone: nothing was lost on the way, and every row's fate has a reason.

generation   requested = completed + failed (by reason) + pending
view         completed = kept + rejected (by reason) + unjudged
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from configs.errors import UnusableInput
from data.store import RunFolder, Segment, read_rollup, segments


@dataclass(frozen=True, slots=True)
class Ledger:
    """Counts of traces. `superseded` copies are duplicates of completed ones and stand outside both balances."""

    requested: int = 0
    completed: int = 0
    failed: int = 0
    pending: int = 0
    kept: int = 0
    rejected: int = 0
    unjudged: int = 0
    superseded: int = 0
    failed_by_reason: dict[str, int] = field(default_factory=dict)
    rejected_by_reason: dict[str, int] = field(default_factory=dict)
    unjudged_by_reason: dict[str, int] = field(default_factory=dict)

    def check(self, *, viewed: bool) -> None:
        """Raises UnusableInput when a balance does not hold; the second one is due once a dataset has been built."""
        if self.pending < 0 or self.requested != self.completed + self.failed + self.pending:
            raise UnusableInput(
                f"ledger: {self.requested} requested is not {self.completed} completed + {self.failed} failed "
                f"+ {self.pending} pending; "
                "traces of another request set lie in this run folder: use another --run-dir"
            )
        if viewed and self.completed != self.kept + self.rejected + self.unjudged:
            raise UnusableInput(
                f"ledger: {self.completed} completed is not {self.kept} kept + {self.rejected} rejected "
                f"+ {self.unjudged} unjudged; "
                "traces arrived after the dataset was built: run tracestill data build again"
            )


class GenerationState:
    """Which requests are done, from the sidecars of the trace segments. The first copy of a trace_id decides its fate."""

    def __init__(self, run: RunFolder) -> None:
        self.finish_reasons: dict[str, str] = {}
        self.superseded = 0
        for segment in segments(run.traces) if run.traces.is_dir() else ():
            for trace_id, reason in zip(*_fates(segment), strict=True):
                if trace_id in self.finish_reasons:
                    self.superseded += 1
                else:
                    self.finish_reasons[trace_id] = reason


def _fates(segment: Segment) -> tuple[list[str], list[str]]:
    trace_ids, reasons = segment.facts.get("trace_ids"), segment.facts.get("finish_reasons")
    if not (isinstance(trace_ids, list) and isinstance(reasons, list) and len(trace_ids) == len(reasons) == segment.rows):
        raise UnusableInput(
            f"segment {segment.path.stem}: its manifest does not name {segment.rows} traces and their finish reasons; "
            "restore it, or delete it with its .arrow file and generate again"
        )
    return trace_ids, reasons


def generation_ledger(state: GenerationState, requested: int) -> Ledger:
    """The first balance. An `abort` is a failed request; every other finish reason completed it."""
    by_reason = Counter(state.finish_reasons.values())
    failed_by_reason = {reason: count for reason, count in by_reason.items() if reason == "abort"}
    failed = sum(failed_by_reason.values())
    completed = sum(by_reason.values()) - failed
    return Ledger(
        requested=requested,
        completed=completed,
        failed=failed,
        pending=requested - completed - failed,
        superseded=state.superseded,
        failed_by_reason=failed_by_reason,
    )


def with_view(ledger: Ledger, counts: Mapping[str, object]) -> Ledger:
    """The ledger with the second balance filled from a dataset's counts (kept, rejected_by_reason, unjudged_by_reason)."""
    rejected, unjudged = counts["rejected_by_reason"], counts["unjudged_by_reason"]
    kept = counts["kept"]
    assert isinstance(rejected, dict) and isinstance(unjudged, dict) and isinstance(kept, int)
    return Ledger(
        ledger.requested, ledger.completed, ledger.failed, ledger.pending, kept, sum(rejected.values()), sum(unjudged.values()),
        ledger.superseded, ledger.failed_by_reason, dict(rejected), dict(unjudged),
    )  # fmt: skip


def read_ledger(run: RunFolder) -> Ledger:
    """The ledger of a run folder as it stands. Raises UnusableInput when the prompts stage has not finished."""
    prompts = read_rollup(run.prompts)
    if prompts is None:
        raise UnusableInput(f"{run.root}: no prompt set yet; run: tracestill run")
    requested = prompts.counts["requests"]
    assert isinstance(requested, int)
    ledger = generation_ledger(GenerationState(run), requested)
    dataset = read_rollup(run.dataset)
    return ledger if dataset is None else with_view(ledger, dataset.counts)
