"""The worker: what came back is a record, a record is committed, and nothing is asked twice."""

import dataclasses
import errno
import itertools
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from configs.engines import HttpEngine, LocalEngine
from configs.errors import Interrupted, UnusableInput
from configs.load import load_recipe
from configs.schema import Budget, Recipe, Teacher
from data.engine import OTHER_MODEL, Completion, ExpertStats, Handout, Partial, Request, Scores
from data.ledger import read_ledger
from data.prompt_set import write_prompts
from data.records import Prompt, Trace, prompt_identity
from data.schema import from_table
from data.store import RunFolder, read_first_copies, seal, segments
from data.work import WorkFolder, clear
from generate.budget import others, spent
from generate.worker import generate_traces
from teacher.engines import load_tokenizer

TOKENIZER = load_tokenizer(Teacher())


def prompt(text: str) -> Prompt:
    messages = ({"role": "user", "content": text},)
    return Prompt(prompt_identity(messages, "v"), "s", "t", "v", messages, "", "", "train", None, "", "MIT")  # type: ignore[arg-type]


class Scripted:
    """Our own seam, filled by hand: says what it is told to, and dies after `fails_after` completions, or takes no more after
    `stops_after`. The first `fails_to_answer` requests come back as aborts."""

    name, version = "scripted", "1"

    def __init__(
        self,
        text: str = "Hm.</think>5<|user|>",
        *,
        fails_after: int | None = None,
        stops_after: int | None = None,
        fails_to_answer: int = 0,
        cost: float = 0.0,
    ) -> None:
        self.ids = tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        self.fails_after, self.stops_after, self.fails_to_answer, self.cost = fails_after, stops_after, fails_to_answer, cost
        self.requests: list[Request] = []

    def load(self) -> None: ...

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        for index, request in enumerate(itertools.islice(requests, self.stops_after)):
            if index == self.fails_after:
                raise RuntimeError("power cut")
            self.requests.append(request)
            if index < self.fails_to_answer:
                yield Completion(request.request_id, (), (), "abort", 1.0, 0.5, error="busy")
                continue
            reason = "stop" if self.ids[-1] in request.stop_ids else "length"
            yield Completion(request.request_id, self.ids, tuple(-0.5 for _ in self.ids), reason, 1.0, 0.5, cost=self.cost)

    def score(
        self, sequences: Sequence[Sequence[int]], top_logits: int = 0, log_z_temperatures: Sequence[float] = (1.0,)
    ) -> list[Scores]:
        raise NotImplementedError

    def expert_stats(self) -> ExpertStats | None:
        return None

    def close(self) -> None: ...


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("embedded", ["generate.segment_traces=4", "generate.samples_per_prompt=2"]).recipe


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return new_run(tmp_path, [prompt(f"What is {index}?") for index in range(5)], requests=10)


def new_run(folder: Path, prompts: list[Prompt], requests: int) -> RunFolder:
    run = RunFolder(folder)
    path, counts = write_prompts(run, prompts), {"requests": requests}
    run.config.touch()
    seal(run, run.prompts, stage="prompts", fingerprint="f", inputs={}, files=[path], counts=counts, seconds=0.0)
    return run


def changed(recipe: Recipe, **values: object) -> Recipe:
    return recipe.model_copy(update={"generate": recipe.generate.model_copy(update=values)})


def work(recipe: Recipe, run: RunFolder, engine: Scripted, *, teacher: str = "teacher") -> int:
    return generate_traces(recipe, run, engine, TOKENIZER, teacher, report=lambda count: None)


def traces(run: RunFolder) -> list[Trace]:
    return [trace for table in read_first_copies(run.traces) for trace in from_table(table, Trace)]


def test_a_completion_becomes_a_whole_record(recipe: Recipe, run: RunFolder) -> None:
    work(recipe, run, Scripted())
    trace = traces(run)[0]
    given, generated = trace.turns
    assert given.origin == "given" and TOKENIZER.decode(list(given.token_ids)).endswith("<|assistant|><think>")  # type: ignore[union-attr]
    assert generated.origin == "generated" and len(generated.logprobs) == len(generated.token_ids)
    assert trace.raw_text == "Hm.</think>5" and trace.finish_reason == "stop"
    assert trace.messages[-1] == {"role": "assistant", "content": "5", "reasoning_content": "Hm."}
    assert (trace.reasoning_tokens, trace.answer_tokens) == (4, 2)  # H m . </think> | 5 <|user|>
    assert trace.prompt_tokens == len(given.token_ids) and trace.teacher_licence == "MIT"


