"""The stages of this package: traces in, verdicts and a dataset out; and, last of all, the page about the run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configs.progress import Count
from configs.schema import Data
from data import abstention, calibration, confidence, facts, grading, groups, minhash, panel, self_ask
from data.asking import Models
from data.benchmarks import find_benchmarks
from data.build import build
from data.card import INVISIBLE
from data.filters.control_tokens import has_control_tokens
from data.grading import lines_of
from data.judge import VERSIONS
from data.schema import schema_hash
from data.shards import ROW
from data.stage import Context, Outcome, Stage
from data.store import RunFolder, input_hashes, read_rollup, seal, sha256_file
from data.verify import VERIFIERS
from data.verify.llm_judge import template_of, version_of

VERSIONED = (abstention, calibration, confidence, facts, grading, groups, minhash, panel, self_ask)
"""Modules whose `VERSION` says that columns, or what is made of them, may be others now."""


def data_stage(models_of: Callable[[Context], Models]) -> Stage:
    """models_of: what the build may ask; called without loading anything."""
    return Stage(
        "data",
        "traces",
        lambda run: run.dataset,
        ("prompts", "traces"),
        lambda context: _identity(context, models_of(context)),
        lambda context, show: _act(context, models_of(context), show),
        _plan,
    )


def _identity(context: Context, models: Models) -> dict[str, Any]:
    """The settings, what the benchmark files hold, every judge's version and the models that are asked: whatever changes, the
    traces are judged again."""
    settings = context.recipe.data.model_dump(mode="json", exclude=INVISIBLE)
    found = find_benchmarks(context.recipe.data.decontaminate, context.folders)
    benchmarks = {name: sha256_file(path) for name, path in found.items()}
    return {
        "data": settings,
        "benchmarks": benchmarks,
        "judges": VERSIONS | {name: verifier.version for name, verifier in VERIFIERS.items()},
        "columns": {module.__name__: module.VERSION for module in VERSIONED} | {"rows": schema_hash(ROW)},
        "models": _asked(context.recipe.data, models, context.folders),
        "verify_timeout_s": context.recipe.data.verify_timeout_s,  # a longer one is asked of what the last one did not settle
    }


def _asked(settings: Data, models: Models, folders: Sequence[Path]) -> dict[str, str]:
    """Models whose replies decide about rows, and tokenizers whose words do, and which they are."""
    asked = {}
    if models.control_words is not None and has_control_tokens(settings.filters):
        asked["control_words"] = models.control_words.identity()
    if models.student is not None and settings.view.abstention_share is not None:
        asked["student"] = models.student.identity()
    if models.judge is not None and settings.judging is not None:
        asked["judge"] = version_of(settings.judging, template_of(settings.judging, folders), models.judge.identity())
    return asked


def _act(context: Context, models: Models, show: Callable[[Count], None]) -> Outcome:
    built = build(context.recipe.data, context.run, show, folders=context.folders, models=models)
    counts = built.counts
    reasons = ", ".join(
        f"{number} {reason}" for reason, number in {**counts["rejected_by_reason"], **counts["unjudged_by_reason"]}.items()
    )
    summary = f"{counts['kept']} of {counts['completed']} traces kept" + (f" ({reasons})" if reasons else "")
    if built.checked is not None:
        summary = f"{summary}; {built.checked.in_words()}"
    if built.judge is None:
        return Outcome(built.files, {**counts, "settings": built.settings}, summary)
    said = "; ".join([summary, *lines_of(built.judge)])
    return Outcome(built.files, {**counts, "judge": built.judge, "settings": built.settings}, said)


def _plan(context: Context) -> str:
    settings = context.recipe.data
    filters = ", ".join(chosen.type for chosen in settings.filters) or "none"
    return f"filters {filters}; dedup {settings.dedup}; {settings.validation_share:.0%} of prompts to validation"


DATA = data_stage(lambda context: Models())
"""Of a recipe that asks no model."""


def _report_identity(context: Context) -> dict[str, Any]:
    """Any stage's new manifest makes a new page, and so do gates that say something else."""
    run = context.run
    made = sorted(path for path in run.root.glob("*/manifest.json") if path.parent != run.report)
    gates = [path for path in [run.evaluation / "gates.json"] if path.is_file()]
    return {"manifests": input_hashes(run, [*made, *gates])}


def _report(context: Context, show: Callable[[Count], None]) -> Outcome:
    from data.report import write_report  # matplotlib, which no other stage needs

    return Outcome([write_report(context.run)], {}, "report/index.html")


def reseal_report(run: RunFolder) -> None:
    """The page was written again outside its stage: its manifest, where there is one, vouches for the new bytes."""
    if (old := read_rollup(run.report)) is not None:
        files = [run.root / path for path in old.files]
        seal(run, run.report, stage=old.stage, fingerprint=old.fingerprint, inputs=old.inputs, files=files, counts=old.counts,
             seconds=old.seconds)  # fmt: skip


REPORT = Stage(
    "report", "pages", lambda run: run.report, ("prompts",), _report_identity, _report, lambda _: "one self-contained HTML page"
)
