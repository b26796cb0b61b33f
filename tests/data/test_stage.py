"""The runner of stages: skip what is done, refuse what cannot start, seal last."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from rich.console import Console

from configs.errors import Busy, UnusableInput
from configs.load import Loaded, load_recipe
from data.checksum import check_text, checked_text
from data.run_config import first_difference, open_run, settle, without_free
from data.stage import Context, Outcome, Stage, exclusive, is_current, run_stage
from data.store import ROLLUP, RunFolder, commit_segment, read_rollup, seal, segments


@pytest.fixture
def context(tmp_path: Path) -> Context:
    loaded = load_recipe("embedded")
    run = open_run(Loaded(loaded.recipe, loaded.path), tmp_path / "run")
    return Context(loaded, run, "embedded", (), Console(quiet=True))


def stage(calls: list[str], *, depends: tuple[str, ...] = (), value: int = 1, name: str = "one") -> Stage:
    def act(context: Context, show: object) -> Outcome:
        calls.append(name)
        path = context.run.root / name / "made.txt"
        path.write_text(f"{value}")
        return Outcome([path], {"value": value})

    return Stage(name, "things", lambda run: run.root / name, depends, lambda context: {"value": value}, act, lambda context: "")


def test_a_finished_stage_is_not_run_again(context: Context) -> None:
    calls: list[str] = []
    first = run_stage(stage(calls), context)
    assert run_stage(stage(calls), context) == first and calls == ["one"]


def test_another_value_a_missing_file_or_another_input_runs_it_again(context: Context) -> None:
    calls: list[str] = []
    run_stage(stage(calls), context)
    run_stage(stage(calls, value=2), context)
    (context.run.root / "one" / "made.txt").unlink()
    run_stage(stage(calls, value=2), context)
    assert calls == ["one"] * 3
    run_stage(stage(calls, depends=("one",), name="two"), context)
    run_stage(stage(calls, value=3), context)
    run_stage(stage(calls, depends=("one",), name="two"), context)
    assert calls[3:] == ["two", "one", "two"]


def test_a_missing_input_is_named_before_anything_is_made(context: Context) -> None:
    with pytest.raises(UnusableInput, match="run the stage that makes absent/ first"):
        run_stage(stage([], depends=("absent",)), context)
    assert not (context.run.root / "one").exists()


def test_what_other_settings_would_make_is_not_current(context: Context) -> None:
    assert not is_current(stage([]), context)
    run_stage(stage([]), context)
    assert is_current(stage([]), context) and not is_current(stage([], value=2), context)
    assert is_current(stage([], depends=("elsewhere",)), context)  # its input is not to be seen from here


def test_a_stage_that_fails_is_not_sealed_and_its_seconds_still_count(context: Context) -> None:
    def fail(context: Context, show: object) -> Outcome:
        raise RuntimeError("in the middle")

    failing = Stage("one", "things", lambda run: run.root / "one", (), lambda context: {"value": 1}, fail, lambda context: "")
    with pytest.raises(RuntimeError):
        run_stage(failing, context)
    assert read_rollup(context.run.root / "one") is None
    noted = context.run.cache / "one.seconds.json"
    seconds = json.loads(noted.read_text())
    noted.write_text(json.dumps(seconds | {"seconds": 100.0}))
    assert run_stage(stage([]), context).seconds >= 100


def test_what_comes_after_the_seal_is_not_of_the_stage(tmp_path: Path) -> None:
    """A worker that was stopped while the others ended and sealed commits what it has in hand when it wakes."""
    run = RunFolder(tmp_path)
    table = pa.table({"trace_id": ["t"]})
    first = commit_segment(run.traces, table, worker="a", facts={})
    seal(run, run.traces, stage="generate", fingerprint="f", inputs={}, files=[first.path], counts={}, seconds=0.0)
    commit_segment(run.traces, table, worker="b", facts={})
    assert [segment.path for segment in segments(run.traces)] == [first.path]
    (run.traces / ROLLUP).unlink()
    assert len(segments(run.traces)) == 2


def test_a_stage_is_run_by_one_process_at_a_time(context: Context) -> None:
    with (
        exclusive(context.run, "train"),
        pytest.raises(Busy, match="already running here"),
        exclusive(context.run, "train"),
    ):
        pass
    with exclusive(context.run, "train"):
        pass


def test_a_setting_that_came_after_a_run_was_made_is_at_its_default(tmp_path: Path) -> None:
    loaded = load_recipe("embedded")
    run = open_run(loaded, tmp_path / "run")
    said = yaml.safe_load(run.config.read_text())
    del said["recipe"]["train"]["seed"], said["recipe"]["evaluate"]["sampling"]["min_p"]
    run.config.write_bytes(checked_text(yaml.safe_dump(said)))
    (run.root / "prompts").mkdir()
    (run.root / "prompts" / "manifest.json").write_text("{}")  # made something, so that it may not be replaced
    (run.checkpoints / "adapter").mkdir(parents=True)
    assert open_run(loaded, run.root) == run
    with pytest.raises(UnusableInput, match=r"train\.seed = 0, this recipe says 5"):
        open_run(load_recipe("embedded", ["train.seed=5"]), run.root)
    said["recipe"]["train"]["of_another_release"] = 1
    run.config.write_bytes(checked_text(yaml.safe_dump(said)))
    with pytest.raises(UnusableInput, match=r"another release wrote it: .*train\.of_another_release"):
        open_run(loaded, run.root)


def test_the_first_difference_is_a_dotted_key() -> None:
    assert first_difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}) == ("a.b.1", 2, 3)
    assert first_difference({"a": 1}, {"a": 1}) is None
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == ("b", None, 2)


def test_a_folder_that_is_no_run_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("something: else\n")
    with pytest.raises(UnusableInput, match="not a configuration written by tracestill"):
        open_run(load_recipe("embedded"), tmp_path / "run")


def test_a_byte_changed_in_a_finished_stage_is_named_and_not_skipped_over(context: Context) -> None:
    run_stage(stage([]), context)
    made = context.run.root / "one" / "made.txt"
    made.write_text("2")
    with pytest.raises(UnusableInput, match=r"made\.txt: sha256 .* expected"):
        run_stage(stage([]), context)


def test_a_folder_in_which_nothing_was_made_takes_another_configuration(tmp_path: Path) -> None:
    open_run(load_recipe("embedded", ["train.lr=0.1"]), tmp_path / "run")
    assert "lr: 0.003" in open_run(load_recipe("embedded"), tmp_path / "run").config.read_text()


def test_opening_twice_keeps_the_first_configuration(tmp_path: Path) -> None:
    first = open_run(load_recipe("embedded"), tmp_path / "run")
    (first.root / "prompts").mkdir()
    (first.root / "prompts" / "manifest.json").write_text("{}")
    text = first.config.read_text()
    assert open_run(load_recipe("embedded"), tmp_path / "run") == RunFolder(tmp_path / "run") and first.config.read_text() == text
    with pytest.raises(UnusableInput, match=r"temperature = 0\.8, this recipe says 0\.1; use another --run-dir, or -s gen"):
        open_run(load_recipe("embedded", ["generate.sampling.temperature=0.1"]), tmp_path / "run")


def test_what_trains_is_decided_when_training_begins(tmp_path: Path) -> None:
    """Traces of a week wait for a learning rate that nobody had thought of."""
    first = open_run(load_recipe("embedded"), tmp_path / "run")
    (first.root / "dataset").mkdir()
    (first.root / "dataset" / "manifest.json").write_text("{}")
    text = first.config.read_text()
    other = load_recipe("embedded", ["train.lr=0.1", "student.lora.rank=8", "export.dtype=fp16"])
    run = open_run(other, tmp_path / "run")
    assert run.config.read_text() == text, "nothing has begun"
    settle(other, run, "train")
    said = yaml.safe_load(run.config.read_text())["recipe"]
    assert (said["train"]["lr"], said["student"]["lora"]["rank"], said["export"]["dtype"]) == (0.1, 8, "fp32")
    check_text(run.config, run.config.read_bytes())

    (run.checkpoints / "step-00000005").mkdir(parents=True)
    assert open_run(other, tmp_path / "run") == run
    with pytest.raises(UnusableInput, match=r"lora\.rank = 8, this recipe says 64; .* to train anew, move"):
        open_run(load_recipe("embedded"), tmp_path / "run")
    text = run.config.read_text()
    settle(load_recipe("embedded"), run, "train")
    assert run.config.read_text() == text


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "run" / "dataset" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("keep me")
    with pytest.raises(UnusableInput, match=r"not empty, and without the config\.yaml of a run"):
        open_run(load_recipe("embedded"), tmp_path / "run")
    assert mine.read_text() == "keep me" and not (tmp_path / "run" / "config.yaml").exists()
    with pytest.raises(UnusableInput, match="--run-dir is empty"):
        open_run(load_recipe("embedded"), Path())


def test_a_kill_before_the_configuration_was_whole_does_not_spoil_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.0123.tmp").write_text("half of it")
    assert open_run(load_recipe("embedded"), tmp_path / "run").config.is_file()


def test_a_damaged_input_stops_the_stage_that_would_read_it(context: Context) -> None:
    run_stage(stage([]), context)
    run_stage(stage([], depends=("one",), name="two"), context)
    (context.run.root / "one" / "made.txt").write_text("2")
    with pytest.raises(UnusableInput, match=r"made\.txt: sha256"):
        run_stage(stage([], depends=("one",), name="two"), context)


@pytest.mark.parametrize(
    ("change", "is_free"),
    [
        ("teacher.engine.timeout_s=10", True),
        ("teacher.engine.batch_size=3", True),
        ("teacher.layout.expert_parallel=1", True),
        ("generate.segment_traces=2", True),
        ("teacher.engine.dtype=bf16", False),
        ("teacher.model=other", False),
        ("generate.sampling.top_k=5", False),
    ],
)
def test_where_and_how_fast_may_change_under_a_run_and_what_may_not(change: str, is_free: bool) -> None:
    one, other = (load_recipe("embedded", changes).recipe.model_dump(mode="json") for changes in ([], [change]))
    assert (without_free(one) == without_free(other)) == is_free
