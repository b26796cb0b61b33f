"""Requests per second with every trace durable: a worker of the generation stage, a bare aiohttp client, datatrove's runner.

    make bench-setup
    python -m tests.bench.http_throughput --json docs/bench/http_throughput.json

All ask one mock server, a process of its own that answers at once with about 16 KB of prose (tests/bench/replies.py), with the
same number in flight; sides take turns in one run, and ratios are medians over turns that followed each other. Our sides, in
requests per second:

whole_worker       generate_traces, from a sealed prompt set to the last committed segment: pool, leases, prompts rendered,
                   journal, replies parsed and tokenised (a BPE of 16,000 tokens), records, Arrow, fsync. What a run sustains.
whole_worker_ids   the same where the server returns token ids (api completions): nothing is tokenised, and a reply is three times
                   as long.
worker_unread      the same worker with reading put off: every reply is in the run's journal, and no record is made of it yet.
read_later         another worker on what worker_unread left: from the journal to the last segment, with nobody to ask. It proves
                   in every round that nothing was left to ask, and is the price that was put off.
client             the http engine and the journal alone: no run folder, no leases, no prompts to render.

A trace is called durable when no server has to be asked again for it, so `ratio` is worker_unread over datatrove: runner over
runner. datatrove commits each reply to SQLite and writes JSONL chunks; it parses replies and does not tokenise them, where
`ratio_whole_worker` does. `ratio_bare` is client over bare: ask, keep, and nothing else, on both sides; the bare one appends to a
file that nobody syncs. The same ratios of the whole worker stand beside them.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from unittest.mock import patch

import aiohttp
from rich.console import Console
from rich.table import Table

from configs.load import load_recipe
from configs.schema import HttpEngine as HttpSettings
from configs.schema import Recipe
from data.engine import Completion, Handout, Request
from data.journal import SYNC_SECONDS, Entry, Journal, read_journal
from data.ledger import read_ledger
from data.prompt_set import write_prompts
from data.records import Prompt, prompt_identity
from data.store import RunFolder, seal
from generate import worker
from teacher.http import listening
from teacher.http.reading import Reader, Reading
from teacher.http_engine import HttpEngine
from tests.bench.frame import machine
from tests.bench.replies import prose, train_tokenizer

REPOSITORY = Path(__file__).parents[2]
PEER = REPOSITORY / ".bench" / "datatrove" / "bin" / "python"
REPLY_BYTES = 16_000
CONCURRENCY = 32
OURS, WHOLE, WHOLE_IDS, LATER, PEERS = 2000, 300, 600, 300, 200
"""Requests of one turn: about three seconds each."""
_numbers = count()


@dataclass(frozen=True, slots=True)
class Result:
    """Medians: in requests per second, and of pairs for ratios. whole_worker_tokens_per_s: output tokens of whole_worker, by its
    tokenizer. turns: every rate that was measured."""

    benchmark: str
    ratio: float
    ratio_bare: float
    ratio_whole_worker: float
    ratio_whole_worker_ids: float
    ratio_bare_worker_unread: float
    ratio_bare_whole_worker: float
    worker_unread: float
    whole_worker: float
    whole_worker_ids: float
    read_later: float
    client: float
    bare: float
    datatrove: float
    whole_worker_tokens_per_s: float
    durability: str
    reply_bytes: int
    concurrency: int
    repeats: int
    turns: dict[str, list[float]]
    machine: str


# --- the worker ----------------------------------------------------------------------------------------------------


class Unread(Reader):
    """Stops at durability: what is kept can be read later, elsewhere."""

    def read(self, request: Request, raw: bytes) -> Reading:
        return Reading(Completion(request.request_id, (), (), "stop", 0.0, 0.0))


class AtOnce:
    """Stands for the threads that parse: there is nothing to hand over to one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None: ...

    async def run(self, work: Callable[[], Reading]) -> Reading:
        return work()

    def close(self) -> None: ...


@contextmanager
def reading_put_off(engine: HttpEngine) -> Iterator[None]:
    engine.reader = Unread(train_tokenizer())
    with patch.object(listening, "Readers", AtOnce), patch.object(worker, "Shift", Deferring):
        yield


class Deferring(worker.Shift):
    """Leaves its replies in the journal, as a worker does that is killed before its next commit."""

    def take(self, completion: Completion) -> None:
        self.asked.pop(completion.request_id)
        self.finished += 1


