"""Evaluated items for the page: how each model's answers were graded, and the same question put to all of them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from data.store import RunFolder, read_json, read_table

COMPARED = ("base", "student", "teacher")
"""In the order of the story: before, after, and what was to be reached."""
GRADES = ("correct", "partial", "not_attempted", "incorrect", "ungraded")
MAX_TEXT = 6000
"""Characters of one text on the page; a 100,000-token trace is cut here, and says so."""
MAX_COMPARISONS, MAX_FAILURES = 6, 3

ItemRow = dict[str, str | int | bool | None]
"""One row of evaluation/MODEL.arrow; the columns are student.evaluate.ItemResult's."""


@dataclass(frozen=True, slots=True)
class GradeBar:
    """How one model's items of one kind were graded: shares of `total`, in the order of GRADES."""

    model: str
    total: int
    counts: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Said:
    """One model's output on one item."""

    model: str
    answer: str
    reasoning: str
    problem: str
    grade: str
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """One held-out question and what each model said to it."""

    kind: str
    question: str
    reference: str
    said: tuple[Said, ...]


def item_rows(run: RunFolder, name: str) -> dict[str, ItemRow]:
    """prompt_id -> row of the first attempt in a model's evaluation, verified against the hash in its figures."""
    path = run.evaluation / f"{name}.arrow"
    if not path.is_file():
        return {}
    table = read_table(path, sha256=read_json(path.with_suffix(".json"))["rows_sha256"])
    return {row["prompt_id"]: row for row in table.to_pylist() if not row.get("sample")}


def grade_bars(rows: Mapping[str, Mapping[str, ItemRow]], *, known: bool) -> tuple[GradeBar, ...]:
    """A bar a model over the closed-book items of one kind; empty when there are none."""
    bars = []
    for model, items in rows.items():
        counted = Counter(str(row["grade"]) for row in items.values() if row["known"] is known)
        if counted:
            bars.append(
                GradeBar(model, sum(counted.values()), tuple((grade, counted[grade]) for grade in GRADES if counted[grade]))
            )
    return tuple(bars)


def kind_of(row: ItemRow) -> str:
    family = str(row["task"]).partition("/")[0]
    return family if row["known"] is None else f"{family}, {'known' if row['known'] else 'unknown to the teacher'}"


def comparisons(rows: Mapping[str, Mapping[str, ItemRow]]) -> tuple[Comparison, ...]:
    """For each kind of item the first that the base got wrong and the student handles, else the first of its kind."""
    chosen: dict[str, str] = {}
    for prompt_id, row in sorted(rows.get("student", {}).items()):
        chosen.setdefault(kind_of(row), prompt_id)
    for prompt_id, row in sorted(rows.get("student", {}).items(), reverse=True):
        before = rows.get("base", {}).get(prompt_id)
        if handled(row) and before is not None and not handled(before):
            chosen[kind_of(row)] = prompt_id
    return tuple(compare(kind, prompt_id, rows) for kind, prompt_id in sorted(chosen.items())[:MAX_COMPARISONS])


def failures(rows: Mapping[str, Mapping[str, ItemRow]]) -> tuple[Comparison, ...]:
    """A few items the student gets wrong, at most one a kind: a report that shows only successes is an advertisement."""
    chosen: dict[str, str] = {}
    for prompt_id, row in sorted(rows.get("student", {}).items()):
        if not handled(row):
            chosen.setdefault(kind_of(row), prompt_id)
    return tuple(compare(kind, prompt_id, rows) for kind, prompt_id in sorted(chosen.items())[:MAX_FAILURES])


def handled(row: ItemRow) -> bool:
    """Right, or declined where nothing else can be right."""
    return row["grade"] == "correct" or (row["known"] is False and row["grade"] == "not_attempted")


def compare(kind: str, prompt_id: str, rows: Mapping[str, Mapping[str, ItemRow]]) -> Comparison:
    said = tuple(
        Said(
            model,
            shortened(row["answer"]),
            shortened(row["reasoning"]),
            str(row["problem"]),
            str(row["grade"]),
            int(row["output_tokens"] or 0),
        )
        for model in COMPARED
        if (row := rows.get(model, {}).get(prompt_id)) is not None
    )
    asked = rows["student"][prompt_id]
    return Comparison(kind, shortened(asked["question"]), shortened(asked["reference"]), said)


def shortened(text: object) -> str:
    text = str(text or "")
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}\n[... {len(text) - MAX_TEXT} more characters]"
