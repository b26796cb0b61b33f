"""What an evaluation leaves in the run folder: figures, one row an item, and the gates' verdicts. No torch: a finished
run is read in a second."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from configs.errors import UnusableInput
from data.depth import DepthFigures
from data.records import FinishReason, digest
from data.store import RunFolder, read_json, read_table, segments, table_bytes, write_bytes, write_json
from student.depth import accuracy_by_depth
from student.gates import Evaluated, GateRow
from student.grades import Grade, GradedItem
from student.scoring import Metrics


@dataclass(frozen=True, slots=True)
class ItemResult:
    """One row of MODEL.arrow: an attempt at an item, what came back, and its grade. problem: why there is no answer, or "".
    confidence: the answer's length-normalised likelihood in [0, 1], or None. cost: dollars, None where nobody named a price.
    is_unseen, twin_of, depths, context_tokens: as in student.grades.GradedItem; rows of earlier versions lack the last two."""

    prompt_id: str
    sample: int
    task: str
    known: bool | None
    question: str
    reference: str
    reasoning: str
    answer: str
    problem: str
    grade: str
    confidence: float | None
    prompt_tokens: int
    reasoning_tokens: int
    output_tokens: int
    finish_reason: FinishReason
    cost: float | None
    is_unseen: bool
    twin_of: str
    depths: tuple[float, ...] = ()
    context_tokens: int = 0

    @property
    def graded(self) -> GradedItem:
        return GradedItem(
            self.task, self.known, Grade(self.grade), self.reasoning_tokens, self.output_tokens, self.finish_reason,
            self.prompt_id, self.sample, self.confidence, self.cost, self.is_unseen, self.twin_of,
            self.depths, self.context_tokens,
        )  # fmt: skip


_RESULT_TYPES = {
    "sample": pa.int32(), "known": pa.bool_(), "confidence": pa.float64(), "prompt_tokens": pa.int32(),
    "reasoning_tokens": pa.int32(), "output_tokens": pa.int32(), "cost": pa.float64(), "is_unseen": pa.bool_(),
    "depths": pa.list_(pa.float64()), "context_tokens": pa.int32(),
}  # fmt: skip
RESULT = pa.schema([(field.name, _RESULT_TYPES.get(field.name, pa.string())) for field in dataclasses.fields(ItemResult)])


def write_results(
    run: RunFolder, name: str, results: Sequence[ItemResult], metrics: Metrics, harness: Mapping[str, object]
) -> None:
    """NAME.arrow first, then NAME.json with its sha256: whoever finds the figures can check the rows they stand on.
    harness: what the figures depend on besides the items (sampling, template, model), as JSON values."""
    rows = table_bytes(pa.Table.from_pylist([dataclasses.asdict(result) for result in results], schema=RESULT))
    write_bytes(run.evaluation / f"{name}.arrow", rows)
    items = sorted({result.prompt_id for result in results})
    record = {
        "name": name,
        "metrics": metrics.to_json(),
        "harness": dict(harness),
        "items": {"num": len(items), "digest": digest(items)},
        "accuracy_by_depth": accuracy_by_depth(result.graded for result in results),
        "rows_sha256": hashlib.sha256(rows).hexdigest(),
    }
    write_json(run.evaluation / f"{name}.json", record)


def evaluation_files(run: RunFolder, name: str) -> list[Path]:
    """What the stage's manifest hashes for one model: figures, rows, and the committed completions they come from."""
    base = run.evaluation / name
    figures = [path for path in (base.with_name(f"{name}.lm_eval.json"),) if path.is_file()]
    kinds = ("items", "lm_eval.items", "lm_eval.scores") if figures else ("items",)
    log = [segment for kind in kinds for segment in segments(run.evaluation / f"{name}.{kind}")]
    committed = [path for segment in log for path in (segment.path, segment.path.with_suffix(".json"))]
    return [run.evaluation / f"{name}.json", run.evaluation / f"{name}.arrow", *figures, *committed]


def write_gates(run: RunFolder, rows: Sequence[GateRow]) -> Path:
    """evaluation/gates.json: the verdicts as the report and the card show them; an empty list says `ungated`."""
    path = run.evaluation / "gates.json"
    write_json(path, {"gates": [row._asdict() for row in rows], "passed": all(row.passed for row in rows)})
    return path


def read_metrics(run: RunFolder, name: str, folder: Path | None = None) -> Metrics | None:
    """The figures of an evaluated model; None when it was not evaluated. folder: absent, evaluation/. Raises UnusableInput for a
    damaged file."""
    path = (folder or run.evaluation) / f"{name}.json"
    if not path.is_file():
        return None
    try:
        return Metrics.from_json(read_json(path)["metrics"])
    except (KeyError, TypeError) as error:
        raise UnusableInput(
            f"{path}: not an evaluation of this version ({error}); delete it and run: tracestill evaluate"
        ) from error


def read_depths(run: RunFolder, name: str) -> dict[str, DepthFigures] | None:
    """Accuracy by depth of an evaluated model, by task; None when it was not evaluated, or no item has places."""
    path = run.evaluation / f"{name}.json"
    return read_json(path).get("accuracy_by_depth") if path.is_file() else None


def read_lm_eval(run: RunFolder, name: str) -> Mapping[str, Any] | None:
    """The figures of a model's lm-eval suites; None when there are none."""
    path = run.evaluation / f"{name}.lm_eval.json"
    return read_json(path) if path.is_file() else None


def read_results(run: RunFolder, name: str, folder: Path | None = None) -> list[ItemResult]:
    """The per-item rows of an evaluated model, verified against the hash in its figures. Raises UnusableInput."""
    figures = (folder or run.evaluation) / f"{name}.json"
    table = read_table(figures.with_name(f"{name}.arrow"), sha256=read_json(figures)["rows_sha256"])
    return [ItemResult(**row | {"depths": tuple(row.get("depths") or ())}) for row in table.to_pylist()]


def read_evaluated(run: RunFolder, name: str, folder: Path | None = None) -> Evaluated | None:
    """Figures and graded attempts of an evaluated model; None when it was not evaluated. Raises UnusableInput for damage."""
    metrics = read_metrics(run, name, folder)
    return None if metrics is None else Evaluated(metrics, [result.graded for result in read_results(run, name, folder)])
