"""Expert telemetry of a run: committed with its traces, counted once whatever was killed, and told to whoever watches."""

import dataclasses
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from configs.load import load_recipe
from configs.schema import ExpertAlarm, Recipe, Teacher
from data.engine import Completion, ExpertLoad, Handout, Request
from data.expert_counts import TaskCounts, from_counts_table, whole_run
from data.expert_figures import from_load_table, layer_loads
from data.prompt_set import write_prompts
from data.records import Trace
from data.schema import from_table
from data.store import RunFolder, read_first_copies, read_segment, read_table, seal, segments, sha256_file
from generate import tracking
from generate.telemetry import ExpertTally, write_expert_load
from generate.tracking import Target, mirror_expert_load
from generate.worker import generate_traces
from teacher.folders import EMBEDDED
from teacher.local_engine import LocalEngine
from tests.generate.test_worker import TOKENIZER, prompt
from tests.train.test_tracking import offline_rows

TOP_K = 2  # experts a token, of the embedded teacher


class Fails(LocalEngine):
    """The embedded teacher, whose machine is lost before it hands over its n-th completion."""

    def __init__(self, before: int) -> None:
        super().__init__(EMBEDDED, batch_size=3)
        self.before = before

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        for index, completion in enumerate(super().generate(requests, handout)):
            if index == self.before:
                raise RuntimeError("power cut")
            yield completion


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    changes = ["generate.segment_traces=3", "generate.samples_per_prompt=2", "generate.sampling.max_tokens=10"]
    return load_recipe("embedded", changes).recipe


def new_run(folder: Path) -> RunFolder:
    """Ten requests of two tasks."""
    run = RunFolder(folder)
    tasks = ("sums", "sums", "sums", "words", "words")
    prompts = [dataclasses.replace(prompt(f"What is {index}?"), task=task) for index, task in enumerate(tasks)]
    path = write_prompts(run, prompts)
    run.config.touch()
    seal(run, run.prompts, stage="prompts", fingerprint="f", inputs={}, files=[path], counts={"requests": 10}, seconds=0.0)
    return run


def work(recipe: Recipe, run: RunFolder, engine: LocalEngine) -> None:
    generate_traces(recipe, run, engine, TOKENIZER, "teacher", report=lambda count: None)


def written(run: RunFolder, teacher: Teacher) -> list[TaskCounts]:
    path, _ = write_expert_load(run, teacher).files
    return from_counts_table(read_table(path, sha256=sha256_file(path)))


def by_task(found: Iterable[TaskCounts]) -> dict[str, tuple[int, list[list[int]]]]:
    groups = {one.task: [other for other in found if other.task == one.task] for one in found}
    return {task: (sum(one.tokens for one in parts), whole_run(parts).tolist()) for task, parts in groups.items()}


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = new_run(tmp_path_factory.mktemp("undisturbed"))
    work(recipe, run, LocalEngine(EMBEDDED, batch_size=3))
    return run


def test_every_layer_counts_each_token_of_the_traces_once(recipe: Recipe, undisturbed: RunFolder) -> None:
    """Prompt and output of each trace, the last token left out, at two experts in every layer."""
    traces = [trace for table in read_first_copies(undisturbed.traces) for trace in from_table(table, Trace)]
    found = by_task(written(undisturbed, recipe.teacher))
    for task, (tokens, counts) in found.items():
        fed = sum(len(turn.token_ids) for trace in traces if trace.task == task for turn in trace.turns)
        assert tokens == fed - sum(trace.task == task for trace in traces), task
        assert {sum(layer) for layer in counts} == {TOP_K * tokens}, task
    assert found.keys() == {"sums", "words"}


def test_each_segment_names_the_counts_of_its_own_traces(undisturbed: RunFolder) -> None:
    for segment in segments(undisturbed.traces):
        fact = segment.facts["expert_counts"]
        counts = from_counts_table(read_table(undisturbed.root / fact["file"], sha256=fact["sha256"]))
        fed = sum(len(turn.token_ids) for trace in from_table(read_segment(segment), Trace) for turn in trace.turns)
        assert sum(one.tokens for one in counts) == fed - segment.rows


