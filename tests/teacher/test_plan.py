"""What fits: bytes on a GPU against the published capacity table, and what is said of a layout that does not fit."""

import json
import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest

from configs.devices import DEVICES, WEIGHT_BYTES
from configs.errors import UnusableInput
from configs.load import load_recipe
from configs.planning import Planning
from configs.schema import Recipe
from teacher.plan import Plan, architecture_of, kv_budget_bytes, plan_recipe
from teacher.planning.architecture import read_architecture
from teacher.planning.degrees import Degrees
from teacher.planning.fit import needed_bytes
from teacher.planning.placement import ANY_SAMPLING, TILES_BYTES, sampling_bytes
from teacher.planning.weights import cut_weights, extra_bytes, rank_weights, whole_parameters
from tests.teacher.models import QWEN

GLM = architecture_of("configs/architectures/glm-5.2")
REPOSITORY = Path(__file__).parents[2]
USABLE = DEVICES["h200"].usable


def planned(name: str, *overrides: str) -> Plan:
    return plan_recipe(load_recipe(name, overrides).recipe)


def degrees(world: int, *, expert: int, tensor: int, zero: bool = False, server: bool = False) -> Degrees:
    return Degrees(world=world, ranks_per_node=8, expert=expert, tensor=tensor, zero=zero, server=server)


# --- the published table: H200 at 92 % of 141 GB ------------------------------------------------------------------

TABLE = [
    ("fp8", degrees(8, expert=1, tensor=8, server=True), 92.9, 36.8),
    ("fp8", degrees(16, expert=16, tensor=1, server=True), 63.7, 66.0),
    ("bf16", degrees(8, expert=8, tensor=8), 185.8, -56.1),
    ("bf16", degrees(16, expert=16, tensor=8), 95.2, 34.5),
    ("bf16", degrees(16, expert=16, tensor=8, zero=True), 92.9, 36.8),
    ("bf16", degrees(16, expert=16, tensor=1, zero=True), 92.9, 36.8),
    ("bf16", degrees(32, expert=32, tensor=8), 49.9, 79.8),
]


@pytest.mark.parametrize(("dtype", "layout", "weights", "left"), TABLE)
def test_weights_and_what_they_leave_are_the_published_ones(dtype: str, layout: Degrees, weights: float, left: float) -> None:
    found = cut_weights(GLM.parts, layout, WEIGHT_BYTES[dtype]).total / 1e9
    assert found == pytest.approx(weights, rel=0.01)
    assert USABLE / 1e9 - found == pytest.approx(left, rel=0.01)


def test_the_row_with_the_least_left_differs_by_the_indexers() -> None:
    """BF16 x 16 with whole dense weights leaves 2.2 GB in the table and 1.9 here, far more than 1 % of so little: the
    table's rows with replicated dense weights (63.7 and 127.5 GB) leave out the indexers, 0.2 B parameters. What remains
    is its rounding: 127.5 is twice 63.7 rounded up."""
    found = cut_weights(GLM.parts, degrees(16, expert=16, tensor=1), 2.0)
    assert found.total / 1e9 == pytest.approx(127.5, rel=0.01)
    assert (USABLE - found.total) / 1e9 == pytest.approx(1.92, abs=0.01)
    assert (USABLE - found.total + found.indexer) / 1e9 == pytest.approx(2.2, abs=0.12)
    fp8 = cut_weights(GLM.parts, degrees(16, expert=16, tensor=1, server=True), 1.0)
    assert (fp8.total - fp8.indexer) / 1e9 == pytest.approx(63.70, abs=0.01)


