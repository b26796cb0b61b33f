"""The figures of a run as one typed object: what `tracestill report --json` prints and the page is drawn from."""

from typing import TypedDict

from configs.errors import UnusableInput
from data.depth import DepthFigures
from data.expert_counts import ALARMS_COUNT, read_counts, whole_run
from data.expert_figures import mean_over_layers, read_load
from data.ledger import read_ledger
from data.report_depth import accuracy_by_depth
from data.store import RunFolder, read_json, read_rollup

MODELS = ("teacher", "base", "student", "export")
FIGURES = ("accuracy", "by_family", "hallucination_rate", "abstention_rate", "omniscience_index", "reasoning_tokens_per_correct")
STAGES = ("prompts", "headroom", "generate", "data", "train", "evaluate", "export")


class ModelFigures(TypedDict):
    """One evaluated model. Rates are in [0, 1], the index in [-100, 100]; null where there was nothing to measure."""

    accuracy: float | None
    by_family: dict[str, float]
    hallucination_rate: float | None
    abstention_rate: float | None
    omniscience_index: float | None
    reasoning_tokens_per_correct: float | None


class LedgerFigures(TypedDict):
    """Counts of traces; requested = completed + failed + pending. kept, rejected and unjudged are null before a dataset is
    built, and add up to completed afterwards."""

    requested: int
    completed: int
    failed: int
    pending: int
    kept: int | None
    rejected: int | None
    unjudged: int | None
    failed_by_reason: dict[str, int]
    rejected_by_reason: dict[str, int]
    unjudged_by_reason: dict[str, int]


class ExpertSummary(TypedDict):
    """The whole run in `tracestill report --json`. Figures are the worst layer's, but divergence_nats and drift_nats, which
    are means over layers; see data/expert_figures.py."""

    layers: int
    experts: int
    experts_per_token: int
    expert_parallel: int
    tokens: int
    cv: float
    max_over_mean: float
    rank_max_over_mean: float
    effective_share: float
    dead_share: float
    divergence_nats: float | None
    drift_nats: float | None
    alarms: list[str]


class Summary(TypedDict):
    """`tracestill report --json`. seconds: of each finished stage, from its manifest. experts: null until generation has
    finished, and for a teacher without routers. accuracy_by_depth: by task, of the teacher's judged traces of prompts whose
    evidence has places; null where there are none."""

    teacher: ModelFigures | None
    base: ModelFigures | None
    student: ModelFigures | None
    export: ModelFigures | None
    ledger: LedgerFigures | None
    seconds: dict[str, float | None]
    experts: ExpertSummary | None
    accuracy_by_depth: dict[str, DepthFigures] | None


def report_json(run: RunFolder) -> Summary:
    """The summary of a run folder as it stands. Raises UnusableInput for a damaged file."""
    teacher, base, student, export = (model_figures(run, name) for name in MODELS)
    return Summary(
        teacher=teacher, base=base, student=student, export=export, ledger=ledger_figures(run), seconds=stage_seconds(run),
        experts=expert_summary(run), accuracy_by_depth=accuracy_by_depth(run),
    )  # fmt: skip


def model_figures(run: RunFolder, name: str) -> ModelFigures | None:
    path = run.evaluation / f"{name}.json"
    if not path.is_file():
        return None
    try:
        metrics = read_json(path)["metrics"]
        return ModelFigures(**{figure: metrics[figure] for figure in FIGURES})  # type: ignore[typeddict-item]
    except (KeyError, TypeError) as error:
        raise UnusableInput(f"{path}: no {error} in it; delete the file and run: tracestill evaluate") from error


def ledger_figures(run: RunFolder) -> LedgerFigures | None:
    if read_rollup(run.prompts) is None:
        return None
    ledger, viewed = read_ledger(run), read_rollup(run.dataset) is not None
    return LedgerFigures(
        requested=ledger.requested,
        completed=ledger.completed,
        failed=ledger.failed,
        pending=ledger.pending,
        kept=ledger.kept if viewed else None,
        rejected=ledger.rejected if viewed else None,
        unjudged=ledger.unjudged if viewed else None,
        failed_by_reason=ledger.failed_by_reason,
        rejected_by_reason=ledger.rejected_by_reason,
        unjudged_by_reason=ledger.unjudged_by_reason,
    )


def stage_seconds(run: RunFolder) -> dict[str, float | None]:
    """Seconds of every stage of the pipeline, null while it has not finished; a resumed stage counts all its attempts."""
    seconds: dict[str, float | None] = dict.fromkeys(STAGES)
    for folder in (run.prompts, run.headroom, run.traces, run.dataset, run.checkpoints, run.evaluation, run.export):
        if (rollup := read_rollup(folder)) is not None:
            seconds[rollup.stage] = rollup.seconds
    return seconds


def expert_summary(run: RunFolder) -> ExpertSummary | None:
    """Raises UnusableInput when a sealed file has changed."""
    rows, rollup = [row for row in read_load(run) if row.task is None], read_rollup(run.traces)
    if not rows or rollup is None:
        return None
    alarms = rollup.counts.get(ALARMS_COUNT, [])
    assert isinstance(alarms, list)
    return ExpertSummary(
        layers=len(rows),
        experts=whole_run(read_counts(run)).shape[-1],
        experts_per_token=rows[0].experts_per_token,
        expert_parallel=rows[0].expert_parallel,
        tokens=rows[0].tokens,
        cv=max(row.cv for row in rows),
        max_over_mean=max(row.max_over_mean for row in rows),
        rank_max_over_mean=max(row.rank_max_over_mean for row in rows),
        effective_share=min(row.effective_share for row in rows),
        dead_share=max(row.dead_share for row in rows),
        divergence_nats=mean_over_layers(rows, lambda row: row.divergence_nats),
        drift_nats=mean_over_layers(rows, lambda row: row.drift_nats),
        alarms=[str(alarm) for alarm in alarms],
    )


# --- figures as text, the same in the table and on the page -------------------------------------------------------------


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def count(value: int | float) -> str:
    """Thousands apart, as the page writes them: 12,345."""
    return f"{value:,.0f}"
