"""The model card: what this student is, where it comes from, what it scored, and how to serve it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import yaml

from configs.schema import Recipe
from data.depth import DepthFigures
from data.prompt_set import read_prompts
from data.store import RunFolder, code_revision, read_rollup, sha256_file
from student.certificate import Certified, read_certificate
from student.depth import depth_rows
from student.gates import GateRow, bound_text, shown
from student.matrix import ParityRow
from student.results import read_depths
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
    accuracy by depth, by task, of the models that have it."""

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
                front_matter(recipe),
                f"# {recipe.name}",
                introduction(recipe, exported),
                "## Results",
                f"On the same held-out items for all models; {gate_summary(facts.gates)}",
                metrics_table(facts.metrics),
                *([depth_table(facts.depths)] if facts.depths else []),
                *([gates_table(facts.gates)] if facts.gates else []),
                "## How to use it",
                usage(),
                "## Where it comes from",
                provenance(facts),
                "## What was checked",
                *checks(exported),
                "## Recipe",
                f"```yaml\n{yaml.safe_dump(recipe.model_dump(mode='json', exclude_defaults=True), sort_keys=False).strip()}\n```",
            ]
        ).rstrip()
        + "\n"
    )


def front_matter(recipe: Recipe) -> str:
    fields = {
        "license": recipe.student.licence.lower(),
        "base_model": recipe.student.model,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "reasoning", "tracestill"],
    }
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
    models = [name for name in COMPARED if name in metrics]
    families = sorted({family for name in models for family in metrics[name].by_family})
    rows: list[list[str]] = [["accuracy, answerable items", *(accuracy_text(metrics[name]) for name in models)]]
    rows += [[f"accuracy, {family}", *(percent(metrics[name].by_family.get(family)) for name in models)] for family in families]
    rows += [
        ["hallucination rate, closed book", *(percent(metrics[name].hallucination_rate) for name in models)],
        ["abstention rate, closed book", *(percent(metrics[name].abstention_rate) for name in models)],
        ["abstention on unknown facts", *(percent(metrics[name].unknown_abstention_rate) for name in models)],
        ["omniscience index", *(number(metrics[name].omniscience_index) for name in models)],
        ["reasoning tokens per correct answer", *(number(metrics[name].reasoning_tokens_per_correct) for name in models)],
        ["items", *(str(metrics[name].num_items) for name in models)],
    ]
    return markdown_table(["", *models], rows)


def depth_table(depths: Mapping[str, Mapping[str, DepthFigures]]) -> str:
    """Long prompts, by where the answer stood."""
    models = [name for name in COMPARED if name in depths]
    rows = [[cell(row.title), *(text or "n/a" for text in row.cells)] for row in depth_rows(depths[name] for name in models)]
    return (
        "Long prompts, by where in them the answer stood. Middle: something it needs has 30 % to 70 % of the prompt's tokens "
        "before it. Ends: nothing has. Lost in the middle: ends less middle.\n\n" + markdown_table(["", *models], rows)
    )


def gates_table(gates: Sequence[GateRow]) -> str:
    rows = [[row.metric, shown(row.value), bound_text(row), "passed" if row.passed else "refused"] for row in gates]
    return markdown_table(["gate", "value", "bound", ""], rows)


def usage() -> str:
    return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
messages = [{"role": "user", "content": "..."}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=512)[0]))
```

Or behind an OpenAI-compatible server: `transformers serve FOLDER --port 8000` (or vLLM, SGLang). Its stop tokens stand in
`generation_config.json`."""


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


def checks(exported: "Sequence[Exported]") -> list[str]:
    """The parity matrix, and what the reload of merged weights found."""
    rows = [matrix_cells(one.row) for one in exported]
    parts = [
        "Each format was opened again as it is served and held against base + adapter in float32, on "
        f"{exported[0].row.traces} held-out teacher traces ({exported[0].row.positions} supervised tokens; KL in nats a token; "
        f"KL(adapter || base) {exported[0].row.kl_base:.3g}). Rates and lengths are of greedy continuations, the adapter's own "
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


# --- cells -------------------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def cell(text: str) -> str:
    """Text that cannot break out of its table cell."""
    return " ".join(text.replace("|", "\\|").split())


def accuracy_text(metrics: Metrics) -> str:
    if (interval := metrics.intervals.get("accuracy")) is None:
        return percent(metrics.accuracy)
    low, high = interval
    return f"{percent(metrics.accuracy)} ({100 * low:.1f} to {100 * high:.1f})"


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"