def test_shipped_recipes_are_rows_of_the_table() -> None:
    found = {name: planned(name).fit.room for name in RECIPES}
    weights = {name: room.weights.total / 1e9 for name, room in found.items()}
    expected = {"glm52-bf16-16xh200": 95.2, "glm52-bf16-32xh200": 49.9, "glm52-fp8-8xh200": 92.9, "glm52-fp8-16xh200": 63.7}
    assert weights == pytest.approx(expected, rel=0.01)
    left = {name: room.free / 1e9 for name, room in found.items() if room.free is not None}
    expected = {"glm52-bf16-16xh200": 34.5, "glm52-bf16-32xh200": 79.8, "glm52-fp8-8xh200": 36.8, "glm52-fp8-16xh200": 66.0}
    assert left == pytest.approx(expected, rel=0.01)


RECIPES = ("glm52-bf16-16xh200", "glm52-bf16-32xh200", "glm52-fp8-8xh200", "glm52-fp8-16xh200")


def test_a_million_tokens_of_cache_take_100_gigabytes_in_bf16_and_half_in_fp8() -> None:
    assert GLM.cache_values() == 78 * (512 + 64) + 21 * 128
    assert GLM.cache_values() * 2 / 1e3 == pytest.approx(95.2, rel=0.001)
    assert GLM.cache_values() * 2 * 2**20 / 1e9 == pytest.approx(99.9, rel=0.001)
    assert GLM.cache_values() * 2**20 / 1e9 == pytest.approx(49.9, rel=0.001)


def test_one_request_of_a_million_fp8_tokens_fits_16_gpus_and_not_8() -> None:
    assert planned("glm52-fp8-16xh200").max_context_tokens == 2**20
    assert (planned("glm52-fp8-8xh200").max_context_tokens or 0) < 0.75 * 2**20
    assert planned("glm52-fp8-8xh200", "plan.context_tokens=1048576").fit.fits is False


# --- what the table leaves out -------------------------------------------------------------------------------------


def test_what_tensor_parallelism_leaves_whole_is_counted_beside_the_weights() -> None:
    """Projections into latents, indexers, routers, norms and the embedding: 2.5 of GLM-5.2's 18.6 B dense parameters."""
    config_layers, hidden = 78, 6144
    down = config_layers * hidden * (2048 + 512 + 64)
    expected = down + GLM.parts.indexer + GLM.parts.router + GLM.parts.norms + GLM.parts.embeddings
    layout = degrees(16, expert=16, tensor=8)
    assert whole_parameters(GLM, layout).total == expected
    assert extra_bytes(GLM, layout, "bf16").uncut == int(expected * 2 * 7 / 8)
    assert extra_bytes(GLM, layout._replace(tensor=1), "bf16") == (0, 0, 0)


def test_zero_slices_what_tensor_parallelism_leaves_whole_over_all_ranks_but_for_the_routers() -> None:
    """As prepared shards are cut: 16 slices of a latent's projection, 2 (the replicas) of a router that AutoEP made anew."""
    spread, together = degrees(16, expert=16, tensor=8, zero=True), degrees(16, expert=1, tensor=8, zero=True)
    assert extra_bytes(GLM, spread, "bf16").uncut == int(GLM.parts.router * 2 * (1 / 2 - 1 / 16))
    assert extra_bytes(GLM, together, "bf16").uncut == 0


def test_a_rank_uses_every_parameter_of_its_share_whatever_holds_it() -> None:
    held = rank_weights(GLM, degrees(16, expert=16, tensor=8), "bf16")
    whole = whole_parameters(GLM, degrees(16, expert=16, tensor=8))
    assert held.parameters.total == whole.total + (GLM.parts.dense - whole.total) / 8 + GLM.parts.routed_experts / 16
    assert held.num_bytes.total == 2 * held.parameters.total
    assert held == rank_weights(GLM, degrees(16, expert=16, tensor=8, zero=True), "bf16")