def test_an_unclosed_think_block_is_kept_raw_and_has_no_answer(recipe: Recipe, run: RunFolder) -> None:
    work(recipe, run, Scripted("Hm. 5, I would say"))
    trace = traces(run)[0]
    assert trace.raw_text == "Hm. 5, I would say" and trace.finish_reason == "length"
    assert trace.messages[-1].get("content") == "" and trace.answer_tokens == 0


def test_segments_hold_the_stated_number_of_traces(recipe: Recipe, run: RunFolder) -> None:
    assert work(recipe, run, Scripted()) == 10
    assert [segment.rows for segment in segments(run.traces)] == [4, 4, 2]
    ledger = read_ledger(run)
    assert (ledger.completed, ledger.failed, ledger.pending) == (10, 0, 0)


def test_after_a_failure_only_what_is_missing_is_asked(recipe: Recipe, run: RunFolder) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        work(recipe, run, Scripted(fails_after=7))
    assert read_ledger(run).completed == 7  # a whole segment, and what was finished when it failed
    again = Scripted()
    assert work(recipe, run, again) == 3
    assert len({trace.trace_id for trace in traces(run)}) == 10 and read_ledger(run).superseded == 0
    assert work(recipe, run, Scripted()) == 0


def test_a_finished_trace_does_not_wait_for_ever_for_its_segment(recipe: Recipe, run: RunFolder) -> None:
    """Asked before every pass, as an engine does, the writer commits what is old enough."""
    patient = changed(recipe, segment_seconds=1e-9)

    class Asking(Scripted):
        def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
            for completion in super().generate(requests, handout):
                yield completion
                assert handout is not None and not handout.stop()

    work(patient, run, Asking())
    assert [segment.rows for segment in segments(run.traces)] == [1] * 10


def test_what_two_workers_finish_twice_counts_once(recipe: Recipe, run: RunFolder, tmp_path: Path) -> None:
    """A second worker on a copy of the folder, which never sees the first one's leases and commits."""
    other = RunFolder(tmp_path / "other")
    other.root.mkdir()
    other.config.touch()
    (other.root / "prompts").symlink_to(run.root / "prompts")
    work(recipe, run, Scripted(stops_after=5))
    work(recipe, other, Scripted())
    for path in other.traces.iterdir():
        path.rename(run.traces / path.name)
    ledger = read_ledger(run)
    assert (ledger.completed, ledger.superseded, ledger.pending) == (10, 5, 0)
    assert len(traces(run)) == 10


