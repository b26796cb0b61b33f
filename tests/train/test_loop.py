import json
import os
import random
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.draining import Drain
from configs.errors import Interrupted, Refused, UnusableInput
from configs.schema import Recipe
from configs.training import CrossEntropy
from data import chat
from student.adapter_files import ADAPTER_WEIGHTS, load_adapter
from student.model import load_base
from tests.train.fixtures import save_dataset, save_tiny_base, start_worker, tiny_recipe, tiny_tokenizer
from train.batches import to_batch
from train.checkpoint import Best, Checkpoint, Progress, load_latest, save_checkpoint, saved_steps
from train.dataset import load_examples
from train.loop import TrainResult, train
from train.losses import SupervisedLoss
from train.setup import Run
from train.step import OptimizerState
from train.taking import agree_on_stopping
from train.tracking import read_metrics

NUM_STEPS = 6  # 34 traces in 12 rows, 2 a step


class Stopped(RuntimeError):
    """Stands for a crash of the training process at a known step."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are split over threads, so bit-equality is asked at one number of them: the worker processes' one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "dataset")


def train_until(step: int, recipe: Recipe, dataset: Path, run: Path) -> None:
    def report(done: int, total: int, metrics: dict[str, float]) -> None:
        if done == step:
            raise Stopped

    with pytest.raises(Stopped):
        train(recipe, dataset_dir=dataset, run_dir=run, report=report)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "adapter" / ADAPTER_WEIGHTS)


def assert_bit_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def whole(base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, train(tiny_recipe(base), dataset_dir=dataset, run_dir=run)


def test_training_lowers_the_loss_and_moves_lora_b(whole: tuple[Path, TrainResult]) -> None:
    run, result = whole
    rows = read_metrics(run / "metrics" / "train.jsonl")
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert result.steps == NUM_STEPS and result.resumed_from == 0
    assert result.validation_loss is not None and result.validation_loss < rows[0]["validation/nats_per_token"]
    assert all(tensor.abs().max() > 0 for tensor in adapter(run).values())


def test_metrics_say_what_was_trained(whole: tuple[Path, TrainResult]) -> None:
    run, result = whole
    rows = read_metrics(run / "metrics" / "train.jsonl")
    assert sum(row.get("loss/supervised_tokens", 0) for row in rows) == result.ledger.trained
    assert rows[-1]["progress/tokens"] == result.ledger.total and rows[-1]["progress/epoch"] == 1.0
    assert json.loads((run / "metrics" / "tokens.json").read_text())["trained"] == result.ledger.trained
    assert rows[1]["optim/lr"] == pytest.approx(3e-3) and rows[-1]["optim/lr"] < 1e-3
    assert all(row["optim/grad_norm"] > 0 for row in rows[1:])


def test_saved_adapter_on_the_base_has_the_reported_validation_loss(
    whole: tuple[Path, TrainResult], base: Path, dataset: Path
) -> None:
    run, result = whole
    student = load_adapter(load_base(str(base), "fp32"), run / "checkpoints" / "adapter")
    rows = load_examples(dataset, tiny_tokenizer(), run / "cache" / "rendered").validation
    loss = SupervisedLoss(student, CrossEntropy())
    loss_sum = sum(loss(*to_batch([row])).item() for row in rows)  # one document a row: nothing that packing could spoil
    assert loss_sum / int(rows.trained().sum()) == pytest.approx(result.validation_loss, rel=1e-5)


def test_killed_run_resumes_bit_equal_with_complete_metrics(
    whole: tuple[Path, TrainResult], base: Path, dataset: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(base)
    process = start_worker({"do": "train", "recipe": recipe.model_dump(), "dataset": str(dataset), "run": str(tmp_path)})
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL, "".join(lines)
    survived = read_metrics(tmp_path / "metrics" / "train.jsonl")
    assert [row["step"] for row in survived][:4] == [0, 1, 2, 3]

    result = train(recipe, dataset_dir=dataset, run_dir=tmp_path)
    assert result.resumed_from >= 2
    assert_bit_equal(adapter(tmp_path), adapter(whole[0]))
    rows = read_metrics(tmp_path / "metrics" / "train.jsonl")
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert rows[-1]["progress/restarts"] == 1
    expected = read_metrics(whole[0] / "metrics" / "train.jsonl")
    assert [row.get("loss/nats_per_token") for row in rows] == [row.get("loss/nats_per_token") for row in expected]


LAYOUTS = [(0, "fp32", "none"), (2, "bf16", "none"), (3, "fp32", "none"), (3, "bf16", "none"), (2, "fp32", "optimizer"),
           (3, "bf16", "parameters")]  # fmt: skip


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "offload"), [*LAYOUTS[:2], *(pytest.param(*layout, marks=pytest.mark.long) for layout in LAYOUTS[2:])]
)
def test_resume_is_bit_equal_in_every_layout_with_dropout(
    base: Path, dataset: Path, tmp_path: Path, zero_stage: int, dtype: str, offload: str
) -> None:
    settings = {"zero_stage": zero_stage, "dtype": dtype, "offload": offload, "weight_decay": 0.01, "rows_per_step": 3}
    recipe = tiny_recipe(base, lora={"dropout": 0.2}, **settings)
    train(recipe, dataset_dir=dataset, run_dir=tmp_path / "whole")
    train_until(3, recipe, dataset, tmp_path / "stopped")
    assert train(recipe, dataset_dir=dataset, run_dir=tmp_path / "stopped").resumed_from == 2
    assert_bit_equal(adapter(tmp_path / "stopped"), adapter(tmp_path / "whole"))


def test_checkpoint_of_one_layout_continues_in_another(
    whole: tuple[Path, TrainResult], base: Path, dataset: Path, tmp_path: Path
) -> None:
    train_until(3, tiny_recipe(base), dataset, tmp_path)
    result = train(tiny_recipe(base, zero_stage=3), dataset_dir=dataset, run_dir=tmp_path)
    assert result.resumed_from == 2
    expected = adapter(whole[0])
    for name, tensor in adapter(tmp_path).items():
        # sums in another order, and AdamW divides small gradients by themselves
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_finished_run_trains_nothing_again(whole: tuple[Path, TrainResult], base: Path, dataset: Path) -> None:
    run, first = whole
    before, seen = adapter(run), []
    again = train(tiny_recipe(base), dataset_dir=dataset, run_dir=run, report=lambda *call: seen.append(call))
    assert again.resumed_from == NUM_STEPS and seen == []
    assert (again.loss, again.validation_loss) == (first.loss, first.validation_loss)
    assert_bit_equal(adapter(run), before)


def test_another_configuration_is_refused_by_name(whole: tuple[Path, TrainResult], base: Path, dataset: Path) -> None:
    with pytest.raises(UnusableInput, match=r"train\.lr was 0\.003, is 0\.5; restore it or use another --run-dir"):
        train(tiny_recipe(base, lr=0.5), dataset_dir=dataset, run_dir=whole[0])


def test_another_dataset_is_refused(whole: tuple[Path, TrainResult], base: Path, tmp_path: Path) -> None:
    other = save_dataset(tmp_path / "dataset", num_train=33)
    with pytest.raises(UnusableInput, match="dataset sha256 was"):
        train(tiny_recipe(base), dataset_dir=other, run_dir=whole[0])


def test_over_length_traces_are_counted_and_left_out(base: Path, tmp_path: Path) -> None:
    dataset = save_dataset(tmp_path / "dataset", num_train=7, num_validation=0, long_traces=2)
    result = train(tiny_recipe(base), dataset_dir=dataset, run_dir=tmp_path / "run")
    assert result.ledger.dropped_traces == {"over_length": 2} and result.ledger.balances
    assert result.steps == 1 and result.validation_loss is None
    rows = read_metrics(tmp_path / "run" / "metrics" / "train.jsonl")
    assert rows[-1]["progress/tokens"] == result.ledger.total - result.ledger.dropped["over_length"]


def test_a_limit_below_every_trace_is_one_line_and_trains_nothing(base: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnusableInput,
        match=r"none of its 34 traces can be trained \(34 over_length\); a row holds 8 tokens: raise train\.max_tokens_per_row",
    ):
        train(tiny_recipe(base, max_tokens_per_row=8), dataset_dir=dataset, run_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_missing_model_and_dataset_are_one_line(base: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="no such folder"):
        train(tiny_recipe(tmp_path / "nowhere"), dataset_dir=dataset, run_dir=tmp_path)
    with pytest.raises(UnusableInput, match="tracestill data build"):
        train(tiny_recipe(base), dataset_dir=tmp_path / "nowhere", run_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "no usable tokenizer in the folder"),
        ("config.json", "{", "config.json is no JSON"),
        ("chat_template.jinja", "{% if %}", "chat template, line 1"),
    ],
)
def test_a_broken_student_is_one_line(base: Path, dataset: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / name).write_text(content)
    with pytest.raises(UnusableInput, match=message):
        train(tiny_recipe(broken), dataset_dir=dataset, run_dir=tmp_path / "run")


def test_weights_of_another_size_are_one_line(base: Path, dataset: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(base, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    with pytest.raises(UnusableInput, match="not a causal language model that loads: RuntimeError"):
        train(tiny_recipe(broken), dataset_dir=dataset, run_dir=tmp_path / "run")


def test_run_directory_that_is_a_file_is_refused(base: Path, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UnusableInput, match="cannot be written"):
        train(tiny_recipe(base), dataset_dir=dataset, run_dir=tmp_path / "run")


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_training(base: Path, dataset: Path, tmp_path: Path) -> None:
    """The first step at such a rate is sound, and makes weights whose loss is no number."""
    recipe = tiny_recipe(base, lr=1e30, max_grad_norm=1e30, warmup_share=0.0, checkpoint_steps=1, max_skipped_steps=2)
    with pytest.raises(Refused, match=r"train step 4: .*: 3 steps were not applied, expected at most train.max_skipped_steps 2"):
        train(recipe, dataset_dir=dataset, run_dir=tmp_path)
    rows = read_metrics(tmp_path / "metrics" / "train.jsonl")
    assert [row.get("optim/non_finite_steps") for row in rows] == [None, 0, 1, 2]
    assert "NaN" not in (tmp_path / "metrics" / "train.jsonl").read_text()
    states = [load_file(path / "state.safetensors") for path in saved_steps(tmp_path / "checkpoints")]
    assert all(torch.isfinite(tensor).all() for state in states for tensor in state.values())
    assert_bit_equal(states[0], states[1])  # a step that is not applied changes no weight and no moment


def test_a_spike_is_not_applied_and_training_goes_on(
    base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.policy.LEAST_HISTORY", 3)
    recipe = tiny_recipe(base, spike_factor=1.0001)
    result = train(recipe, dataset_dir=dataset, run_dir=tmp_path)
    rows = read_metrics(tmp_path / "metrics" / "train.jsonl")
    norms = [row["optim/grad_norm"] for row in rows[1:]]
    assert result.steps == NUM_STEPS and rows[-1]["optim/skipped_steps"] == sum(
        norm > 1.0001 * statistics.median(norms[:index]) for index, norm in enumerate(norms) if index >= 3
    ), norms  # holds while at most one step is skipped: a skipped norm is not remembered
    assert rows[-1]["progress/supervised_tokens"] <= result.ledger.trained


# --- stopping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGUSR2", pytest.param("SIGTERM", marks=pytest.mark.long)])
def test_a_signal_saves_the_state_exits_resumable_and_the_resume_is_bit_equal(
    whole: tuple[Path, TrainResult], base: Path, dataset: Path, tmp_path: Path, name: str
) -> None:
    recipe = tiny_recipe(base, checkpoint_steps=1000)
    process = start_worker({"do": "train", "recipe": recipe.model_dump(), "dataset": str(dataset), "run": str(tmp_path)})
    assert process.stdout is not None
    asked, lines = 0.0, []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 2/"):
            process.send_signal(signal.Signals[name])
            asked = time.monotonic()
    assert process.wait() == 75, "".join(lines)
    assert time.monotonic() - asked < 10.0
    assert f"stopped by {name}; the state of training is saved" in "".join(lines)
    [saved] = saved_steps(tmp_path / "checkpoints")
    assert int(saved.name.removeprefix("step-")) >= 2
    result = train(tiny_recipe(base), dataset_dir=dataset, run_dir=tmp_path)
    assert result.resumed_from == int(saved.name.removeprefix("step-"))
    assert_bit_equal(adapter(tmp_path), adapter(whole[0]))


def stopping_at(number: int) -> Callable[[Run, Drain], float]:
    """A validation's loss, during which a signal comes the number-th time."""
    asked: list[int] = []

    def ask(run: Run, stop: Drain) -> float:
        asked.append(1)
        if len(asked) == number:
            stop.requested = "SIGUSR2"
        agree_on_stopping(run.step, stop)
        return 1.0

    return ask


