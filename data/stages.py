"""The stages of this package: traces in, verdicts and a dataset out; and, last of all, the page about the run."""

from collections.abc import Callable
from typing import Any

from configs.progress import Count
from data.benchmarks import find_benchmarks
from data.build import build
from data.card import INVISIBLE
from data.judge import VERSIONS
from data.stage import Context, Outcome, Stage
from data.store import RunFolder, input_hashes, read_rollup, seal, sha256_file
from data.verify import VERIFIERS


def _identity(context: Context) -> dict[str, Any]:
    """The settings, what the benchmark files hold and every judge's version: whatever changes, the traces are judged again."""
    settings = context.recipe.data.model_dump(mode="json", exclude=INVISIBLE)
    found = find_benchmarks(context.recipe.data.decontaminate, context.folders)
    benchmarks = {name: sha256_file(path) for name, path in found.items()}
    return {
        "data": settings,
        "benchmarks": benchmarks,
        "judges": VERSIONS | {name: verifier.version for name, verifier in VERIFIERS.items()},
    }


def _act(context: Context, show: Callable[[Count], None]) -> Outcome:
    built = build(context.recipe.data, context.run, show, folders=context.folders)
    counts = built.counts
    reasons = ", ".join(
        f"{number} {reason}" for reason, number in {**counts["rejected_by_reason"], **counts["unjudged_by_reason"]}.items()
    )
    summary = f"{counts['kept']} of {counts['completed']} traces kept" + (f" ({reasons})" if reasons else "")
    return Outcome(built.files, {**counts, "settings": built.settings}, summary)


def _plan(context: Context) -> str:
    settings = context.recipe.data
    filters = ", ".join(chosen.type for chosen in settings.filters) or "none"
    return f"filters {filters}; dedup {settings.dedup}; {settings.validation_share:.0%} of prompts to validation"


DATA = Stage("data", "traces", lambda run: run.dataset, ("prompts", "traces"), _identity, _act, _plan)


def _report_identity(context: Context) -> dict[str, Any]:
    """Any stage's new manifest makes a new page."""
    run = context.run
    return {
        "manifests": input_hashes(run, sorted(path for path in run.root.glob("*/manifest.json") if path.parent != run.report))
    }


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
