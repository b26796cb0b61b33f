"""A student's plan: what fits, what would, how fast, and what is said of it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.devices import DEVICES
from configs.errors import UnusableInput
from configs.lengths import Lengths, output_lengths
from configs.load import load_recipe, shipped_recipes
from configs.planning import Planning, Workload
from configs.training import Lora, Train
from student.plan import StudentPlan, plan_student
from student.planning.adapter import adapter_of
from student.planning.memory import uneven_heads
from student.planning.rate import Traces, flops_per_token, rate_of, row_network_s, traces_of
from student.planning.shape import Shape, read_shape
from student.planning.table import student_json, student_tables

REPOSITORY = Path(__file__).parents[2]
RECIPES = ("student-7b", "student-13b")
SMALL: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 20, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 30, "max_position_embeddings": 64,
}  # fmt: skip


def plan(name: str, *overrides: str) -> StudentPlan:
    return plan_student(load_recipe(name, overrides).recipe)


def run(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "80"}
    command = [sys.executable, "-m", "tracestill", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)


# --- the shipped recipes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_student_fits_its_node_and_has_a_price(name: str) -> None:
    found = plan(name)
    assert found.room.fits and found.refusal is None and found.rate is not None
    assert found.train.ranks == 8 and found.train.activation_checkpointing and found.train.best_metric == "loss"
    assert 0 < found.rate.hours < 48 and found.rate.dollars == pytest.approx(found.rate.hours * 8 * 3)


def test_both_shapes_are_there_and_rows_of_65_536_tokens() -> None:
    assert [plan(name).shape.model_type for name in RECIPES] == ["qwen2", "llama"]
    assert all(plan(name).train.max_tokens_per_row == 65_536 for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_longest_trace_of_a_shipped_student_has_a_row_and_positions(name: str) -> None:
    recipe = load_recipe(name).recipe
    longest = recipe.plan.workload.prompt_tokens + recipe.generate.sampling.max_tokens
    assert longest <= min(recipe.train.row_lengths[-1], plan(name).shape.max_positions)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_planned_or_says_what_is_missing(name: str) -> None:
    try:
        json.dumps(student_json(plan(name)), allow_nan=False)
    except UnusableInput as missing:
        assert "no such folder" in str(missing)


def test_a_run_of_a_folder_without_weights_is_refused_with_one_line(tmp_path: Path) -> None:
    done = run("run", "student-7b", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.startswith("error: student.model configs/architectures/qwen2.5-7b: no *.safetensors in the folder")
    assert len(done.stderr.splitlines()) == 1


# --- what fits ---------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_settings_that_do() -> None:
    found = plan("student-7b", "train.gpu=h100", "train.sequence_parallel=1")
    assert found.room.fits is False and found.rate is None and found.refusal is not None
    assert "of a row of 131,072 tokens do not fit 73.6 GB of each h100: 18.3 GB short per GPU" in found.refusal
    assert found.alternatives[0].overrides == "-s train.sequence_parallel=2"


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.gpu=h100", "train.sequence_parallel=1"),
        ("train.activation_checkpointing=false",),
        ("train.gpu=h100", "train.max_tokens_per_row=524288", "train.longer_rows=[]", "train.sequence_parallel=1"),
    ],
)
def test_every_setting_that_is_offered_fits_when_it_is_taken(overrides: tuple[str, ...]) -> None:
    alternatives = plan("student-7b", *overrides).alternatives
    assert alternatives
    for one in alternatives:
        taken = plan("student-7b", *overrides, *(word for word in one.overrides.split() if word != "-s"))
        assert taken.room.fits and taken.refusal is None and taken.room.needed == one.needed, one.overrides


def test_nothing_is_offered_where_nothing_helps() -> None:
    found = plan("student-7b", "train.max_tokens_per_row=1024", "train.longer_rows=[]", "student.lora={rank: 10000000}")
    assert found.refusal is not None and found.refusal.endswith("no settings near these fit")


def test_heads_that_cannot_be_dealt_out_are_refused() -> None:
    found = plan("student-7b", "train.sequence_parallel=8")
    assert (
        found.refusal is not None
        and "train.sequence_parallel 8 does not divide the student's 28 attention heads" in found.refusal
    )
    shape = read_shape(SMALL, "small")
    assert uneven_heads(shape, 2) is uneven_heads(shape, 4) is None  # key heads are copied for the second
    three = read_shape(SMALL | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 2}, "three")
    assert uneven_heads(three, 2) is not None


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ("train.activation_checkpointing=false", "train.activation_checkpointing=true"),
        ("train.sequence_parallel=1", "train.sequence_parallel=2"),
        ("train.zero_stage=2", "train.zero_stage=3"),
        ("train.longer_rows=[131072]", "train.longer_rows=[]"),
    ],
)
def test_each_remedy_takes_less_memory(more: str, less: str) -> None:
    assert plan("student-7b", more).room.needed > plan("student-7b", less).room.needed


def test_on_a_cpu_sizes_are_known_rates_are_not_and_nothing_is_refused() -> None:
    found = plan(
        "embedded", "train.processes=3", "train.rows_per_step=3", "train.sequence_parallel=3", "train.max_tokens_per_row=3072"
    )
    assert found.room.needed > 0 and found.room.fits is None and found.rate is None and found.refusal is None


# --- how fast ----------------------------------------------------------------------------------------------------


def small() -> Shape:
    return read_shape(SMALL, "small")


def by_hand(train: Train, lora: Lora, traces: Traces) -> float:
    """Products of one trace of equal documents, one layer and one matrix after the other, over its tokens."""
    shape, adapter = small(), adapter_of(small(), lora)
    tokens, forwards = traces.tokens, 2 if train.activation_checkpointing else 1
    total = 0.0
    for module in shape.modules:
        for _ in range(module.count):
            product = 2 * tokens * module.inputs * module.outputs
            low_rank = 2 * tokens * lora.rank * (module.inputs + module.outputs)
            if module.kind == "linear":
                total += product * (forwards + 1) + (product if module in adapter.saved else 0)
                total += low_rank * (forwards + 2) if module in adapter.targets else 0
    for _ in range(shape.layers):
        total += 2 * traces.square * shape.queries * (forwards + 2)  # two products of length^2 / 2 pairs
    head = 2 * traces.supervised * shape.hidden * shape.vocabulary
    return (total + head * (4 if adapter.saved else 2)) / tokens


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    "lora", [Lora(rank=3), Lora(rank=3, targets=("q_proj",), modules_to_save=("lm_head", "up_proj"))], ids=str
)
def test_arithmetic_is_that_of_every_product_by_hand(again: bool, lora: Lora) -> None:
    train, traces = Train(activation_checkpointing=again), Traces(1, 40.0, 25.0, 1600.0)
    assert flops_per_token(small(), adapter_of(small(), lora), train, traces) == pytest.approx(by_hand(train, lora, traces))


def test_hours_are_tokens_over_the_rate_of_all_gpus() -> None:
    train = Train(gpu="h200", processes=8, rows_per_step=8, dtype="bf16", max_tokens_per_row=1000, epochs=3.0)
    planning, traces = Planning(), Traces(10, 500.0, 400.0, 250_000.0)
    adapter = adapter_of(small(), Lora(rank=3))
    found = rate_of(small(), adapter, train, planning, DEVICES["h200"], traces)
    flops = flops_per_token(small(), adapter, train, traces)
    assert found.tokens == 15_000 and found.steps == 2 and found.network_s == 0
    assert found.tokens_per_s_per_gpu == pytest.approx(0.3 * 989e12 / flops)
    assert found.hours == pytest.approx(15_000 / (8 * found.tokens_per_s_per_gpu) / 3600)


def test_links_carry_gathered_weights_and_exchanged_heads() -> None:
    """By hand: 7 of 8 slices of all weights over 450 GB/s, twice; half of 500 tokens' queries, keys, values and outputs, of 2
    layers, forward and backward."""
    device, shape = DEVICES["h200"], small()
    settings: dict[str, Any] = {"processes": 8, "rows_per_step": 8, "dtype": "bf16", "max_tokens_per_row": 1000}
    gathered = row_network_s(shape, Train(zero_stage=3, **settings), device, 1000)
    assert gathered == pytest.approx(2 * shape.parameters * 2 * 7 / 8 / 450e9)
    exchanged = row_network_s(shape, Train(sequence_parallel=2, **settings), device, 1000)
    assert exchanged == pytest.approx(500 * (8 + 4 + 4 + 8) * 2 * 2 * 2 / 2 / 450e9)
    again = row_network_s(shape, Train(sequence_parallel=2, activation_checkpointing=True, **settings), device, 1000)
    assert again == pytest.approx(1.5 * exchanged)


def test_a_trace_is_its_prompt_and_its_output() -> None:
    """Outputs of 30 and 50, equally often, after a prompt of 10: squares of 40 and 60."""
    outputs = Lengths(mean=40.0, live=(30**2 + 50**2) / 2 / 40 / 2)
    found = traces_of(Planning(workload=Workload(traces=7, prompt_tokens=10)), outputs)
    assert found == pytest.approx((7, 50.0, 40.0, (40**2 + 60**2) / 2))
    assert output_lengths(Workload(), 10**6).square > output_lengths(Workload(), 10**6).mean ** 2


# --- as it is used -----------------------------------------------------------------------------------------------


WHOLE_HEAD = "student.lora={rank: 8, dora: true, modules_to_save: [lm_head]}"


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("student-7b", ()),
        ("student-13b", ()),
        ("embedded", ()),
        ("student-7b", ("train.gpu=h100", "train.sequence_parallel=1")),
        ("student-7b", ("train.zero_stage=3", "train.offload=parameters", WHOLE_HEAD)),
    ],
)
def test_tables_are_80_columns_wide(name: str, overrides: tuple[str, ...]) -> None:
    output = io.StringIO()
    Console(file=output, width=80, highlight=False).print(student_tables(plan(name, *overrides)))
    assert max(len(line.rstrip()) for line in output.getvalue().splitlines()) <= 80
    assert "modules with an adapter" in output.getvalue()


def test_the_plan_of_a_recipe_is_of_both_models_and_needs_no_torch(tmp_path: Path) -> None:
    heavy = {"torch", "transformers", "numpy", "pyarrow"}
    code = (
        "import sys, tracestill; sys.argv = ['tracestill', 'plan', 'student-7b', '--json'];"
        f"tracestill.application()(standalone_mode=False); assert not {heavy} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters_total"] == 743_377_000_704 and found["student"]["parameters_total"] == 7_615_616_512
    assert found["student"]["fits"] is True and found["student"]["rate"]["hours"] > 0


def test_either_model_is_planned_alone() -> None:
    student, teacher = (run("plan", "student-13b", "--only", one, "--json") for one in ("student", "teacher"))
    assert student.returncode == teacher.returncode == 0
    assert json.loads(student.stdout.splitlines()[-1]).keys() == {"student"}
    assert "student" not in json.loads(teacher.stdout.splitlines()[-1])


def test_a_student_that_does_not_fit_is_exit_3_with_its_json() -> None:
    done = run("plan", "student-7b", "-s", "train.gpu=h100", "-s", "train.sequence_parallel=1", "--only", "student", "--json")
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1
    found = json.loads(done.stdout.splitlines()[-1])["student"]
    assert found["fits"] is False and found["rate"] is None and found["refusal"] in done.stderr
    assert found["nearest_settings"][0]["overrides"] == "-s train.sequence_parallel=2"


def test_a_base_that_is_not_there_yet_stops_only_the_plan_that_asks_for_it() -> None:
    both, alone = run("plan", "glm52-fp8-16xh200", "--json"), run("plan", "glm52-fp8-16xh200", "--only", "student")
    assert both.returncode == 0 and "student not planned: student.model weights/base-7b: no such folder" in both.stdout
    assert json.loads(both.stdout.splitlines()[-1])["student"] is None
    assert alone.returncode == 2


@pytest.mark.parametrize(
    "text", ["{", "[]", '"llama"', "\xff", "[" * 100_000, '{"model_type": "llama", "hidden_size": ' + "9" * 6000 + "}"]
)
def test_a_damaged_configuration_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UnusableInput, match="restore the file") as refused:
        plan("student-7b", f"student.model={tmp_path}")
    assert "\n" not in str(refused.value)