@pytest.mark.parametrize("before", [4, pytest.param(1, marks=pytest.mark.long), pytest.param(8, marks=pytest.mark.long)])
def test_a_run_that_was_cut_off_and_resumed_has_the_counts_of_one_that_was_not(
    recipe: Recipe, undisturbed: RunFolder, tmp_path: Path, before: int
) -> None:
    """Three slots and segments of three: some cuts lose finished traces, and rows that finished in the same pass."""
    run = new_run(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        work(recipe, run, Fails(before))
    work(recipe, run, LocalEngine(EMBEDDED, batch_size=5))
    assert by_task(written(run, recipe.teacher)) == by_task(written(undisturbed, recipe.teacher))


def test_counts_saved_for_a_segment_that_never_came_are_not_read(recipe: Recipe, undisturbed: RunFolder) -> None:
    before = by_task(written(undisturbed, recipe.teacher))
    tally = ExpertTally()
    tally.tasks["sums"] = TaskCounts("sums", 5, np.full((3, 16), 9))
    assert tally.save(undisturbed, "killed") and tally.save(undisturbed, "killed") == {}
    assert by_task(written(undisturbed, recipe.teacher)) == before


def test_figures_know_the_ranks_of_the_layout(recipe: Recipe, undisturbed: RunFolder) -> None:
    _, path = write_expert_load(undisturbed, recipe.teacher).files
    rows = from_load_table(read_table(path, sha256=sha256_file(path)))
    assert {row.expert_parallel for row in rows} == {2} and {row.experts_per_token for row in rows} == {TOP_K}
    assert [(row.task, row.layer) for row in rows[:4]] == [(None, 0), (None, 1), (None, 2), ("sums", 0)]


def test_a_collapse_is_one_warning_and_no_error(recipe: Recipe, undisturbed: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    assert write_expert_load(undisturbed, recipe.teacher).alarms == [] and caplog.text == ""
    alarm = ExpertAlarm(max_over_mean=1.01, effective_share=0.999, dead_share=0.9, minimum_mean_load=1)
    alarms = write_expert_load(undisturbed, recipe.teacher.model_copy(update={"experts": alarm})).alarms
    assert len(alarms) == 6 and len(caplog.records) == 1  # three layers, two figures
    said = caplog.records[0].getMessage()
    assert said.startswith("expert load looks collapsed: sparse layer 0: max_over_mean ") and "; and 3 more" in said
    assert "above 1.01" in said and "below 0.999" in said and "\n" not in said


def test_a_teacher_that_nobody_counts_has_no_telemetry(recipe: Recipe, tmp_path: Path) -> None:
    tally, run = ExpertTally(), RunFolder(tmp_path)
    request = Request("r", (1, 2), (), 5, 1.0, 1.0, 0)
    tally.add(request, Completion("r", (3,), (0.0,), "length", 0.0, 0.0))
    tally.add(request, Completion("r", (3,), (0.0,), "length", 0.0, 0.0, ExpertLoad(1.0, 1.0, ())))  # a server's summary
    assert tally.save(run, "w") == {} and write_expert_load(run, recipe.teacher) == ([], [], [])


# --- W&B ---------------------------------------------------------------------------------------------------------

ROWS = layer_loads(
    [TaskCounts("facts/metals", 4, np.array([[4, 4], [8, 0]])), TaskCounts("sums", 4, np.array([[4, 4], [0, 8]]))], 1
)


def test_the_figures_are_in_wandb_a_row_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(tracking, "WANDB_TIMEOUT_S", 120.0)  # a crowded machine may need longer than a run should wait
    mirror_expert_load(ROWS, Target(tmp_path, "offline", "test", "tiny"))
    rows = offline_rows(tmp_path)
    assert [row["experts/layer"] for row in rows] == [0, 1]
    assert [row["experts/all tasks/max_over_mean"] for row in rows] == [1.0, 1.0]
    assert [row["experts/facts/metals/max_over_mean"] for row in rows] == [1.0, 2.0]
    assert rows[1]["experts/sums/divergence_nats"] == pytest.approx(np.log(2)) and "experts/sums/drift_nats" not in rows[1]


@pytest.mark.long
def test_a_stalled_wandb_costs_its_time_limit_and_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr(tracking, "WANDB_TIMEOUT_S", 15.0)
        started = time.monotonic()
        mirror_expert_load(ROWS, Target(tmp_path, "online", "test", "tiny"))
        assert 15 <= time.monotonic() - started < 25
        silent.settimeout(0)
        silent.accept()[0].close()  # it did get as far as asking
    assert "W&B stopped: not done within 15 s; metrics/expert_load.arrow is complete" in caplog.text


def test_a_disabled_mirror_starts_nothing(tmp_path: Path) -> None:
    mirror_expert_load(ROWS, Target(tmp_path, "disabled", "test", "tiny"))
    assert not list(tmp_path.iterdir())
