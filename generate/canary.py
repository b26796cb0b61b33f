"""The canary: a seeded, stratified share of the prompts is answered and judged first, and says whether the rest is worth
the money. Its traces are traces like all others: the run goes on from them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.table import Table

from configs.errors import Refused
from configs.progress import Report
from configs.schema import Canary, Data, Recipe
from data.judge import judge_run, opinion
from data.ledger import fates_of
from data.processes import num_cores
from data.prompt_set import PromptIndex, PromptSet
from data.records import digest
from data.select import select
from data.store import RunFolder, segments

QUANTILES = (0.1, 0.5, 0.9, 0.99)


def canary_prompts(prompts: PromptIndex, share: float, seed: int) -> np.ndarray:
    """bool [num_prompts]: of each task the given share, at least one, by hash: another share's choice holds or is held by
    this one, and no other prompt moves when one is added."""
    chosen = np.zeros(len(prompts), dtype=bool)
    for task in range(len(prompts.tasks)):
        members = np.flatnonzero(prompts.task_codes_N == task).tolist()
        ranked = sorted(members, key=lambda row: digest("canary", seed, prompts.prompt_id(row)))
        chosen[ranked[: max(1, math.ceil(share * len(members)))]] = bool(members)
    return chosen


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """requests: of the canary. completed, failed: of those. fates: completed traces by what became of them, `kept` or a
    reason. reasoning_tokens: by quantile. whole_run_cost: dollars for all requests at this price."""

    requests: int
    completed: int
    failed: int
    fates: Mapping[str, int]
    truncated_share: float
    reasoning_tokens: Mapping[str, float]
    output_tokens: int
    cost: float
    whole_run_cost: float

    @property
    def kept_share(self) -> float:
        return self.fates.get("kept", 0) / max(1, self.completed)

    @property
    def failed_share(self) -> float:
        return self.failed / max(1, self.requests)


def measure(
    recipe: Recipe, run: RunFolder, folders: Sequence[Path] = (), tell: Report = lambda count: None
) -> CanaryReport:  # fmt: skip
    """folders: where the recipe's benchmark files are looked for. tell: how far judging is. Raises Refused when not one of the
    canary's requests is completed."""
    assert recipe.generate.canary.share is not None
    with PromptSet.open(run) as prompts:
        index = prompts.index("train")
    chosen = canary_prompts(index, recipe.generate.canary.share, recipe.generate.seed)
    samples = recipe.generate.samples_per_prompt
    asked = [index.prompt_id(row) for row in np.flatnonzero(chosen).tolist()]
    return _report(recipe, run, folders, asked, samples, tell, total=len(index) * samples)


def _report(
    recipe: Recipe, run: RunFolder, folders: Sequence[Path], asked: Sequence[str], samples: int, tell: Report, *, total: int
) -> CanaryReport:
    committed, requests = segments(run.traces), len(asked) * samples
    fates = fates_of(committed)
    view = recipe.data.view.model_copy(update={"abstention_share": None})  # asking the student can wait for the whole run
    settings = recipe.data.model_copy(update={"dedup": "none", "view": view})
    facts, reasons = _judged(run, settings, folders, asked, tell) if fates.by_reason.keys() - {"abort"} else (None, [])
    if facts is None or not facts.num_rows:
        said = ", ".join(f"{count} {error}" for error, count in fates.errors.items()) or "see --status"
        raise Refused(f"{run.traces}: not one of the canary's {requests} requests completed ({said}); mend the cause")
    cost = sum(float(segment.facts.get("cost", 0.0)) for segment in committed)
    reasoning_N, answer_N = (facts[name].to_numpy() for name in ("reasoning_tokens", "answer_tokens"))
    reasoning = np.quantile(reasoning_N, QUANTILES)
    return CanaryReport(
        requests=requests,
        completed=facts.num_rows,
        failed=min(requests - facts.num_rows, fates.by_reason.get("abort", 0)),
        fates=dict(Counter(reason or "kept" for reason in reasons)),
        truncated_share=facts["finish_reason"].to_pylist().count("length") / facts.num_rows,
        reasoning_tokens={f"p{quantile * 100:g}": float(value) for quantile, value in zip(QUANTILES, reasoning, strict=True)},
        output_tokens=int(reasoning_N.sum() + answer_N.sum()),
        cost=cost,
        whole_run_cost=cost / max(1, sum(fates.by_reason.values())) * total,
    )


