"""A million queued requests: what a worker's memory does, and how long `--status` takes.

    python -m tests.bench.queue --json docs/bench/queue.json

One prompt set of 1 M prompts of about 200 characters, one sample each, sealed in a run folder. A worker process loads what any
worker loads, notes its resident memory, opens the pool, and claims, renders and commits `ASKED` requests through the real claims,
journal and writer (the teacher is a function that answers at once); its highest resident memory minus the noted one is
`memory_mb_above_start`. Then sidecars of 1 M finished requests stand in the folder, 256 each, and
`tracestill generate --status` is timed as a process, from the shell's side.
"""

import argparse
import json
import os
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.load import load_recipe
from data.columns import coded
from data.engine import Completion, ExpertStats, Handout, Request, Scores
from data.prompt_set import write_prompts
from data.records import Prompt, digest, prompt_identity
from data.schema import SCHEMA_VERSION
from data.store import RunFolder, seal
from tests.bench.frame import machine

REPOSITORY = Path(__file__).parents[2]
ASKED = 20_000
SEGMENT = 256
TASKS = 20
OVERRIDES = ["generate.samples_per_prompt=1", "teacher.engine={type: local}"]


@dataclass(frozen=True, slots=True)
class Result:
    """status_seconds: median over `repeats` processes, with the two ends. open_seconds: pool and claims, before the first ask."""

    benchmark: str
    requests: int
    memory_mb_above_start: float
    memory_mb_at_start: float
    open_seconds: float
    asks_per_s: float
    status_seconds: float
    status_seconds_min: float
    status_seconds_max: float
    repeats: int
    machine: str


def prompts(count: int) -> Iterator[Prompt]:
    """Of `TASKS` tasks and lengths around 200 characters."""
    for number in range(count):
        text = f"Question {number}: " + "what is the sum of these numbers, and why? " * (3 + number % 3)
        messages = ({"role": "user", "content": text},)
        yield Prompt(
            prompt_identity(messages, "v"), "bench", f"task{number % TASKS}", "v", messages, "4", "", "train", None, "", "MIT"  # type: ignore[arg-type]
        )  # fmt: skip


def make_run(folder: Path, count: int) -> RunFolder:
    run = RunFolder(folder)
    path, counts = write_prompts(run, prompts(count)), {"requests": count}
    seal(run, run.prompts, stage="prompts", fingerprint="f", inputs={}, files=[path], counts=counts, seconds=0.0)
    (folder / "config.yaml").write_text("# made by a benchmark\n")
    return run


class Instant:
    """Answers at once, `asked` requests in all."""

    name, version = "instant", "1"

    def __init__(self, answer: tuple[int, ...], asked: int) -> None:
        self.answer, self.asked = answer, asked

    def load(self) -> None: ...

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        for number, request in enumerate(requests):
            yield Completion(request.request_id, self.answer, tuple(-0.1 for _ in self.answer), "stop", 0.0, 0.0)
            if number + 1 == self.asked:
                return

    def score(
        self, sequences: Sequence[Sequence[int]], top_logits: int = 0, log_z_temperatures: Sequence[float] = (1.0,)
    ) -> list[Scores]:
        raise NotImplementedError

    def expert_stats(self) -> ExpertStats | None:
        return None

    def close(self) -> None: ...


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def highest_resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def work(folder: Path, asked: int) -> None:
    """The worker process; prints one line of JSON."""
    from generate.worker import generate_traces
    from teacher.engines import load_tokenizer

    recipe = load_recipe("embedded", OVERRIDES).recipe
    tokenizer = load_tokenizer(recipe.teacher)
    answer = tuple(tokenizer.encode("It is so.</think>4<|user|>", add_special_tokens=False))
    (small := folder / "small").mkdir()
    generate_traces(recipe, make_run(small, 300), Instant(answer, 300), tokenizer, "teacher", report=lambda count: None)
    before, started, opened = resident_mb(), time.perf_counter(), list[float]()

    def report(count: object) -> None:
        if not opened:
            opened.append(time.perf_counter() - started)

    run = RunFolder(folder)
    finished = generate_traces(recipe, run, Instant(answer, asked), tokenizer, "teacher", report=report)
    seconds = time.perf_counter() - started - opened[0]
    print(json.dumps({"before": before, "highest": highest_resident_mb(), "open": opened[0], "rate": finished / seconds}))


def add_sidecars(run: RunFolder, requests: int) -> None:
    """As commit_segment leaves them; `--status` opens no data file, so these are empty."""
    run.traces.mkdir(exist_ok=True)
    for number in range(-(-requests // SEGMENT)):
        rows = min(SEGMENT, requests - number * SEGMENT)
        facts = {
            "trace_ids": secrets.token_hex(16 * rows),
            "finish_reasons": coded(["length" if row % 17 == 0 else "stop" for row in range(rows)]), "errors": {},
            "tasks": coded([f"task{(number + row) % TASKS}" for row in range(rows)]),
            "output_tokens": [4000 + row for row in range(rows)],
            "cost": 1.5, "teacher_fingerprint": "teacher",
        }  # fmt: skip
        sidecar = {
            "schema_version": SCHEMA_VERSION, "rows": rows, "bytes": 0, "sha256": digest(number), "schema_hash": "0",
            "facts": facts,
        }  # fmt: skip
        stem = run.traces / f"{number:020d}-bench-{number:08x}"
        stem.with_suffix(".arrow").touch()
        stem.with_suffix(".json").write_text(json.dumps(sidecar) + "\n")


def time_status(run: RunFolder, repeats: int) -> list[float]:
    words = [sys.executable, "-m", "tracestill", "generate", "embedded", "--run-dir", str(run.root), "--status", "--json"]
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        ended = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        found.append(time.perf_counter() - started)
        ledger = json.loads(ended.stdout.splitlines()[-1])["ledger"]
        assert ledger["requested"] == ledger["completed"], ledger
    return found


def measure(count: int, asked: int, repeats: int) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", count)
        words = [sys.executable, "-m", "tests.bench.queue", "--work", str(run.root), "--asked", str(asked)]
        told = json.loads(
            subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        )
        finished = RunFolder(Path(folder) / "finished")
        make_run(finished.root, 1)
        counts = {"requests": count}
        seal(finished, finished.prompts, stage="prompts", fingerprint="f", inputs={}, files=[], counts=counts, seconds=0.0)
        add_sidecars(finished, count)
        seconds = time_status(finished, repeats)
    return Result(
        "queue", count, told["highest"] - told["before"], told["before"], told["open"], told["rate"], statistics.median(seconds),
        min(seconds), max(seconds), repeats, machine(),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--asked", type=int, default=ASKED)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work, arguments.asked)
        return
    text = json.dumps(asdict(measure(arguments.requests, arguments.asked, arguments.repeats)), indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
