"""The dataset card: README.md beside the rows, as model hubs read it. What the rows are, where they come from, what was left
out and why, and under which licences. Equal datasets have equal cards: no time, no machine, no path."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import yaml

from configs.engines import HttpEngine
from configs.schema import Data
from data.counts import Counts
from data.schema import SCHEMA_VERSION
from data.shards import ROW

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"))


_WHO_JUDGES = {"type", "model", "api", "dtype", "kv_dtype"}
INVISIBLE: dict[str, Any] = {
    "verify_timeout_s": True, "processes": True, "judging": {"engine": set(HttpEngine.model_fields) - _WHO_JUDGES}
}  # fmt: skip
"""Settings that change no row, as pydantic's `exclude` has them: of the judge's engine everything but who it is. Where it
listens, how it is asked and what it costs are no matter of its grades, and an address has no place in a dataset."""


class Origin(NamedTuple):
    """Kept rows that share it, as the traces name it. licence: of the prompt source or of the teacher."""

    name: str
    licence: str
    rows: int


class CardFacts(NamedTuple):
    settings: Data
    counts: Counts
    teachers: Sequence[Origin]
    sources: Sequence[Origin]


def origins(facts: pa.Table, kept_N: np.ndarray, name: Sequence[str], licence: str) -> list[Origin]:
    """Most rows first. name: the columns that spell it."""
    grouped = facts.filter(pa.array(kept_N)).group_by([*name, licence]).aggregate([("trace_id", "count")])
    found = [Origin(" ".join(row[part] for part in name), row[licence], row["trace_id_count"]) for row in grouped.to_pylist()]
    return sorted(found, key=lambda origin: (-origin.rows, origin))


def render_card(facts: CardFacts) -> str:
    counts = facts.counts
    return "\n\n".join(
        [
            _front_matter(facts),
            "# Distilled reasoning traces",
            f"{counts['kept']:,} of {counts['completed']:,} completed traces of {counts['prompts']:,} prompts, whole "
            "conversations with the teacher's reasoning in `reasoning_content` of its turns. Made by tracestill; every file's "
            "sha256 is in `manifest.json`." + _relabelled(counts),
            _table(("split", "rows"), [("train", counts["train_rows"]), ("validation", counts["validation_rows"])]),
            "A prompt's rows are all in one split, chosen by the hash of the prompt.",
            "    from datasets import load_from_disk\n    rows = load_from_disk('dataset')['train']",
            "## Tokens",
            _table(
                ("task", "rows", "prompt", "reasoning", "answer"),
                [(task, its["kept"], its["prompt_tokens"], its["reasoning_tokens"], its["answer_tokens"])
                 for task, its in counts["by_task"].items() if its["kept"]],
            ),
            "By the teacher's tokenizer" + ("; of relabelled rows by the student's." if counts["relabelled"] else "."),
            "## Where it comes from",
            _table(("teacher", "licence", "rows"), facts.teachers),
            _table(("prompt source", "licence", "rows"), facts.sources),
            "## What was left out, and why",
            _left_out(counts),
            "Nothing was deleted: every trace and every verdict is in the run folder, and this is a view of them.",
            "## How it was chosen",
            "```yaml\n" + _yaml(facts.settings.model_dump(mode="json", exclude=INVISIBLE)) + "\n```",
            f"Columns ({SCHEMA_VERSION}): " + ", ".join(f"`{field.name}`" for field in ROW) + ".",
        ]
    ) + "\n"  # fmt: skip


def _relabelled(counts: Counts) -> str:
    if not counts["relabelled"]:
        return ""
    return (
        f" {counts['relabelled']:,} rows say \"I don't know\" where the teacher answered, because the student's base could not "
        "have: nothing in them but the question stood in the teacher's trace, and `provenance` says so."
    )


def _front_matter(facts: CardFacts) -> str:
    licences = sorted({origin.licence.lower() for origin in (*facts.teachers, *facts.sources)})
    header = {
        "license": licences[0] if len(licences) == 1 else "other",
        "tags": ["distillation", "reasoning", "tracestill"],
        "size_categories": [next((name for limit, name in SIZES if facts.counts["kept"] < limit), "n>10M")],
        "configs": [{"config_name": "default", "data_files": _data_files(facts.counts)}],
    }
    return f"---\n{_yaml(header)}\n---"


def _yaml(value: Mapping[str, object]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False).rstrip()


def _data_files(counts: Counts) -> list[dict[str, str]]:
    splits = (("train", counts["train_rows"]), ("validation", counts["validation_rows"]))
    return [{"split": split, "path": f"{split}/*.arrow"} for split, rows in splits if rows]


def _left_out(counts: Counts) -> str:
    reasons: Mapping[str, Mapping[str, int]] = {
        "rejected": counts["rejected_by_reason"],
        "unjudged": counts["unjudged_by_reason"],
    }
    rows = [(fate, f"`{reason}`", number) for fate, its in reasons.items() for reason, number in its.items()]
    return _table(("fate", "reason", "traces"), rows) if rows else "Nothing."


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")
