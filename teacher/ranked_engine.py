"""The sharded teacher as one engine of this process: its ranks are started once, stay loaded, and are given work through files.

Generation hands its ranks the whole stage (generate/launch.py). Evaluation asks in batches, from one process that stores what
comes back; a teacher that takes a cluster to load must not be loaded for each. In the folder, on the disk that all nodes share:

    ready          the ranks have loaded the teacher
    job-N.json     what is asked: to load, requests to generate, sequences to score, or the end
    out-N.R.jsonl  what the R-th group of ranks answers, a line as it comes; the last line says so

A group (ranks of one tensor-parallel group) takes every W-th request, W groups in all; its first rank writes. Lines are for this
process alone and are not durable: the store behind the engine is (student/item_store.py).
"""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from configs.errors import Interrupted, Stopped, TracestillError
from configs.launch import die_with_parent
from configs.progress import expect_loading
from configs.schema import Teacher
from data.engine import Completion, Engine, ExpertStats, Handout, LoopGuard, Partial, Request, Scores, TopLogits
from data.store import write_bytes

READY, LOOK_S = "ready", 0.05
LOAD, GENERATE, SCORE, CLOSE = "load", "generate", "score", "close"


def deepspeed_version() -> str:
    """As teacher.deepspeed_engine.DeepSpeedEngine.version has it, without importing DeepSpeed."""
    return f"deepspeed {importlib.metadata.version('deepspeed')}, transformers {importlib.metadata.version('transformers')}"