def test_a_quantised_checkpoint_keeps_some_weights_in_bf16() -> None:
    extra = extra_bytes(GLM, degrees(16, expert=16, tensor=1, server=True), "fp8")
    assert extra.unquantised == 2 * 154880 * 6144 + GLM.parts.router + GLM.parts.norms
    quantised = GLM.parts.attention + GLM.parts.indexer + GLM.parts.dense_mlp + GLM.parts.shared_experts
    assert extra.scales == pytest.approx((quantised + GLM.parts.routed_experts / 16) * 4 / 128**2, abs=5)
    # the router is whole on every tensor-parallel rank, in bf16 too
    cut = extra_bytes(GLM, degrees(8, expert=1, tensor=8, server=True), "fp8")
    assert cut.unquantised == 2 * 154880 * 6144 / 8 + GLM.parts.router + GLM.parts.norms


def test_the_bound_of_prefill_tiles_is_the_one_of_the_attention() -> None:
    from teacher.tiles import TILE_BYTES

    assert TILES_BYTES == 4 * TILE_BYTES


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "asked", ["{temperature: 0}", "{top_p: 1}", "{top_p: 0.95}", "{top_p: 1, min_p: 0.1}", "{top_p: 1, top_k: 5}"]
)
def test_room_for_sampling_is_what_sampling_holds_at_its_peak(dtype: str, asked: str) -> None:
    """Allocations and releases as torch's profiler sees them on a CPU; seeds, targets and ids of a row are 0.1 %."""
    import torch

    from teacher.sampling import Noise, Pairs, Truncation, sample

    rows, vocabulary = 4, 20_000
    sampling = load_recipe("embedded", [f"generate.sampling={asked}"]).recipe.generate.sampling
    noise = None
    if sampling.temperature > 0:
        top_p, top_k, min_p = sampling.top_p, sampling.top_k, sampling.min_p
        ones = torch.ones(rows, dtype=torch.float64)
        cut = Truncation(ones * top_p, torch.full((rows,), top_k), ones * min_p) if (top_p, top_k, min_p) != (1, 0, 0) else None
        noise = Noise(ones, cut, ones / 2)
    logits_BV = torch.randn(rows, vocabulary).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    banned_V = torch.arange(vocabulary) > vocabulary - 10
    peak = peak_bytes(lambda: sample(logits_BV, noise, banned_V, Pairs(torch.tensor([0]), torch.tensor([1]))))
    assert sampling_bytes(rows, vocabulary, dtype, sampling) == pytest.approx(logits_BV.nbytes + peak, rel=0.001)


