"""Workers killed at random moments, started again each time: nothing lost, nothing seen twice, little said twice.

    python -m tests.bench.kill_storm --json docs/bench/kill_storm.json

`WORKERS` processes of `tracestill generate` share one run folder and one mock server that streams token ids, `RATE` a second
for each request; what it says is a function of the request alone. As soon as a worker has shown its beat it is left alone for a
random while and then gets SIGKILL, and another one is started, `--http-kills` times; then nobody is killed any more. A second
part does the same to launches of the embedded teacher on two DeepSpeed ranks, one after the other: a quarter of the kills fall
anywhere in a launch, loading included, the others after its first token. Keys:

lost          requests without a trace at the end
duplicated    trace ids that a reader of the finished run sees twice
wrong         traces whose tokens are not those of an undisturbed run
redone        tokens said, by the server's count or by a meter in every rank, beyond those that count in the end
redone_bound  most that were in flight since their last checkpoint: kills x requests in flight x checkpoint_tokens (of a server:
              and what the sockets hold)
superseded    copies finished twice: leases are advisory
"""

import argparse
import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.ledger import read_ledger
from data.store import RunFolder, read_first_copies
from tests.bench.frame import machine
from tests.e2e.commands import ROOT, SMALL
from tests.teacher.mock_server import Asked, MockServer, Reply, completed, events, token

WORKERS, CONCURRENCY, CHECKPOINT_TOKENS, TTL_S = 4, 8, 64, 3.0
RATE, TOKENS_PER_EVENT = 200, 8
SOCKET_TOKENS = 64
"""Sent by the server and not yet in the journal: an event or two on the way, and the reader's own pace."""
RANKS, RANK_SLOTS, RANK_CHECKPOINT_TOKENS = 2, 16, 8
LIVES_S = (0.2, 4.0)
LOADING_SHARE, LOADING_S, SPEAKING_S = 0.25, (0.5, 8.0), (0.0, 2.0)
START_S = 120.0


class Metered(tuple[bytes, ...]):
    """Events of one reply; the server's books grow as they are sent, not as they are made."""

    books: Counter[str]
    request_id: str

    def __getitem__(self, key: Any) -> Any:
        def sending() -> Iterator[bytes]:
            for event in tuple(self)[key]:
                self.books[self.request_id] += TOKENS_PER_EVENT
                yield event

        return sending()


@dataclass
class Storyteller:
    """Answers by token ids from where the prompt ends. sent: tokens, whole events, by request."""

    first_prompt: dict[str, int] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)

    def __call__(self, asked: Asked) -> Reply:
        prompt = len(asked.body["prompt"])
        position = prompt - self.first_prompt.setdefault(asked.request_id, prompt)
        ids = [token(asked.request_id, index) for index in range(position, length(asked.request_id))]
        chunks = [completed(ids[start : start + TOKENS_PER_EVENT], None) for start in range(0, len(ids), TOKENS_PER_EVENT)]
        metered = Metered(events([*chunks, completed([], "stop")]))
        metered.books, metered.request_id = self.sent, asked.request_id
        return Reply(events=metered, pause_s=TOKENS_PER_EVENT / RATE)


