"""The prompt set of a run as it lies on disk: one Arrow file with both sides of the split."""

from pathlib import Path

from configs.errors import UnusableInput
from data.records import Prompt, Split
from data.schema import from_table, to_table
from data.store import RunFolder, read_rollup, read_table, table_bytes, write_bytes


def prompt_file(run: RunFolder) -> Path:
    return run.prompts / "prompts.arrow"


def write_prompts(run: RunFolder, prompts: list[Prompt]) -> Path:
    write_bytes(prompt_file(run), table_bytes(to_table(prompts, Prompt)))
    return prompt_file(run)


def read_prompts(run: RunFolder, split: Split | None = None) -> list[Prompt]:
    """The prompts of one side (or of both), verified against the prompts stage's manifest. Raises UnusableInput."""
    rollup = read_rollup(run.prompts)
    path = prompt_file(run)
    if rollup is None:
        raise UnusableInput(f"{run.prompts}: no prompt set yet; run the prompts stage first: tracestill prompts")
    table = read_table(path, sha256=rollup.files[str(path.relative_to(run.root))])
    return [prompt for prompt in from_table(table, Prompt) if split is None or prompt.split == split]
