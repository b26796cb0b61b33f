"""How fast: bytes, operations and seconds against figures worked out by hand and sums written out."""

import random

import pytest

from configs.devices import Links, device_of
from configs.load import load_recipe
from configs.planning import Planning
from configs.schema import Teacher
from teacher.plan import architecture_of, plan_recipe
from teacher.planning.degrees import degrees_of
from teacher.planning.throughput import Machine, decode_step, gather_s, gathered_bytes, machine, prefill_seconds, touched_share
from teacher.planning.weights import cut_weights, whole_parameters

GLM = architecture_of("configs/architectures/glm-5.2")


def machine_of(name: str, *overrides: str) -> Machine:
    teacher: Teacher = load_recipe(name, overrides).recipe.teacher
    device = device_of(teacher.hardware.gpu)
    assert device is not None
    return machine(architecture_of(teacher.model), teacher, degrees_of(teacher), device)


def test_the_weights_only_roofline_is_the_published_one() -> None:
    """FP8 on 8 x H200 at 256 requests: 19.4 ms a step, 1,654 tokens/s per GPU. It takes every matrix for cut; what tensor
    parallelism leaves whole and what is not quantised is read on every rank, and makes ours 1.6 % longer."""
    runs_on = machine_of("glm52-fp8-8xh200")
    published = cut_weights(GLM.parts, runs_on.degrees, 1.0).total / runs_on.device.bandwidth
    assert published * 1e3 == pytest.approx(19.4, rel=0.01)
    assert 256 / published / 8 == pytest.approx(1654, rel=0.01)
    assert decode_step(runs_on, 256, 8192).weights_s == pytest.approx(published * 1.016, rel=0.001)


def test_the_default_efficiency_is_below_what_a_public_server_reaches() -> None:
    """267 output tokens/s per GPU at 256 requests; its contexts are not published, so short ones are assumed."""
    step = decode_step(machine_of("glm52-fp8-8xh200"), 256, 4096)
    assert step.tokens_per_s(Planning().efficiency) / 8 < 267 < step.tokens_per_s() / 8
    assert 267 / (256 / step.weights_s / 8) == pytest.approx(0.164, abs=0.001)


@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_the_share_of_experts_a_batch_touches_is_what_drawing_them_gives(tokens: int) -> None:
    draw = random.Random(0)
    seen = [len({expert for _ in range(tokens) for expert in draw.sample(range(32), 3)}) / 32 for _ in range(4000)]
    assert touched_share(32, 3, tokens) == pytest.approx(sum(seen) / len(seen), abs=0.01)  # 4,000 draws: 3 sigma
    assert touched_share(0, 0, tokens) == 0.0


def test_zero_gathers_37_gigabytes_a_step_beside_spread_experts_and_everything_without() -> None:
    layout = ("teacher.layout.tensor_parallel=1", "teacher.layout.zero_stage=3")
    spread = machine_of("glm52-bf16-16xh200", *layout)
    assert gathered_bytes(spread) / 1e9 == pytest.approx(37.2, rel=0.001)
    plain = machine_of("glm52-bf16-16xh200", *layout, "teacher.layout.expert_parallel=1")
    assert gathered_bytes(plain) / 1e12 == pytest.approx(1.49, rel=0.003)
    assert gathered_bytes(machine_of("glm52-bf16-16xh200")) == 0.0


def test_gathering_everything_takes_3_seconds_at_best_and_28_over_one_port() -> None:
    layout = ("teacher.layout.tensor_parallel=1", "teacher.layout.zero_stage=3", "teacher.layout.expert_parallel=1")
    one_node = machine_of("glm52-bf16-16xh200", *layout, "teacher.hardware.gpus_per_node=16", "teacher.hardware.nodes=1")
    assert gather_s(one_node) == pytest.approx(3.1, rel=0.01)
    one_port = machine_of("glm52-bf16-16xh200", *layout, "teacher.hardware.network_gb_per_s=6.25")
    assert gather_s(one_port) == pytest.approx(28, rel=0.01)


def test_a_ring_uses_the_ports_of_its_ranks_and_an_all_to_all_its_own() -> None:
    links = Links(link=400.0, network=10.0, ranks_per_node=4)
    assert links.ring(80.0, 4) == 80 * 3 / 4 / 400
    assert links.ring(80.0, 8) == 80 * 7 / 8 / 40  # four ports a node
    assert links.ring(80.0, 2, stride=4) == 80 / 2 / 10  # one rank a node, one port
    assert links.ring(80.0, 1) == 0.0
    assert links.all_to_all(80.0, 4) == 80 * 3 / 4 / 400
    assert links.all_to_all(80.0, 8) == 80 * 4 / 8 / 10  # half of it stays in the node, on the faster links
    assert links.all_to_all(80.0, 1) == 0.0


