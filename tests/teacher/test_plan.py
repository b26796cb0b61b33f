"""What fits: bytes on a GPU against the published capacity table, and what is said of a layout that does not fit."""

import json
from pathlib import Path

import pytest

from configs.errors import UnusableInput
from configs.load import load_recipe
from configs.schema import Planning, Recipe
from teacher.plan import Plan, architecture_of, kv_budget_bytes, plan_recipe
from teacher.planning.architecture import read_architecture
from teacher.planning.devices import DEVICES, WEIGHT_BYTES, Degrees
from teacher.planning.fit import needed_bytes
from teacher.planning.placement import TILES_BYTES, cut_weights, extra_bytes, uncut_parameters
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
    assert uncut_parameters(GLM, layout) == expected
    assert extra_bytes(GLM, layout, "bf16").uncut == int(expected * 2 * 7 / 8)
    assert extra_bytes(GLM, layout._replace(tensor=1), "bf16") == (0, 0, 0)
    assert extra_bytes(GLM, layout._replace(zero=True), "bf16").uncut == int(expected * 2 * 7 / 8 / 2)


def test_a_quantised_checkpoint_keeps_some_weights_in_bf16() -> None:
    extra = extra_bytes(GLM, degrees(16, expert=16, tensor=1, server=True), "fp8")
    assert extra.unquantised == 2 * 154880 * 6144 + GLM.parts.router + GLM.parts.norms
    assert extra.scales == int(cut_weights(GLM.parts, degrees(16, expert=16, tensor=1), 1.0).total * 4 / 128**2)


def test_the_bound_of_prefill_tiles_is_the_one_of_the_attention() -> None:
    from teacher.tiles import TILE_BYTES

    assert TILES_BYTES == 4 * TILE_BYTES


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
    ],
)  # fmt: skip
def test_a_damaged_configuration_is_one_line(key: str, value: object, said: str) -> None:
    config = json.loads((REPOSITORY / "configs/architectures/glm-5.2/config.json").read_text()) | {key: value}
    if not said:  # absent, as some families write it
        assert read_architecture(config, "here").parts.shared_experts == 0
        return
    with pytest.raises(UnusableInput, match=said):
        read_architecture(config, "here")


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
