"""The two balances of a run, from manifests alone: nothing was lost on the way, and every row's fate has a reason.

generation   requested = completed + failed (by reason) + pending
view         completed = kept + rejected (by reason) + unjudged
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from configs.errors import UnusableInput
from data.columns import num_rows, tally
from data.copies import counting_rows, segment_keys
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


class Fates(NamedTuple):
    """How the committed requests of a run ended. errors: why the aborted ones did."""

    by_reason: Mapping[str, int]
    errors: Mapping[str, int]
    superseded: int = 0


def read_fates(run: RunFolder) -> Fates:
    """From the sidecars of the trace segments, of the copies that count."""
    return fates_of(segments(run.traces))


def fates_of(committed: Sequence[Segment]) -> Fates:
    for segment in committed:
        _check_facts(segment)
    counts_N = counting_rows(*segment_keys(committed))
    reasons, errors, start = Counter[str](), Counter[str](), 0
    for segment in committed:
        keep, start = counts_N[start : start + segment.rows], start + segment.rows
        why = segment.facts.get("errors", {})
        is_whole = bool(keep.all())
        reasons.update(tally(segment.facts["finish_reasons"], None if is_whole else keep))
        errors.update(word for row, word in why.items() if is_whole or keep[int(row)])
    return Fates(reasons, errors, superseded=len(counts_N) - int(counts_N.sum()))


def _check_facts(segment: Segment) -> None:
    trace_ids, reasons = segment.facts.get("trace_ids"), segment.facts.get("finish_reasons")
    if not num_rows(trace_ids) == num_rows(reasons) == segment.rows:
        raise UnusableInput(
            f"segment {segment.path.stem}: its manifest does not name {segment.rows} traces and their finish reasons; "
            "restore it, or delete it with its .arrow file and generate again"
        )


def generation_ledger(fates: Fates, requested: int) -> Ledger:
    """The first balance. An `abort` is a failed request; every other finish reason completed it."""
    failed = fates.by_reason.get("abort", 0)
    completed = sum(fates.by_reason.values()) - failed
    unexplained = failed - sum(fates.errors.values())
    return Ledger(
        requested=requested,
        completed=completed,
        failed=failed,
        pending=requested - completed - failed,
        superseded=fates.superseded,
        failed_by_reason=dict(fates.errors) | ({"abort": unexplained} if unexplained else {}),
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
    ledger = generation_ledger(read_fates(run), requested)
    dataset = read_rollup(run.dataset)
    return ledger if dataset is None else with_view(ledger, dataset.counts)
