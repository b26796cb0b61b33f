"""A bad night on a real Slurm, with what it cost; every run in it is compared with one that nobody disturbed.

    python -m tests.bench.slurm_storm --json docs/bench/slurm_storm.json

Runs tests/slurm/test_storm.py (root, Slurm's programs, three quarters of an hour on two cores) and writes what its tests found.
Keys beside theirs:

passed, failed  of the tests; each compares ledger, traces and dataset with the undisturbed run's
requeued        of 20 jobs that a higher partition took the nodes from
silence_ratio   worst time from a rank's SIGSTOP to the end of its attempt, over the silence that is allowed
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.bench.frame import machine
from tests.e2e.commands import ROOT


def storm() -> dict[str, Any]:
    """Raises RuntimeError when the tests did not run."""
    with tempfile.TemporaryDirectory() as folder:
        figures, results = Path(folder) / "figures.json", Path(folder) / "results.xml"
        words = ["-m", "pytest", "-q", "tests/slurm/test_storm.py", f"--junitxml={results}"]
        subprocess.run([sys.executable, *words], cwd=ROOT, env=os.environ | {"TRACESTILL_STORM": str(figures)}, check=False)
        if not figures.is_file():
            raise RuntimeError("no storm: its tests were skipped, or ended before they began")
        suite = next(ElementTree.parse(results).iter("testsuite"))
        found: dict[str, Any] = json.loads(figures.read_text())
    failed = sum(int(suite.get(key, "0")) for key in ("failures", "errors", "skipped"))
    return summary(found, passed=int(suite.get("tests", "0")) - failed, failed=failed)


def summary(found: dict[str, Any], *, passed: int, failed: int) -> dict[str, Any]:
    """found: figures of the tests, by test."""
    silent = [one["seconds"] / one["silence_s"] for name, one in found.items() if name.startswith("stopped_rank")]
    return {
        "benchmark": "slurm_storm",
        "passed": passed,
        "failed": failed,
        "requeued": found["preemptions"]["requeued"],
        "silence_ratio": max(silent),
        **found,
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    text = json.dumps(storm(), indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
