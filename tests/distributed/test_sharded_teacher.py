"""Two gloo processes with ZeRO-3 and experts over both equal one process, token for token; nobody hangs."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from transformers import AutoConfig, GlmMoeDsaConfig
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaTopkRouter

from configs.errors import UnusableInput
from data.engine import Request
from teacher.deepspeed_engine import BACKSTOP_S, route_in_float32
from teacher.families import FAMILIES
from teacher.local_engine import LocalEngine
from teacher.parallel import Parallel, check_layout, parallel_config, zero_config
from tests.distributed.launch import Found, as_task, run_ranks
from tests.teacher.models import GLM, save_random_model
from tests.teacher.test_decode import make_requests

GREEDY = make_requests(12)
SAMPLED = make_requests(12, temperature=1.0, seed=3)
ONLY_RANK_0 = make_requests(5, seed=5)
BUDGET_TOKENS = 256
SEQUENCES = [(7, 8, 9, 10), (11,), tuple(range(6, 50))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"), "glm")


def bytes_per_token(model: Path) -> int:
    """Of cache, as one process sees it."""
    cache_tokens = LocalEngine(model, cache_bytes=1 << 30).runner.limits.cache_tokens
    assert cache_tokens is not None
    return (1 << 30) // cache_tokens


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One launch serves all the comparisons: uneven shares, sampling, a rank that has nothing to do at all, and a cache too
    small for all slots. A killed build of DeepSpeed's shared-memory collective has left its lock behind: nobody may wait for
    it."""
    folder = tmp_path_factory.mktemp("ranks")
    lock = folder / "ext" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    jobs = [[GREEDY[:9], GREEDY[9:]], [SAMPLED[:2], SAMPLED[2:]], [ONLY_RANK_0, []]]
    budget = BUDGET_TOKENS * bytes_per_token(model)
    found = run_ranks(folder, as_task(model, jobs, score=[SEQUENCES[:2], SEQUENCES[2:]], cache_bytes=budget))
    assert [path for path in lock.parent.rglob("*") if path.is_file()] == [lock], "something was compiled"
    return found


@pytest.fixture(scope="module")
def local(model: Path) -> LocalEngine:
    return LocalEngine(model, batch_size=4)


@pytest.mark.parametrize(
    ("job", "requests"), [(0, GREEDY), (1, SAMPLED), (2, ONLY_RANK_0)], ids=["greedy", "sampled", "idle-rank"]
)
def test_two_ranks_equal_one_process_token_for_token(found: Found, local: LocalEngine, job: int, requests: list[Request]) -> None:
    assert found.tokens(job) == {c.request_id: c.token_ids for c in local.generate(requests)}


def test_each_rank_admits_by_the_bytes_of_its_cache(found: Found) -> None:
    """Four slots of 128 columns would take 512."""
    assert [rank["cache_tokens"] for rank in found.ranks] == [BUDGET_TOKENS, BUDGET_TOKENS]


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


def test_a_closed_engine_leaves_no_process_group_behind(found: Found) -> None:
    """Without the barrier and the orderly end, one run aborted at exit."""
    assert [rank["group_is_left"] for rank in found.ranks] == [False, False]


def test_every_process_group_has_the_time_out_that_was_asked_for(found: Found) -> None:
    """DeepSpeed's own groups, in which most collectives run, would wait for torch's 30 minutes."""
    assert [rank["timeouts_s"] for rank in found.ranks] == [[60 + BACKSTOP_S]] * 2


def test_transformers_sees_plain_values_and_no_parallel_sections() -> None:
    """HfDeepSpeedConfig misreads the parallel sections, and neither it nor DeepSpeed takes a torch dtype."""
    for dtype in ("fp32", "bf16"):
        announced = zero_config(dtype, Parallel(expert=2, tensor=2))
        assert json.loads(json.dumps(announced)) == announced
        assert not {"tensor_parallel", "expert_parallel"} & announced.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_only_initialize_is_given_the_parallel_sections(model_type: str) -> None:
    sections = parallel_config(Parallel(expert=2, tensor=2), model_type)
    assert json.loads(json.dumps(sections)) == sections and sections.keys() == {"tensor_parallel", "expert_parallel"}
    assert parallel_config(Parallel(), model_type) == {}


def test_small_parameters_are_sharded_like_large_ones() -> None:
    """The default threshold keeps them whole, and then ranks that step apart do not hang on a small model."""
    assert zero_config("bf16", Parallel())["zero_optimization"]["stage3_param_persistence_threshold"] == 0


def test_an_architecture_that_nobody_has_tried_runs_under_zero_alone() -> None:
    assert parallel_config(Parallel(), "olmoe") == {}
    for parallel in (Parallel(expert=2), Parallel(tensor=2)):
        with pytest.raises(UnusableInput, match="model_type olmoe: .* know glm_moe_dsa, .*ZeRO-3 alone"):
            parallel_config(parallel, "olmoe")


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
    ("parallel", "world", "ranks_per_node", "said"),
    [
        (Parallel(expert=3), 2, 2, "layout.expert_parallel 3: does not divide the 2 ranks"),
        (Parallel(tensor=4), 2, 2, "layout.tensor_parallel 4: does not divide the 2 ranks"),
        (Parallel(expert=3), 3, 3, "layout.expert_parallel 3: does not divide the model's 8 experts"),
        (Parallel(tensor=4), 4, 4, "layout.tensor_parallel 4: does not divide the model's num_attention_heads 2"),
        (Parallel(tensor=2), 2, 1, "layout.tensor_parallel 2: does not divide the 1 ranks of a node"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_its_sum(
    parallel: Parallel, world: int, ranks_per_node: int, said: str
) -> None:
    with pytest.raises(UnusableInput, match=said):
        check_layout(parallel, AutoConfig.for_model(**GLM), world, ranks_per_node)
