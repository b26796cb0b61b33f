"""The model card: what this student is, where it comes from, what it scored, and how to serve it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import yaml

from configs.schema import Recipe
from data.prompt_set import read_prompts
from data.store import RunFolder, code_revision, read_rollup, sha256_file
from student.certificate import Certified, read_certificate
from student.gates import GateRow, bound_text, shown
from student.parity import Parity
from student.scoring import Metrics

COMPARED = ("teacher", "base", "student")


class PromptSource(NamedTuple):
    """Where prompts came from, under which licence, and how many of them the training split holds."""

    source: str
    licence: str
    num_prompts: int


@dataclass(frozen=True, slots=True)
class CardFacts:
    """Everything the card states. dataset_sha256 is of the dataset's manifest, which holds the hash of every file."""

    recipe: Recipe
    sources: tuple[PromptSource, ...]
    dataset_sha256: str
    train_rows: int
    validation_rows: int
    metrics: Mapping[str, Metrics]
    gates: Sequence[GateRow]
    revision: str
    certificate: Certified | None = None


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


def render_card(facts: CardFacts, findings: Parity) -> str:
    """README.md of the exported folder: front matter as model hubs read it, then prose and tables."""
    recipe = facts.recipe
    return (
        "\n\n".join(
            [
                front_matter(recipe),
                f"# {recipe.name}",
                introduction(recipe, findings),
                "## Results",
                f"On the same held-out items for all models; {gate_summary(facts.gates)}",
                metrics_table(facts.metrics),
                *([gates_table(facts.gates)] if facts.gates else []),
                "## How to use it",
                usage(),
                "## Where it comes from",
                provenance(facts),
                "## What was checked",
                checks(findings),
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


def introduction(recipe: Recipe, findings: Parity) -> str:
    return (
        f"A student distilled from the reasoning traces of **{recipe.teacher.model}** by LoRA on **{recipe.student.model}**, "
        f"merged and stored in {findings.dtype}. It answers in its own chat template, its reasoning inside `<think>` tags."
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


def checks(findings: Parity) -> str:
    return (
        "Reloaded from this folder and set against base + adapter in float32: "
        f"logits off by {findings.logit_error:.1e} of their spread, {100 * findings.adapter_kept:.2f} % of the adapter's effect "
        f"kept, {findings.tokens} greedy tokens compared with {findings.near_ties} near ties, and {findings.twins} conversations "
        "prompted with exactly the ids of training."
    )


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