def test_the_traffic_of_a_step_is_what_its_parts_add_up_to() -> None:
    """16 replicas of 2 requests each, 10,000 tokens of context, experts over all ranks."""
    layout = ("teacher.layout.tensor_parallel=1", "teacher.layout.zero_stage=0")
    traffic = decode_step(machine_of("glm52-bf16-16xh200", *layout), 32, 10_000).traffic
    assert traffic.dense_read == (GLM.parts.dense - 154880 * 6144) * 2
    assert traffic.experts_read == pytest.approx(GLM.parts.routed_experts * 2 / 16 * (1 - (31 / 32) ** 32))
    assert traffic.cache_read == 2 * 2 * (78 * 2048 * 576 + 21 * 10_000 * 128)
    assert traffic.all_to_all == pytest.approx(2 * 2 * 8 * 6144 * 2 * 75 * 15 / 16)
    assert traffic.gathered == traffic.tensor_parallel == 0.0


@pytest.mark.parametrize("name", ["glm52-bf16-16xh200", "glm52-bf16-32xh200", "glm52-fp8-8xh200", "glm52-fp8-16xh200"])
def test_a_step_that_touches_every_expert_reads_the_weights_that_the_memory_table_lists(name: str) -> None:
    """All but the embedding, which is looked up: whole under DeepSpeed, a tensor-parallel rank's rows of it in a server, and
    two bytes a number in all of these."""
    plan = plan_recipe(load_recipe(name).recipe)
    assert plan.machine is not None
    degrees, room = plan.machine.degrees, plan.fit.room
    traffic = decode_step(plan.machine, 10**6, 1).traffic
    looked_up = 2 * GLM.parts.embeddings / (degrees.tensor if degrees.server else 1)
    listed = room.weights.total + sum(room.extra)
    assert traffic.dense_read + traffic.experts_read == pytest.approx(listed - looked_up, rel=1e-9)
    # a prompt of one pass reads as much
    slow = plan.machine._replace(device=plan.machine.device._replace(bandwidth=1.0))
    assert prefill_seconds(slow, 16, Planning()) == pytest.approx(listed - looked_up, rel=1e-9)


def test_a_step_of_the_bf16_recipe_is_worked_out_by_hand() -> None:
    """14 requests of 36,000 tokens: 17.65 B dense parameters without the embedding, 1.573 B of them whole on every rank; 4.41 GB
    of slices and 2.75 GB more, 32.51 GB of experts and 2.64 GB of cache at 4.8 TB/s are 8.82 ms."""
    step = decode_step(machine_of("glm52-bf16-16xh200"), 14, 36_000)
    whole = 78 * 6144 * (2048 + 512 + 64) + GLM.parts.indexer + GLM.parts.router + GLM.parts.norms
    assert whole / 1e9 == pytest.approx(1.573, abs=0.001)
    dense = GLM.parts.dense - GLM.parts.embeddings
    assert step.traffic.dense_read == 2 * ((dense - whole) / 8 + whole)
    assert step.traffic.dense_read == pytest.approx(4.41e9 + 2.75e9, rel=0.001)
    assert step.bound_s * 1e3 == pytest.approx(8.82, abs=0.01)


def test_time_to_the_first_token_counts_what_every_rank_multiplies_whole() -> None:
    fp8, bf16 = machine_of("glm52-fp8-8xh200"), machine_of("glm52-bf16-16xh200")
    assert prefill_seconds(fp8, 8192, Planning()) == pytest.approx(0.159, abs=0.0005)
    assert prefill_seconds(bf16, 131_072, Planning()) == pytest.approx(8.81, abs=0.005)


def test_tensor_parallel_ranks_share_weights_and_repeat_the_cache() -> None:
    one, eight = (
        decode_step(machine_of("glm52-bf16-16xh200", f"teacher.layout.tensor_parallel={ranks}"), 32, 10_000).traffic
        for ranks in (1, 8)
    )
    whole = 2 * whole_parameters(GLM, degrees_of(load_recipe("glm52-bf16-16xh200").recipe.teacher))._replace(embeddings=0).total
    assert eight.dense_read == whole + (one.dense_read - whole) / 8
    assert eight.cache_read == one.cache_read * 8  # a replica's requests are eight times as many
    assert eight.all_to_all == one.all_to_all  # each rank sends its share of them
    sharded = machine_of("glm52-bf16-16xh200", "teacher.layout.kv_cache=sharded")
    assert decode_step(sharded, 32, 10_000).traffic.cache_read == eight.cache_read / 8


