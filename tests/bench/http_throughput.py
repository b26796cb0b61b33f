"""Requests per second with every reply durable: the http engine, a bare aiohttp client, datatrove's checkpointed runner.

    make bench-setup
    python -m tests.bench.http_throughput --json docs/bench/http_throughput.json

All ask the same mock server, a process of its own that answers at once with about 16 KB of text, with the same number in
flight; sides take turns in one run, and ratios are of turns that followed each other.

`ratio` and `ratio_bare` go up to durability: a reply counts when its bytes, with the line that names their origin, are in a file
that is fsynced in groups of GROUP. `ratio_bare`'s other side appends replies to a file and never syncs it. `ratio` is over
datatrove, which commits each reply to SQLite (no sync of its own beyond SQLite's) and writes JSONL chunks; it parses and does not
tokenise. `tokenised` goes on to completions: parsed, and their ids counted by a BPE of 16,000 tokens trained on this repository;
on two cores, of which the mock takes one, a tokenizer is what bounds it.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from configs import schema
from data.engine import Completion, Handout, Request
from teacher.http.reading import Reader, Reading
from teacher.http_engine import HttpEngine
from tests.bench.frame import machine

REPOSITORY = Path(__file__).parents[2]
PEER = REPOSITORY / ".bench" / "datatrove" / "bin" / "python"
REPLY_BYTES = 16_000
CONCURRENCY = 32
GROUP = 64
OURS, TOKENISED, PEERS = 2000, 300, 200
"""Requests of one turn: about three seconds each."""


@dataclass(frozen=True, slots=True)
class Result:
    """Medians in requests per second; ratios are medians of pairs."""

    benchmark: str
    ratio: float
    ratio_bare: float
    ratio_tokenised: float
    ratio_bare_tokenised: float
    ours: float
    tokenised: float
    bare: float
    datatrove: float
    durability: str
    reply_bytes: int
    concurrency: int
    repeats: int
    turns: dict[str, list[float]]
    machine: str


class Log:
    """A file that is appended to and synced in groups."""

    def __init__(self, path: Path, group: int) -> None:
        self.file, self.group, self.kept = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), group, 0

    def keep(self, request_id: str, raw: bytes) -> None:
        os.write(self.file, raw)
        self.kept += 1
        if self.kept % self.group == 0:
            os.fsync(self.file)

    def close(self) -> None:
        os.fsync(self.file)
        os.close(self.file)


class Unread(Reader):
    """Stops at durability: what is kept can be read later, elsewhere."""

    def read(self, request: Request, raw: bytes) -> Reading:
        return Reading(Completion(request.request_id, (), (), "stop", 0.0, 0.0))


_numbers = count()


def requests(number: int) -> Iterator[Request]:
    """Never the same twice, as in a run."""
    for _ in range(number):
        index = next(_numbers)
        messages = ({"role": "user", "content": f"question {index}"},)
        yield Request(f"r{index}", (1, 2), (), 20_000, 1.0, 0.95, index, messages=messages)  # type: ignore[arg-type]


def ours(url: str, tokenizer: PreTrainedTokenizerBase, number: int, folder: Path, *, read: bool) -> float:
    engine = HttpEngine(schema.HttpEngine(base_urls=(url,), concurrency=CONCURRENCY), "tiny", tokenizer)
    if not read:
        engine.reader = Unread(tokenizer)
    log, started = Log(folder / f"kept{next(_numbers)}", GROUP), time.perf_counter()
    finished = sum(completion.finish_reason == "stop" for completion in engine.generate(requests(number), Handout(keep=log.keep)))
    log.close()
    assert finished == log.kept == number, (finished, log.kept)
    return number / (time.perf_counter() - started)


def bare(url: str, number: int, folder: Path) -> float:
    """The least a client can do: ask, read, append."""
    path = folder / f"bare{next(_numbers)}"

    async def run() -> None:
        source = requests(number)
        connector = aiohttp.TCPConnector(limit=0)
        with path.open("ab") as file:
            async with aiohttp.ClientSession(connector=connector) as session:

                async def worker() -> None:
                    for request in source:
                        body = {"model": "tiny", "messages": request.messages, "max_tokens": request.max_tokens, "stream": False}
                        async with session.post(f"{url}/chat/completions", json=body) as response:
                            file.write(await response.read() + b"\n")

                await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))

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


@contextmanager
def mock_server() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.teacher.mock_server", "--reply-bytes", str(REPLY_BYTES)]
    server = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    finally:
        server.kill()
        server.wait()


def train_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of a real one's kind: byte-level BPE that splits at words."""
    files = sorted(
        str(path) for folder in ("data", "teacher", "train", "student") for path in (REPOSITORY / folder).rglob("*.py")
    )
    bpe = ByteLevelBPETokenizer()
    bpe.train(files, vocab_size=16_000, special_tokens=["<|im_end|>", "<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), eos_token="<|endoftext|>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}<think>"
    return tokenizer


def measure(repeats: int) -> Result:
    turns: dict[str, list[float]] = {"ours": [], "bare": [], "tokenised": [], "datatrove": []}
    tokenizer = train_tokenizer()
    with mock_server() as url, tempfile.TemporaryDirectory(prefix="http_throughput-") as temporary:
        folder = Path(temporary)
        sides = {
            "ours": lambda: ours(url, tokenizer, OURS, folder, read=False),
            "bare": lambda: bare(url, OURS, folder),
            "tokenised": lambda: ours(url, tokenizer, TOKENISED, folder, read=True),
            "datatrove": lambda: datatrove(url, PEERS, folder),
        }
        for repeat in range(repeats + 1):
            for name, side in sides.items():
                rate = side()
                if repeat:  # the first round compiles Python and warms the page cache
                    turns[name].append(rate)

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(turns[one], turns[other], strict=True))

    medians = {name: statistics.median(rates) for name, rates in turns.items()}
    return Result(
        "http_throughput", ratio("ours", "datatrove"), ratio("ours", "bare"), ratio("tokenised", "datatrove"),
        ratio("tokenised", "bare"), **medians,
        durability=f"each reply written before it is parsed, fsync every {GROUP} replies and at the end",
        reply_bytes=REPLY_BYTES, concurrency=CONCURRENCY, repeats=repeats, turns=turns, machine=machine(),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if not PEER.is_file():
        parser.error(f"{PEER.relative_to(REPOSITORY)} is not there; run: make bench-setup")
    result = measure(arguments.repeats)
    table = Table("requests/s", "ours", "tokenised", "bare", "datatrove", "ratio", "ratio_bare")
    table.add_row("median", *(f"{getattr(result, name):,.0f}" for name in ("ours", "tokenised", "bare", "datatrove")),
                  f"{result.ratio:.1f}", f"{result.ratio_bare:.2f}")  # fmt: skip
    Console().print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(asdict(result), indent=1) + "\n")
    print(json.dumps(asdict(result), separators=(",", ":")))


if __name__ == "__main__":
    main()
