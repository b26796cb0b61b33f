"""Four workers, one request at a time each, replies that take heavy-tailed times: how close the end is to the best there is.

    python -m tests.bench.makespan --json docs/bench/makespan.json

The mock server's times are log-normal, drawn per request around a median that its task has; replies are as long as they took.
No schedule ends before max(total / 4, longest); `ratio` is the time from the first request's arrival to the last reply over
that. The workers know nothing but prompts and what earlier replies of a task took. They are processes that start at the same
moment; until the last of them asks for the first time, some places stand empty, and that is in the figure.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from data.ledger import read_ledger
from data.store import RunFolder
from tests.bench.frame import machine
from tests.bench.kill_storm import environment
from tests.teacher.mock_server import PROSE, Asked, MockServer, Reply, encoded, said

WORKERS = 4
MEDIANS_S = (0.1, 0.3, 0.8, 1.6, 3.0)
SIGMA = 0.6
LETTERS_PER_S = 200


@dataclass
class Slow:
    """Answers after the request's own time. spans: (arrival, end), seconds."""

    spans: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, asked: Asked) -> Reply:
        task = int(asked.body["messages"][0]["content"].split()[1])
        seconds = MEDIANS_S[task] * math.exp(SIGMA * random.Random(asked.request_id).gauss(0.0, 1.0))
        now = time.monotonic()
        self.spans.append((now, now + seconds))
        text = (PROSE * (1 + int(seconds * LETTERS_PER_S) // len(PROSE)))[: int(seconds * LETTERS_PER_S)]
        return Reply(body=encoded(said(reasoning_content=text, content="4")), wait_s=seconds)


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds. ratio: of the run in the middle. idle_start: until the last worker's first request."""

    benchmark: str
    ratio: float
    ratios: list[float]
    makespan: float
    bound: float
    total: float
    longest: float
    idle_start: float
    requests: int
    machine: str


def run_once(folder: Path, requests: int) -> tuple[float, float, float, float, float]:
    folder.mkdir()
    rows = [json.dumps({"question": f"Task {number % len(MEDIANS_S)} number {number}?", "task": f"t{number % len(MEDIANS_S)}",
                        "split": "train"}) for number in range(requests)]  # fmt: skip
    (folder / "tasks.jsonl").write_text("\n".join(rows))
    teller, run = Slow(), RunFolder(folder / "run")
    with MockServer(teller) as server:
        recipe = {
            "name": "makespan",
            "teacher": {"engine": {"type": "http", "base_urls": [server.url], "model": "tiny", "concurrency": 1}},
            "generate": {"prompts": [{"type": "jsonl", "path": "tasks.jsonl"}], "samples_per_prompt": 1, "segment_traces": 4},
        }
        (folder / "makespan.yaml").write_text(yaml.safe_dump(recipe))
        words = [sys.executable, "-m", "tracestill", "prompts", str(folder / "makespan.yaml"), "--run-dir", str(run.root)]
        subprocess.run(words, env=environment(), check=True, capture_output=True)
        command = [*words[:3], "generate", *words[4:]]
        workers = [subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) for _ in range(WORKERS)]
        assert [worker.wait() for worker in workers] == [0] * WORKERS
    assert read_ledger(run).completed == requests and len(teller.spans) == requests
    starts, ends = zip(*teller.spans, strict=True)
    times = [end - start for start, end in teller.spans]
    return max(ends) - min(starts), sum(times), max(times), sorted(starts)[WORKERS - 1] - min(starts), requests


def measure(repeats: int, requests: int) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        found = [run_once(Path(folder) / str(number), requests) for number in range(repeats)]
    ratios = [makespan / max(total / WORKERS, longest) for makespan, total, longest, *_ in found]
    middle = sorted(range(repeats), key=lambda number: ratios[number])[repeats // 2]
    makespan, total, longest, idle, _ = found[middle]
    bound = max(total / WORKERS, longest)
    return Result(
        "makespan", ratios[middle], ratios, makespan, bound, total, longest, idle, requests, machine()
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200)
    arguments = parser.parse_args()
    text = json.dumps(asdict(measure(arguments.repeats, arguments.requests)), indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
