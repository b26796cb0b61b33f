"""How long a build of 200,000 traces of 2 KB takes, and how much memory all of its processes hold together.

    python -m tests.bench.build --json docs/bench/build.json

Four samples of 50,000 prompts, 2 KB of reasoning and answer each with 500 token ids and logprobs, in segments of 256;
half of the prompts have an `exact`, half a `math` reference; one answer in five is wrong, one trace in a hundred is cut at
max_tokens. The traces are made first, outside the clock. `again` is a second build of the same traces: nothing is asked, and the
dataset is written anew.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from configs.schema import Data
from data.build import build
from data.prompt_set import write_prompts
from data.records import Prompt, Trace, Turn, prompt_identity, trace_identity
from data.schema import to_table
from data.store import RunFolder, commit_segment, seal
from tests.bench.frame import machine

SAMPLES = 4
SEGMENT = 256
WORDS = 20_000


class Texts:
    """Sentences of made-up words by Zipf's law: as compressible as English, and no two alike."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        syllables = ["ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu", "the", "an", "or", "ing"]
        self.words = ["".join(self.rng.choice(syllables, self.rng.integers(1, 5))) for _ in range(WORDS)]

    def text(self, num_bytes: int) -> str:
        picks = self.rng.zipf(1.3, num_bytes // 4) % WORDS
        text = " ".join(self.words[pick] for pick in picks)[:num_bytes]
        return text.replace(" the ", ".\n")


def make_prompts(count: int, texts: Texts) -> list[Prompt]:
    prompts = []
    for number in range(count):
        messages = ({"role": "user", "content": f"Question {number}: {texts.text(160)}"},)
        verifier, answer = ("exact", f"word{number % 977}") if number % 2 else ("math", str(number % 9973))
        identity = prompt_identity(messages, "v1")  # type: ignore[arg-type]
        task = f"task{number % 7}"
        prompts.append(Prompt(identity, "made", task, "v1", messages, answer, verifier, "train", None, "", "MIT"))  # type: ignore[arg-type]
    return prompts


def make_trace(prompt: Prompt, sample: int, texts: Texts, length: int) -> Trace:
    rng = texts.rng
    answer = prompt.answer if rng.random() < 0.8 else f"{prompt.answer}1"
    reasoning = texts.text(length)
    ids = tuple(rng.integers(0, 150_000, length // 4).tolist())
    finish = "length" if rng.random() < 0.01 else "stop"
    said = {"role": "assistant", "content": answer, "reasoning_content": reasoning}
    turns = (Turn("assistant", ids, "generated", tuple(rng.random(len(ids)).tolist())),)
    return Trace(
        trace_identity(prompt.prompt_id, sample, "t", "s"), prompt.prompt_id, sample, "made", prompt.task, "v1", "tiny", "r", "t",
        "local", "1", turns, (*prompt.messages, said), "", f"{reasoning}</think>{answer}", finish, 40, len(ids), 3, 1.0, 0.95,  # type: ignore[arg-type]
        4096, 1, "", 1, "w", 1.0, 1.0, 0.001, "MIT", "MIT",
    )  # fmt: skip


def make_run(root: Path, num_traces: int, num_bytes: int) -> RunFolder:
    texts, run = Texts(0), RunFolder(root)
    prompts = make_prompts(num_traces // SAMPLES, texts)
    path = write_prompts(run, prompts)
    seal(
        run, run.prompts, stage="prompts", fingerprint="f", inputs={}, files=[path], counts={"requests": num_traces}, seconds=0.0
    )
    traces: list[Trace] = []
    for sample in range(SAMPLES):
        for prompt in prompts:
            traces.append(make_trace(prompt, sample, texts, num_bytes))
            if len(traces) == SEGMENT:
                commit(run, traces)
                traces = []
    if traces:
        commit(run, traces)
    return run


def commit(run: RunFolder, traces: list[Trace]) -> None:
    facts = {
        "trace_ids": "".join(trace.trace_id for trace in traces),
        "finish_reasons": [trace.finish_reason for trace in traces],
    }
    commit_segment(run.traces, to_table(traces, Trace), worker="bench", facts=facts)


def resident_mb(root_pid: int) -> list[int]:
    """Of a process and of everything below it, largest first; shared pages count once a process."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
            except (OSError, IndexError):
                continue
    found, waiting = [], [root_pid]
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        try:
            found.append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20)
        except OSError:
            continue
    return sorted(found, reverse=True)


def timed_build(root: str, num_workers: int, say: Connection) -> None:
    notes: list[tuple[float, str]] = []
    started = time.perf_counter()

    def tell(count: object) -> None:
        note = getattr(count, "note", "")
        if not notes or notes[-1][1] != note:
            notes.append((time.perf_counter() - started, note))

    built = build(Data(), RunFolder(Path(root)), tell, num_workers=num_workers)
    say.send((time.perf_counter() - started, notes, dict(built.counts)))


def measure(run: RunFolder, num_workers: int) -> dict[str, object]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=timed_build, args=(str(run.root), num_workers, theirs))
    process.start()
    assert process.pid is not None
    peak: list[int] = []
    while process.is_alive() and not ours.poll(0.1):
        peak = max(peak, resident_mb(process.pid), key=sum)
    seconds, notes, counts = ours.recv()
    process.join()
    return {
        "seconds": round(seconds, 1),
        "peak_rss_mb": sum(peak),
        "peak_rss_mb_by_process": peak,
        "phases": [f"{at:.1f} s {note}" for at, note in notes],
        "kept": counts["kept"],
        "completed": counts["completed"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=200_000)
    parser.add_argument("--bytes", type=int, default=2_048)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    run = RunFolder(folder / "run")
    if not run.traces.exists():
        started = time.perf_counter()
        make_run(run.root, arguments.traces, arguments.bytes)
        print(f"made {arguments.traces:,} traces in {time.perf_counter() - started:.0f} s")
    shutil.rmtree(run.root / "work", ignore_errors=True)
    first, again = (measure(run, arguments.workers) for _ in range(2))
    result = {
        "benchmark": "build", "traces": arguments.traces, "bytes": arguments.bytes, "workers": arguments.workers, **first,
        "again": again, "machine": machine(),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
