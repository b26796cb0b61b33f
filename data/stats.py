"""What a built dataset is made of. Values only: the command prints."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from configs.errors import UnusableInput
from data.counts import Counts, TaskCounts
from data.ledger import Ledger, read_ledger
from data.store import Rollup, RunFolder, read_rollup


@dataclass(frozen=True, slots=True)
class Stats:
    """tasks: name -> counts, in name order. total: the same over all. ledger: both balances as they stand now."""

    tasks: Mapping[str, TaskCounts]
    total: Counts
    ledger: Ledger
    dataset_sha256: str


def dataset_stats(run: RunFolder) -> Stats:
    """The figures of the sealed dataset, from manifests alone. Raises UnusableInput when there is none."""
    rollup = _sealed(run)
    total = cast(Counts, rollup.counts)
    return Stats(total["by_task"], total, read_ledger(run), dataset_hash(rollup))


def dataset_hash(rollup: Rollup) -> str:
    """One sha256 for the rows of the dataset: over the names and hashes of its Arrow files, in name order. The card, which also
    tells what was left out, does not count."""
    rows = (path for path in sorted(rollup.files) if path.startswith("dataset/") and path.endswith(".arrow"))
    named = [f"{path} {rollup.files[path]}" for path in rows]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()


def _sealed(run: RunFolder) -> Rollup:
    rollup = read_rollup(run.dataset)
    if rollup is None:
        raise UnusableInput(f"{run.dataset}: no dataset yet; run: tracestill data build")
    return rollup
