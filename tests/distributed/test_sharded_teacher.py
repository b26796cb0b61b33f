"""Two gloo processes with ZeRO-3 and experts over both equal one process, token for token; nobody hangs."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from transformers import AutoConfig, GlmMoeDsaConfig
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaTopkRouter

from configs.errors import UnusableInput
from data.engine import Request
from teacher.deepspeed_engine import Parallel, check_layout, route_in_float32
from teacher.local_engine import LocalEngine
from tests.teacher.models import GLM, save_random_model
from tests.teacher.test_decode import make_requests

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 300


class Found(NamedTuple):
    """What both ranks wrote, rank by rank."""

    ranks: list[dict[str, Any]]

    def tokens(self, job: int) -> dict[str, tuple[int, ...]]:
        return {c["request_id"]: tuple(c["token_ids"]) for rank in self.ranks for c in rank["jobs"][job]}


def run_ranks(folder: Path, task: dict[str, Any], world: int = 2) -> Found:
    """Runs the worker on `world` ranks. Hanging ranks are a failure after TIMEOUT_S, not a stuck suite."""
    task_file = folder / "task.json"
    task_file.write_text(json.dumps(task))
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_EXTENSIONS_DIR": str(folder / "ext"),
        "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={world}",
        "-m", "tests.distributed.worker", str(task_file),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Found([json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)])


def as_task(model: Path, jobs: Sequence[Sequence[Sequence[Request]]], **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model), "parallel": {"expert": 2, "tensor": 1, "zero_stage": 3}, "dtype": "fp32", "batch_size": 4,
        "generate": [[[asdict(request) for request in share] for share in shares] for shares in jobs], "score": [[], []],
    } | changes  # fmt: skip


GREEDY = make_requests(12)
SAMPLED = make_requests(12, temperature=1.0, seed=3)
ONLY_RANK_0 = make_requests(5, seed=5)
SEQUENCES = [(7, 8, 9, 10), (11,), tuple(range(6, 50))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"), "glm")


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One launch serves all the comparisons: uneven shares, sampling, and a rank that has nothing to do at all."""
    jobs = [[GREEDY[:9], GREEDY[9:]], [SAMPLED[:2], SAMPLED[2:]], [ONLY_RANK_0, []]]
    return run_ranks(tmp_path_factory.mktemp("ranks"), as_task(model, jobs, score=[SEQUENCES[:2], SEQUENCES[2:]]))


@pytest.fixture(scope="module")
def local(model: Path) -> LocalEngine:
    return LocalEngine(model, batch_size=4)


@pytest.mark.parametrize(
    ("job", "requests"), [(0, GREEDY), (1, SAMPLED), (2, ONLY_RANK_0)], ids=["greedy", "sampled", "idle-rank"]
)
def test_two_ranks_equal_one_process_token_for_token(found: Found, local: LocalEngine, job: int, requests: list[Request]) -> None:
    assert found.tokens(job) == {c.request_id: c.token_ids for c in local.generate(requests)}


def test_each_rank_answers_its_own_share(found: Found) -> None:
    assert [len(rank["jobs"][0]) for rank in found.ranks] == [9, 3]
    assert [len(rank["jobs"][2]) for rank in found.ranks] == [5, 0]


def test_scores_equal_one_process(found: Found, local: LocalEngine) -> None:
    scored = [values for rank in found.ranks for values in rank["scores"]]
    for values, expected in zip(scored, local.score(SEQUENCES), strict=True):
        assert values == pytest.approx(expected.logprobs, abs=1e-4)  # float32, other GEMM shapes


def test_expert_counts_of_both_ranks_add_up_to_one_process(found: Found, model: Path) -> None:
    """AutoEP's router and transformers' are hooked at different outputs; dummy steps and padding are in neither."""
    fresh = LocalEngine(model, batch_size=7)
    list(fresh.generate([*GREEDY, *SAMPLED, *ONLY_RANK_0]))
    stats = fresh.expert_stats()
    assert stats is not None
    for task, expected in stats.counts.items():
        parts = [torch.tensor(rank["counts"][task]) for rank in found.ranks if task in rank["counts"]]
        assert torch.equal(torch.stack(parts).sum(0), torch.tensor(expected)), task