def peak_bytes(work: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    changes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[attr-defined]
    return max(accumulate(changes))


def test_a_plan_counts_the_recipes_own_sampling_and_an_engine_any() -> None:
    """64 rows of 154,880 logits in bf16: 60 bytes each where the vocabulary is sorted, row after row, and 14 greedily."""
    plans = [planned("glm52-bf16-16xh200", f"generate.sampling={{temperature: {kind}}}") for kind in (1, 0)]
    assert [plan.fit.room.transients.logits for plan in plans] == [154_880 * (64 * 60 + 8), 154_880 * 64 * 14]
    assert {plan.fit.cache_bytes_per_gpu for plan in plans} == {kv_budget_bytes(plans[0].teacher)}
    assert sampling_bytes(64, 154_880, "bf16", ANY_SAMPLING) == plans[0].fit.room.transients.logits


def test_sharding_the_cache_by_token_divides_it_over_a_node() -> None:
    whole, sharded = (planned("glm52-bf16-16xh200", f"teacher.layout.kv_cache={kind}") for kind in ("replicated", "sharded"))
    assert whole.fit.cache.pools == sharded.fit.cache.pools == 2
    longest = (whole.fit.cache.max_tokens or 0, sharded.fit.cache.max_tokens or 0)
    assert longest[1] == pytest.approx(8 * longest[0], rel=1e-4)
    assert sharded.max_context_tokens == 2**20


def test_latents_are_the_same_on_every_tensor_parallel_rank_and_grouped_heads_are_not() -> None:
    moe = architecture_of("configs/architectures/qwen3-235b-a22b")
    assert [GLM.cache_values(ranks) for ranks in (1, 8)] == [GLM.cache_values()] * 2
    assert [moe.cache_values(ranks) for ranks in (1, 2, 4, 8)] == [moe.cache_values() // cut for cut in (1, 2, 4, 4)]


def test_the_budget_is_what_is_left_after_everything_else() -> None:
    recipe = load_recipe("glm52-bf16-32xh200").recipe
    plan = plan_recipe(recipe)
    room = plan.fit.room
    assert kv_budget_bytes(recipe.teacher) == USABLE - room.weights.total - sum(room.extra) - sum(room.transients)
    assert kv_budget_bytes(load_recipe("embedded").recipe.teacher) is None
    too_small = load_recipe("glm52-bf16-16xh200", ["teacher.hardware.nodes=1"]).recipe
    assert kv_budget_bytes(too_small.teacher, Planning()) == 0


# --- the longest request -------------------------------------------------------------------------------------------

OURS = ("glm52-bf16-16xh200", "teacher.layout.zero_stage=0")


@pytest.mark.parametrize("sampling", ["{max_tokens: %d}", "{max_tokens: %d, temperature: 0}"])
def test_a_plan_fits_exactly_when_the_decode_loop_would_admit_its_longest_request(sampling: str) -> None:
    """The loop admits prompt + max_tokens by whole tokens of the budget that the engine gets, whatever the sampling."""
    tokens = (kv_budget_bytes(load_recipe(*OURS[:1]).recipe.teacher) or 0) // (GLM.cache_values() * 2)
    fitting, refused = (planned(*OURS, f"generate.sampling={sampling % (tokens - 4000 + more)}") for more in (0, 1))
    assert (fitting.fit.fits, refused.fit.fits) == (True, False)
    assert fitting.demand.longest_tokens == fitting.max_context_tokens == tokens
    assert refused.demand.slot_tokens == fitting.demand.slot_tokens == 36_000  # rates are of the workload all the same


def test_an_output_too_long_for_the_cache_is_refused_with_the_length_that_fits() -> None:
    plan = planned(*OURS, "generate.sampling.max_tokens=300000")
    assert plan.refusal is not None and "for a request of 304,000 tokens do not fit" in plan.refusal
    remedy = re.search(r"-s (generate.sampling.max_tokens=\d+) would fit; nearest that fit: 2 nodes", plan.refusal)
    assert remedy is not None and planned(*OURS, remedy[1]).fit.fits is True
    longer = remedy[1].replace("=", "=1")
    assert planned(*OURS, longer).fit.fits is False
    assert planned(*OURS, "generate.sampling.max_tokens=300000", "plan.context_tokens=304000").refusal is not None


def test_an_output_is_cut_at_the_models_positions_and_a_server_is_not_asked_for_max_tokens() -> None:
    plan = planned("glm52-fp8-8xh200", "generate.sampling.max_tokens=2000000")
    assert plan.fit.fits is True and plan.demand.longest_tokens == plan.demand.request_tokens
    sharded = planned(*OURS, "teacher.layout.kv_cache=sharded", "generate.sampling.max_tokens=2000000")
    assert sharded.demand.longest_tokens == GLM.max_positions and sharded.fit.fits is True


def test_a_stated_cache_is_what_requests_are_let_in_by_on_a_cpu_too() -> None:
    small, large = (planned("embedded", f"teacher.engine.cache_bytes={size}") for size in (1_441_791, 1_441_792))
    assert (small.fit.fits, large.fit.fits) == (False, True)  # 1,024 positions of 1,408 bytes
    assert small.refusal is not None and "holds 1,023 tokens of cache, too few for a request of 1,024 tokens" in small.refusal
    assert "set it to 1441792 or more" in small.refusal and "layout" not in small.refusal
    assert planned(*OURS, "teacher.engine.cache_bytes=5000").fit.fits is False
    spread = planned("embedded", "teacher.engine.cache_bytes=1000", "teacher.layout.kv_cache=sharded")
    assert spread.refusal is not None and "cache_bytes 1000 holds 1 tokens of cache" in spread.refusal
    assert "set it to 720896 or more" in spread.refusal  # half of the request on each of two ranks
    assert planned(*OURS, "teacher.engine.cache_bytes=500000000000").fit.cache == planned(*OURS).fit.cache


def test_the_loop_refuses_what_the_plan_refuses() -> None:
    """The embedded teacher, with room for 710 tokens: an output that could be one token longer is refused by both."""
    from data.engine import Request
    from teacher.engines import open_engine

    stated = (
        "teacher.engine={type: local, dtype: fp32, batch_size: 2, cache_bytes: 1000000}",
        "teacher.layout.expert_parallel=1",
    )
    engine = open_engine(load_recipe("embedded", stated).recipe.teacher)
    engine.load()
    for max_tokens, fits in ((610, True), (611, False)):
        workload = ("plan.workload.prompt_tokens=100", f"generate.sampling.max_tokens={max_tokens}")
        assert planned("embedded", *stated, *workload).fit.fits is fits
        ends = tuple(range(136))  # with its first token, whatever that is
        request = Request("one", (5,) * 100, ends, max_tokens, temperature=0.0, top_p=1.0, seed=0)
        if fits:
            assert len(list(engine.generate([request]))) == 1
        else:
            with pytest.raises(UnusableInput, match="may take 711 tokens of cache, the budget holds 710"):
                list(engine.generate([request]))


# --- layouts that do not fit ---------------------------------------------------------------------------------------


def test_a_layout_that_does_not_fit_names_its_shortfall_and_ones_that_do() -> None:
    plan = planned("glm52-bf16-16xh200", "teacher.hardware.nodes=1")
    room, demand = plan.fit.room, plan.demand
    assert plan.fit.fits is False and plan.step is None and plan.cost is None
    assert room.cache is not None and plan.fit.shortfall == needed_bytes(plan.fit.cache, demand) - room.cache
    assert plan.refusal is not None and "\n" not in plan.refusal
    assert "185.8 GB of weights" in plan.refusal and "-s teacher.hardware.nodes=2" in plan.refusal


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("glm52-bf16-16xh200", ("teacher.hardware.nodes=1",)),
        ("glm52-bf16-16xh200", ("teacher.hardware.nodes=3",)),
        ("glm52-bf16-16xh200", ("teacher.hardware.gpu=h100",)),
        ("glm52-fp8-8xh200", ("plan.context_tokens=1000000",)),
        ("glm52-fp8-8xh200", ("teacher.engine.dtype=bf16",)),
        ("generic-moe", ("teacher.hardware.gpu=h100", "teacher.layout.zero_stage=0", "plan.concurrency=512")),
    ],
)
def test_every_layout_that_is_offered_fits_when_it_is_taken(name: str, overrides: tuple[str, ...]) -> None:
    plan = planned(name, *overrides)
    assert plan.fit.fits is False and plan.alternatives
    for one in plan.alternatives:
        taken = planned(name, *overrides, *(word for word in one.overrides.split() if word != "-s"))
        assert taken.fit.fits is True, one
        assert taken.decode_tokens_per_s_per_gpu == pytest.approx(one.decode_tokens_per_s_per_gpu)