class Mute(HttpEngine):
    """Reads what others were told, and has nobody to ask."""

    def load(self) -> None: ...

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:  # type: ignore[override]
        assert not [request.request_id for request in requests], "a reply that was kept had to be asked for again"
        return iter(())


def new_run(folder: Path, number: int) -> RunFolder:
    run = RunFolder(folder / f"run{next(_numbers)}")
    path, counts = write_prompts(run, map(prompt, range(number))), {"requests": number}
    run.config.write_text("# made by a benchmark\n")
    seal(run, run.prompts, stage="prompts", fingerprint="f", inputs={}, files=[path], counts=counts, seconds=0.0)
    return run


def prompt(number: int) -> Prompt:
    messages = ({"role": "user", "content": f"question {number}"},)
    return Prompt(prompt_identity(messages, "v"), "bench", "task", "v", messages, "", "", "train", None, "", "MIT")  # type: ignore[arg-type]


def recipe_for(url: str, api: str = "chat") -> Recipe:
    engine = f'{{type: http, base_urls: ["{url}"], model: tiny, api: {api}, concurrency: {CONCURRENCY}}}'
    words = ["generate.samples_per_prompt=1", "generate.sampling.max_tokens=20000", f"teacher.engine={engine}"]
    return load_recipe("embedded", words).recipe


def work(recipe: Recipe, run: RunFolder, engine: HttpEngine) -> float:
    """Seconds of one worker, from opening the sealed prompt set until everything of it is closed."""
    started = time.perf_counter()
    worker.generate_traces(recipe, run, engine, train_tokenizer(), "teacher", report=lambda count: None)
    return time.perf_counter() - started


def engine_of(recipe: Recipe, kind: type[HttpEngine] = HttpEngine) -> HttpEngine:
    assert isinstance(recipe.teacher.engine, HttpSettings)
    return kind(recipe.teacher.engine, "tiny", train_tokenizer())


def whole_worker(url: str, number: int, folder: Path, api: str = "chat") -> float:
    recipe, run = recipe_for(url, api), new_run(folder, number)
    seconds = work(recipe, run, engine_of(recipe))
    assert_committed(run, number)
    return number / seconds


def assert_committed(run: RunFolder, number: int) -> None:
    ledger = read_ledger(run)
    assert (ledger.completed, ledger.failed, ledger.pending, ledger.superseded) == (number, 0, 0, 0), ledger


def defer(recipe: Recipe, run: RunFolder) -> float:
    """Seconds until every reply of the run is in its journal, and nothing in a segment."""
    engine = engine_of(recipe)
    with reading_put_off(engine):
        return work(recipe, run, engine)


def worker_unread(url: str, number: int, folder: Path) -> float:
    recipe, run = recipe_for(url), new_run(folder, number)
    seconds = defer(recipe, run)
    assert read_ledger(run).pending == number
    return number / seconds


def read_later(url: str, number: int, folder: Path) -> float:
    recipe, run = recipe_for(url), new_run(folder, number)
    defer(recipe, run)
    seconds = work(recipe, run, engine_of(recipe, Mute))
    assert_committed(run, number)
    return number / seconds


# --- clients -------------------------------------------------------------------------------------------------------


def requests(number: int) -> Iterator[Request]:
    """Never the same twice, as in a run."""
    for _ in range(number):
        index = next(_numbers)
        messages = ({"role": "user", "content": f"question {index}"},)
        yield Request(f"r{index}", (1, 2), (), 20_000, 1.0, 0.95, index, messages=messages)  # type: ignore[arg-type]


def client(url: str, number: int, folder: Path) -> float:
    """Our engine, each reply in a journal as a worker's `keep` writes it."""
    engine, place = engine_of(recipe_for(url)), folder / f"journal{next(_numbers)}"
    place.mkdir()
    journal, started = Journal(place, "client"), time.perf_counter()

    def keep(request_id: str, raw: bytes) -> None:
        journal.append(Entry("reply", request_id, {"sizes": [len(raw)]}, {}, raw), is_whole=True)

    with reading_put_off(engine):
        finished = {completion.request_id for completion in engine.generate(requests(number), Handout(keep=keep))}
    journal.close()
    seconds = time.perf_counter() - started
    kept = {entry.trace_id for path in place.iterdir() for _, entry in read_journal(path)}
    assert kept == finished and len(kept) == number
    return number / seconds


