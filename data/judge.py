"""Every judgement on every completed trace of a run, in the order in which they decide."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from configs.errors import UnusableInput
from configs.progress import Count, Report
from configs.schema import Data
from data import decontaminate, dedup
from data.dataset import ROW
from data.dedup import Keyed
from data.filters import FILTERS
from data.records import Prompt, Trace, Verdict
from data.schema import from_table
from data.select import Judgement, kept, select
from data.store import RunFolder, read_first_copies
from data.verify import Verifier
from data.verify.runner import Item, judge

VERSIONS = {name: judge.version for name, judge in FILTERS.items()} | {
    "decontaminate": decontaminate.VERSION,
    "dedup": dedup.VERSION,
}
"""Of every judgement except the verifiers' (those are data.verify.VERIFIERS')."""


class Candidate(NamedTuple):
    """What judging needs of a trace; its text waits in Arrow. answer is "" for a truncated trace, whatever its last words."""

    trace_id: str
    prompt: Prompt
    answer: str
    key: str


@dataclass(slots=True)
class Collected:
    """Completed traces in log order, the filters' verdicts on them, and their dataset rows (ROW, log order)."""

    candidates: list[Candidate] = field(default_factory=list)
    filtered: dict[str, list[Verdict]] = field(default_factory=dict)
    rows: pa.Table = field(default_factory=ROW.empty_table)

    @property
    def identities(self) -> list[str]:
        return [candidate.trace_id for candidate in self.candidates]


def completed_traces(run: RunFolder) -> Iterator[pa.Table]:
    """The first copy of every completed trace, verified, a segment at a time. Aborted requests failed: they are no traces."""
    for table in read_first_copies(run.traces) if run.traces.is_dir() else ():
        yield table.filter(pa.array([reason != "abort" for reason in table["finish_reason"].to_pylist()], pa.bool_()))


def collect(run: RunFolder, settings: Data, prompts: Mapping[str, Prompt], total: int, tell: Report) -> Collected:
    """One pass over the log. A segment is in memory at a time, and its token ids and logprobs are dropped with it.

    total: completed traces by the ledger, for the progress report.
    Raises UnusableInput for a damaged segment, no completed trace, or one whose prompt is not in the prompt set.
    """
    found = Collected(filtered={name: [] for name in FILTERS if name in settings.filters})
    tables = []
    for table in completed_traces(run):
        tables.append(table.select(ROW.names))
        for trace in from_table(table, Trace):
            found.candidates.append(_candidate(trace, prompts, run))
            for name, verdicts in found.filtered.items():
                verdicts.append(_verdict(trace.trace_id, FILTERS[name].apply(trace, settings)))
        tell(Count(len(found.candidates), total, "reading traces"))
    if not found.candidates:
        raise UnusableInput(f"{run.traces}: no completed trace; run tracestill generate first")
    found.rows = pa.concat_tables([found.rows, *tables])
    return found


def _candidate(trace: Trace, prompts: Mapping[str, Prompt], run: RunFolder) -> Candidate:
    prompt = prompts.get(trace.prompt_id)
    if prompt is None:
        raise UnusableInput(
            f"{run.traces}: trace {trace.trace_id} answers prompt {trace.prompt_id}, which is not in {run.prompts}; "
            "the folder holds traces of another prompt set: use another --run-dir"
        )
    answer = trace.messages[-1].get("content", "") if trace.finish_reason == "stop" else ""
    return Candidate(trace.trace_id, prompt, answer, dedup.conversation_key(trace.messages))


def _verdict(trace_id: str, reason: str) -> Verdict:
    return Verdict(trace_id, "fail" if reason else "pass", reason, 0.0 if reason else 1.0)


def judge_all(
    found: Collected,
    prompts: Mapping[str, Prompt],
    settings: Data,
    *,
    verifiers: Mapping[str, Verifier],
    num_workers: int | None,
    tell: Report,
) -> list[Judgement]:
    """Filters, decontamination, verifier, deduplication: the first that does not pass decides.

    Deduplication comes last and looks at survivors only, so the copy that stays is good in itself. Without
    settings.require_verified the verifiers' verdicts are on record and decide nothing.
    """
    items = [Item(candidate.prompt, candidate.answer) for candidate in found.candidates]
    results = judge(items, timeout_s=settings.verify_timeout_s, num_workers=num_workers, verifiers=verifiers, report=tell)
    verified = (Verdict(trace_id, *result) for trace_id, result in zip(found.identities, results, strict=True))
    judgements = [
        *(_judgement(name, verdicts) for name, verdicts in found.filtered.items()),
        _judgement("decontaminate", _contamination(found, prompts)),
        _judgement("verifier", verified, decides=settings.require_verified),
    ]
    if settings.dedup == "exact":
        judgements.append(_judgement("dedup", _duplication(found, judgements)))
    return judgements


def _judgement(name: str, verdicts: Iterable[Verdict], *, decides: bool = True) -> Judgement:
    return Judgement(name, {verdict.trace_id: verdict for verdict in verdicts}, decides)


def _contamination(found: Collected, prompts: Mapping[str, Prompt]) -> Iterator[Verdict]:
    asked = {candidate.prompt.prompt_id: candidate.prompt for candidate in found.candidates}
    held_out = [prompt for prompt in prompts.values() if prompt.split == "eval"]
    leaks = decontaminate.contaminated(asked.values(), held_out)
    for candidate in found.candidates:
        yield _verdict(candidate.trace_id, "contaminated" if candidate.prompt.prompt_id in leaks else "")


def _duplication(found: Collected, judgements: list[Judgement]) -> Iterator[Verdict]:
    survivors = kept(select(found.identities, judgements))
    repeated = dedup.duplicates([Keyed(candidate.trace_id, candidate.key) for candidate in found.candidates], survivors)
    for trace_id in found.identities:
        yield _verdict(trace_id, "duplicate" if trace_id in repeated else "")
