"""config.yaml of a run folder: what the run is made with, and what of it may still change.

Three kinds of settings. FREE ones say where and how fast, and may change from one command to the next. LATER ones belong to a
stage at the end of the pipeline: traces of a week wait for a learning rate that nobody has thought of yet, so they may change
until that stage has made something. All others are what the folder is.
"""

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.errors import UnusableInput
from configs.load import Loaded, describe, fingerprint
from configs.schema import Recipe
from configs.training import FREE_WHILE_TRAINING
from data.checksum import checked_text
from data.store import RunFolder, code_revision, write_bytes

log = logging.getLogger(__name__)

# What may change under a run folder without making another run of it: where and how fast, not what. No layout changes a
# token's identity: a run that began on two nodes goes on with four, from shards or from the checkpoint. A dataset is a view
# of the traces, which may be taken again; its own manifest says with what settings.
FREE = (
    "data", "slurm", "plan", "teacher.hardware", "teacher.layout", "teacher.experts", "teacher.engine.processes",
    "teacher.engine.batch_size", "teacher.engine.cache_bytes", "teacher.engine.prepared", "teacher.engine.timeout_s",
    "teacher.engine.concurrency", "teacher.engine.base_urls", "teacher.engine.servers_file", "teacher.engine.stream",
    "teacher.engine.deadline_s", "teacher.engine.attempts", "teacher.engine.health_s", "teacher.engine.drain_s",
    "teacher.engine.price_input_per_million", "teacher.engine.price_output_per_million", "teacher.engine.api_key_env",
    "teacher.engine.ca_file", "generate.segment_traces", "generate.segment_seconds", "generate.checkpoint_tokens",
    "generate.lease_ttl_s", "generate.drain_seconds", "generate.budget", "generate.canary", "generate.retry_failed",
    "generate.accept_code_change", "evaluate.gates", "evaluate.headroom", "evaluate.models",
    "evaluate.prices", *(f"train.{name}" for name in FREE_WHILE_TRAINING),
)  # fmt: skip
RETIRED = ("train.traces_per_step", "train.tokens_per_micro_batch")
"""Settings of releases before rows were packed."""
LATER: Mapping[str, tuple[str, str]] = {
    "student": ("train", "checkpoints"), "train": ("train", "checkpoints"), "export": ("export", "export"),
}  # fmt: skip
"""Sections that may change until their stage has put something into its folder."""


def open_run(loaded: Loaded, run_dir: Path | None) -> RunFolder:
    """The run folder, made if need be, with config.yaml written first. A folder that holds anything made by another
    configuration is refused; one in which nothing was made yet (a typo in the first try) takes the new one, and so does one in
    which the stage of a LATER section has made nothing: its config.yaml changes when that stage begins (`settle`).

    Raises:
        UnusableInput: unwritable folder, or the first difference between its configuration and this one.
    """
    if run_dir is not None and str(run_dir) in ("", "."):
        raise UnusableInput("--run-dir is empty or the working directory itself; name a folder of its own, for example runs/mine")
    run = RunFolder((run_dir or Path("runs") / loaded.recipe.name).resolve())
    wanted = loaded.recipe.model_dump(mode="json")
    # Looked at again: somebody who starts with us may have written it in between.
    if not run.config.is_file() and _holds_something(run.root) and not run.config.is_file():
        raise UnusableInput(
            f"run directory {run.root}: not empty, and without the config.yaml of a run; "
            "choose an empty or new --run-dir, or restore config.yaml"
        )
    if run.config.is_file():
        if not os.access(run.root, os.W_OK):
            raise UnusableInput(f"run directory {run.root}: not writable; choose another --run-dir or change its permissions")
        stored = _stored(run)
        if first_difference(stored, without_free(wanted)) is None:
            return run
        if any(run.root.glob("*/*.arrow")) or any(run.root.glob("*/manifest.json")):
            undecided = [section for section in LATER if _is_undecided(run, section)]
            difference = first_difference(without(stored, undecided), without(without_free(wanted), undecided))
            if difference is None:
                return run
            raise _made_otherwise(run, *difference)
        log.warning("%s holds nothing made with its old configuration yet; it is replaced", run.config)
    try:
        _write(run, wanted)
    except OSError as error:
        raise UnusableInput(
            f"run directory {run.root}: cannot be written ({error.strerror}); choose another --run-dir"
        ) from error
    return run


