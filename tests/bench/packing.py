"""Packing 10,000 documents of log-normal length into rows against what one writes first: next-fit, first-fit, a scan.

    python -m tests.bench.packing --json docs/bench/packing.json

Lengths have a median of 4,000 tokens and a 99th percentile of 32,000, and are cut at the capacity. All packers get the same;
next-fit and first-fit in the order they come in, which is random. The scan is best-fit decreasing as it is defined, every open
row looked at for every document. `ours` are the rows that are trained, each with documents of all lengths (data/mixed_rows.py);
`best_fit` says how many they are (data/packing.py), and must fill its rows as the scan does, or there is no figure.

`waste`: share of the rows' capacity without a token, as packed. `skew`: mean over steps of the dearest rank's modelled cost over
the mean rank's, 8 ranks with 2 rows each a step; ours grouped, theirs in their own order. `seconds` per 1,000 rows: processor
time, packers interleaved, medians; `ratio`: the scan's over best_fit's, `ratio_ours`: over ours. `million_documents_s`: ours,
packed and grouped.

`settings`: ours at other ranks and capacities. There `waste_grouped` counts rows that were spread over more ranks, so that each
has work, as if they were padded, which they are not. `skew_waiting` is what ranks that wait for each other after each row see:
sum over micro-steps of the dearest row over that of the mean row.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.mixed_rows import pack_mixed
from data.packing import Packing, pack
from data.row_groups import DENSE_7B, group_rows
from tests.bench.frame import machine

ACCUMULATION = 2
Rows = list[list[int]]
"""Documents of each row."""


def log_normal_lengths(count: int, longest: int, seed: int = 0) -> np.ndarray:
    sigma = np.log(32_000 / 4_000) / 2.3263  # the normal distribution's 99th percentile
    return np.random.default_rng(seed).lognormal(np.log(4_000), sigma, count).astype(np.int64).clip(1, longest)


# --- packers ------------------------------------------------------------------------------------------------------


def next_fit(lengths: Sequence[int], capacity: int) -> Rows:
    rows: Rows = []
    space = 0
    for document, length in enumerate(lengths):
        if length > space:
            rows.append([])
            space = capacity
        rows[-1].append(document)
        space -= length
    return rows


def first_fit(lengths: Sequence[int], capacity: int) -> Rows:
    rows: Rows = []
    spaces: list[int] = []
    for document, length in enumerate(lengths):
        index = next((row for row, space in enumerate(spaces) if space >= length), len(rows))
        if index == len(rows):
            rows.append([])
            spaces.append(capacity)
        rows[index].append(document)
        spaces[index] -= length
    return rows


def scan(lengths: Sequence[int], capacity: int) -> Rows:
    rows: Rows = []
    spaces: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda document: -lengths[document]):
        length = lengths[document]
        index = min((row for row, space in enumerate(spaces) if space >= length), key=spaces.__getitem__, default=len(rows))
        if index == len(rows):
            rows.append([])
            spaces.append(capacity)
        rows[index].append(document)
        spaces[index] -= length
    return rows


def best_fit(lengths: Sequence[int], capacity: int) -> Rows:
    return as_lists(pack(np.array(lengths), (capacity,), 0))


def ours(lengths: Sequence[int], capacity: int) -> Rows:
    return as_lists(pack_mixed(np.array(lengths), (capacity,), 0))


def as_lists(packing: Packing) -> Rows:
    return [packing.row(row).tolist() for row in range(len(packing))]


PACKERS: dict[str, Callable[[Sequence[int], int], Rows]] = {
    "ours": ours, "best_fit": best_fit, "next_fit": next_fit, "first_fit": first_fit, "scan": scan
}  # fmt: skip


# --- figures ------------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    rows: int
    waste: float
    skew: float
    seconds_per_1000_rows: float


class Skews(NamedTuple):
    skew: float
    skew_waiting: float


def skews(steps: Sequence[np.ndarray]) -> Skews:
    """steps: costs [M, W] of each, 0 where a rank had no row."""
    loads = [cost_MW.sum(0) for cost_MW in steps]
    waited = sum(float(cost_MW.max(1).sum()) for cost_MW in steps)
    return Skews(
        float(np.mean([load_W.max() / load_W.mean() for load_W in loads])), waited / float(sum(load_W.mean() for load_W in loads))
    )


def steps_in_order(cost_R: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Rows as they come, one to each rank after the other."""
    missing = -len(cost_R) % ranks
    cost_MW = np.append(cost_R, np.zeros(missing)).reshape(-1, ranks)
    return [cost_MW[start : start + ACCUMULATION] for start in range(0, len(cost_MW), ACCUMULATION)]


