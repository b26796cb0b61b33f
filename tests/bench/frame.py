"""The frame of every benchmark: two sides, interleaved, medians, one JSON line."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

Side = Callable[[], float]
"""Does the work once and returns its amount (tokens, rows, ...), so that a figure is amount per second."""


@dataclass(frozen=True, slots=True)
class Result:
    """Medians in amount per second; ratio is ours over theirs, the median of the pairwise ratios."""

    benchmark: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    ratio_min: float
    ratio_max: float
    repeats: int
    machine: str


def machine() -> str:
    """Processor, cores and memory, in words."""
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def interleave(benchmark: str, unit: str, ours: Side, theirs: Side, *, repeats: int, warmup: int = 1) -> Result:
    """Runs ours, theirs, ours, theirs, ... and compares them pair by pair."""
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repeat in range(warmup + repeats):
        for name, side in (("ours", ours), ("theirs", theirs)):
            started = time.perf_counter()
            amount = side()
            if repeat >= warmup:
                rates[name].append(amount / (time.perf_counter() - started))
    ratios = [one / other for one, other in zip(rates["ours"], rates["theirs"], strict=True)]
    ours_rate, theirs_rate = statistics.median(rates["ours"]), statistics.median(rates["theirs"])
    return Result(
        benchmark, unit, ours_rate, theirs_rate, statistics.median(ratios), min(ratios), max(ratios), repeats, machine()
    )


def main(description: str, measure: Callable[[int], Result], default_repeats: int = 5) -> None:
    """The command line of a benchmark module."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--repeats", type=int, default=default_repeats)
    arguments = parser.parse_args()
    result = measure(arguments.repeats)
    table = Table("benchmark", "unit", "ours", "theirs", "ratio", "range", "repeats")
    table.add_row(result.benchmark, result.unit, f"{result.ours:,.1f}", f"{result.theirs:,.1f}", f"{result.ratio:.2f}",
                  f"{result.ratio_min:.2f} to {result.ratio_max:.2f}", str(result.repeats))  # fmt: skip
    Console().print(table)
    if arguments.json:
        print(json.dumps(asdict(result), separators=(",", ":")))
