"""Judging mathematics against calling math-verify on each answer: answers per second.

    python -m tests.bench.math_verify --json docs/bench/math_verify.json

400 prompts with 8 answers each, of the kinds that MATH's answers are of (tests/data/math_pairs.py argues the shares), six in
ten right, nine in ten in a box, two in three after a page of steps. Theirs parses reference and answer and compares them, one
by one, in this process, with no deadline at all. Ours is the pool of the build: what can be read is compared here, the rest goes
to workers with a deadline that remember boxes; its start is paid beforehand, as theirs is. In turn, on the same answers, over
chunks, so that a busy machine hits both; answers of a chunk are new to both.

`ratio`: two workers. `ratio_one_process`: one worker, so as many processes that compare as theirs (the pool's own process reads
while the worker compares). `ratio_no_memory`: the same, one answer a prompt, so that nothing repeats. `differing`: verdicts
that are not the same.
"""

import argparse
import json
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data.records import Prompt
from data.verify import VERIFIERS, math
from data.verify.math_reading import quick
from data.verify.runner import Item, Pool
from tests.bench.frame import machine
from tests.data.math_pairs import draw, write_up

PROMPTS, SAMPLES, CHUNKS = 400, 8, 8
RIGHT_SHARE, WARM_UP = 0.6, 800
TIMEOUT_S = 60.0


class Measured(NamedTuple):
    """Medians over chunks, in answers per second; ratio is the median of the chunks' ratios, cpu_ratio that of processor time."""

    ours: float
    theirs: float
    ratio: float
    ratio_min: float
    ratio_max: float
    cpu_ratio: float
    differing: int


def make_items(num_prompts: int, samples: int, seed: int) -> tuple[list[Item], dict[str, int]]:
    """Prompt by prompt, as a trace log has them; and how many prompts there are of each kind of reference."""
    rng = random.Random(seed)
    items, kinds = [], {}
    while len(items) < num_prompts * samples:
        drawn = draw(rng)
        prompt = Prompt(f"{seed}-{len(items)}", "bench", drawn.kind, "v1", (), drawn.reference, "math", "train", None, "", "CC0")
        kinds[drawn.kind] = kinds.get(drawn.kind, 0) + 1
        for _ in range(samples):
            said = rng.choice(drawn.right if rng.random() < RIGHT_SHARE else drawn.wrong)
            items.append(Item(prompt, write_up(rng, said)))
    return items, kinds


def theirs(items: Sequence[Item]) -> list[bool]:
    """math-verify on each, with the reading of bare expressions that both sides share."""
    return [math._equal(math._parse(prompt.answer), math._parse(answer)) for prompt, answer in items]


class Timed(NamedTuple):
    verdicts: list[bool]
    seconds: float
    cpu_seconds: float


def timed(work: Callable[[], list[bool]], pool: Pool) -> Timed:
    started, used = time.perf_counter(), cpu_seconds(pool)
    found = work()
    return Timed(found, time.perf_counter() - started, cpu_seconds(pool) - used)


def cpu_seconds(pool: Pool) -> float:
    """User and system time so far of this process and of the pool's workers, which live from chunk to chunk."""
    ticks = 0
    for worker in pool.workers:
        fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def compare(items: Sequence[Item], num_workers: int) -> Measured:
    """Chunk by chunk, ours and theirs in turn."""
    ours: list[Timed] = []
    others: list[Timed] = []
    with Pool(VERIFIERS, timeout_s=TIMEOUT_S, num_workers=num_workers) as pool:
        # math-verify's parser learns: in a new process an answer costs many times what it does after some hundred others, and a
        # build judges 200,000. Both sides have seen the same kinds before the first chunk, each worker its share of them.
        warm, _ = make_items(WARM_UP * num_workers, 1, seed=10**6)
        pool.judge(warm)
        theirs(warm[:WARM_UP])
        for number, chunk in enumerate(chunks_of(items, -(-len(items) // CHUNKS))):
            turns = [(ours, partial(judged, pool, chunk)), (others, partial(theirs, chunk))]
            for side, work in turns if number % 2 else reversed(turns):
                side.append(timed(work, pool))
    ratios = [slow.seconds / fast.seconds for fast, slow in zip(ours, others, strict=True)]
    size = len(items) / CHUNKS
    return Measured(
        size / statistics.median(side.seconds for side in ours),
        size / statistics.median(side.seconds for side in others),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        statistics.median(slow.cpu_seconds / fast.cpu_seconds for fast, slow in zip(ours, others, strict=True)),
        sum(one != other for fast, slow in zip(ours, others, strict=True) for one, other in zip(fast[0], slow[0], strict=True)),
    )


def judged(pool: Pool, items: Sequence[Item]) -> list[bool]:
    return [found.verdict == "pass" for found in pool.judge(items)]


def chunks_of(items: Sequence[Item], size: int) -> list[list[Item]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def measure(num_prompts: int) -> dict[str, object]:
    math.prepare()
    items, kinds = make_items(num_prompts, SAMPLES, seed=1)
    alone, _ = make_items(num_prompts * 2, 1, seed=2)
    settled = sum(quick(prompt.answer, answer) is not None for prompt, answer in items)
    two, one, new = compare(items, 2), compare(items, 1), compare(alone, 1)
    return {
        "benchmark": "math_verify", "unit": "answers/s", "ratio": two.ratio, "ratio_one_process": one.ratio,
        "ratio_no_memory": new.ratio, "differing": two.differing + one.differing + new.differing,
        "settled_without_a_worker": settled / len(items), "answers": len(items), "samples_per_prompt": SAMPLES, "kinds": kinds,
        "machine": machine(), "two_workers": two._asdict(), "one_worker": one._asdict(), "one_sample": new._asdict(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # sympy's deprecations, one an answer
    found = measure(arguments.prompts)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
