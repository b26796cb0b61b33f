"""An engine that comes up from prepared shards is the engine that from_pretrained makes, bit for bit, on every rank."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from teacher.checkpoint.partition import Layout
from teacher.local_engine import LocalEngine
from teacher.prepare import prepare
from tests.distributed.launch import launch
from tests.teacher.models import CONFIGS, QWEN, save_random_model
from tests.teacher.test_decode import make_requests

REQUESTS = make_requests(6)


def compare(folder: Path, model: Path, layout: Layout, dtype: str) -> list[dict[str, Any]]:
    """What each rank found, after preparing the model and coming up from both."""
    shards = prepare(model, folder / "shards", layout, dtype).folder  # type: ignore[arg-type]
    groups = [REQUESTS[index :: layout.world // layout.tensor] for index in range(layout.world // layout.tensor)]
    task = {
        "model": str(model), "shards": str(shards), "dtype": dtype,
        "parallel": {"expert": layout.expert, "tensor": layout.tensor, "zero_stage": layout.zero_stage},
        "generate": [[asdict(request) for request in groups[rank // layout.tensor]] for rank in range(layout.world)],
    }  # fmt: skip
    done = launch(folder, task, layout.world, "tests.distributed.prepared_worker")
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(layout.world)]


def check(ranks: list[dict[str, Any]], model: Path, layout: Layout, dtype: str) -> None:
    for rank in ranks:
        assert rank["differences"] == []
    if dtype == "fp32":
        expected = {done.request_id: list(done.token_ids) for done in LocalEngine(model, batch_size=4).generate(REQUESTS)}
        found = {done["request_id"]: done["token_ids"] for rank in ranks for done in rank["completions"]}
        assert found == expected


def test_two_ranks_hold_the_same_bits_answer_the_same_and_read_their_own_files(tmp_path: Path) -> None:
    model, layout = save_random_model(tmp_path / "model", "glm"), Layout(2, expert=2)
    ranks = compare(tmp_path, model, layout, "fp32")
    check(ranks, model, layout, "fp32")
    for number, rank in enumerate(ranks):
        assert rank["read"] == [f"layer-000{layer}-0000{number}.safetensors" for layer in range(3)] + [
            f"top-0000{number}.safetensors"
        ]


@pytest.mark.long
def test_no_rank_comes_up_with_a_configuration_that_was_changed(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", "glm")
    path = prepare(model, tmp_path / "shards", Layout(2, expert=2), "fp32").folder / "config.json"
    path.write_text(path.read_text().replace('"routed_scaling_factor": 1.5', '"routed_scaling_factor": 9.5'))
    task = {
        "model": str(model), "shards": str(path.parent), "dtype": "fp32", "generate": [[], []],
        "parallel": {"expert": 2, "tensor": 1, "zero_stage": 3},
    }  # fmt: skip
    done = launch(tmp_path, task, 2, "tests.distributed.prepared_worker")
    assert done.returncode != 0 and done.stderr.count("config.json: sha256") == 2


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(2), Layout(2, expert=2, zero_stage=0), Layout(2, tensor=2), Layout(2, tensor=2, zero_stage=0),
        Layout(2, expert=2, tensor=2), Layout(4, expert=4), Layout(4, expert=2, tensor=2), Layout(4, expert=4, tensor=2),
    ],
    ids=str,
)  # fmt: skip
def test_every_layout_holds_the_same_bits(tmp_path: Path, layout: Layout, dtype: str) -> None:
    model = save_random_model(tmp_path / "model", "glm")
    check(compare(tmp_path, model, layout, dtype), model, layout, dtype)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["deepseek", "qwen-moe", "mixtral"])
@pytest.mark.parametrize("layout", [Layout(2, expert=2), Layout(2, expert=2, tensor=2)], ids=str)
def test_other_families_hold_the_same_bits(tmp_path: Path, kind: str, layout: Layout) -> None:
    model = save_random_model(tmp_path / "model", kind)
    check(compare(tmp_path, model, layout, "fp32"), model, layout, "fp32")


@pytest.mark.long
@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_model_is_cut_by_zero_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    monkeypatch.setitem(CONFIGS, "qwen", QWEN | {"tie_word_embeddings": tied})
    model = save_random_model(tmp_path / "model", "qwen")
    check(compare(tmp_path, model, Layout(2), "fp32"), model, Layout(2), "fp32")