@pytest.mark.parametrize("overrides", [("teacher.hardware.nodes=3",), ("plan.context_tokens=304000",),
                                       ("teacher.layout.tensor_parallel=1",)])  # fmt: skip
def test_layouts_with_the_fewest_nodes_changed_come_first_then_those_with_the_fewest_settings(overrides: tuple[str, ...]) -> None:
    plan = planned("glm52-bf16-16xh200", *overrides)
    order = [(abs(one.nodes - plan.teacher.hardware.nodes), one.nodes, one.overrides.count("-s ")) for one in plan.alternatives]
    assert len(order) == 3 and order == sorted(order)


def test_the_search_for_layouts_does_not_grow_with_the_ranks() -> None:
    """Degrees are divisors of experts and heads; a stated number of processes has no bound."""
    plan = planned("glm52-bf16-16xh200", "teacher.engine.processes=10000000000")
    assert plan.refusal is not None and plan.alternatives


def test_experts_must_divide_over_the_ranks() -> None:
    plan = planned("glm52-bf16-16xh200", "teacher.hardware.nodes=3")
    assert plan.fit.fits is False and plan.fit.shortfall is None
    assert plan.refusal is not None and "layout.expert_parallel 24 does not divide the model's 256 experts" in plan.refusal
    assert {one.nodes for one in plan.alternatives} == {2, 4}


