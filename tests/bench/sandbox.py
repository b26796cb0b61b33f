"""What confinement costs: a program in the sandbox against the same program run bare by the same python.

    python -m tests.bench.sandbox --json docs/bench/sandbox.json

The program reads a thousand numbers, sorts them and prints them: milliseconds, so that what is left is the start. Both sides
in turns; `p50_overhead_ms` is the median of the pairwise differences, `p99_overhead_ms` their 99th percentile. An answer's
tests share one start: `stdin_item_ms`, `function_item_ms` and `asserts_item_ms` are whole answers with 20 tests each, and
`bare_item_ms` is 20 processes that run the program bare, one after the other.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

from data.records import Prompt
from data.verify import code, sandbox
from tests.bench.frame import machine

PROGRAM = "import sys\nprint(*sorted(map(int, sys.stdin.read().split())))"
FUNCTION = "def ordered(numbers):\n    return sorted(numbers)"
NUMBERS = [number * 7919 % 10_007 for number in range(1000)]
TEXT = " ".join(map(str, NUMBERS))
NUM_TESTS = 20
PATIENT = sandbox.Limits(wall_s=60.0)


def item(kind: str, tests: list, reference: str, **more: str) -> Prompt:
    details = json.dumps({"language": "python", "kind": kind, "tests": tests, **more})
    return Prompt("bench", "bench", "bench", "v1", (), reference, "code", "train", None, details, "CC0")


ITEMS = {
    "stdin_item_ms": item("stdin", [{"stdin": TEXT, "stdout": " ".join(map(str, sorted(NUMBERS)))}] * NUM_TESTS, PROGRAM),
    "function_item_ms": item(
        "function", [{"arguments": [NUMBERS], "expected": sorted(NUMBERS)}] * NUM_TESTS, FUNCTION, function="ordered"
    ),
    "asserts_item_ms": item("asserts", [f"assert ordered({NUMBERS}) == {sorted(NUMBERS)}"] * NUM_TESTS, FUNCTION),
}


def timed_ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def bare() -> None:
    command = [sandbox.PYTHON, "-I", "-X", "utf8", "-c", PROGRAM]
    subprocess.run(command, input=TEXT.encode(), env={}, cwd="/", check=True, capture_output=True)


def confined() -> None:
    outcome = sandbox.run(PROGRAM, stdin=TEXT, limits=PATIENT)
    assert outcome.status == "ok", outcome


def scored(prompt: Prompt) -> None:
    with patch.object(code, "TIMEOUT_S", PATIENT.wall_s):
        assert code.score(prompt, prompt.answer) == 1.0


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, round(share * (len(values) - 1)))]


def measure(repeats: int) -> dict[str, object]:
    sandbox.require()
    bare()
    confined()
    pairs = [(timed_ms(confined), timed_ms(bare)) for _ in range(repeats)]
    overheads = [ours - theirs for ours, theirs in pairs]
    rounds = range(max(3, repeats // 20))
    items = {name: statistics.median(timed_ms(lambda p=prompt: scored(p)) for _ in rounds) for name, prompt in ITEMS.items()}
    return {
        "benchmark": "sandbox",
        "p50_overhead_ms": statistics.median(overheads),
        "p99_overhead_ms": percentile(overheads, 0.99),
        "p50_ms": statistics.median(ours for ours, _ in pairs),
        "p99_ms": percentile([ours for ours, _ in pairs], 0.99),
        "bare_p50_ms": statistics.median(theirs for _, theirs in pairs),
        "bare_p99_ms": percentile([theirs for _, theirs in pairs], 0.99),
        **items,
        "bare_item_ms": NUM_TESTS * statistics.median(theirs for _, theirs in pairs),
        "repeats": repeats,
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    found = measure(arguments.repeats)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
