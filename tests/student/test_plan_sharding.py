"""Bytes per rank: the formulas against what two ranks of a real DeepSpeed engine hold."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from configs.training import Lora, Train
from student.planning import sharding
from student.planning.adapter import adapter_of, frozen_tensors
from student.planning.shape import read_shape
from student.planning.sharding import State, buffers, placed, rank_state
from tests.student.plan_models import tiny_config
from train import engine_config

REPOSITORY = Path(__file__).parents[2]
THRESHOLD = 150
"""So that some of the tiny tensors stay whole under stage 3, and some do not."""
LORA = {"rank": 3, "alpha": 6}
SETTINGS = {"processes": 2, "rows_per_step": 4, "liger": False}
CASES: dict[str, dict[str, Any]] = {
    f"{dtype}-{stage}": {"family": "llama", "lora": LORA, "train": SETTINGS | {"dtype": dtype, "zero_stage": stage}}
    for dtype in ("fp32", "bf16")
    for stage in (0, 2, 3)
} | {
    "biases, dora": {
        "family": "qwen2",
        "lora": LORA | {"dora": True, "modules_to_save": ("lm_head",)},
        "train": SETTINGS | {"dtype": "bf16", "zero_stage": 3},
    }
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    task = {"folder": str(folder), "threshold": THRESHOLD, "cases": CASES}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.student.plan_worker", json.dumps(task)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def planned(case: dict[str, Any]) -> State:
    shape = read_shape(tiny_config(case["family"]).to_dict(), "tiny")
    adapter = adapter_of(shape, Lora.model_validate(case["lora"]))
    return rank_state(frozen_tensors(shape), adapter.tensors, Train.model_validate(case["train"]))


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_holds_what_the_plan_says_to_the_byte(
    found: Path, name: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "PERSISTENCE_THRESHOLD", THRESHOLD)
    assert json.loads((found / f"{name}.{rank}.json").read_text()) == planned(CASES[name])._asdict()


def test_the_plan_knows_what_deepspeed_is_configured_with() -> None:
    assert sharding.PERSISTENCE_THRESHOLD == engine_config.ZERO3_PERSISTENCE_THRESHOLD
    for stage, dtype in ((0, "fp32"), (0, "bf16"), (2, "bf16"), (3, "fp32")):
        train = Train.model_validate({"zero_stage": stage, "dtype": dtype})
        for trained in (10**6, 10**10):
            zero = engine_config.deepspeed_config(train, 1, trained)["zero_optimization"]
            assert isinstance(zero, dict)
            found = DeepSpeedZeroConfig(**zero)
            assert found.stage == sharding.effective_stage(train) and found.max_live_parameters == sharding.LIVE_ELEMENTS
            reduced = buffers(TENSORS, Counter({trained: 1}), train.model_copy(update={"processes": 2}), largest=0).reduced
            assert reduced == found.reduce_bucket_size * (4 if dtype == "fp32" else 2)


TENSORS = Counter({10: 3, 7: 1, 200_000: 1})


def train_of(**settings: Any) -> Train:
    return Train.model_validate({"processes": 4, "rows_per_step": 4, "dtype": "bf16"} | settings)


def test_four_ranks_by_hand() -> None:
    """37 trained elements: flat and padded to 40 at stage 2; at stage 3 slices of 3, 3, 3 and 2. There the large frozen tensor
    is cut too, and the small ones are whole beside their slices."""
    trained = Counter({10: 3, 7: 1})
    assert rank_state(TENSORS, trained, train_of(zero_stage=2)) == State(400_074, 80, 0, 40, 40, 80)
    assert rank_state(TENSORS, trained, train_of(zero_stage=3)) == State(100_022, 22, 148, 44, 44, 88)
    assert rank_state(TENSORS, trained, train_of(zero_stage=0, dtype="fp32")) == State(800_148, 148, 0, 148, 0, 296)


def test_ranks_that_share_rows_share_the_state_too() -> None:
    alone, shared = (rank_state(TENSORS, TENSORS, train_of(zero_stage=3, sequence_parallel=degree)) for degree in (1, 4))
    assert alone == shared


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_offloaded_is_on_the_host_and_nothing_is_lost(stage: int) -> None:
    state = rank_state(TENSORS, TENSORS, train_of(zero_stage=stage))
    for offload in ("none", "optimizer", *(("parameters",) if stage == 3 else ())):
        gpu, host = placed(state, train_of(zero_stage=stage, offload=offload))
        assert tuple(map(sum, zip(gpu, host, strict=True))) == state
        assert (host.moments > 0) is (offload != "none") and (host.weights > 0) is (offload == "parameters")
        assert gpu.persistent == state.persistent


def test_stage_3_never_gathers_more_than_there_is() -> None:
    tensors, trained = Counter({10**9: 4}), Counter({10**6: 1})
    assert buffers(tensors, trained, train_of(zero_stage=3), largest=10**8).gathered == 2 * 10**9
    assert buffers(tensors, trained, train_of(zero_stage=3), largest=2 * 10**9).gathered == 4 * 10**9
    assert buffers(Counter({10**6: 4}), trained, train_of(zero_stage=3), largest=10**9).gathered == 2 * 5 * 10**6
    assert buffers(tensors, trained, train_of(zero_stage=2), largest=10**9).gathered == 0
    alone = train_of(zero_stage=3, processes=1, offload="parameters")
    assert buffers(tensors, trained, alone, largest=10**8).gathered == 2 * 10**9  # brought back from the host