def test_the_selection_bias_stays_float32(found: Found) -> None:
    assert [rank["bias_dtypes"] for rank in found.ranks] == [["torch.float32"]] * 2


@pytest.mark.long
@pytest.mark.parametrize(("expert", "zero_stage"), [(1, 3), (2, 0)])
def test_other_layouts_equal_one_process(model: Path, local: LocalEngine, tmp_path: Path, expert: int, zero_stage: int) -> None:
    task = as_task(model, [[GREEDY[:9], GREEDY[9:]]], parallel={"expert": expert, "tensor": 1, "zero_stage": zero_stage})
    assert run_ranks(tmp_path, task).tokens(0) == {c.request_id: c.token_ids for c in local.generate(GREEDY)}


@pytest.mark.long
def test_tensor_parallel_ranks_equal_one_process(model: Path, local: LocalEngine, tmp_path: Path) -> None:
    """EP 2 folded with TP 2 on two ranks: both work on the same requests."""
    task = as_task(model, [[GREEDY, GREEDY]], parallel={"expert": 2, "tensor": 2, "zero_stage": 3})
    expected = {c.request_id: c.token_ids for c in local.generate(GREEDY)}
    for rank in run_ranks(tmp_path, task).ranks:
        assert {c["request_id"]: tuple(c["token_ids"]) for c in rank["jobs"][0]} == expected


@pytest.mark.long
def test_bf16_keeps_the_router_in_float32(model: Path, tmp_path: Path) -> None:
    ranks = run_ranks(tmp_path, as_task(model, [[GREEDY[:3], GREEDY[3:]]], dtype="bf16")).ranks
    assert [rank["bias_dtypes"] for rank in ranks] == [["torch.float32"]] * 2


def test_autoep_routes_bf16_tokens_as_transformers_does() -> None:
    """Without the float32 product, 0.3 % of tokens go elsewhere: 4,000 tokens see it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**GLM)
    assert isinstance(config, GlmMoeDsaConfig)
    reference = GlmMoeDsaTopkRouter(config).bfloat16()
    reference.weight.data.normal_(0, 0.2)
    bias = torch.empty(8).uniform_(-0.1, 0.1)
    reference.register_buffer("e_score_correction_bias", bias)
    router = TokenChoiceTopKRouter(32, 8, None, None, 2, "sigmoid", True, config.routed_scaling_factor, False).bfloat16()
    router.gate.weight.data.copy_(reference.weight.data)
    del router.e_score_correction_bias
    router.register_buffer("e_score_correction_bias", bias)
    tokens = torch.randn(4000, 32, dtype=torch.bfloat16)
    _, expected_weights, expected = reference(tokens)
    assert (router(tokens)[1].sort(-1).values != expected.sort(-1).values).any(), "AutoEP is exact by itself now: drop the patch"
    route_in_float32(torch.nn.ModuleList([router]))
    weights, chosen, _ = router(tokens)
    assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)
    assert torch.allclose(weights.sort(-1).values, expected_weights.sort(-1).values, atol=1e-6)


@pytest.mark.parametrize(
    ("parallel", "world", "said"),
    [
        (Parallel(expert=2, zero_stage=0), 2, "layout.zero_stage 0: .* only with zero_stage 3"),
        (Parallel(expert=3), 2, "layout.expert_parallel 3: does not divide the 2 ranks"),
        (Parallel(tensor=4), 2, "layout.tensor_parallel 4: does not divide the 2 ranks"),
        (Parallel(expert=3), 3, "layout.expert_parallel 3: does not divide the model's 8 experts"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_its_sum(parallel: Parallel, world: int, said: str) -> None:
    with pytest.raises(UnusableInput, match=said):
        check_layout(parallel, "bf16", AutoConfig.for_model(**GLM), world)
