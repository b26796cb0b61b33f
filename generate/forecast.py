"""What a run is going to take, before anything is asked: counts, prompt tokens, hours, dollars and bytes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from configs.lengths import output_lengths
from configs.schema import HttpEngine, Recipe
from data.logits import bytes_per_token
from data.prompt_set import PromptIndex, PromptSet, write_prompts
from data.records import Prompt
from data.store import RunFolder, read_rollup, segments, sha256_file

SAMPLE = 2_000
"""Prompts that are tokenised; larger sets are sampled, and the table says so."""
BYTES_PER_TOKEN = 12.0
"""Of a committed trace, calculated: 4 of id and 4 of logprob, which hardly compress, and about 4 characters of text, twice,
which zstd brings to half. Where the run has traces, theirs is used."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """requests: prompts x samples. prompt_tokens: of the sampled prompts, rendered. hours and dollars: None where nothing
    is known of the hardware or the prices. measured: whether output lengths are those of this run's own traces."""

    prompts: int
    requests: int
    by_task: dict[str, int]
    prompt_tokens: Sequence[int]
    output_tokens_mean: float
    measured: bool
    hours: float | None
    dollars: float | None
    trace_bytes: float
    logits_bytes: float


def forecast(recipe: Recipe, run: RunFolder, prompts: Callable[[], object], count: Callable[[Prompt], int]) -> Forecast:
    """prompts: the recipe's, for a run whose prompt set is not made yet. count: rendered prompt -> tokens."""
    if read_rollup(run.prompts) is not None:
        with PromptSet.open(run) as found:
            return _forecast(recipe, run, found, count)
    with TemporaryDirectory() as folder:  # the same code as the stage, and nothing left behind
        path = write_prompts(RunFolder(Path(folder)), prompts())  # type: ignore[arg-type]
        with PromptSet(path, sha256_file(path)) as found:
            return _forecast(recipe, run, found, count)


def _forecast(recipe: Recipe, run: RunFolder, found: PromptSet, count: Callable[[Prompt], int]) -> Forecast:
    index, samples = found.index("train"), recipe.generate.samples_per_prompt
    rows = np.unique(np.linspace(0, len(index) - 1, min(SAMPLE, len(index))).astype(int))
    tokens = [count(prompt) for prompt in found.prompts(index.positions_N[rows])]
    requests = len(index) * samples
    mean, measured = _output_tokens(recipe, run)
    hours, dollars = _price(recipe, requests, float(np.mean(tokens)), mean)
    kept = recipe.generate.logits
    return Forecast(
        prompts=len(index),
        requests=requests,
        by_task=_by_task(index),
        prompt_tokens=tokens,
        output_tokens_mean=mean,
        measured=measured,
        hours=hours,
        dollars=dollars,
        trace_bytes=requests * (mean * _bytes_per_token(run) + float(np.mean(tokens)) * 5),
        logits_bytes=0.0 if kept is None else requests * mean * bytes_per_token(kept),
    )


def _by_task(index: PromptIndex) -> dict[str, int]:
    counts = np.bincount(index.task_codes_N, minlength=len(index.tasks)).tolist()
    return {task: count for task, count in zip(index.tasks, counts, strict=True) if count}


def _output_tokens(recipe: Recipe, run: RunFolder) -> tuple[float, bool]:
    """Mean of a request, and whether it was measured here."""
    tokens = [count for segment in segments(run.traces) for count in segment.facts["output_tokens"]]
    if tokens:
        return float(np.mean(tokens)), True
    return output_lengths(recipe.plan.workload, recipe.generate.sampling.max_tokens).mean, False


def _bytes_per_token(run: RunFolder) -> float:
    committed = segments(run.traces)
    tokens = sum(sum(segment.facts["output_tokens"]) for segment in committed)
    return sum(segment.path.stat().st_size for segment in committed) / tokens if tokens else BYTES_PER_TOKEN


def _price(recipe: Recipe, requests: int, prompt_tokens: float, output_tokens: float) -> tuple[float | None, float | None]:
    """Hours and dollars: a server's by its prices, our own GPUs' by the plan."""
    from teacher.plan import plan_recipe

    engine = recipe.teacher.engine
    cost = plan_recipe(recipe).cost if recipe.teacher.hardware.gpu != "cpu" else None
    hours = None if cost is None else cost.hours * requests * output_tokens / cost.output_tokens
    if isinstance(engine, HttpEngine) and (engine.price_input_per_million or engine.price_output_per_million):
        paid = prompt_tokens * engine.price_input_per_million + output_tokens * engine.price_output_per_million
        return hours, requests * paid / 1e6
    return hours, None if cost is None or hours is None else cost.dollars * hours / cost.hours


def forecast_json(found: Forecast) -> dict[str, object]:
    """JSON values; the prompt tokens of the sample as quantiles."""
    quantiles: list[float] = np.quantile(found.prompt_tokens, (0.0, 0.5, 0.9, 1.0)).tolist()
    values: dict[str, object] = asdict(found)
    values["prompt_tokens"] = dict(zip(("min", "p50", "p90", "max"), quantiles, strict=True))
    return values


# --- shown -------------------------------------------------------------------------------------------------------


def forecast_tables(found: Forecast) -> RenderableType:
    table = Table(title="what generation is going to take", title_justify="left", show_header=False)
    table.add_row("requests", f"{found.requests:,}", f"{found.prompts:,} prompts")
    source = "measured in this run" if found.measured else "plan.workload's, cut at max_tokens"
    total = found.output_tokens_mean * found.requests
    table.add_row("output tokens", f"{total:,.0f}", f"{found.output_tokens_mean:,.0f} a request, {source}")
    unknown = "unknown: teacher.hardware.gpu is cpu"
    table.add_row("hours", unknown if found.hours is None else f"{found.hours:,.1f}", "at plan.efficiency")
    table.add_row("cost", "unknown: no prices" if found.dollars is None else f"$ {found.dollars:,.2f}", "")
    logits = f"and {_size(found.logits_bytes)} of logits" if found.logits_bytes else ""
    table.add_row("storage", _size(found.trace_bytes), logits)
    for task, count in found.by_task.items():
        table.add_row("task", task, f"{count:,} prompts")
    return Group(table, _histogram(found))


def _histogram(found: Forecast) -> Table:
    sampled = "" if len(found.prompt_tokens) == found.prompts else f", {len(found.prompt_tokens):,} sampled"
    table = Table("up to", "prompts", "", title=f"prompt tokens{sampled}", title_justify="left")
    edges = 2 ** np.ceil(np.log2(np.maximum(found.prompt_tokens, 1))).astype(int)
    for edge in sorted(set(edges.tolist())):
        count = int((edges == edge).sum())
        table.add_row(f"{edge:,}", f"{count:,}", "#" * max(1, round(40 * count / len(edges))))
    return table


def _size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"
