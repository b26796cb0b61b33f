"""From judgements to a view: every completed trace is kept, rejected or unjudged, and exactly one reason says why.

Judgements stand in a fixed order, and the first one that does not pass decides; so the reasons add up to the traces,
whatever else may be wrong with each of them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import pyarrow as pa

from data.records import Verdict

Fate = Literal["kept", "rejected", "unjudged"]

VIEW_FILE = "view.arrow"
VIEW = pa.schema([("trace_id", pa.string()), ("fate", pa.string()), ("reason", pa.string()), ("judgement", pa.string())])


class Judgement(NamedTuple):
    """One column of verdicts, a verdict for each completed trace by trace_id. name: who was asked. decides: False for one
    that is on record only."""

    name: str
    verdicts: Mapping[str, Verdict]
    decides: bool = True


class Decision(NamedTuple):
    """What became of one trace. reason and judgement (who decided) are "" for a kept one."""

    trace_id: str
    fate: Fate
    reason: str = ""
    judgement: str = ""


def select(trace_ids: Iterable[str], judgements: Sequence[Judgement]) -> list[Decision]:
    """One decision a trace, in the order given. Raises KeyError when a judgement has not seen a trace."""
    return [_decide(trace_id, judgements) for trace_id in trace_ids]


def _decide(trace_id: str, judgements: Sequence[Judgement]) -> Decision:
    for judgement in judgements:
        if not judgement.decides:
            continue
        verdict = judgement.verdicts[trace_id]
        if verdict.verdict != "pass":
            return Decision(trace_id, "rejected" if verdict.verdict == "fail" else "unjudged", verdict.reason, judgement.name)
    return Decision(trace_id, "kept")


def kept(decisions: Iterable[Decision]) -> set[str]:
    return {decision.trace_id for decision in decisions if decision.fate == "kept"}


def reasons(decisions: Iterable[Decision], fate: Fate) -> dict[str, int]:
    """Count by reason of the traces with this fate, most frequent first."""
    counted = Counter(decision.reason for decision in decisions if decision.fate == fate)
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def view_table(decisions: Iterable[Decision]) -> pa.Table:
    """One row a decision, sorted by trace_id."""
    return pa.Table.from_pylist([decision._asdict() for decision in sorted(decisions)], schema=VIEW)
