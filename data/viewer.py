"""Single traces with everything that was said about them, a segment in memory at a time. Values first, then how a terminal
shows them."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from configs.errors import UnusableInput
from data.details import in_words, parsed
from data.records import Message, Trace, Verdict
from data.schema import VERDICT, from_table
from data.select import VIEW, VIEW_FILE, Decision, Fate
from data.store import Rollup, RunFolder, read_first_copies, read_rollup
from data.verdict_files import EVIDENCE, EVIDENCE_FILE, Known, has_evidence, judge_files, read_file

FOLDED_CHARACTERS = 240


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to show: everything that is given has to match; trace_id and task by prefix. tokens: of the output. finish: how it
    ended. fate and reason need a dataset."""

    trace_id: str = ""
    task: str = ""
    fate: Fate | None = None
    reason: str = ""
    finish: str = ""
    min_tokens: int = 0
    max_tokens: int | None = None


class Shown(NamedTuple):
    """One trace, its fate, every verdict on it by the name of the judge's file (`length-v1`), and what is known of it besides.
    All are empty before a dataset is built, and of an abort, which no dataset counts."""

    trace: Trace
    decision: Decision | None
    verdicts: Mapping[str, Verdict]
    known: Known | None = None


def show(run: RunFolder, wanted: Wanted = Wanted(), limit: int | None = None) -> Iterator[Shown]:
    """Traces in log order, read as they are asked for.

    Raises UnusableInput when there are none, when a fate is wanted and no dataset is sealed, or when a verdict file or a
    segment is not what was committed.
    """
    rollup = read_rollup(run.dataset)
    if rollup is None and (wanted.fate or wanted.reason):
        raise UnusableInput(f"{run.dataset}: no dataset yet, so no fates; run: tracestill data build")
    if not run.traces.is_dir():
        raise UnusableInput(f"{run.traces}: no traces yet; run: tracestill generate")
    rows = [] if rollup is None else read_file(run, rollup, VIEW_FILE, VIEW).to_pylist()
    decisions = {row["trace_id"]: Decision(**row) for row in rows}
    return itertools.islice(_matching(run, wanted, rollup, decisions), limit)


def _matching(run: RunFolder, wanted: Wanted, rollup: Rollup | None, decisions: Mapping[str, Decision]) -> Iterator[Shown]:
    tables = {} if rollup is None else {name: read_file(run, rollup, f"{name}.arrow", VERDICT) for name in judge_files(rollup)}
    evidence = None if rollup is None or not has_evidence(rollup) else read_file(run, rollup, EVIDENCE_FILE, EVIDENCE)
    for table in read_first_copies(run.traces):
        for row in _matching_rows(table, wanted, decisions):
            [trace] = from_table(table.slice(row, 1), Trace)
            verdicts = _verdicts(tables, trace.trace_id)
            yield Shown(trace, decisions.get(trace.trace_id), verdicts, _known(evidence, trace.trace_id))


def _matching_rows(table: pa.Table, wanted: Wanted, decisions: Mapping[str, Decision]) -> list[int]:
    """Found before a record is made: token ids of a long trace are a million Python objects."""
    columns = (table[name].to_pylist() for name in ("trace_id", "task", "finish_reason", "reasoning_tokens", "answer_tokens"))
    most = float("inf") if wanted.max_tokens is None else wanted.max_tokens
    return [
        row
        for row, (trace_id, task, finish, reasoning, answer) in enumerate(zip(*columns, strict=True))
        if trace_id.startswith(wanted.trace_id)
        and task.startswith(wanted.task)
        and wanted.finish in ("", finish)
        and wanted.min_tokens <= reasoning + answer <= most
        and _has_fate(wanted, decisions.get(trace_id))
    ]


def _has_fate(wanted: Wanted, decision: Decision | None) -> bool:
    if not wanted.fate and not wanted.reason:
        return True
    return decision is not None and wanted.fate in (None, decision.fate) and wanted.reason in ("", decision.reason)


