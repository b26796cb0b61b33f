"""Models side by side on the run's held-out items, under one harness: what a team reads instead of leaderboards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import UnusableInput
from configs.progress import Display
from data.stage import Context
from data.store import read_json, read_rollup, write_bytes, write_json
from student.depth import accuracy_by_depth, depth_rows
from student.figures import aligned, cell, figure_rows, lm_eval_rows, markdown_table
from student.gates import Evaluated
from student.paired import Paired, difference
from student.results import read_evaluated, read_lm_eval
from student.stages import OpenTarget, evaluate_models
from student.targets import target_spec

PAIRED = ("accuracy", "hallucination_rate")


class Compared(NamedTuple):
    """text: the table as people read it. path: where it stands as Markdown, its figures beside it as JSON. values: those."""

    text: str
    path: Path
    values: dict[str, Any]


def compare_models(context: Context, names: Sequence[str], open_target: OpenTarget) -> Compared:
    """Every model has answered every item; comparison.md and comparison.json stand in evaluation/. All names are looked up before
    any model is loaded. Raises UnusableInput."""
    if len(names) < 2 or len(set(names)) < len(names):
        raise UnusableInput(f"evaluate --compare {' '.join(names)}: expected two models or more, each once")
    specs = {name: target_spec(context.recipe, context.run, name) for name in names}
    if shared := [name for name in names if [one.file for one in specs.values()].count(specs[name].file) > 1]:
        raise UnusableInput(f"evaluate --compare {' '.join(shared)}: one model under several names; expected each once")
    if asked := [name for name in names if not is_sealed(context, specs[name].file, open_target(context, name).fingerprint)]:
        with Display("compare", "items", context.console) as display:
            evaluate_models(context, asked, open_target, display.show)
    found = {name: read_evaluated(context.run, spec.file) for name, spec in specs.items()}
    evaluated = {name: one for name, one in found.items() if one is not None}
    first, *others = names
    seed = context.recipe.evaluate.seed
    paired = {
        name: [difference(evaluated[name].items, evaluated[first].items, metric, seed=seed) for metric in PAIRED]
        for name in others
    }
    lm_eval = {name: read_lm_eval(context.run, spec.file) for name, spec in specs.items()}
    values = {
        "models": {name: one.metrics.to_json() for name, one in evaluated.items()},
        "accuracy_by_depth": {name: accuracy_by_depth(one.items) for name, one in evaluated.items()},
        "lm_eval": {name: one for name, one in lm_eval.items() if one is not None},
        "against": first,
        "paired": {name: [one._asdict() for one in tests] for name, tests in paired.items()},
    }
    rows = comparison_rows(evaluated, paired)
    tables = [rows, *([table] if (table := lm_eval_rows(lm_eval)) else [])]
    path = context.run.evaluation / "comparison.md"
    write_bytes(path, ("\n\n".join(markdown_table(table[0], table[1:]) for table in tables) + "\n").encode())
    write_json(path.with_suffix(".json"), values)
    return Compared("\n\n".join(map(aligned, tables)), path, values)


def is_sealed(context: Context, file: str, fingerprint: str) -> bool:
    """Whether a finished stage has this model's figures. They stay as they are, whatever has changed since in how a model is
    asked: the next stage would call a sealed file that differs damage."""
    name = f"evaluation/{file}.json"
    sealed = any(
        name in rollup.files
        for folder in (context.run.evaluation, context.run.export)
        if (rollup := read_rollup(folder)) is not None
    )
    return sealed and read_json(context.run.root / name)["harness"]["model_fingerprint"] == fingerprint


def comparison_rows(evaluated: Mapping[str, Evaluated], paired: Mapping[str, Sequence[Paired]]) -> list[list[str]]:
    """Figures of each model, by depth where prompts are long, then how it differs from the first one, item by item."""
    rows = figure_rows({name: one.metrics for name, one in evaluated.items()})
    by_depth = depth_rows([accuracy_by_depth(one.items) for one in evaluated.values()])
    rows += [[cell(row.title), *(text or "-" for text in row.cells)] for row in by_depth]
    for index, metric in enumerate(PAIRED):
        texts = ["" if name not in paired else paired_text(paired[name][index]) for name in evaluated]
        if any(texts):
            rows.append([f"{metric.replace('_', ' ')} against {next(iter(evaluated))}", *(text or "-" for text in texts)])
    return rows


def paired_text(found: Paired) -> str:
    """`+12.5 points (8.1 to 16.9), p 2e-08, exact McNemar`."""
    if found.value is None or found.interval is None or found.p is None:
        return ""
    low, high = found.interval
    return f"{100 * found.value:+.1f} points ({100 * low:.1f} to {100 * high:.1f}), p {found.p:.1g}, {found.test}"
