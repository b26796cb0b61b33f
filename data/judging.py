"""Every trace segment is asked every question of the panel once, over worker processes and over builds.

Workers read a segment, verify it and answer; answers that only a verifier's killable process can give come back as items
and are judged here. Of an earlier build's answers only those are asked for again that `unsettled` names. What is known is
committed every few seconds, so that a build that is killed loses those.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from configs.progress import Count, Report
from data.look import Look
from data.panel import Panel, PanelSpec, Said, unsettled, with_judged
from data.processes import map_unordered
from data.store import RunFolder, Segment, read_segment
from data.verdict_log import Part, VerdictLog
from data.verify.runner import Item, Pool

COMMIT_SECONDS = 10.0
INLINE_SEGMENTS = 3
"""So few segments are looked at in this process: a worker takes a second to start."""


class _Task(NamedTuple):
    """questions: that this segment was never asked. again: rows that a verifier could not settle, and may now."""

    segment: Segment
    questions: tuple[str, ...]
    again: tuple[int, ...]

    @property
    def verifies(self) -> bool:
        return bool(self.again) or "verifier" in self.questions


class _Answers(NamedTuple):
    segment: Segment
    said: dict[str, Said]
    again: dict[int, Item]


@dataclass(slots=True)
class _Fresh:
    """Parts that are not committed yet, by question."""

    logs: Mapping[str, VerdictLog]
    parts: dict[str, list[Part]] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    def add(self, name: str, part: Part) -> None:
        self.parts.setdefault(name, []).append(part)

    def commit(self, *, after_s: float = 0.0) -> None:
        if time.monotonic() - self.since < after_s:
            return
        for name, parts in self.parts.items():
            self.logs[name].add(sorted(parts))
        self.parts, self.since = {}, time.monotonic()


def examine(
    run: RunFolder, committed: Sequence[Segment], spec: PanelSpec, *, num_workers: int, pool: Pool, tell: Report
) -> dict[str, pa.Table]:
    """By question, the answers about every completed trace of the segments, in log order; superseded copies included.

    num_workers: processes that read segments. pool: judges what needs a verifier's worker.
    Raises UnusableInput for a damaged segment or a trace without its prompt, what was judged until then is kept; or, before
    anything is judged, where a verifier that the prompts need cannot work on this machine.
    """
    panel = Panel(spec)
    logs = {name: VerdictLog(run, name, question.key, question.schema) for name, question in panel.questions.items()}
    tasks = [task for segment in committed if (task := _task(segment, logs, pool)).questions or task.again]
    if any(task.verifies for task in tasks):
        panel.require()
    fresh = _Fresh(logs)
    num_workers = 0 if len(tasks) <= INLINE_SEGMENTS else min(num_workers, len(tasks))
    done, total = len(committed) - len(tasks), len(committed)
    try:
        for segment, answers, again in map_unordered(_ask, tasks, num_workers=num_workers, set_up=_take_seat, arguments=(spec,)):
            if again:
                answers["verifier"] = Said(logs["verifier"].rows(segment), again)
            for name, said in answers.items():
                rows = with_judged(said, pool) if said.open_items else said.rows
                fresh.add(name, Part(segment.path.stem, segment.sha256, rows))
            done += 1
            tell(Count(done, total, "judging", unit="segments"))
            fresh.commit(after_s=COMMIT_SECONDS)
    finally:
        fresh.commit()
    return {name: log.read(committed) for name, log in logs.items()}


def _task(segment: Segment, logs: Mapping[str, VerdictLog], pool: Pool) -> _Task:
    missing = tuple(name for name, log in logs.items() if not log.covers(segment))
    return _Task(segment, missing, () if "verifier" in missing else unsettled(logs["verifier"].rows(segment), pool.limits_s))


_seat: list[Panel] = []


def _take_seat(spec: PanelSpec) -> None:
    _seat[:] = [Panel(spec)]


def _ask(task: _Task) -> _Answers:
    (panel,) = _seat
    look = Look(read_segment(task.segment), panel.prompts)
    again = {row: Item(look.prompts[row], look.answers[row]) for row in task.again}
    return _Answers(task.segment, {name: panel.questions[name].ask(look) for name in task.questions}, again)
