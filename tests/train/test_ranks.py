"""Gradients do not depend on ranks, ZeRO stage, accumulation, or ranks that share rows. AdamW hides a constant factor, so losses
cannot show this: every case is compared with gradients taken one document at a time in float64 (train/reference.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from configs.errors import UnusableInput
from student.adapter_files import ADAPTER_WEIGHTS, load_adapter
from student.model import load_base
from tests.train.rank_cases import LEAKING, LONG, QUICK, reference_of, run_cases, save_bases
from tests.train.rank_worker import VOCABULARY, Case, build_loss
from train.engine_config import deepspeed_config
from train.reference import Reference
from train.sequence_parallel import refuse_uneven_heads
from train.step import World, loss_scale

ALL = [*QUICK, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_bases(folder)
    return folder


@pytest.fixture(scope="module")
def quick(bases: Path) -> Path:
    run_cases(bases, [*QUICK, LEAKING])
    return bases


@pytest.fixture(scope="module")
def long(bases: Path) -> Path:
    run_cases(bases, LONG)
    return bases


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    return {}


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def results(case: Case, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("quick" if case in QUICK else "long")


def facts_of(folder: Path, case: Case) -> dict[str, Any]:
    return json.loads((folder / f"{case.name}.json").read_text())


@pytest.mark.parametrize("case", ALL, indirect=True, ids=lambda case: case.name)
def test_gradients_and_loss_are_those_of_one_document_after_the_other_in_float64(
    case: Case, results: Path, references: dict[str, Reference]
) -> None:
    reference = reference_of(case, results, references)
    found = load_file(results / f"{case.name}.gradients")
    assert found.keys() == reference.gradients.keys()
    for name, expected in reference.gradients.items():
        error = (found[name] - expected).norm() / expected.norm()
        assert error < 1e-5, (name, error)  # float32 arithmetic; a wrong scale is off by a factor of 2
    facts = facts_of(results, case)
    norm = torch.cat([expected.flatten() for expected in reference.gradients.values()]).norm()
    assert facts["loss"] == pytest.approx(reference.loss, rel=1e-6)
    assert facts["norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert World(*facts["world"]).data_size == case.settings.data_parallel


@pytest.mark.parametrize("case", ALL, indirect=True, ids=lambda case: case.name)
def test_every_case_takes_the_optimizer_step_of_its_gradients(
    case: Case, results: Path, references: dict[str, Reference]
) -> None:
    reference = reference_of(case, results, references)
    before = dict(build_loss(results / case.base, case).model.named_parameters())
    for name, after in load_file(results / f"{case.name}.parameters").items():
        # a first AdamW step is the learning rate x sign(gradient); where the gradient is near zero its sign is rounding
        expected = before[name].detach() - 1e-2 * reference.gradients[name].sign()
        assert (after - expected).abs().mean() < 1e-4, name


@pytest.mark.parametrize("case", ALL, indirect=True, ids=lambda case: case.name)
def test_adapter_file_has_whole_shapes_and_loads(case: Case, results: Path, references: dict[str, Reference]) -> None:
    stored = load_file(results / f"{case.name}.adapter" / ADAPTER_WEIGHTS)
    shapes = [tuple(tensor.shape) for tensor in reference_of(case, results, references).gradients.values()]
    if case.base == "tied":
        head, embedding = (tensor for tensor in stored.values() if len(tensor) == VOCABULARY)
        assert torch.equal(head, embedding), "one tensor, under both names"
        shapes.append(tuple(head.shape))
    assert sorted(tuple(tensor.shape) for tensor in stored.values()) == sorted(shapes)
    load_adapter(load_base(str(results / case.base), "fp32"), results / f"{case.name}.adapter")


REFUSING = [case if case in QUICK else pytest.param(case, marks=pytest.mark.long) for case in [*QUICK, *LONG] if case.refuses]


@pytest.mark.parametrize("case", REFUSING, indirect=True, ids=lambda case: case.name)
def test_a_spike_and_a_gradient_that_is_no_number_change_nothing(case: Case, results: Path) -> None:
    facts = facts_of(results, case)
    assert facts["refused"] == [False, False] and facts["unchanged"]


@pytest.mark.parametrize("case", REFUSING, indirect=True, ids=lambda case: case.name)
def test_the_step_after_a_refused_one_has_a_gradient_of_its_own(case: Case, results: Path, quick: Path) -> None:
    expected = facts_of(quick, QUICK[0])["next_norm"]
    assert facts_of(results, case)["next_norm"] == pytest.approx(expected, rel=1e-3)  # after steps that rounding makes differ


def test_deepspeeds_own_wrapper_lets_packed_documents_see_each_other_and_the_probe_says_so(quick: Path) -> None:
    """Around sdpa, on a row that every case above has passed the probe with. If this fails, DeepSpeed has mended it."""
    facts = facts_of(quick, LEAKING)
    assert abs(facts["packed"] - facts["alone"]) > 5e-4 * facts["alone"]  # equal to 1e-7 in the cases above
    assert facts["refused"].startswith("packed documents see each other on cpu")


# --- without ranks -----------------------------------------------------------------------------------------------


def test_ranks_that_share_rows_are_neighbours() -> None:
    worlds = [World(rank, 8, 4) for rank in range(8)]
    assert [world.data_rank for world in worlds] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [world.sequence_rank for world in worlds] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert {world.data_size for world in worlds} == {2}


def test_the_loss_scale_is_ranks_over_tokens_and_a_step_without_tokens_is_no_division_by_zero() -> None:
    assert loss_scale(8, 1000) == 8 / 1000
    assert loss_scale(8, 0) == 8


@pytest.mark.parametrize(("queries", "keys", "degree"), [(6, 6, 4), (12, 3, 2), (4, 4, 8), (6, 2, 3)])
def test_heads_that_cannot_be_dealt_out_are_refused(queries: int, keys: int, degree: int) -> None:
    config = AutoConfig.for_model("llama", hidden_size=8 * queries, num_attention_heads=queries, num_key_value_heads=keys)
    with pytest.raises(UnusableInput, match=f"sequence_parallel {degree}: {queries} attention heads"):
        refuse_uneven_heads(config, degree)


@pytest.mark.parametrize(("queries", "keys", "degree"), [(32, 8, 8), (32, 8, 16), (8, 1, 4)])
def test_key_heads_fewer_than_ranks_are_accepted(queries: int, keys: int, degree: int) -> None:
    refuse_uneven_heads(
        AutoConfig.for_model("llama", hidden_size=8 * queries, num_attention_heads=queries, num_key_value_heads=keys), degree
    )


def test_bf16_at_stage_0_runs_as_stage_2() -> None:
    config = deepspeed_config(Case("", {"dtype": "bf16", "zero_stage": 0}, {}).settings, 1, 1000)
    assert isinstance(config["zero_optimization"], dict) and config["zero_optimization"]["stage"] == 2
