"""The model card: what this student is, where it comes from, what it scored, and how to serve it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from configs.schema import Recipe
from data.depth import DepthFigures
from data.prompt_set import read_prompts
from data.store import RunFolder, code_revision, read_rollup, sha256_file
from student.certificate import Certified, read_certificate
from student.depth import depth_rows
from student.figures import cell, figure_rows, lm_eval_rows, markdown_table
from student.gates import GateRow, bound_text, shown_with_interval
from student.grades import ENDS, MIDDLE, TWINS, UNSEEN, is_length
from student.matrix import ParityRow
from student.results import read_depths, read_lm_eval
from student.scoring import Metrics

if TYPE_CHECKING:
    from student.export import Exported

COMPARED = ("teacher", "base", "student")


class PromptSource(NamedTuple):
    """Where prompts came from, under which licence, and how many of them the training split holds."""

    source: str
    licence: str
    num_prompts: int


@dataclass(frozen=True, slots=True)
class CardFacts:
    """Everything the card states. dataset_sha256 is of the dataset's manifest, which holds the hash of every file. depths:
    accuracy by depth, by task, of the models that have it. lm_eval: rows of a table."""

    recipe: Recipe
    sources: tuple[PromptSource, ...]
    dataset_sha256: str
    train_rows: int
    validation_rows: int
    metrics: Mapping[str, Metrics]
    gates: Sequence[GateRow]
    revision: str
    certificate: Certified | None = None
    depths: Mapping[str, Mapping[str, DepthFigures]] = field(default_factory=dict)
    lm_eval: Sequence[Sequence[str]] = ()


def gather(run: RunFolder, recipe: Recipe, metrics: Mapping[str, Metrics], gates: Sequence[GateRow]) -> CardFacts:
    """The facts as the run folder holds them; figures that no stage has made are 0 or empty."""
    dataset = read_rollup(run.dataset)
    counts = dataset.counts if dataset else {}
    return CardFacts(
        recipe=recipe,
        sources=prompt_sources(run),
        dataset_sha256=sha256_file(run.dataset / "manifest.json") if dataset else "",
        train_rows=int(str(counts.get("train_rows", 0))),
        validation_rows=int(str(counts.get("validation_rows", 0))),
        metrics=metrics,
        gates=gates,
        revision=code_revision(),
        certificate=read_certificate(run, recipe),
        depths={name: found for name in metrics if (found := read_depths(run, name)) is not None},
        lm_eval=lm_eval_rows({name: read_lm_eval(run, name) for name in metrics}),
    )


def certificate_text(certificate: Certified | None) -> str:
    if certificate is None:
        return "none (`tracestill train RECIPE --certify` makes one)"
    verdict = "hold" if certificate.holds else "do NOT hold"
    return (
        f"gradients {verdict}: within {certificate.largest_difference:.1e} of a float64 reference, bound {certificate.bound:g}; "
        f"sha256 `{certificate.sha256}`" + (f"; made with other {', '.join(certificate.others)}" if certificate.others else "")
    )


def prompt_sources(run: RunFolder) -> tuple[PromptSource, ...]:
    """Sources of the training prompts, most prompts first."""
    counted = Counter((prompt.source, prompt.licence) for prompt in read_prompts(run, "train"))
    return tuple(PromptSource(source, licence, count) for (source, licence), count in counted.most_common())


def render_card(facts: CardFacts, exported: "Sequence[Exported]") -> str:
    """README.md of the exported folder: front matter as model hubs read it, then prose and tables."""
    recipe = facts.recipe
    return (
        "\n\n".join(
            [
                front_matter(facts),
                f"# {recipe.name}",
                introduction(recipe, exported),
                "## Results",
                f"On the same held-out items for all models; {gate_summary(facts.gates)}",
                metrics_table(facts.metrics),
                *([depth_table(facts.depths)] if facts.depths else []),
                *([markdown_table(facts.lm_eval[0], facts.lm_eval[1:])] if facts.lm_eval else []),
                *([gates_table(facts.gates)] if facts.gates else []),
                "## Limits",
                limits(facts),
                "## How to use it",
                usage([one.name for one in exported]),
                "## Where it comes from",
                provenance(facts),
                "## What was checked",
                *checks(exported, held_out=facts.validation_rows > 0),
                "## Recipe",
                f"```yaml\n{recipe_text(recipe)}\n```",
            ]
        ).rstrip()
        + "\n"
    )


def front_matter(facts: CardFacts) -> str:
    """Metadata as model hubs read it. Source: the Hugging Face model card specification, with its model-index of results."""
    recipe, student = facts.recipe, facts.metrics.get("student")
    fields: dict[str, Any] = {
        "license": recipe.student.licence.lower(),
        "base_model": recipe.student.model,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "reasoning", "tracestill"],
    }
    if student is not None:
        figures = {name: getattr(student, name) for name in ("accuracy", "hallucination_rate", "abstention_rate")}
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"type": "held-out", "name": f"evaluation suites of the recipe {recipe.name}"},
            "metrics": [
                {"type": name, "value": round(value, 4), "name": name.replace("_", " ")}
                for name, value in figures.items()
                if value is not None
            ],
        }
        fields["model-index"] = [{"name": recipe.name, "results": [result]}]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False).strip()}\n---"


def introduction(recipe: Recipe, exported: "Sequence[Exported]") -> str:
    formats = ", ".join(f"{one.name} ({one.notes['dtype']})" if "dtype" in one.notes else one.name for one in exported)
    return (
        f"A student distilled from the reasoning traces of **{recipe.teacher.model}** by LoRA on **{recipe.student.model}**, "
        f"exported as {formats}. It answers in its own chat template, its reasoning inside `<think>` tags."
    )


def gate_summary(gates: Sequence[GateRow]) -> str:
    """`ungated` is said out loud: a card without gates is a card nobody checked."""
    if not gates:
        return "**ungated**: the recipe sets no gate."
    passed = sum(row.passed for row in gates)
    return f"**{passed} of {len(gates)} gates passed**."


def metrics_table(metrics: Mapping[str, Metrics]) -> str:
    header, *rows = figure_rows({name: metrics[name] for name in COMPARED if name in metrics})
    return markdown_table(header, rows)


def depth_table(depths: Mapping[str, Mapping[str, DepthFigures]]) -> str:
    """Long prompts, by where the answer stood."""
    models = [name for name in COMPARED if name in depths]
    rows = [[cell(row.title), *(text or "n/a" for text in row.cells)] for row in depth_rows(depths[name] for name in models)]
    return (
        "Long prompts, by where in them the answer stood. Middle: something it needs has 30 % to 70 % of the prompt's tokens "
        "before it. Ends: nothing has. Lost in the middle: ends less middle.\n\n" + markdown_table(["", *models], rows)
    )


def gates_table(gates: Sequence[GateRow]) -> str:
    rows = [
        [cell(row.metric), shown_with_interval(row), bound_text(row), "passed" if row.passed else "**refused**"] for row in gates
    ]
    return markdown_table(["gate", "value", "bound", ""], rows)


def limits(facts: CardFacts) -> str:
    """What the figures do not say, from the figures themselves."""
    student, base = facts.metrics.get("student"), facts.metrics.get("base")
    said = []
    if not facts.gates:
        said.append("Nobody set a bound that it had to keep: it is **ungated**.")
    if refused := [row.metric for row in facts.gates if not row.passed]:
        said.append(f"It does **not** keep {', '.join(refused)}.")
    if student is None:
        return "\n".join(f"- {text}" for text in [*said, "It was **not evaluated**."])
    lengths = {name for name in student.slices if is_length(name)}
    tasks = ", ".join(sorted(student.slices.keys() - {TWINS, UNSEEN, MIDDLE, ENDS, *lengths}))
    said.append(
        f"Figures are of {student.num_items} items, of {tasks} alone; "
        "intervals are of drawing such items again, not of other tasks."
    )
    if (unseen := student.slices.get(UNSEEN)) is None:
        said.append("No item comes from a family without training traces: how it does elsewhere was **not measured**.")
    elif unseen.accuracy is not None:
        before = base.slices.get(UNSEEN) if base else None
        drop = "" if before is None or before.accuracy is None else f"; its base, before training: {percent(before.accuracy)}"
        said.append(f"In families that no training trace came from it answers {percent(unseen.accuracy)} right{drop}.")
    if student.twin_gap is None:
        said.append("No item was asked again in other words: what hangs on the wording was **not measured**.")
    else:
        said.append(f"Asked again in other words, the same items lose {100 * student.twin_gap:.1f} points.")
    if student.hallucination_rate is None:
        said.append("No closed-book fact was asked: its hallucination rate was **not measured**.")
    else:
        said.append(
            f"Of closed-book facts that it did not get right, it made up an answer to {percent(student.hallucination_rate)} "
            "instead of declining."
        )
    settings = facts.recipe.train
    said.append(
        f"It was trained on rows of at most {max((settings.max_tokens_per_row, *settings.longer_rows)):,} tokens; longer "
        "contexts are outside of what it has seen."
    )
    return "\n".join(f"- {text}" for text in said)


def usage(names: Sequence[str]) -> str:
    """For the formats that were exported."""
    parts = []
    if any(name != "adapter" and not name.startswith("gguf") for name in names):
        parts.append("""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