def _judged(
    run: RunFolder, settings: Data, folders: Sequence[Path], asked: Sequence[str], tell: Report
) -> tuple[pa.Table, list[str]]:
    """data.facts of the canary's completed traces, and for each "" or why it would not be kept."""
    found = judge_run(run, settings, num_workers=settings.processes or num_cores(), tell=tell, folders=folders)
    decisions = select(opinion(found, settings).judgements, len(found))
    mine_N = np.isin(found["facts"]["prompt_id"].to_pylist(), list(asked))
    codes = decisions.reasons_N[mine_N]
    return found["facts"].filter(pa.array(mine_N)), [decisions.words[code] for code in codes.tolist()]


def violations(report: CanaryReport, canary: Canary) -> list[str]:
    """What the thresholds of the recipe say against going on, one sentence each."""
    found = []
    if report.kept_share < canary.min_kept_share:
        found.append(f"{report.kept_share:.1%} kept, expected at least min_kept_share {canary.min_kept_share:.1%}")
    if report.truncated_share > canary.max_truncated_share:
        found.append(
            f"{report.truncated_share:.1%} truncated, expected at most max_truncated_share {canary.max_truncated_share:.1%}"
        )
    if report.failed_share > canary.max_failed_share:
        found.append(f"{report.failed_share:.1%} failed, expected at most max_failed_share {canary.max_failed_share:.1%}")
    longest = canary.max_reasoning_tokens_p99
    if longest is not None and report.reasoning_tokens["p99"] > longest:
        found.append(f"reasoning p99 {report.reasoning_tokens['p99']:,.0f} tokens, expected at most {longest:,}")
    if canary.max_cost is not None and report.whole_run_cost > canary.max_cost:
        found.append(f"the whole run would cost ${report.whole_run_cost:,.2f}, expected at most max_cost ${canary.max_cost:,.2f}")
    return found


def refusal(found: Sequence[str]) -> Refused:
    return Refused(
        f"canary: {'; '.join(found)}; look at the traces with tracestill data show, then change generate.canary or the recipe"
    )


def canary_table(report: CanaryReport, canary: Canary) -> Table:
    table = Table("", "canary", "threshold", title=f"canary: {report.requests:,} requests", title_justify="left")
    table.columns[1].justify = "right"
    table.add_row("failed", f"{report.failed:,} ({report.failed_share:.1%})", f"at most {canary.max_failed_share:.1%}")
    table.add_row("completed", f"{report.completed:,}", "")
    for fate, count in sorted(report.fates.items(), key=lambda item: (item[0] != "kept", -item[1])):
        bound = f"at least {canary.min_kept_share:.1%}" if fate == "kept" else ""
        table.add_row(f"  {fate}", f"{count:,} ({count / report.completed:.1%})", bound)
    table.add_row("truncated", f"{report.truncated_share:.1%}", f"at most {canary.max_truncated_share:.1%}")
    spread = ", ".join(f"{name} {value:,.0f}" for name, value in report.reasoning_tokens.items())
    longest = canary.max_reasoning_tokens_p99
    table.add_row("reasoning tokens", spread, "" if longest is None else f"p99 at most {longest:,}")
    table.add_row("output tokens", f"{report.output_tokens:,}", "")
    bound = "" if canary.max_cost is None else f"at most ${canary.max_cost:,.2f}"
    table.add_row("cost", f"${report.cost:,.2f}; the whole run ${report.whole_run_cost:,.2f}", bound)
    return table