def length(request_id: str) -> int:
    """Log-normal, median 200 tokens, at most 1,000."""
    return min(1000, max(8, round(200 * math.exp(0.7 * random.Random(request_id).gauss(0.0, 1.0)))))


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of worker."""

    kills: int
    requests: int
    lost: int
    duplicated: int
    wrong: int
    superseded: int
    redone: int
    redone_bound: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    benchmark: str
    kills: int
    lost: int
    duplicated: int
    wrong: int
    http: Part
    deepspeed: Part | None
    seed: int
    machine: str


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def start(recipe: str, run: RunFolder, *words: str, cwd: Path | None = None) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tracestill", "generate", recipe, "--run-dir", str(run.root), *words]
    log = (run.root.parent / "workers.log").open("ab")
    return subprocess.Popen(command, cwd=cwd, env=environment(), stdout=log, stderr=log, start_new_session=True)


def beats(run: RunFolder) -> set[Path]:
    return set((run.root / "work" / "workers").glob("*.beat"))


# --- http --------------------------------------------------------------------------------------------------------


def http_recipe(folder: Path, url: str, requests: int) -> Path:
    rows = [
        json.dumps({"question": f"Question {number}?", "task": f"t{number % 5}", "split": "train"}) for number in range(requests)
    ]
    (folder / "tasks.jsonl").write_text("\n".join(rows))
    recipe = {
        "name": "storm",
        "teacher": {
            "engine": {"type": "http", "base_urls": [url], "model": "tiny", "api": "completions", "stream": True,
                       "concurrency": CONCURRENCY},
        },
        "generate": {
            "prompts": [{"type": "jsonl", "path": "tasks.jsonl"}], "samples_per_prompt": 1,
            "sampling": {"max_tokens": 2000, "temperature": 1.0}, "checkpoint_tokens": CHECKPOINT_TOKENS, "lease_ttl_s": TTL_S,
            "segment_traces": 64, "segment_seconds": 2.0,
        },
    }  # fmt: skip
    (folder / "storm.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "storm.yaml"


def storm_on_http(folder: Path, *, kills: int, requests: int, seed: int, workers: int = WORKERS) -> Part:
    teller, dice, started = Storyteller(), random.Random(seed), time.monotonic()
    with MockServer(teller) as server:
        recipe, run = http_recipe(folder, server.url, requests), RunFolder(folder / "run")
        words = [sys.executable, "-m", "tracestill", "prompts", str(recipe), "--run-dir", str(run.root)]
        subprocess.run(words, env=environment(), check=True, capture_output=True)
        _storm(str(recipe), run, kills, dice, workers)
        subprocess.run([*words[:3], "generate", *words[4:]], env=environment(), check=True, capture_output=True, timeout=1800)
    ledger, said = read_ledger(run), outputs(run)
    expected = {identity: tuple(token(identity, index) for index in range(length(identity))) for identity in said}
    tokens = sum(map(len, expected.values()))
    return Part(
        kills=kills,
        requests=requests,
        lost=ledger.pending + ledger.failed + requests - len(said),
        duplicated=sum(count - 1 for count in Counter(identities(run)).values()),
        wrong=sum(said[identity][:-1] != expected[identity] and said[identity] != expected[identity] for identity in said),
        superseded=ledger.superseded,
        redone=sum(teller.sent.values())
        - sum(-(-len(ids) // TOKENS_PER_EVENT) * TOKENS_PER_EVENT for ids in expected.values())
        - requests * 2 * TOKENS_PER_EVENT,
        redone_bound=kills * CONCURRENCY * (CHECKPOINT_TOKENS + SOCKET_TOKENS),
        tokens=tokens,
        seconds=time.monotonic() - started,
    )


def _storm(recipe: str, run: RunFolder, kills: int, dice: random.Random, workers: int) -> None:
    """Each of `workers` places always has a worker; whoever has lived its time is killed and replaced."""
    living: list[tuple[subprocess.Popen[bytes], float]] = []
    seen: dict[int, float] = {}
    killed = 0
    while killed < kills:
        while len(living) < workers:
            living.append((start(recipe, run), dice.uniform(*LIVES_S)))
        time.sleep(0.05)
        pids = {int(path.name.split("-")[-3]) for path in beats(run)}
        for place, (process, life) in enumerate(living):
            if process.pid in pids:
                seen.setdefault(process.pid, time.monotonic())
            ended = process.poll() is not None
            if ended or (process.pid in seen and time.monotonic() - seen[process.pid] >= life):
                process.kill()
                process.wait()
                killed += not ended
                del living[place]
                break
    for process, _ in living:
        process.send_signal(signal.SIGTERM)
    for process, _ in living:
        process.wait()


def identities(run: RunFolder) -> list[str]:
    return [identity for table in read_first_copies(run.traces) for identity in table["trace_id"].to_pylist()]


def outputs(run: RunFolder) -> dict[str, tuple[int, ...]]:
    return {
        row["trace_id"]: tuple(row["turns"][1]["token_ids"])
        for table in read_first_copies(run.traces)
        for row in table.select(["trace_id", "turns"]).to_pylist()
    }


# --- deepspeed ---------------------------------------------------------------------------------------------------


class Meter:
    """Counts every token that a rank says, a byte each in a file of its process: a SIGKILL takes no byte back. Ranks run the
    front door of their working directory, and there stands one that opens the real one with the meter in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        words = f"from tests.bench.kill_storm import open_metered\n\nopen_metered({str(folder)!r})\n"
        (folder / "tracestill.py").write_text(words)

    @property
    def said(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.said"))


def open_metered(folder: str) -> None:
    """`python -m tracestill` in a process whose rows, if it is a rank, count what they say."""
    if "RANK" in os.environ:
        from teacher.row import Row

        said, say = os.open(f"{folder}/{os.getpid()}-{time.time_ns()}.said", os.O_CREAT | os.O_WRONLY | os.O_APPEND), Row.say

        def counted(self: Row, token_id: int, logprob: float) -> None:
            os.write(said, b".")
            say(self, token_id, logprob)

        Row.say = counted
    runpy.run_path(str(ROOT / "tracestill.py"), run_name="__main__")


def storm_on_ranks(folder: Path, *, kills: int, seed: int, overrides: Sequence[str] = ("generate.samples_per_prompt=4",)) -> Part:
    """The embedded teacher on two ranks, in float32 with noise that knows seed and position alone, so that the tokens are those
    of the run that nobody killed."""
    dice, started = random.Random(seed), time.monotonic()
    chosen = (*SMALL, f"generate.checkpoint_tokens={RANK_CHECKPOINT_TOKENS}", f"generate.lease_ttl_s={TTL_S}",
              f"teacher.engine.batch_size={RANK_SLOTS}", *overrides)  # fmt: skip
    settings = [word for override in chosen for word in ("-s", override)]
    undisturbed, run = RunFolder(folder / "undisturbed"), RunFolder(folder / "killed")
    for one in (undisturbed, run):
        words = [sys.executable, "-m", "tracestill", "prompts", "embedded", "--run-dir", str(one.root), *settings]
        subprocess.run(words, env=environment(), check=True, capture_output=True)
    calm, meter, killed = Meter(folder / "calm"), Meter(folder / "meter"), 0
    assert start("embedded", undisturbed, *settings, cwd=calm.folder).wait() == 0
    while killed < kills and read_ledger(run).pending:
        killed += kill_one(start("embedded", run, *settings, cwd=meter.folder), run, meter, dice)
    assert start("embedded", run, *settings, cwd=meter.folder).wait() == 0
    ledger, expected, said = read_ledger(run), outputs(undisturbed), outputs(run)
    tokens = sum(map(len, expected.values()))
    assert calm.said == tokens, f"{calm.said} tokens by the meter, {tokens} in the traces of a run that nobody killed"
    return Part(
        kills=killed,
        requests=len(expected),
        lost=ledger.pending + ledger.failed + len(expected.keys() - said.keys()),
        duplicated=sum(count - 1 for count in Counter(identities(run)).values()),
        wrong=sum(said.get(identity) != ids for identity, ids in expected.items()),
        superseded=ledger.superseded,
        redone=meter.said - tokens,
        redone_bound=killed * RANKS * RANK_SLOTS * RANK_CHECKPOINT_TOKENS,
        tokens=tokens,
        seconds=time.monotonic() - started,
    )


def kill_one(process: "subprocess.Popen[bytes]", run: RunFolder, meter: Meter, dice: random.Random) -> bool:
    """SIGKILL to the launch, with whose front process its ranks die; False when it had ended before. A while after its beat shows
    or, more often, after it has begun to speak."""
    before, silent = beats(run), meter.said
    speaks = dice.random() >= LOADING_SHARE
    deadline = time.monotonic() + START_S
    while process.poll() is None and not (meter.said > silent if speaks else beats(run) - before):
        assert time.monotonic() < deadline, "the launch never began"
        time.sleep(0.05)
    time.sleep(dice.uniform(*(SPEAKING_S if speaks else LOADING_S)))
    was_alive = process.poll() is None
    process.kill()
    process.wait()
    return was_alive


def measure(http_kills: int, rank_kills: int, requests: int, seed: int) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        (web := Path(folder) / "http").mkdir()
        (ranks := Path(folder) / "ranks").mkdir()
        http = storm_on_http(web, kills=http_kills, requests=requests, seed=seed)
        deepspeed = storm_on_ranks(ranks, kills=rank_kills, seed=seed) if rank_kills else None
    parts = [part for part in (http, deepspeed) if part is not None]
    return Result(
        "kill_storm", sum(part.kills for part in parts), sum(part.lost for part in parts), sum(part.duplicated for part in parts),
        sum(part.wrong for part in parts), http, deepspeed, seed, machine(),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--http-kills", type=int, default=190)
    parser.add_argument("--rank-kills", type=int, default=10)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)))
    arguments = parser.parse_args()
    result = measure(arguments.http_kills, arguments.rank_kills, arguments.requests, arguments.seed)
    text = json.dumps(asdict(result), indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