def bare(url: str, number: int, folder: Path) -> float:
    """The least a client can do: ask, read, append."""
    path = folder / f"bare{next(_numbers)}"

    async def run() -> None:
        source = requests(number)
        connector = aiohttp.TCPConnector(limit=0)
        with path.open("ab") as file:
            async with aiohttp.ClientSession(connector=connector) as session:

                async def ask() -> None:
                    for request in source:
                        body = {"model": "tiny", "messages": request.messages, "max_tokens": request.max_tokens, "stream": False}
                        async with session.post(f"{url}/chat/completions", json=body) as response:
                            file.write(await response.read() + b"\n")

                await asyncio.gather(*(ask() for _ in range(CONCURRENCY)))

    started = time.perf_counter()
    asyncio.run(run())
    return number / (time.perf_counter() - started)


def datatrove(url: str, number: int, folder: Path) -> float:
    words = [  # -P: a script's folder is the first place where Python looks for `queue`
        str(PEER), "-P", str(REPOSITORY / "tests" / "bench" / "datatrove_peer.py"), url.removesuffix("/v1"), str(number),
        str(CONCURRENCY), str(folder / f"datatrove{next(_numbers)}"),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return number / float(done.stdout.split()[-1])


# --- both sides ----------------------------------------------------------------------------------------------------


@contextmanager
def mock_server() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.bench.replies", "--reply-bytes", str(REPLY_BYTES)]
    server = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    finally:
        server.kill()
        server.wait()


def take_turns(repeats: int) -> dict[str, list[float]]:
    """Requests per second of every side in every round."""
    with mock_server() as url, tempfile.TemporaryDirectory(prefix="http_throughput-") as temporary:
        folder = Path(temporary)
        sides = {
            "client": lambda: client(url, OURS, folder),
            "bare": lambda: bare(url, OURS, folder),
            "worker_unread": lambda: worker_unread(url, OURS, folder),
            "datatrove": lambda: datatrove(url, PEERS, folder),
            "whole_worker": lambda: whole_worker(url, WHOLE, folder),
            "whole_worker_ids": lambda: whole_worker(url, WHOLE_IDS, folder, "completions"),
            "read_later": lambda: read_later(url, LATER, folder),
        }
        turns: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(repeats + 1):
            for name, side in sides.items():
                rate = side()
                if repeat:  # the first round compiles Python and warms the page cache
                    turns[name].append(rate)
    return turns


def measure(repeats: int) -> Result:
    turns = take_turns(repeats)

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(turns[one], turns[other], strict=True))

    medians = {name: statistics.median(rates) for name, rates in turns.items()}
    tokens = len(train_tokenizer().encode(prose(0, REPLY_BYTES)))
    return Result(
        "http_throughput",
        ratio=ratio("worker_unread", "datatrove"),
        ratio_bare=ratio("client", "bare"),
        ratio_whole_worker=ratio("whole_worker", "datatrove"),
        ratio_whole_worker_ids=ratio("whole_worker_ids", "datatrove"),
        ratio_bare_worker_unread=ratio("worker_unread", "bare"),
        ratio_bare_whole_worker=ratio("whole_worker", "bare"),
        **medians,
        whole_worker_tokens_per_s=medians["whole_worker"] * tokens,
        durability=f"each reply is handed to the kernel, in the journal, before it is parsed (a killed process loses none), and "
        f"fsynced within {SYNC_SECONDS:g} s and at the end; segments are fsynced",
        reply_bytes=REPLY_BYTES,
        concurrency=CONCURRENCY,
        repeats=repeats,
        turns=turns,
        machine=machine(),
    )


def show(result: Result) -> None:
    table = Table("side", "requests/s", "over datatrove", "over bare")
    for name, rates in result.turns.items():
        rate = statistics.median(rates)
        table.add_row(name, f"{rate:,.0f}", f"{rate / result.datatrove:.2f}", f"{rate / result.bare:.3f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if not PEER.is_file():
        parser.error(f"{PEER.relative_to(REPOSITORY)} is not there; run: make bench-setup")
    result = measure(arguments.repeats)
    show(result)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(asdict(result), indent=1) + "\n")
    print(json.dumps(asdict(result), separators=(",", ":")))


if __name__ == "__main__":
    main()