def test_another_teacher_template_or_code_is_refused(recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    work(recipe, run, Scripted())
    with pytest.raises(UnusableInput, match="this worker's teacher is not the one that began the run"):
        work(recipe, run, Scripted(), teacher="another")
    monkeypatch.setattr("generate.identity.source_fingerprint", lambda: "edited")
    with pytest.raises(UnusableInput, match="this worker's code is not the one that began the run .*accept_code_change=true"):
        work(recipe, run, Scripted())
    assert work(changed(recipe, accept_code_change=True), run, Scripted()) == 0


def test_traces_that_nobody_asks_for_are_refused(recipe: Recipe, run: RunFolder) -> None:
    work(recipe, run, Scripted())
    (run.root / "work" / "identity.json").unlink()
    with pytest.raises(UnusableInput, match="traces of segment .* belong to another teacher"):
        work(recipe, run, Scripted(), teacher="another")


# --- killed, and taken up by another worker ----------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing after it runs for the worker that is "dead"."""


class Dying(Scripted):
    """Finishes `finishes` requests and is half through the next ones when its process is gone."""

    def __init__(self, finishes: int, half_through: int) -> None:
        super().__init__()
        self.finishes, self.half_through = finishes, half_through

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        assert handout is not None
        source = iter(requests)
        for request in itertools.islice(source, self.finishes):
            yield Completion(request.request_id, self.ids, tuple(-0.5 for _ in self.ids), "stop", 1.0, 0.5)
        for request in itertools.islice(source, self.half_through):
            handout.take(Partial(request.request_id, self.ids[:2], (-0.5, -0.5)))
            handout.take(Partial(request.request_id, self.ids[:3], (-0.5, -0.5, -0.5)))
        raise Killed


def kill(recipe: Recipe, run: RunFolder, engine: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker ends as by SIGKILL: no commit, no journal closed, leases left behind, and a beat that grows old."""
    with monkeypatch.context() as patch:
        for name in ("generate.writer.Writer.commit", "data.journal.Journal.close", "data.work.Leases.release_all"):
            patch.setattr(name, lambda self: None)
        patch.setattr("data.work.Worker.__exit__", lambda self, *_: self._stopped.set())
        with pytest.raises(Killed):
            work(recipe, run, engine)
    for beat in (run.root / "work" / "workers").glob("*.beat"):
        os.utime(beat, (1.0, 1.0))


def test_what_a_killed_worker_had_is_committed_or_continued(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten requests: three finished and not committed, four half said, three not begun."""
    kill(changed(recipe, segment_traces=100), run, Dying(3, 4), monkeypatch)
    assert read_ledger(run).completed == 0
    second = Scripted()
    assert work(recipe, run, second) == 7
    prefixes = [len(request.prefix_ids) for request in second.requests]
    assert sorted(prefixes) == [0, 0, 0, 3, 3, 3, 3] and prefixes[:4] == [3, 3, 3, 3]
    assert all(request.max_tokens == recipe.generate.sampling.max_tokens for request in second.requests)
    ledger = read_ledger(run)
    assert (ledger.completed, ledger.superseded, ledger.pending) == (10, 0, 0)
    assert {trace.raw_text for trace in traces(run)} == {"Hm.</think>5"}
    assert sorted(trace.attempt for trace in traces(run)) == [1] * 3 + [2] * 7


class Served(Scripted):
    """As if behind a server: a reply is kept as bytes before it is read, and "{" cannot be read."""

    def __init__(self, replies: list[bytes], *, dies: bool = False) -> None:
        super().__init__()
        self.replies, self.dies = iter(replies), dies

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        assert handout is not None
        for request in requests:
            self.requests.append(request)
            while (raw := next(self.replies, None)) is not None:
                handout.keep(request.request_id, raw)
                if raw != b"{":
                    break
            if raw is None and self.dies:
                raise Killed
            if not self.dies:
                yield self.read(request, raw or b"{}")

    def read(self, request: Request, raw: bytes) -> Completion:
        if raw == b"{":
            return Completion(request.request_id, (), (), "abort", 1.0, 0.5, error="bad_reply")
        return Completion(request.request_id, self.ids, (), "stop", 1.0, 0.5, cost=0.25)


def test_a_reply_that_was_paid_for_is_committed_and_one_that_cannot_be_read_is_asked_again_and_kept(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first worker has two good replies, one after a bad one, and a bad one, none of them read, when it is killed."""
    kill(recipe, run, Served([b"{1}", b"{", b"{2}", b"{"], dies=True), monkeypatch)
    second = Served([b"{3}"] * 8)
    assert work(recipe, run, second) == 8 and len(second.requests) == 8
    assert sorted(trace.raw for trace in traces(run)) == sorted([b"{1}", b"{{2}", b"{{3}", *[b"{3}"] * 7])
    assert {trace.cost for trace in traces(run)} == {0.25}


def test_what_another_model_said_is_asked_again_and_stays_out_of_the_trace(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"engine": HttpEngine()})})

    class Impostor(Served):
        def remember_in(self, folder: Path) -> None: ...

        def price(self, prompt_tokens: int, output_tokens: int) -> float:
            return 0.01 * output_tokens

        def read(self, request: Request, raw: bytes) -> Completion:
            if raw == b"{other}":
                return Completion(request.request_id, (), (), "abort", 1.0, 0.5, error=OTHER_MODEL, cost=0.5)
            return super().read(request, raw)

    kill(served, run, Impostor([b"{other}"], dies=True), monkeypatch)
    second = Impostor([b"{ours}"] * 10)
    assert work(served, run, second) == 10
    assert {trace.raw for trace in traces(run)} == {b"{ours}"}
    assert sorted(trace.cost for trace in traces(run)) == [0.25] * 9 + [0.75]


def test_what_a_stream_said_before_its_worker_was_killed_is_paid_for(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No reply was ever kept of it, and the server bills it all the same."""
    served = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"engine": HttpEngine()})})

    class Priced(Dying):
        def remember_in(self, folder: Path) -> None: ...

        def price(self, prompt_tokens: int, output_tokens: int) -> float:
            assert prompt_tokens > 0
            return 0.01 * output_tokens

    kill(served, run, Priced(0, 4), monkeypatch)
    second = Scripted(cost=1.0)
    second.price = lambda prompt_tokens, output_tokens: 0.01 * output_tokens  # type: ignore[attr-defined]
    second.remember_in = lambda folder: None  # type: ignore[attr-defined]
    assert work(served, run, second) == 10
    assert sorted(trace.cost for trace in traces(run)) == [1.0] * 6 + [1.03] * 4