class RankedTeacher:
    """launch: runs the ranks until they end, calling what it is given a few times a second; whatever that raises ends them.
    num_groups: how many answer, each its share."""

    name = "deepspeed"

    def __init__(self, folder: Path, num_groups: int, launch: Callable[[Callable[[], None]], None]) -> None:
        self.folder, self.num_groups, self.launch = folder, num_groups, launch
        self.version = deepspeed_version()
        self._thread: threading.Thread | None = None
        self._ended: BaseException | None = None
        self._giving_up = threading.Event()
        self._jobs = itertools.count()
        self._is_idle, self._is_loaded = True, False

    def start(self) -> None:
        """The ranks, without the teacher. Where other nodes take part they are at the rendezvous whether it is asked or not."""
        if self._thread is not None:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        # A thread that lives as long as the launch: the kernel ends a child when the thread that began it ends.
        self._thread = threading.Thread(target=self._launch, name="teacher ranks", daemon=True)
        self._thread.start()

    def load(self) -> None:
        """Returns when every rank has its weights. A second call does nothing. Raises what the ranks ended with."""
        if self._is_loaded:
            return
        self.start()
        expect_loading()
        self._write_job(next(self._jobs), {"kind": LOAD})
        while not (self.folder / READY).is_file():
            self._wait()
        self._is_loaded = True

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        """All requests are read before the first is answered. handout.stop and handout.keep are not called."""
        asked, chosen = list(requests), handout or Handout()
        said = self._ask({"kind": GENERATE, "requests": [_plain(one) for one in asked], "every": chosen.every_tokens})
        for kind, values in said:
            if kind == "partial":
                chosen.take(Partial(values[0], tuple(values[1]), tuple(values[2])))
            else:
                yield Completion(**values | {name: tuple(values[name]) for name in ("token_ids", "logprobs")})

    def score(
        self, sequences: Sequence[Sequence[int]], top_logits: int = 0, log_z_temperatures: Sequence[float] = (1.0,)
    ) -> list[Scores]:
        found: dict[int, Scores] = {}
        job = {"kind": SCORE, "sequences": [list(one) for one in sequences], "top": top_logits, "z": list(log_z_temperatures)}
        for _, values in self._ask(job):
            top = None if values["top"] is None else _top_of(values["top"])
            found[values["number"]] = Scores(tuple(values["logprobs"]), top)
        return [found[number] for number in range(len(sequences))]

    def expert_stats(self) -> ExpertStats | None:
        return None

    def close(self) -> None:
        """The ranks end, and are ended where they are in the middle of something, or where this is called because of a signal:
        other nodes have heard it too, and may not be met any more."""
        if self._thread is None:
            return
        if self._is_idle and self._ended is None and not isinstance(sys.exception(), Interrupted | Stopped):
            self._write_job(next(self._jobs), {"kind": CLOSE})
        else:
            self._giving_up.set()
        self._thread.join()
        self._thread, self._is_loaded = None, False
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- the other side ------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        def poll() -> None:
            if self._giving_up.is_set():
                raise Interrupted("the teacher's ranks were told to end")

        try:
            self.launch(poll)
            self._ended = TracestillError("the teacher's ranks ended before they were told to")
        except BaseException as error:  # told to whoever waits for the ranks
            self._ended = error

    def _wait(self) -> None:
        if self._ended is not None:
            raise self._ended
        time.sleep(LOOK_S)

    def _ask(self, job: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """(kind, values) of every line but the last, from all groups, as they come."""
        self.load()
        number, self._is_idle = next(self._jobs), False
        tails = [_Tail(self.folder / f"out-{number}.{group}.jsonl") for group in range(self.num_groups)]
        self._write_job(number, job)
        open_tails = list(tails)
        while open_tails:
            lines = [line for tail in open_tails for line in tail.new_lines()]
            for kind, values in lines:
                if kind != "end":
                    yield kind, values
            open_tails = [tail for tail in open_tails if not tail.is_over]
            if not lines and open_tails:
                self._wait()
        self._is_idle = True

    def _write_job(self, number: int, job: dict[str, Any]) -> None:
        write_bytes(self.folder / f"job-{number}.json", json.dumps(job).encode())


class _Tail:
    """Whole lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        self.path, self.place, self.is_over = path, 0, False

    def new_lines(self) -> list[tuple[str, Any]]:
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            file.seek(self.place)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.place += len(whole) + len(newline)
        found = [tuple(json.loads(line)) for line in whole.splitlines()]
        self.is_over = bool(found) and found[-1][0] == "end"
        return cast(list[tuple[str, Any]], found)


# --- a rank ------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Of a rank among the groups. is_first: of its group, and writes."""

    group: int
    num_groups: int
    is_first: bool


def serve_rank(teacher: Teacher, folder: Path) -> None:
    """One rank, started by torchrun: answers job after job until it is told to end; the first is to load. Jobs are collective:
    each rank of each group begins each of them, with a share that may be empty."""
    from teacher.engines import open_engine

    die_with_parent()
    rank, size = int(os.environ["RANK"]), teacher.layout.tensor_parallel
    place = Place(rank // size, int(os.environ["WORLD_SIZE"]) // size, rank % size == 0)
    engine = open_engine(teacher)
    for number in itertools.count():
        path = folder / f"job-{number}.json"
        while not path.is_file():
            time.sleep(LOOK_S)
        job = json.loads(path.read_bytes())
        if job["kind"] == CLOSE:
            break
        if job["kind"] == LOAD:
            engine.load()
            if rank == 0:
                write_bytes(folder / READY, b"")
            continue
        _answer(engine, job, folder / f"out-{number}.{place.group}.jsonl", place)
    engine.close()


def _answer(engine: Engine, job: dict[str, Any], path: Path, place: Place) -> None:
    with path.open("w") if place.is_first else open(os.devnull, "w") as file:  # noqa: PTH123

        def say(kind: str, values: object) -> None:
            file.write(json.dumps([kind, values]) + "\n")
            file.flush()

        if job["kind"] == GENERATE:
            mine = [request_of(values) for values in job["requests"][place.group :: place.num_groups]]

            def take(partial: Partial) -> None:
                say("partial", [partial.request_id, partial.token_ids, partial.logprobs])

            for completion in engine.generate(mine, Handout(job["every"], take)):
                values = dataclasses.asdict(dataclasses.replace(completion, expert_load=None, top=None))
                say("completion", values)
        else:
            numbers = range(place.group, len(job["sequences"]), place.num_groups)
            found = engine.score([job["sequences"][number] for number in numbers], job["top"], job["z"])
            for number, scores in zip(numbers, found, strict=True):
                top = None if scores.top is None else [array.tolist() for array in scores.top]
                say("scores", {"number": number, "logprobs": scores.logprobs, "top": top})
        say("end", None)


# --- JSON --------------------------------------------------------------------------------------------------------


def _plain(request: Request) -> dict[str, Any]:
    return dataclasses.asdict(request)


def request_of(values: dict[str, Any]) -> Request:
    """What `dataclasses.asdict` and JSON made of a request, as it was."""
    changed: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if (guard := changed["loop_guard"]) is not None:
        changed["loop_guard"] = LoopGuard(*guard)
    return Request(**changed)


def _top_of(arrays: Sequence[Any]) -> TopLogits:
    ids_TK, logits_TK, log_z_TC = arrays
    return TopLogits(np.array(ids_TK, np.int32), np.array(logits_TK, np.float32), np.array(log_z_TC, np.float64))