def steps_grouped(lengths_N: np.ndarray, capacities: Sequence[int], ranks: int) -> tuple[list[np.ndarray], float]:
    """And the waste of the rows after grouping."""
    groups = group_rows(pack_mixed(lengths_N, capacities, 0), lengths_N, capacities, DENSE_7B, ranks, 0)
    rows_per_step = ranks * ACCUMULATION
    dealt = [groups.deal(groups.rows_of_step(step, rows_per_step), ranks) for step in range(groups.num_steps(rows_per_step))]
    return [np.where(places_MW >= 0, groups.cost_R[places_MW], 0.0) for places_MW in dealt], groups.rows.waste


def compare(lengths_N: np.ndarray, capacity: int, ranks: int, repeats: int) -> dict[str, Packed]:
    lengths, cost_N = lengths_N.tolist(), DENSE_7B.of_documents(lengths_N)
    seconds: dict[str, list[float]] = {name: [] for name in PACKERS}
    found: dict[str, Rows] = {}
    for _ in range(repeats):
        for name, packer in PACKERS.items():
            started = time.process_time()
            found[name] = packer(lengths, capacity)
            seconds[name].append(time.process_time() - started)
    tokens = {name: sorted(int(lengths_N[row].sum()) for row in rows) for name, rows in found.items()}
    assert tokens["best_fit"] == tokens["scan"], "the two best fits do not fill their rows alike"
    packed: dict[str, Packed] = {}
    for name, rows in found.items():
        cost_R = np.array([cost_N[row].sum() for row in rows])
        steps = steps_grouped(lengths_N, (capacity,), ranks)[0] if name == "ours" else steps_in_order(cost_R, ranks)
        waste = 1 - int(lengths_N.sum()) / (len(rows) * capacity)
        packed[name] = Packed(len(rows), waste, skews(steps).skew, statistics.median(seconds[name]) / len(rows) * 1000)
    return packed


def at(capacities: tuple[int, ...], ranks: int, documents: int) -> dict[str, object]:
    lengths_N = log_normal_lengths(documents, capacities[-1])
    steps, waste_grouped = steps_grouped(lengths_N, capacities, ranks)
    waste = pack_mixed(lengths_N, capacities, 0).waste
    return {"capacities": capacities, "ranks": ranks, "waste": waste, "waste_grouped": waste_grouped, **skews(steps)._asdict()}


def million_seconds() -> float:
    lengths_N = log_normal_lengths(1_000_000, 65_536)
    started = time.process_time()
    group_rows(pack_mixed(lengths_N, (65_536,), 0), lengths_N, (65_536,), DENSE_7B, 8, 0)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    packed = compare(log_normal_lengths(arguments.documents, 65_536), 65_536, 8, arguments.repeats)
    settings = [
        at(capacities, ranks, arguments.documents)
        for capacities in ((65_536,), (131_072,), (65_536, 131_072))
        for ranks in (2, 8, 16, 32)
    ]
    mine, seconds = packed["ours"], {name: one.seconds_per_1000_rows for name, one in packed.items()}
    found = {
        "benchmark": "packing", "waste": mine.waste, "skew": mine.skew,
        "ratio": seconds["scan"] / seconds["best_fit"], "ratio_ours": seconds["scan"] / seconds["ours"],
        "seconds_per_1000_rows": seconds["ours"],
        "million_documents_s": million_seconds(), "documents": arguments.documents, "repeats": arguments.repeats,
        "machine": machine(), "packers": {name: one._asdict() for name, one in packed.items()}, "settings": settings,
    }  # fmt: skip
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