def test_heads_must_divide_over_tensor_parallel_ranks() -> None:
    plan = planned("glm52-bf16-16xh200", "teacher.hardware.gpus_per_node=3", "teacher.layout.expert_parallel=1",
                   "teacher.layout.tensor_parallel=3")  # fmt: skip
    assert plan.refusal is not None and "tensor_parallel 3 does not divide the model's 64 attention heads" in plan.refusal


def test_a_dense_model_has_no_experts_to_spread(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    plan = planned("embedded", f"teacher.model={tmp_path}")
    assert plan.fit.fits is False and plan.refusal is not None and "no routed experts" in plan.refusal


def test_a_degree_that_does_not_divide_the_ranks_is_a_mistake_in_the_recipe() -> None:
    with pytest.raises(UnusableInput, match=r"layout.expert_parallel 5 does not divide the 16 ranks \(8 on each of hardware"):
        planned("glm52-bf16-16xh200", "teacher.layout.expert_parallel=5")


def test_stated_concurrency_has_to_fit() -> None:
    fitting = planned("glm52-bf16-16xh200").fit.cache.requests(planned("glm52-bf16-16xh200").demand.slot_tokens)
    assert planned("glm52-bf16-16xh200", f"plan.concurrency={fitting}").fit.fits is True
    refused = planned("glm52-bf16-16xh200", f"plan.concurrency={(fitting or 0) + 1}")
    assert refused.fit.fits is False and refused.refusal is not None and f"{(fitting or 0) + 1} requests" in refused.refusal


# --- other engines and unknown devices -----------------------------------------------------------------------------


def test_the_embedded_teacher_on_cpu_has_sizes_and_no_verdict() -> None:
    plan = planned("embedded")
    assert plan.fit.fits is None and plan.refusal is None and plan.max_context_tokens is None
    assert plan.fit.room.weights.total > 0 and plan.step is None and plan.cost is None
    assert [row.context_tokens for row in plan.contexts] == []  # all of them are beyond its 1,024 positions


@pytest.mark.parametrize("engine", ["{type: local}", "{type: http}", "{type: deepspeed}", "{type: http, dtype: int4}"])
@pytest.mark.parametrize("gpu", ["cpu", "h100"])
def test_every_engine_can_be_planned_on_every_device(engine: str, gpu: str) -> None:
    plan = planned("embedded", f"teacher.engine={engine}", f"teacher.hardware.gpu={gpu}")
    assert plan.fit.fits is (True if gpu == "h100" else None)
    assert (plan.step is None) == (gpu == "cpu")


def test_a_server_cuts_experts_over_its_tensor_parallel_ranks_and_autotp_does_not() -> None:
    server = cut_weights(GLM.parts, degrees(8, expert=1, tensor=8, server=True), 1.0)
    ours = cut_weights(GLM.parts, degrees(8, expert=1, tensor=8), 1.0)
    assert (server.routed_experts, ours.routed_experts) == (GLM.parts.routed_experts // 8, GLM.parts.routed_experts)


def test_all_experts_means_every_rank_of_the_launch() -> None:
    recipe = load_recipe("glm52-bf16-16xh200", ["teacher.hardware.nodes=4"]).recipe
    assert recipe == Recipe.model_validate(recipe.model_dump())
    assert (recipe.teacher.world, recipe.teacher.expert_parallel, recipe.teacher.ranks_per_node) == (32, 32, 8)


@pytest.mark.parametrize("name", ["embedded", "generic-moe", *RECIPES])
def test_every_shipped_recipe_can_be_planned_and_none_is_refused(name: str) -> None:
    assert planned(name).refusal is None


@pytest.mark.parametrize("override", ["teacher.layout.kv_cache=sharded", "teacher.engine.kv_dtype=fp8"])
def test_our_engine_refuses_a_cache_that_only_a_plan_can_have(override: str) -> None:
    from teacher.engines import open_engine

    with pytest.raises(UnusableInput, match=override.split("=")[0]):
        open_engine(load_recipe("embedded", [override]).recipe.teacher)


# --- config.json that nobody should plan with ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", "big", "hidden_size 'big'"), ("hidden_size", -1, "hidden_size -1"),
        ("vocab_size", True, "vocab_size True"),
        ("kv_lora_rank", 1.5, "kv_lora_rank 1.5"), ("num_hidden_layers", 0, "num_hidden_layers 0"),
        ("indexer_types", ["full"], "an entry for each of 78 layers"),
        ("num_experts_per_tok", 1000, "1000 in config.json, of 256"),
        ("hidden_size", float("inf"), "hidden_size inf"), ("n_shared_experts", None, ""),
        ("num_experts_per_tok", None, "no num_experts_per_tok in config.json"),
        ("max_position_embeddings", None, "no max_position_embeddings in config.json"),
        ("index_topk", None, "no index_topk in config.json"), ("q_lora_rank", None, "cannot be counted with"),
        ("num_local_experts", float("nan"), "num_local_experts nan"), ("num_local_experts", 1e308, r"num_local_experts 1e\+308"),
        ("num_hidden_layers", 10**400, r"num_hidden_layers 10+\.\.\. in config.json"),
        ("model_type", ["glm_moe_dsa"], r"model_type \['glm_moe_dsa'\] in config.json; expected a name"),
        ("model_type", {"a": 1}, "expected a name"), ("index_topk_freq", "x", "index_topk_freq 'x'"),
    ],
)  # fmt: skip
def test_a_damaged_configuration_is_one_line(key: str, value: object, said: str) -> None:
    config = json.loads((REPOSITORY / "configs/architectures/glm-5.2/config.json").read_text()) | {key: value}
    if not said:  # absent, as some families write it
        assert read_architecture(config, "here").parts.shared_experts == 0
        return
    with pytest.raises(UnusableInput, match=said) as refused:
        read_architecture(config, "here")
    assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "damage",
    [
        b'\xff\xfe{"a": 1}', b"[1]", b'{"hidden_size": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"model_type": ["llama"]}',
        b'{"model_type": {"a": 1}}', b'{"model_type": "mixtral", "num_local_experts": NaN}',
        b'{"model_type": "gpt9", "num_hidden_layers": null}',
    ],
)  # fmt: skip
def test_a_damaged_configuration_file_is_one_line(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "config.json").write_bytes(damage)
    with pytest.raises(UnusableInput, match=r"config\.json|no size formula") as refused:
        architecture_of(str(tmp_path))
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


def test_tensor_parallelism_stays_inside_a_node_and_cuts_key_value_heads_evenly() -> None:
    across = plan_recipe(load_recipe("glm52-bf16-16xh200", ["teacher.layout.tensor_parallel=16"]).recipe)
    assert across.refusal is not None and "must not cross the network" in across.refusal
    grouped = plan_recipe(load_recipe("generic-moe", ["teacher.layout.tensor_parallel=8"]).recipe)
    assert grouped.refusal is not None and "4 key-value heads" in grouped.refusal
    assert all(one.tensor_parallel <= 4 for one in grouped.alternatives)


def test_a_stated_length_above_the_models_positions_is_refused() -> None:
    for change in ("plan.context_tokens=99999999", "plan.workload.prompt_tokens=5000000"):
        with pytest.raises(UnusableInput, match="above the model's 1048576 positions"):
            plan_recipe(load_recipe("glm52-fp8-16xh200", [change]).recipe)
