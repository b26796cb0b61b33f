"""Who else is at a run: another node's part of the stage, whoever sealed before we had done, prompts that changed meanwhile; and
what the progress line says of failures."""

import io
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import Interrupted, UnusableInput
from configs.launch import Nodes
from configs.load import load_recipe
from configs.progress import Count, file_reporter, read_counts
from data.engine import Completion, Handout, Request
from data.ledger import read_ledger
from data.prompt_set import write_prompts
from data.run_config import open_run
from data.stage import Context, exclusive, run_stage
from data.store import ROLLUP, Rollup, RunFolder, read_rollup, seal, segments
from data.work import WorkFolder
from generate.launch import join_generation, launch, teacher_fingerprint, unseal_for_retry, unseal_if_grown, wait_for_others
from generate.stages import GENERATE, PROMPTS
from generate.worker import generate_traces
from teacher.folders import EMBEDDED
from tests.generate.test_worker import TOKENIZER, Dying, Scripted, kill, prompt, work

BASE = ("generate.segment_traces=4", "generate.samples_per_prompt=2", "train.wandb=disabled")
REQUESTS = 10
HERE = Nodes(2, 1, "localhost:29500", "tracestill")
"""The second of two nodes."""


def context_of(root: Path, *overrides: str) -> Context:
    loaded = load_recipe("embedded", [*BASE, *overrides])
    return Context(loaded, open_run(loaded, root), str(loaded.path), tuple(overrides), Console(file=io.StringIO()))