def test_a_worker_that_wakes_after_the_others_have_sealed_ends_in_order(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cleared it away; what it had in hand is committed beside the seal, and in nobody's view."""
    quick = changed(recipe, lease_ttl_s=0.2)

    class Sleeper(Scripted):
        def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
            source = iter(requests)
            request = next(source)
            folder = WorkFolder(run.root / "work")
            for beat in folder.workers.glob("*.beat"):
                os.utime(beat, (1.0, 1.0))
            clear(folder, ttl_s=30.0)
            yield Completion(request.request_id, self.ids, tuple(-0.5 for _ in self.ids), "stop", 1.0, 0.5)
            self.requests = [*source]

    sleeper = Sleeper()
    monkeypatch.setattr("data.work.Worker._keep_beating", lambda self: None)
    assert work(quick, run, sleeper) == 1
    assert len(sleeper.requests) < 9 and read_ledger(run).completed == 1


def test_a_lease_whose_holder_lives_is_left_alone(recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    kill(recipe, run, Dying(0, 4), monkeypatch)
    for beat in (run.root / "work" / "workers").glob("*.beat"):
        os.utime(beat)
    held = len(list((run.root / "work" / "leases").iterdir()))
    assert held >= 4 and work(recipe, run, Scripted()) == 10 - held
    assert read_ledger(run).pending == held


def test_what_others_did_while_a_worker_stood_still_is_not_asked_again(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped for longer than the time to live, as a whole node is when its file server hangs: another worker takes over and
    ends the run; of what was queued nothing is asked, and what was in hand is superseded."""
    quick = changed(recipe, lease_ttl_s=0.2)

    class Stopped(Scripted):
        def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
            for number, completion in enumerate(super().generate(requests, handout)):
                yield completion
                if number == 0:
                    time.sleep(0.5)
                    assert work(quick, run, Scripted()) >= 9

    monkeypatch.setattr("data.work.Worker._keep_beating", lambda self: None)
    stopped = Stopped()
    work(quick, run, stopped)
    ledger = read_ledger(run)
    assert len(stopped.requests) == 1 and (ledger.completed, ledger.superseded) == (10, 1)


def test_a_commit_that_failed_is_not_tried_again_by_a_worker_that_goes_down(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written beside the traces is there already; the next worker commits them from the journal."""
    tries = list[int]()

    def full(*_: object, **__: object) -> None:
        tries.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("generate.writer.commit_segment", full)
        work(recipe, run, Scripted())
    assert len(tries) == 1
    second = Scripted()
    assert work(recipe, run, second) == 6 and read_ledger(run).pending == 0


def test_what_a_worker_leaves_is_taken_up_by_one_that_had_found_nothing_free(
    recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tail of a run: while one worker's last requests are answered, the other one dies."""

    class Patient(Scripted):
        def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
            source = iter(requests)
            self.requests = [*source]
            left = 10 - len(self.requests)
            while len(self.requests) < 10:
                time.sleep(0.05)
                self.requests += source
            assert left >= 4
            for request in self.requests:
                yield Completion(request.request_id, self.ids, tuple(-0.5 for _ in self.ids), "stop", 1.0, 0.5)

    monkeypatch.setattr("generate.worker.LOOK_AGAIN_S", 0.1)
    quick = changed(recipe, lease_ttl_s=1.0)
    kill(quick, run, Dying(0, 4), monkeypatch)
    for beat in (run.root / "work" / "workers").glob("*.beat"):
        os.utime(beat)
    assert work(quick, run, Patient()) == 10


def test_a_worker_that_ends_in_order_leaves_nothing_but_its_facts(recipe: Recipe, run: RunFolder) -> None:
    work(recipe, run, Scripted())
    left = [path.suffix for path in (run.root / "work").rglob("*") if path.is_file()]
    assert sorted(left) == [".json", ".json"]  # who it was, and what all workers have in common


def test_a_drain_journals_what_is_half_said_and_exits_resumable(recipe: Recipe, run: RunFolder) -> None:
    class Signalled(Dying):
        def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
            assert handout is not None
            source = iter(requests)
            request = next(source)
            yield Completion(request.request_id, self.ids, tuple(-0.5 for _ in self.ids), "stop", 1.0, 0.5)
            request = next(source)
            signal.raise_signal(signal.SIGUSR2)
            assert handout.stop() and next(source, None) is None, "nothing is asked any more"
            handout.take(Partial(request.request_id, self.ids[:3], (-0.5, -0.5, -0.5)))

    with pytest.raises(Interrupted, match="stopped by SIGUSR2"):
        work(recipe, run, Signalled(1, 1))
    assert read_ledger(run).completed == 1
    again = Scripted()
    assert work(recipe, run, again) == 9  # at once: nobody has to wait for a lease to grow old
    assert [len(request.prefix_ids) for request in again.requests] == [3] + [0] * 8
    assert sorted(trace.attempt for trace in traces(run)) == [1] * 9 + [2]


# --- bounds ------------------------------------------------------------------------------------------------------


def test_gpus_of_our_own_are_paid_while_their_worker_lives(recipe: Recipe, run: RunFolder) -> None:
    """Loading the teacher, and what a kill lost: traces are charged with neither."""
    facts = {"a": {"started_at": 0.0, "seen_at": 100.0, "price_per_second": 0.01}, "b": {"started_at": 50.0, "seen_at": 150.0}}
    assert spent(0.4, 7, others(facts, [])) == (1.0, 7, 150 / 3600)
    assert spent(1.5, 7, others(facts, [])).cost == 1.5
    priced = {"teacher.hardware": {"gpu": "h200", "gpus_per_node": 1}, "plan.price_per_gpu_hour": 3600.0}
    paid = load_recipe("embedded", [f"{key}={json.dumps(value)}" for key, value in priced.items()]).recipe
    paid = paid.model_copy(update={"teacher": paid.teacher.model_copy(update={"engine": LocalEngine()})})

    class Loading(Scripted):
        def load(self) -> None:
            time.sleep(0.3)

    assert work(changed(paid, samples_per_prompt=2, budget=Budget(max_cost=0.2)), run, Loading()) == 0


@pytest.mark.parametrize("budget", [Budget(max_tokens=20), Budget(max_cost=0.25)])
def test_a_budget_stops_admission_and_leaves_the_rest_pending(recipe: Recipe, run: RunFolder, budget: Budget) -> None:
    """Six tokens and ten cents an answer: the first three or four are asked before either limit is seen to be reached."""
    engine = Scripted(cost=0.1)
    finished = work(changed(recipe, budget=budget, segment_traces=1), run, engine)
    ledger = read_ledger(run)
    assert finished == ledger.completed in (3, 4) and ledger.pending == 10 - finished
    assert sum(trace.cost for trace in traces(run)) == pytest.approx(0.1 * finished)


def test_what_a_dead_worker_had_in_hand_is_in_no_budget(recipe: Recipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It will be committed by whoever takes it up; counted with every death it would end the run early, and for good."""
    kill(changed(recipe, segment_traces=100), run, Dying(3, 4), monkeypatch)
    assert work(changed(recipe, budget=Budget(max_tokens=61)), run, Scripted()) == 7
    assert read_ledger(run).pending == 0


def test_failed_requests_are_asked_again_only_when_told_to(recipe: Recipe, run: RunFolder) -> None:
    work(recipe, run, Scripted(fails_to_answer=3))
    assert read_ledger(run).failed_by_reason == {"busy": 3}
    assert work(recipe, run, Scripted()) == 0
    assert work(changed(recipe, retry_failed=True), run, Scripted()) == 3
    ledger = read_ledger(run)
    assert (ledger.completed, ledger.failed, ledger.superseded) == (10, 0, 3)
    assert work(changed(recipe, retry_failed=True), run, Scripted()) == 0
    assert {trace.finish_reason for trace in traces(run)} == {"stop"}


def test_a_prompts_own_budget_is_at_most_the_recipes(recipe: Recipe, tmp_path: Path) -> None:
    limits = [0, 7, 10**6]
    prompts = [dataclasses.replace(prompt(f"What is {limit}?"), max_tokens=limit, reasoning_budget=3) for limit in limits]
    run = new_run(tmp_path, prompts, requests=6)
    engine = Scripted()
    work(recipe, run, engine)
    most = recipe.generate.sampling.max_tokens
    assert sorted(request.max_tokens for request in engine.requests) == [7, 7, most, most, most, most]
    assert {request.reasoning_budget for request in engine.requests} == {3}
    assert {trace.max_tokens for trace in traces(run)} == {7, most}
