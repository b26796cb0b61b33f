"""What all workers of a run must have in common, written down by the first: whoever differs is refused, by name."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import UnusableInput
from configs.sampling import Sampling
from configs.schema import Recipe
from data.records import digest
from data.store import RunFolder, code_revision, read_json, sha256_file, write_json
from data.work import WorkFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # 2 s, and the launcher needs none

PACKAGES = ("configs", "data", "teacher", "generate")
REMEDIES = {
    "code": "use the release that began the run, or accept it with -s generate.accept_code_change=true",
    "template": "use the tokenizer folder that began the run, or another --run-dir",
}


def sampling_fingerprint(sampling: Sampling, seed: int) -> str:
    """Part of every trace's identity."""
    return digest(sampling.model_dump(mode="json"), seed)


def join(recipe: Recipe, run: RunFolder, tokenizer: "PreTrainedTokenizerBase", teacher_fingerprint: str) -> None:
    """This worker is one of the run's.

    Raises:
        UnusableInput: the run was begun with other code, template, model, sampling or prompts.
    """
    mine = cheap_identity(recipe, run, teacher_fingerprint) | {"template": digest(tokenizer.chat_template)}
    try:
        write_json(WorkFolder.of(run).identity, mine, replace=False)
    except FileExistsError:
        refuse_others(recipe, run, mine)


def cheap_identity(recipe: Recipe, run: RunFolder, teacher_fingerprint: str) -> dict[str, str]:
    """What is known without a tokenizer."""
    return {
        "code": source_fingerprint(),
        "teacher": teacher_fingerprint,
        "sampling": sampling_fingerprint(recipe.generate.sampling, recipe.generate.seed),
        "prompts": sha256_file(run.prompts / "manifest.json"),
        "revision": code_revision(),
    }


def refuse_others(recipe: Recipe, run: RunFolder, mine: Mapping[str, str]) -> None:
    """Raises UnusableInput when the run was begun with something else than `mine` says."""
    path = WorkFolder.of(run).identity
    first = read_json(path) if path.is_file() else mine
    for name in ("code", "template", "teacher", "sampling", "prompts"):
        if name in mine and first.get(name) != mine[name] and not (name == "code" and recipe.generate.accept_code_change):
            revisions = f"{_short(first.get('revision', '?'))} against {_short(mine['revision'])}"
            said = revisions if name == "code" else "hashes differ"
            raise UnusableInput(
                f"{run.root}: this worker's {name} is not the one that began the run ({said}); "
                f"{REMEDIES.get(name, 'use another --run-dir')}"
            )


def _short(revision: str) -> str:
    """`a1b2c3d4e5f6+changes` of a checkout with edits."""
    head, plus, changes = revision.partition("+")
    return f"{head[:12]}{plus}{changes}"


def source_fingerprint() -> str:
    """Hash of every source file that decides a trace: a checkout's revision says nothing about its edits."""
    root, found = Path(__file__).parent.parent, hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]