def test_a_stop_during_validation_measures_it_after_the_resume(
    whole: tuple[Path, TrainResult], base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is taken, its row is not logged yet: the checkpoint keeps the row."""
    with monkeypatch.context() as patch:
        patch.setattr("train.validation.mean_loss", stopping_at(2))  # the first is before any step
        with pytest.raises(Interrupted):
            train(tiny_recipe(base), dataset_dir=dataset, run_dir=tmp_path)
    assert [path.name for path in saved_steps(tmp_path / "checkpoints")] == ["step-00000002", "step-00000003"]
    assert len(read_metrics(tmp_path / "metrics" / "train.jsonl")) == 3
    train(tiny_recipe(base), dataset_dir=dataset, run_dir=tmp_path)
    rows, expected = (read_metrics(run / "metrics" / "train.jsonl") for run in (tmp_path, whole[0]))
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert rows[3]["validation/nats_per_token"] == expected[3]["validation/nats_per_token"]
    assert_bit_equal(adapter(tmp_path), adapter(whole[0]))


def test_a_row_that_waited_for_its_validation_is_logged_once_whatever_comes_after(
    base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint keeps the row until the next one: a start that logged it and was killed is followed by one that does too."""
    recipe = tiny_recipe(base, checkpoint_steps=1000)
    with monkeypatch.context() as patch:
        patch.setattr("train.validation.mean_loss", stopping_at(2))
        with pytest.raises(Interrupted):
            train(recipe, dataset_dir=dataset, run_dir=tmp_path)
    for _ in range(2):
        train_until(4, recipe, dataset, tmp_path)
    train(recipe, dataset_dir=dataset, run_dir=tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics" / "train.jsonl")] == list(range(NUM_STEPS + 1))


@pytest.mark.long
def test_ten_random_kills_end_bit_equal(base: Path, dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(base, epochs=8.0, checkpoint_steps=3, lora={"dropout": 0.1})
    expected = train(recipe, dataset_dir=dataset, run_dir=tmp_path / "whole")
    task = {"do": "train", "recipe": recipe.model_dump(), "dataset": str(dataset), "run": str(tmp_path / "killed")}
    rng = random.Random(0)
    for _ in range(10):
        process = start_worker(task)
        assert process.stdout is not None
        steps = rng.randint(1, 6)
        for line in process.stdout:
            if line.startswith("step ") and (steps := steps - 1) == 0:
                time.sleep(rng.uniform(0.0, 0.05))  # anywhere in a step or a checkpoint
                process.kill()
        process.wait()
    result = train(recipe, dataset_dir=dataset, run_dir=tmp_path / "killed")
    assert result.steps == expected.steps
    assert_bit_equal(adapter(tmp_path / "killed"), adapter(tmp_path / "whole"))
    rows, whole_rows = (read_metrics(tmp_path / name / "metrics" / "train.jsonl") for name in ("killed", "whole"))
    for key in ("step", "loss/nats_per_token", "optim/grad_norm", "validation/nats_per_token"):
        assert [row.get(key) for row in rows] == [row.get(key) for row in whole_rows], key


# --- the best validation -----------------------------------------------------------------------------------------


def test_the_adapter_is_the_best_validations_and_training_stops_early(
    base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, 4.0, 3.0, 3.0, 3.5, 3.2, 1.0])  # of steps 0, 2, 4, ...: three in a row are no better than that of step 4
    monkeypatch.setattr("train.validation.mean_loss", lambda run, stop: next(losses))
    watched = {"validation_steps": 2, "best_metric": "loss", "early_stop_patience": 3}
    recipe = tiny_recipe(base, epochs=4.0, checkpoint_steps=1, kept_checkpoints=99, **watched)
    result = train(recipe, dataset_dir=dataset, run_dir=tmp_path)
    assert (result.best, result.steps) == (Best(3.0, 4), 10)
    state = load_file(tmp_path / "checkpoints" / "step-00000004" / "state.safetensors")
    kept = {name.removeprefix("parameters/").replace(".default", ""): tensor for name, tensor in state.items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in adapter(tmp_path).items())
    best = sorted(path.name for path in (tmp_path / "checkpoints").glob("best-*"))
    assert best == ["best-00000002", "best-00000004"], "those that the kept checkpoints know of"
    assert not (tmp_path / "checkpoints" / "adapter" / "files.json").exists()
    again = train(recipe, dataset_dir=dataset, run_dir=tmp_path)
    assert (again.steps, again.best, again.resumed_from) == (10, result.best, 10)


def test_a_damaged_checkpoint_does_not_cost_the_best_adapter_of_the_one_before(
    base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(base, checkpoint_steps=2, validation_steps=2, best_metric="loss")

    def measured(*losses: float) -> Callable[[Run, Drain], float]:
        left = iter(losses)
        return lambda run, stop: next(left)

    monkeypatch.setattr("train.validation.mean_loss", measured(5.0, 3.0, 2.0))
    train_until(5, recipe, dataset, tmp_path)
    (tmp_path / "checkpoints" / "step-00000004" / "state.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr("train.validation.mean_loss", measured(3.1, 4.0))  # on a GPU steps may come out otherwise
    assert train(recipe, dataset_dir=dataset, run_dir=tmp_path).best == Best(3.0, 2)
    assert (tmp_path / "checkpoints" / "damaged-step-00000004").is_dir()


def test_a_best_adapter_that_was_damaged_meanwhile_is_not_published(
    base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, 3.0, 4.0, 4.0])
    monkeypatch.setattr("train.validation.mean_loss", lambda run, stop: next(losses))
    recipe = tiny_recipe(base, checkpoint_steps=2, validation_steps=2, best_metric="loss")
    train_until(5, recipe, dataset, tmp_path)
    weights = tmp_path / "checkpoints" / "best-00000002" / ADAPTER_WEIGHTS
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(UnusableInput, match=r"best-00000002/adapter_model\.safetensors: not the bytes that were written"):
        train(recipe, dataset_dir=dataset, run_dir=tmp_path)
    assert not (tmp_path / "checkpoints" / "adapter").exists()


def test_training_leaves_no_launcher_variable_behind(whole: tuple[Path, TrainResult]) -> None:
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_DEEPSPEED"} & os.environ.keys()


def test_a_kill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    tensors = {"lora_A": torch.zeros(64, 64)}
    rng = random.Random(0)
    save_checkpoint(tmp_path, Checkpoint(Progress(1), OptimizerState(tensors, {}, 0)), {}, kept=2)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            for step in range(2, 10_000):
                save_checkpoint(tmp_path, Checkpoint(Progress(step), OptimizerState(tensors, {}, step)), {}, kept=2)
            os._exit(0)
        time.sleep(rng.uniform(0.005, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = load_latest(tmp_path, {})
        assert loaded is not None and loaded.state.steps == (0 if loaded.progress.step == 1 else loaded.progress.step)


def test_the_template_is_called_once_a_trace_over_trainings_and_resumes(
    base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, plain = [], chat.render

    def render(*arguments: object, **named: object) -> str:
        calls.append(1)
        return plain(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(chat, "render", render)
    train_until(3, tiny_recipe(base), dataset, tmp_path)
    once = len(calls)
    assert once >= 3 * 37  # a conversation is rendered whole, up to its answer, and with it
    assert train(tiny_recipe(base), dataset_dir=dataset, run_dir=tmp_path).resumed_from == 2
    train(tiny_recipe(base), dataset_dir=dataset, run_dir=tmp_path)
    assert len(calls) == once