messages = [{"role": "user", "content": "..."}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=512)[0]))
```

Or behind an OpenAI-compatible server: `transformers serve FOLDER --port 8000` (or vLLM, SGLang). Its stop tokens stand in
`generation_config.json`.""")
    if "adapter" in names:
        parts.append(
            "`adapter/` goes onto its base: `PeftModel.from_pretrained(base, FOLDER)`, or `vllm serve BASE --enable-lora "
            "--lora-modules student=FOLDER` with a `--max-lora-rank` of at least its rank."
        )
    if any(name.startswith("gguf") for name in names):
        parts.append("A GGUF file goes into llama.cpp, with its template: `llama-server -m FILE --jinja`.")
    return "\n\n".join(parts)


def provenance(facts: CardFacts) -> str:
    recipe = facts.recipe
    rows = [
        ["teacher", f"{recipe.teacher.model}, licence {recipe.teacher.licence}"],
        ["base student", f"{recipe.student.model}, licence {recipe.student.licence}"],
        *(["prompts", f"{cell(one.source)}: {one.num_prompts}, licence {cell(one.licence)}"] for one in facts.sources),
        [
            "dataset",
            f"{facts.train_rows} training and {facts.validation_rows} validation traces, sha256 `{facts.dataset_sha256}`",
        ],
        ["gradient certificate", certificate_text(facts.certificate)],
        ["code", f"tracestill `{facts.revision}`"],
    ]
    return markdown_table(["", ""], rows)


