"""What a view is worth: one student for each of three views and three seeds, at equal training tokens, on the embedded pair.

    python -m tests.bench.views --json docs/bench/views.json --work FOLDER [--run FINISHED_RUN]

One set of traces (of the `embedded` recipe) for all. `raw` is what the filters left, `verified` what a verifier passed,
`calibrated` what is probably right, with facts that the base student cannot produce turned into "I don't know". Each is built
once without a bound; the least of their training tokens, rounded down to a thousand, then bounds all three (`max_tokens`, a
fair sample by hash). Trained and evaluated by the commands that everybody uses, in run folders of their own, with the recipe's
settings but for train.seed; teacher and base are evaluated once. Seeds are the outer loop, so that a cut run still compares
views.

Killed, it goes on where it was: --work keeps the run folders. About five minutes a student on two cores.

By view: accuracy of all answerable items, of facts (their held-out phrasings) and of the others, hallucination rate, abstention
where nobody knows, over-refusal (of items that have an answer), omniscience index; the mean of the seeds, and each.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from data.store import RunFolder, read_rollup
from tests.bench.frame import machine

VIEWS = {"raw": "{base: raw", "verified": "{base: verified", "calibrated": "{base: calibrated, abstention_share: 0.05"}
"""Settings, but for the bound that closes them."""
SEEDS = (0, 1, 2)
ROUNDED = 1_000
FIGURES = (
    "accuracy", "hallucination_rate", "abstention_rate", "unknown_abstention_rate", "over_refusal_rate", "omniscience_index",
)  # fmt: skip


class Arm(NamedTuple):
    view: str
    seed: int


def tracestill(*words: str) -> None:
    """Raises CalledProcessError for any failure but a gate that refuses the student (exit 3), which is a result."""
    done = subprocess.run([sys.executable, "-m", "tracestill", *words], check=False)
    if done.returncode not in (0, 3):
        raise subprocess.CalledProcessError(done.returncode, done.args)


def traces_of(work: Path, given: Path | None) -> Path:
    """A run folder with finished prompts and traces."""
    if given is not None:
        return given
    run = work / "traces"
    for stage in ("prompts", "generate"):
        tracestill(stage, "embedded", "--run-dir", str(run))
    return run


def tokens_without_bound(work: Path, traces: Path, view: str) -> int:
    """Training tokens of the whole view, both splits."""
    run = work / f"whole-{view}"
    if read_rollup(RunFolder(run).dataset) is None:
        begin(run, traces, f"data.view={VIEWS[view]}}}")
    tracestill("data", "build", "embedded", "--run-dir", str(run), "-s", f"data.view={VIEWS[view]}}}")
    return tokens_of(run)


def begin(run: Path, traces: Path, *overrides: str) -> None:
    """A run folder of these settings, with the prompts and traces of another, and what was measured of those."""
    shutil.rmtree(run, ignore_errors=True)
    # Left to the program: config.yaml of these settings. It refuses for want of traces, which is why they are brought after it.
    subprocess.run(
        [sys.executable, "-m", "tracestill", "data", "build", "embedded", "--run-dir", str(run), *_settings(overrides)],
        check=False, capture_output=True,
    )  # fmt: skip
    for name in ("prompts", "traces", "metrics"):
        shutil.copytree(traces / name, run / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("train*", "wandb*"))


def _settings(overrides: tuple[str, ...]) -> list[str]:
    return [word for override in overrides for word in ("-s", override)]


def tokens_of(run: Path) -> int:
    counts = built(run)
    return sum(int(str(counts[name])) for name in ("prompt_tokens", "reasoning_tokens", "answer_tokens"))


def built(run: Path) -> dict[str, object]:
    rollup = read_rollup(RunFolder(run).dataset)
    assert rollup is not None, f"{run}: no dataset"
    return rollup.counts


def student_of(work: Path, traces: Path, arm: Arm, max_tokens: int) -> dict[str, object]:
    """Built, trained and evaluated; what was done before is not done again."""
    run = work / f"{arm.view}-{arm.seed}"
    overrides = (f"data.view={VIEWS[arm.view]}, max_tokens: {max_tokens}}}", f"train.seed={arm.seed}")
    if not (run / "config.yaml").is_file() or not (run / "traces" / "manifest.json").is_file():
        begin(run, traces, *overrides)
        first = work / f"{next(iter(VIEWS))}-{SEEDS[0]}"
        for others in (work / f"whole-{arm.view}" / "verdicts" / "replies", first / "evaluation"):
            if others.is_dir():  # what the base said, and how teacher and base did, was asked once already
                target = run / others.relative_to(others.parents[1 if others.name == "replies" else 0])
                shutil.copytree(others, target, ignore=shutil.ignore_patterns("student*", "manifest.json", "gates.json"))
    for command in (("data", "build"), ("train",), ("evaluate",)):
        tracestill(*command, "embedded", "--run-dir", str(run), *_settings(overrides))
    return figures_of(run, arm)


def figures_of(run: Path, arm: Arm) -> dict[str, object]:
    metrics = json.loads((run / "evaluation" / "student.json").read_text())["metrics"]
    counts = built(run)
    by_family = metrics["by_family"]
    others = [value for family, value in by_family.items() if family != "facts"]
    return {
        "view": arm.view, "seed": arm.seed, "rows": counts["train_rows"], "tokens": tokens_of(run),
        "relabelled": counts["relabelled"], "accuracy_of_facts": by_family["facts"],
        "accuracy_of_others": statistics.mean(others),
    } | {name: metrics[name] for name in FIGURES}  # fmt: skip


def summary(students: list[dict[str, object]]) -> dict[str, dict[str, float]]:
    """By view, the mean over the seeds that there are."""
    names = [name for name in students[0] if name not in ("view", "seed")]
    return {
        view: {name: statistics.mean(float(str(one[name])) for one in mine) for name in names}
        for view in VIEWS
        if (mine := [one for one in students if one["view"] == view])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--work", type=Path, required=True, help="keeps the run folders")
    parser.add_argument("--views", nargs="+", default=list(VIEWS), choices=VIEWS, help="bounded by the least of these")
    parser.add_argument("--run", type=Path, help="a run of the `embedded` recipe with finished traces")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    traces = traces_of(arguments.work, arguments.run)
    whole = {view: tokens_without_bound(arguments.work, traces, view) for view in arguments.views}
    max_tokens = min(whole.values()) // ROUNDED * ROUNDED
    students: list[dict[str, object]] = []
    for arm in (Arm(view, seed) for seed in SEEDS for view in arguments.views):
        students.append(student_of(arguments.work, traces, arm, max_tokens))
        found = {
            "benchmark": "views", "tokens_without_bound": whole, "max_tokens": max_tokens, "views": summary(students),
            "students": students, "machine": machine(),
        }  # fmt: skip
        print(json.dumps(students[-1]), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