@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_every_token_is_multiplied_once_with_what_is_cut_and_by_every_rank_with_what_is_whole(tensor: int) -> None:
    runs_on = machine_of("glm52-bf16-16xh200", f"teacher.layout.tensor_parallel={tensor}")
    assert runs_on.device.bf16_flops == 989e12
    whole = 78 * 6144 * (2048 + 512 + 64) + GLM.parts.indexer + GLM.parts.router + GLM.parts.norms
    done = decode_step(runs_on, 32, 1).compute_s * 989e12 * 16
    expected = 2 * 32 * (GLM.active - GLM.parts.embeddings + (tensor - 1) * whole)
    assert done == pytest.approx(expected, rel=0.001)  # one token of context


def test_zero_gathers_what_is_whole_from_all_ranks_and_slices_from_their_replicas() -> None:
    """2 nodes of 8, TP 8: 2 replicas of each slice. The routers, which AutoEP makes anew, are sliced as those are."""
    runs_on = machine_of("glm52-bf16-16xh200", "teacher.layout.zero_stage=3")
    whole = whole_parameters(GLM, runs_on.degrees).total
    everywhere, slices = 2 * (whole - GLM.parts.router), 2 * ((GLM.parts.dense - whole) / 8 + GLM.parts.router)
    assert gathered_bytes(runs_on) == everywhere + slices
    rate_of_slices = 50e9  # one port a node: the next replica's rank is 8 away
    assert gather_s(runs_on) == pytest.approx(everywhere * 15 / 16 / 400e9 + slices / 2 / rate_of_slices)
    assert gathered_bytes(runs_on) + 2 * GLM.parts.routed_experts / 16 == runs_on.weights.num_bytes.total


def test_a_bound_is_the_slowest_resource_and_grows_with_the_load() -> None:
    runs_on = machine_of("glm52-bf16-32xh200")
    steps = [decode_step(runs_on, requests, 8192) for requests in (4, 40, 400, 4000)]
    assert all(step.bound_s == max(step.memory_s, step.compute_s, step.network_s) for step in steps)
    rates = [step.tokens_per_s() for step in steps]
    assert rates == sorted(rates) and [step.bound_s for step in steps] == sorted(step.bound_s for step in steps)
    slow = machine_of("glm52-bf16-32xh200", "teacher.hardware.network_gb_per_s=0.1")
    assert decode_step(slow, 400, 8192).bound_by == "network" and steps[0].bound_by == "memory"


def test_a_longer_prompt_takes_longer_and_a_million_tokens_more_than_in_proportion() -> None:
    runs_on, planning = machine_of("glm52-fp8-16xh200"), Planning()
    lengths = (1, 1024, 8192, 131_072, 2**20)
    seconds = [prefill_seconds(runs_on, tokens, planning) for tokens in lengths]
    assert seconds == sorted(seconds)
    assert seconds[4] > 8 * seconds[3]


def test_prefill_of_8192_tokens_is_their_arithmetic() -> None:
    """One rank, FP8, 0.4 of 1,979 TFLOP/s: 2 x 39.3 B x 8192 for the layers, attention of 4,352 expanded and 3,840 absorbed
    queries, and 8192^2 / 2 index scores on 21 layers. Over 50 GB/s of network the experts' tokens take longer than that."""
    layers = 2 * 8192 * (GLM.active - 2 * 154880 * 6144)
    attention = 2 * 78 * 64 * (512 * 4352**2 / 2 + 3840 * 2048 * 1088)
    index = 2 * 21 * 32 * 128 * 8192**2 / 2
    arithmetic = (layers + attention + index) / (0.4 * 1979e12)
    fast = machine_of("glm52-fp8-16xh200", "teacher.hardware.network_gb_per_s=400")
    assert prefill_seconds(fast, 8192, Planning()) == pytest.approx(arithmetic, rel=1e-9)
    exchanged = 2 * 8192 * 8 * 6144 * 2 * 75 / 2 / 50e9  # half of the ranks are in the other node
    assert prefill_seconds(machine_of("glm52-fp8-16xh200"), 8192, Planning()) == pytest.approx(exchanged, rel=1e-9)
    assert exchanged > arithmetic


def test_a_short_prompt_waits_for_the_weights_unless_it_shares_the_pass() -> None:
    runs_on, planning = machine_of("glm52-bf16-16xh200"), Planning()
    held = (runs_on.weights.num_bytes.total - 2 * GLM.parts.embeddings) / 4.8e12
    assert prefill_seconds(runs_on, 16, planning) == pytest.approx(held)
    assert prefill_seconds(runs_on, 16, planning, alone=False) < held / 20


def test_the_rate_of_a_plan_is_the_bound_times_the_stated_efficiency() -> None:
    plans = [plan_recipe(load_recipe("glm52-fp8-16xh200", [f"plan.efficiency={share}"]).recipe) for share in (0.15, 1.0)]
    first, second = (plan.decode_tokens_per_s_per_gpu for plan in plans)
    assert first and second and first == pytest.approx(0.15 * second)
    step = plans[0].step
    assert step is not None and second == pytest.approx(step.tokens_per_s() / 16)