def seal_prompts(run: RunFolder) -> None:
    path = write_prompts(run, [prompt(f"What is {index}?") for index in range(REQUESTS // 2)])
    counts = {"requests": REQUESTS}
    seal(run, run.prompts, stage="prompts", fingerprint="f", inputs={}, files=[path], counts=counts, seconds=0.0)


def seal_traces(run: RunFolder) -> Rollup:
    files = [path for segment in segments(run.traces) for path in (segment.path, segment.path.with_suffix(".json"))]
    return seal(run, run.traces, stage="generate", fingerprint="f", inputs={}, files=files, counts={}, seconds=0.0)


def answer(context: Context, engine: Scripted | None = None) -> int:
    """As a worker of this run does, with a teacher that says what it is told to."""
    return work(context.recipe, context.run, engine or Scripted(), teacher=teacher_fingerprint(context))


@pytest.fixture
def join(tmp_path: Path) -> Callable[..., Context]:
    """A run over two nodes, whose prompts are there; called once more, the same folder under other overrides."""

    def at(*overrides: str) -> Context:
        context = context_of(tmp_path / "run", "teacher.hardware.nodes=2", *overrides)
        if read_rollup(context.run.prompts) is None:
            seal_prompts(context.run)
        return context

    return at


# --- another node ------------------------------------------------------------------------------------------------


Started = list[tuple[list[str], Path, Nodes | None]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """This process is of the second node. Instead of ranks, whose rendezvous would be waited for: what they would be given."""
    calls: Started = []
    for name, value in {"NODES": "2", "RENDEZVOUS": HERE.rendezvous, "NODE_RANK": "1"}.items():
        monkeypatch.setenv(f"TRACESTILL_{name}", value)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr("generate.launch.run_ranks", lambda words, *, log, nodes, **_: calls.append((list(words), log, nodes)))
    return calls


def test_another_node_starts_its_ranks_beside_the_first_and_seals_nothing(join: Callable[..., Context], started: Started) -> None:
    context = join()
    before = sorted(context.run.root.rglob("*"))
    join_generation(context)
    assert started == [(context.words("generate"), context.run.logs / "generate.n1.log", HERE)]
    assert sorted(context.run.root.rglob("*")) == before


def test_another_node_of_a_run_that_is_answered_has_nothing_to_do(join: Callable[..., Context], started: Started) -> None:
    """As the first node, which reads the same ledger and starts no ranks either. What failed is something to do when asked."""
    context = join()
    answer(context, Scripted(fails_to_answer=3))
    assert read_ledger(context.run).failed == 3
    join_generation(context)
    assert started == []
    join_generation(join("generate.retry_failed=true"))
    assert len(started) == 1


def edit_code(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generate.identity.source_fingerprint", lambda: "edited")


def edit_prompts(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    seal_prompts(context.run)


def edit_teacher(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another template, in a folder that has the same name."""
    template = Path(context.recipe.teacher.model) / "chat_template.jinja"
    template.write_text(template.read_text() + " ")


@pytest.mark.parametrize(("name", "edit"), [("code", edit_code), ("prompts", edit_prompts), ("teacher", edit_teacher)])
def test_another_node_with_something_else_is_refused_before_it_starts_a_rank(
    name: str,
    edit: Callable[[Context, pytest.MonkeyPatch], None],
    join: Callable[..., Context],
    started: Started,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first node says so too; ranks of this one would meet those of nobody, and wait ten minutes for them."""
    shutil.copytree(EMBEDDED, tmp_path / "teacher")
    context = join(f"teacher.model={tmp_path / 'teacher'}")
    answer(context, Scripted(stops_after=4))
    join_generation(context)
    assert len(started) == 1, "as it was begun, it may go on"
    edit(context, monkeypatch)
    before = sorted(context.run.root.rglob("*"))
    with pytest.raises(UnusableInput, match=f"this worker's {name} is not the one that began the run"):
        join_generation(context)
    assert len(started) == 1 and sorted(context.run.root.rglob("*")) == before


def test_another_node_starts_no_rank_of_a_run_whose_budget_is_spent(join: Callable[..., Context], started: Started) -> None:
    """Four answers of six tokens; a limit of one token more lets it in."""
    answer(join(), Scripted(stops_after=4))
    with pytest.raises(Interrupted, match=r"generate.budget.max_tokens 24 is reached .*6 requests stay pending") as raised:
        join_generation(join("generate.budget.max_tokens=24"))
    assert raised.value.exit_code == 75 and started == []
    join_generation(join("generate.budget.max_tokens=25"))
    assert len(started) == 1


def test_another_node_leaves_a_sealed_trace_alone_that_was_changed(join: Callable[..., Context], started: Started) -> None:
    """A run is opened again for what failed; what a damaged byte said before must not be asked anew and sealed over."""
    answer(join(), Scripted(fails_to_answer=3))
    context = join("generate.retry_failed=true")
    seal_traces(context.run)
    damaged = segments(context.run.traces)[0].path
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    with pytest.raises(UnusableInput, match=f"{damaged.name}: sha256 .* expected .* by the generate stage"):
        join_generation(context)
    assert started == [] and (context.run.traces / ROLLUP).is_file()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TRACESTILL_RENDEZVOUS", None, "no rendezvous in the environment"),
        ("TRACESTILL_NODES", "3", "TRACESTILL_NODES=3; expected 2"),
        ("TRACESTILL_NODE_RANK", "2", "says which node this is; expected 0..1"),
    ],
)
def test_a_node_that_does_not_know_its_place_starts_nothing(
    variable: str,
    value: str | None,
    message: str,
    join: Callable[..., Context],
    started: Started,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(variable)
    if value is not None:
        monkeypatch.setenv(variable, value)
    with pytest.raises(UnusableInput, match=message):
        join_generation(join())
    assert started == []


def test_a_canary_in_the_recipe_is_refused_on_every_node(join: Callable[..., Context], started: Started) -> None:
    with pytest.raises(UnusableInput, match=r"a canary is asked with --canary 0\.5; leave it out"):
        join_generation(join("generate.canary.share=0.5"))
    assert started == []


# --- sealed by somebody who had not seen all -----------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Context:
    """One node, one process, and told to ask again what failed."""
    context = context_of(tmp_path / "run", "teacher.engine={type: local}", "generate.retry_failed=true")
    seal_prompts(context.run)
    return context


def test_a_seal_that_names_every_segment_stands(alone: Context) -> None:
    unseal_if_grown(alone.run)  # nothing is sealed, and nothing there
    answer(alone)
    unseal_if_grown(alone.run)
    seal_traces(alone.run)
    before = (alone.run.traces / ROLLUP).read_bytes()
    unseal_if_grown(alone.run)
    assert (alone.run.traces / ROLLUP).read_bytes() == before


def test_a_seal_that_misses_a_segment_goes_and_the_segments_stay(alone: Context) -> None:
    answer(alone, Scripted(fails_to_answer=3))
    seal_traces(alone.run)
    assert answer(alone) == 3 and read_ledger(alone.run).failed == 3, "beside the seal, and in nobody's view"
    before = {path: path.read_bytes() for path in alone.run.traces.iterdir() if path.name != ROLLUP}
    unseal_if_grown(alone.run)
    assert {path: path.read_bytes() for path in alone.run.traces.iterdir()} == before
    ledger = read_ledger(alone.run)
    assert (ledger.completed, ledger.failed, ledger.superseded) == (REQUESTS, 0, 3)


def test_nobody_unseals_while_another_process_is_sealing(alone: Context) -> None:
    answer(alone, Scripted(fails_to_answer=3))
    seal_traces(alone.run)
    answer(alone)
    waiting = threading.Thread(target=unseal_if_grown, args=(alone.run,))
    with exclusive(alone.run, "generate"):
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and (alone.run.traces / ROLLUP).is_file()
        (alone.run.traces / ROLLUP).unlink()
        seal_traces(alone.run)
    waiting.join(10)
    assert not waiting.is_alive() and (alone.run.traces / ROLLUP).is_file(), "the new seal names everything"


def test_what_we_asked_again_is_in_the_seal_though_another_process_sealed_before_our_commit(
    alone: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes were told to ask again what failed. The other one finds all of it leased, asks nothing and seals."""
    answer(alone, Scripted(fails_to_answer=3))
    seal_traces(alone.run)

    class Overtaken(Scripted):
        def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
            for completion in super().generate(requests, handout):
                if len(self.requests) == 1:
                    seal_as_the_stage_does(alone)
                yield completion

    monkeypatch.setattr("teacher.engines.open_engine", lambda teacher: Overtaken())
    unseal_for_retry(alone)
    rollup = run_stage(GENERATE, alone)
    sealed = {Path(path).name for path in rollup.files}
    assert {path.name for path in alone.run.traces.glob("*.arrow")} <= sealed
    assert (rollup.counts["completed"], rollup.counts["superseded"], read_ledger(alone.run).failed) == (REQUESTS, 3, 0)


def seal_as_the_stage_does(context: Context) -> None:
    """Under the stage's own identity and inputs, so that it would be taken for complete."""
    run_stage(replace(GENERATE, together=None, admit=lambda context: None), context)


def test_two_processes_that_open_a_sealed_run_again_at_once_do_not_trip_over_each_other(
    alone: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ledger of a million traces is read for seconds, and meanwhile the other one has unsealed."""
    answer(alone, Scripted(fails_to_answer=3))
    seal_traces(alone.run)

    def slow(run: RunFolder) -> object:
        found = read_ledger(run)
        (run.traces / ROLLUP).unlink()  # the other process
        return found

    monkeypatch.setattr("generate.launch.read_ledger", slow)
    unseal_for_retry(alone)
    assert not (alone.run.traces / ROLLUP).exists()


# --- prompts that changed ------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path) -> Callable[[str], Context]:
    """The real prompts stage, over a file of tasks that has one question for each letter."""
    (tmp_path / "recipe.yaml").write_text(
        "name: asked\nteacher: {engine: {type: local}}\n"
        "generate: {prompts: [{type: jsonl, path: tasks.jsonl}], samples_per_prompt: 1, segment_traces: 4}\n"
    )
    loaded = load_recipe(str(tmp_path / "recipe.yaml"))

    def with_questions(letters: str) -> Context:
        rows = [{"question": f"What is {letter}?", "answer": "4", "verifier": "exact", "split": "train"} for letter in letters]
        (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
        run = open_run(loaded, tmp_path / "run")
        return Context(loaded, run, str(loaded.path), (), Console(file=io.StringIO()))

    return with_questions


def test_a_prompt_set_may_change_for_as_long_as_nothing_was_answered(asked: Callable[[str], Context]) -> None:
    assert run_stage(PROMPTS, asked("abc")).counts["train"] == 3
    assert run_stage(PROMPTS, asked("abcd")).counts["train"] == 4
    assert answer(asked("abcd")) == 4


def test_a_prompt_set_that_has_traces_does_not_change(asked: Callable[[str], Context]) -> None:
    run_stage(PROMPTS, context := asked("abc"))
    answer(context)
    before = {path: path.read_bytes() for path in context.run.root.rglob("*") if path.is_file()}
    with pytest.raises(UnusableInput, match="there are traces of the one before; restore its sources and files, or use another"):
        run_stage(PROMPTS, asked("abcd"))
    assert {path: path.read_bytes() for path in context.run.root.rglob("*") if path.is_file()} == before
    run_stage(PROMPTS, asked("abc"))
    assert answer(asked("abc")) == 0, "with its sources restored the run is what it was"


def test_a_prompt_set_that_lost_a_file_is_not_made_anew_under_its_traces(asked: Callable[[str], Context]) -> None:
    """The same sources may be worded otherwise by another release: restored, not made again."""
    run_stage(PROMPTS, context := asked("abc"))
    answer(context)
    (context.run.prompts / "prompts.arrow").unlink()
    with pytest.raises(UnusableInput, match="has changed or is damaged"):
        run_stage(PROMPTS, asked("abc"))


def test_a_prompt_set_does_not_change_under_answers_that_are_only_journalled(
    asked: Callable[[str], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paid for, and not committed yet when their worker was killed: the same prompts commit them, others never would."""
    run_stage(PROMPTS, context := asked("abc"))
    kill(context.recipe, context.run, Dying(2, 0), monkeypatch)
    assert not list(context.run.traces.glob("*.json"))
    with pytest.raises(UnusableInput, match="there are traces of the one before"):
        run_stage(PROMPTS, asked("abcd"))
    run_stage(PROMPTS, asked("abc"))
    second = Scripted()
    assert work(context.recipe, context.run, second) == 1 and len(second.requests) == 1
    assert read_ledger(context.run).completed == 3


def test_a_prompt_set_changes_under_a_worker_that_never_got_an_answer(asked: Callable[[str], Context]) -> None:
    """It found its weights missing, say. What it wrote of itself is no reason to refuse those who come after it."""
    run_stage(PROMPTS, context := asked("abc"))
    answer(context, Scripted(stops_after=0))
    assert WorkFolder.of(context.run).identity.is_file()
    run_stage(PROMPTS, context := asked("abcd"))
    assert answer(context) == 4


def test_a_prompt_set_does_not_change_under_a_worker_that_is_alive(asked: Callable[[str], Context]) -> None:
    """It has the old one in hand, and loads its teacher for a quarter of an hour."""
    run_stage(PROMPTS, context := asked("abc"))

    class Loading(Scripted):
        def load(self) -> None:
            with pytest.raises(UnusableInput, match="workers are at the one before"):
                run_stage(PROMPTS, asked("abcd"))

    assert answer(context, Loading()) == 3


# --- failures in the progress line -----------------------------------------------------------------------------------


def test_the_progress_line_counts_what_failed_and_each_kind_is_a_warning_once(
    alone: Context, caplog: pytest.LogCaptureFixture
) -> None:
    counts: list[Count] = []
    engine, teacher = Scripted(fails_to_answer=3), teacher_fingerprint(alone)
    with caplog.at_level(logging.WARNING, "generate.worker"):
        generate_traces(alone.recipe, alone.run, engine, TOKENIZER, teacher, report=counts.append)
    said = [count.remark.partition(", ")[2] for count in counts]
    assert said == ["", "1 failed", "2 failed", *["3 failed"] * 8]
    assert counts[-1].done == REQUESTS and counts[-1].remark.endswith(" tokens/s, 3 failed")
    (warned,) = (record.getMessage() for record in caplog.records)
    assert f"{engine.requests[0].request_id} failed: busy; more of these are counted" in warned


def test_a_worker_whose_requests_are_all_answered_says_nothing_of_failures(alone: Context) -> None:
    counts: list[Count] = []
    generate_traces(alone.recipe, alone.run, Scripted(), TOKENIZER, teacher_fingerprint(alone), report=counts.append)
    assert not [count for count in counts if "failed" in count.remark]


def test_prompts_that_are_read_for_minutes_are_a_sign_of_life(alone: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said meanwhile; between its passes the engine asks whether to stop."""
    monkeypatch.setattr("generate.worker.TELL_S", 0.0)
    counts: list[Count] = []

    class Reading(Scripted):
        def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
            assert handout is not None
            for _ in range(3):
                time.sleep(0.6)
                assert not handout.stop()
            yield from super().generate(requests, handout)

    generate_traces(alone.recipe, alone.run, Reading(), TOKENIZER, teacher_fingerprint(alone), report=counts.append)
    notes = [count.note for count in counts if "reading prompts" in count.note]
    assert len(set(notes)) >= 2 and counts[-1].done == REQUESTS


def test_who_waits_for_others_is_not_silent(alone: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their watchdogs look after them."""
    monkeypatch.setattr("generate.launch.WAIT_S", 0.01)
    counts: list[Count] = []
    waiting = threading.Thread(target=wait_for_others, args=(alone, counts.append))

    class Held(Scripted):
        def load(self) -> None:
            waiting.start()
            time.sleep(0.5)

    assert answer(alone, Held()) == REQUESTS
    waiting.join(30)
    assert not waiting.is_alive()
    assert counts[0] == Count(0, REQUESTS, "1 other workers at the rest") and len(set(counts)) < len(counts)


def test_failures_of_every_rank_are_in_the_line_that_their_launcher_shows(tmp_path: Path) -> None:
    """Ranks tell by files; the first one's requests may be the only ones that are answered."""
    paths = [tmp_path / "r0", tmp_path / "r1", tmp_path / "r2"]
    assert read_counts(paths) is None
    for path, failed in zip(paths, (0, 3, 2), strict=True):
        file_reporter(path)(Count(5, 10, "7 tokens/s", failed, tokens=100))
    found = read_counts(paths)
    assert found is not None and (found.done, found.total, found.remark) == (15, 30, "7 tokens/s, 5 failed")
    assert found.tokens == 300  # of answers that are not whole too: a run of long ones is not silent


def test_a_launcher_shows_the_failures_of_its_workers_beside_what_the_whole_run_has_done(
    alone: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(alone, Scripted(stops_after=4))
    shown: list[Count] = []
    monkeypatch.setattr("teacher.engines.open_engine", lambda teacher: Scripted(fails_to_answer=2))
    launch(alone, shown.append, read_ledger(alone.run))
    assert (shown[-1].done, shown[-1].total, shown[-1].failed) == (REQUESTS, REQUESTS, 2)