def checks(exported: "Sequence[Exported]", *, held_out: bool) -> list[str]:
    """The parity matrix, and what the reload of merged weights found. held_out: its traces were in no training step."""
    rows = [matrix_cells(one.row) for one in exported]
    row, kind = exported[0].row, "held-out" if held_out else "training"
    parts = [
        "Each format was opened again as it is served and held against base + adapter in float32, on "
        f"{row.traces} {kind} teacher traces ({row.positions} supervised tokens; KL in nats a token; "
        f"KL(adapter || base) {row.kl_base:.3g}). Rates and lengths are of greedy continuations, the adapter's own "
        "in brackets; tokens a second are of one sequence on the machine that exported.",
        markdown_table(MATRIX_HEADER, rows),
    ]
    parts += [
        f"{one.name}: {one.notes['because']}, so it is stored in {one.notes['dtype']}."
        for one in exported
        if "because" in one.notes
    ]
    for one in exported:
        if (found := one.parity) is not None:
            parts.append(
                f"Merged weights, reloaded: logits off by {found.logit_error:.1e} of their spread, {found.tokens} greedy tokens "
                f"compared with {found.near_ties} near ties, and {found.twins} conversations prompted with exactly the ids of "
                "training."
            )
    return parts


MATRIX_HEADER = (
    "format", "KL(adapter \\|\\| export)", "retention", "stops", "closes think", "tokens to first difference", "size", "tokens/s",
)  # fmt: skip


def matrix_cells(row: ParityRow) -> list[str]:
    return [
        row.format, f"{row.kl_adapter:.2e}", f"{100 * row.retention:.2f} %",
        f"{100 * row.stop_rate:.0f} % ({100 * row.adapter_stop_rate:.0f} %)",
        f"{100 * row.think_close_rate:.0f} % ({100 * row.adapter_think_close_rate:.0f} %)",
        f"{row.first_divergence:.1f} ({row.adapter_length:.1f})", f"{row.size_bytes / 1e6:.1f} MB",
        f"{row.tokens_per_second:.0f}",
    ]  # fmt: skip


def recipe_text(recipe: Recipe) -> str:
    """Only what is not a default, and the `type` by which sections are told apart: it loads as a recipe."""
    brief = _with_types(recipe.model_dump(mode="json", exclude_defaults=True), recipe.model_dump(mode="json"))
    return yaml.safe_dump(brief, sort_keys=False).strip()


def _with_types(brief: Any, full: Any) -> Any:
    if isinstance(brief, dict):
        kind = {"type": full["type"]} if isinstance(full.get("type"), str) else {}
        return kind | {key: _with_types(value, full[key]) for key, value in brief.items()}
    if isinstance(brief, list):
        return [_with_types(one, whole) for one, whole in zip(brief, full, strict=True)]
    return brief


# --- cells -------------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f} %"