def _verdicts(tables: Mapping[str, pa.Table], trace_id: str) -> dict[str, Verdict]:
    """They are sorted by trace_id, each at most once in a file."""
    found = {}
    for name, table in tables.items():
        row = table["trace_id"].index(trace_id).as_py()
        if row >= 0:
            [found[name]] = from_table(table.slice(row, 1), Verdict)
    return found


def _known(evidence: pa.Table | None, trace_id: str) -> Known | None:
    row = -1 if evidence is None else evidence["trace_id"].index(trace_id).as_py()
    return Known(**evidence.select(Known._fields).slice(row, 1).to_pylist()[0]) if evidence is not None and row >= 0 else None


# --- on a terminal -----------------------------------------------------------------------------------------------


def rendered(shown: Shown, *, unfold: bool) -> RenderableType:
    """One trace: who said what, reasoning folded to its beginning and its end unless it is unfolded."""
    trace = shown.trace
    fate = "" if shown.decision is None else f"  {shown.decision.fate} {shown.decision.reason}".rstrip()
    ended = trace.finish_reason + (f" ({trace.error})" if trace.error else "")
    facts = (
        f"{ended}, {trace.prompt_tokens:,} + {trace.reasoning_tokens:,} reasoning + {trace.answer_tokens:,} answer tokens, "
        f"{trace.seconds:,.1f} s, attempt {trace.attempt}, {trace.engine} {trace.model_id}"
    )
    verdicts = ", ".join(f"{name} {verdict.reason or verdict.verdict}" for name, verdict in shown.verdicts.items())
    parts: list[RenderableType] = [Rule(f"{trace.task}{fate}  {trace.trace_id}", align="left"), Text(facts, style="dim")]
    for message in trace.messages:
        parts += _message(message, unfold)
    if trace.messages and not trace.messages[-1].get("content") and not trace.messages[-1].get("reasoning_content"):
        parts.append(_line("raw", trace.raw_text if unfold else folded(trace.raw_text), "dim"))
    if verdicts:
        parts.append(_line("verdicts", verdicts))
    parts += [_line("", f"{name}: {in_words(parsed(said.detail))}") for name, said in shown.verdicts.items() if said.detail]
    if shown.known is not None:
        parts.append(_line("known", known_in_words(shown.known), "dim"))
    return Group(*parts)


def known_in_words(known: Known) -> str:
    figures = (
        ("p(correct)", known.p_correct, "{:.3f}"),
        ("agreement", known.agreement, "{:.2f}"),
        ("logprob of the answer", known.answer_logprob, "{:.3f}"),
        ("of the reasoning", known.reasoning_logprob, "{:.3f}"),
        ("lowest", known.lowest_logprob, "{:.3f}"),
        ("tokens over the shortest right one", known.tokens_over_shortest, "{:.2f}"),
    )
    said = ", ".join(f"{name} {'unknown' if value is None else form.format(value)}" for name, value, form in figures)
    return f"{said}; right ones of its prompt differ widely in length" if known.wide_spread else said


def _message(message: Message, unfold: bool) -> list[RenderableType]:
    reasoning, said = message.get("reasoning_content", ""), message.get("content", "")
    is_long = message.get("role") != "assistant" and not unfold
    parts: list[RenderableType] = [_line("think", reasoning if unfold else folded(reasoning), "dim")] if reasoning else []
    return [*parts, _line(message.get("role", ""), folded(said, 8 * FOLDED_CHARACTERS) if is_long else said)]


def _line(label: str, text: str, style: str = "") -> Text:
    """Model output is data: no markup in it is ever obeyed, and no control character reaches the terminal."""
    return Text(f"{label:<10} {printable(text)}", style=style)


def printable(text: str) -> str:
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def folded(text: str, limit: int = FOLDED_CHARACTERS) -> str:
    """The text, or its two ends and how much stands between them."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half].rstrip()} [... {len(text) - 2 * half:,} characters ...] {text[-half:].lstrip()}"
