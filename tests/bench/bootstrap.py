"""Figures with their intervals: 20,000 items asked 8 times each, against `scipy.stats.bootstrap` for one of them.

    python -m tests.bench.bootstrap --json docs/bench/bootstrap.json

Ours is `student.scoring.measure` whole: 11 ratios with 4,000 draws, 5 figures of curves with 1,000, and all of it once more for
each slice. Theirs is the accuracy alone, 4,000 draws of items (its sums as arrays, `vectorized`, in batches that fit into
memory), percentile method. Both draw whole items, and their ends must agree within what 4,000 draws leave, or there is no figure.

`seconds`, `seconds_scipy`: medians, interleaved. `figures`: how many intervals ours has made in its time.
"""

import argparse
import json
import random
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from student.grades import Grade, GradedItem
from student.resampling import NUM_RESAMPLES, Interval
from student.scoring import Metrics, measure
from tests.bench.frame import machine

NUM_ITEMS, NUM_SAMPLES, NUM_REPEATS = 20_000, 8, 3
MAX_DIFFERENCE = 5e-4
"""Of the ends of two bootstraps of 4,000 draws: an end's own standard error here is 4e-5, the figure's 0.002."""


def attempts() -> list[GradedItem]:
    rng, found = random.Random(0), []
    for number in range(NUM_ITEMS):
        task, chance = rng.choice(("sums", "words", "facts/metals", "facts/flags")), rng.random()
        known = None if "/" not in task else rng.random() < 0.7
        for sample in range(NUM_SAMPLES):
            right = rng.random() < chance and known is not False
            grade = Grade.CORRECT if right else rng.choice((Grade.INCORRECT, Grade.NOT_ATTEMPTED))
            reasoning, output = rng.randrange(500), rng.randrange(500, 900)
            found.append(
                GradedItem(
                    task, known, grade, reasoning, output, "stop", str(number), sample, rng.random(), 0.001, task == "words"
                )
            )
    return found


def scipy_interval(items: list[GradedItem]) -> Interval:
    counts: dict[str, list[int]] = {}
    for one in items:
        if one.known is not False:
            sums = counts.setdefault(one.item, [0, 0])
            sums[0] += one.grade is Grade.CORRECT
            sums[1] += 1
    right, asked = np.array(list(counts.values()), np.float64).T

    def accuracy(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
        return first.sum(axis=axis) / second.sum(axis=axis)

    found = bootstrap(
        (right, asked), accuracy, paired=True, vectorized=True, n_resamples=NUM_RESAMPLES, batch=200, method="percentile", rng=0
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def count_intervals(metrics: Metrics) -> int:
    return len(metrics.intervals) + sum(map(count_intervals, metrics.slices.values()))


def compared() -> dict[str, Any]:
    items = attempts()
    ours, theirs = [], []
    for _ in range(NUM_REPEATS):
        started = time.perf_counter()
        metrics = measure(items)
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        peer = scipy_interval(items)
        theirs.append(time.perf_counter() - started)
    mine = metrics.intervals["accuracy"]
    difference = max(abs(mine.low - peer.low), abs(mine.high - peer.high))
    assert difference <= MAX_DIFFERENCE, (mine, peer)
    return {
        "benchmark": "bootstrap", "items": NUM_ITEMS, "attempts": len(items), "figures": count_intervals(metrics),
        "seconds": round(statistics.median(ours), 2), "seconds_scipy": round(statistics.median(theirs), 2),
        "difference": difference, "accuracy": [metrics.accuracy, *mine],
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), "machine": machine(),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Figures with their intervals, against scipy for one of them.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(compared())
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
