"""Is everything in a run folder what was written? Every byte is vouched for by a hash: files by their stage's manifest or their
segment's sidecar, manifests and sidecars and the configuration by a checksum of their own."""

from pathlib import Path
from typing import NamedTuple

from configs.errors import UnusableInput
from data.asking import reply_folders
from data.checksum import check_text
from data.ledger import Ledger, read_ledger
from data.store import ROLLUP, Rollup, RunFolder, SegmentLog, read_rollup, read_segment, verify_files

MADE_WHOLE = ("prompts", "verdicts", "dataset", "export")
"""Folders in which nothing stands but what a manifest names."""


MADE_BY = {"prompts": "prompts", "traces": "generate", "dataset": "data build", "checkpoints": "train"}


class Verified(NamedTuple):
    """strays: files in those folders that no manifest names (verdicts of an earlier version of a judge, say): nothing reads
    them."""

    files: int
    stages: int
    strays: tuple[Path, ...]
    ledger: Ledger


def verify_run(run: RunFolder) -> Verified:
    """Reads everything that the run's stages made.

    Raises:
        UnusableInput: the first file that is missing or is not what was written, what of it, and how to get it back.
    """
    check_text(run.config, run.config.read_bytes())
    sealed = [rollup for path in sorted(run.root.glob(f"*/{ROLLUP}")) if (rollup := read_rollup(path.parent)) is not None]
    for rollup in sealed:
        verify_files(run, rollup)
    for folder in (run.traces, *reply_folders(run)):
        for segment in SegmentLog(folder).look():
            read_segment(segment)
    _check_inputs(run, sealed)
    ledger = read_ledger(run)
    ledger.check(viewed=read_rollup(run.dataset) is not None)
    return Verified(sum(len(rollup.files) for rollup in sealed), len(sealed), tuple(_strays(run, sealed)), ledger)


def _check_inputs(run: RunFolder, sealed: list[Rollup]) -> None:
    """The manifests that a later stage was made from are there."""
    for rollup in sealed:
        for path in rollup.inputs:
            if path.endswith(ROLLUP) and not (run.root / path).is_file():
                raise UnusableInput(
                    f"{run.root / path}: missing, though the {rollup.stage} stage was made from it; restore it, or run the stage "
                    f"that makes it again (tracestill {MADE_BY.get(path.split('/')[0], 'run')})"
                )


def _strays(run: RunFolder, sealed: list[Rollup]) -> list[Path]:
    named = {path for rollup in sealed for path in rollup.files}
    found = (path for name in MADE_WHOLE for path in sorted((run.root / name).rglob("*")) if path.is_file())
    paid_for = {path for folder in reply_folders(run) for path in folder.glob("*.*")}  # read above, sealed or not yet
    strays = (path for path in found if path.name != ROLLUP and path not in paid_for)
    return [inside for path in strays if str(inside := path.relative_to(run.root)) not in named]