def settle(loaded: Loaded, run: RunFolder, stage: str) -> None:
    """config.yaml says what the stage, which begins now, is given; whoever begins it holds its lock."""
    wanted = loaded.recipe.model_dump(mode="json")
    stored, pinned = _stored(run), without_free(wanted)
    changed = [
        section for section, (name, _) in LATER.items()
        if name == stage and _is_undecided(run, section) and stored.get(section) != pinned.get(section)
    ]  # fmt: skip
    if changed:
        _write(run, yaml.safe_load(run.config.read_text())["recipe"] | {section: wanted[section] for section in changed})


def _is_undecided(run: RunFolder, section: str) -> bool:
    folder = run.root / LATER[section][1]
    return not folder.is_dir() or all(path.name.startswith(".") for path in folder.iterdir())


def _made_otherwise(run: RunFolder, key: str, was: object, now: object) -> UnusableInput:
    stage, folder = LATER.get(key.partition(".")[0], ("", ""))
    again = f"; to {stage} anew, move {run.root / folder} away" if folder else ""
    return UnusableInput(
        f"run directory {run.root}: was made with {key} = {was!r}, this recipe says {now!r}; use another --run-dir, or "
        f"-s {key}={was}{again}"
    )


def _write(run: RunFolder, recipe: Mapping[str, Any]) -> None:
    header = {"code_revision": code_revision(), "fingerprint": fingerprint(dict(recipe))}
    text = f"# Resolved configuration of this run.\n{yaml.safe_dump(header | {'recipe': recipe}, sort_keys=False)}"
    write_bytes(run.config, checked_text(text))


def _holds_something(folder: Path) -> bool:
    """Whether anything but a killed attempt's half-written config.yaml lies there."""
    return folder.is_dir() and any(not path.name.startswith(".config.yaml.") for path in folder.iterdir())


def _stored(run: RunFolder) -> dict[str, Any]:
    """What of config.yaml decides what the run is, as this release says it."""
    try:
        stored = dict(yaml.safe_load(run.config.read_text())["recipe"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UnusableInput(f"{run.config}: not a configuration written by tracestill; use another --run-dir") from error
    return without_free(_as_today(stored))


def _as_today(stored: dict[str, Any]) -> dict[str, Any]:
    """What is free left out, and settings that came after it was written at their defaults: they are how the run was made.
    RETIRED ones are left out; whoever trains that run anew is told by its checkpoint what differs.

    Raises UnusableInput for one that this release does not know."""
    try:
        return Recipe.model_validate(without(without_free(stored), RETIRED)).model_dump(mode="json")
    except ValidationError as error:
        raise UnusableInput(
            f"config.yaml of the run, as another release wrote it: {describe(error)}; use that release, or another --run-dir"
        ) from error


def without_free(value: Any) -> Any:
    """The configuration without what is free to change."""
    return without(value, FREE)


def without(value: Any, left_out: Collection[str], path: str = "") -> Any:
    """The configuration without the settings of these dotted names."""
    if not isinstance(value, dict):
        return value
    inside = {key: f"{path}.{key}" if path else str(key) for key in value}
    return {key: without(value[key], left_out, dotted) for key, dotted in inside.items() if dotted not in left_out}


def first_difference(left: Any, right: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first leaf that differs, as (dotted key, left value, right value); None when equal."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in [*left, *(key for key in right if key not in left)]:
            found = first_difference(left.get(key), right.get(key), f"{path}.{key}" if path else str(key))
            if found is not None:
                return found
        return None
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            if (found := first_difference(one, other, f"{path}.{index}")) is not None:
                return found
        return None
    return None if left == right else (path, left, right)
