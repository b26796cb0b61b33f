"""What a machine does at the recipe's layout, measured beside what the plan calculates: memory, arithmetic and links, one
prefill and one decode step of the loaded teacher.

The calculation stands there twice. *Data sheet* is what `plan` says. *From measured* puts the rates measured here into the
same formulas, with the same stated shares of them (plan.efficiency, plan.prefill_efficiency): where it agrees with the
measured step the formula is right and the machine is not what was promised, where it does not, time is lost to what no
formula counts (launches, Python, waiting, the latency of each collective). A tiny model loses nearly all of it there.

Links are measured twice, because tensor parallelism stays inside a node and expert parallelism does not: an all-gather of
each node's ranks, and an all-to-all of all ranks, of which the bytes that leave the node count.

Every rank measures at the same time; the slowest counts. torch is imported, DeepSpeed only by the engine.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from configs.devices import Device, Links
from configs.errors import UnusableInput
from configs.schema import HttpEngine, Recipe
from teacher.cache import SlotCache
from teacher.engines import open_engine
from teacher.plan import Plan, plan_recipe
from teacher.planning.throughput import Machine, decode_step, prefill_seconds
from teacher.runner import DTYPES, Runner

COPY_BYTES = 256 << 20  # beyond any cache
MATRIX = {"cpu": 1024, "cuda": 8192}
LINK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
REPEATS = 5


class Load(NamedTuple):
    """What is measured: a prompt of prefill_tokens, and `rows` requests a rank of `context` tokens that decode together."""

    prefill_tokens: int
    rows: int
    context: int


class Measured(NamedTuple):
    """Of the slowest rank. memory: bytes/s read and written by a copy. flops: of a square matrix product in the engine's
    dtype. link: bytes/s that a rank receives in an all-gather over the ranks of its node; None where it is alone there.
    network: bytes/s that a rank sends to other nodes while all ranks exchange tokens; None on one node."""

    memory_bytes_per_s: float
    flops: float
    link_bytes_per_s: float | None
    network_bytes_per_s: float | None
    prefill_s: float
    decode_s: float


class Calculated(NamedTuple):
    """prefill_s at plan.prefill_efficiency; decode_bound_s at full rates; decode_s at plan.efficiency."""

    prefill_s: float
    decode_bound_s: float
    decode_s: float


class Probe(NamedTuple):
    """data_sheet is None where the device is not in the planner's table. network_bytes_per_s: as the recipe states it.
    prefill_efficiency, efficiency: the shares of the rates that both calculations are made with."""

    load: Load
    measured: Measured
    data_sheet: Calculated | None
    from_measured: Calculated
    network_bytes_per_s: float
    prefill_efficiency: float
    efficiency: float


def load_of(plan: Plan) -> Load:
    """The plan's own prompt and decode step, within the model's positions and the engine's slots."""
    longest = plan.architecture.max_positions
    rows = -(-plan.step.concurrency // plan.fit.degrees.replicas) if plan.step else plan.demand.slots // plan.fit.degrees.replicas
    context = plan.step.context_tokens if plan.step else plan.demand.slot_tokens
    return Load(min(plan.planning.workload.prompt_tokens, longest - 1), max(1, rows), min(context, longest - 1))


def probe(recipe: Recipe) -> Probe:
    """Collective under torchrun: opens the recipe's engine, measures, closes it. The same value on every rank.

    Raises:
        UnusableInput: the recipe's engine is a server, or its model has no weights here.
    """
    if isinstance(recipe.teacher.engine, HttpEngine):
        raise UnusableInput("plan --probe: a server is measured where it runs; expected teacher.engine deepspeed or local")
    plan = plan_recipe(recipe)
    load, engine = load_of(plan), open_engine(recipe.teacher)
    engine.load()
    runner: Runner = engine.runner  # type: ignore[attr-defined]  (both engines that run here have one)
    runner.watch.ignore()
    dtype = DTYPES[recipe.teacher.engine.dtype]
    links = measure_links(runner.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    measured = slowest(
        Measured(
            memory_bytes_per_s=measure_memory(runner.device),
            flops=measure_arithmetic(runner.device, dtype),
            link_bytes_per_s=links.inside,
            network_bytes_per_s=links.across,
            prefill_s=measure_prefill(runner, load.prefill_tokens),
            decode_s=measure_decode(runner, load.rows, load.context),
        ),
        runner.device,
    )
    engine.close()
    sheet = calculate(plan, load, plan.machine) if plan.machine else None
    own = calculate(plan, load, machine_as_measured(plan, measured))
    stated = recipe.teacher.hardware.network_gb_per_s * 1e9
    return Probe(load, measured, sheet, own, stated, recipe.plan.prefill_efficiency, recipe.plan.efficiency)


# --- the calculation ---------------------------------------------------------------------------------------------


def calculate(plan: Plan, load: Load, machine: Machine) -> Calculated:
    bound = decode_step(machine, load.rows * plan.fit.degrees.replicas, load.context).bound_s
    return Calculated(prefill_seconds(machine, load.prefill_tokens, plan.planning), bound, bound / plan.planning.efficiency)


def machine_as_measured(plan: Plan, measured: Measured) -> Machine:
    """The plan's machine with this one's rates. Where no such link was there to be measured, none is crossed: any rate does."""
    engine = plan.teacher.engine
    link = measured.link_bytes_per_s or measured.memory_bytes_per_s
    links = Links(link, measured.network_bytes_per_s or link, plan.fit.degrees.ranks_per_node)
    bf16_flops = measured.flops * (2 if engine.dtype == "fp32" else 1)  # the planner takes float32 at half of it
    device = Device(0.0, measured.memory_bytes_per_s, link, bf16_flops, bf16_flops)
    return Machine(plan.architecture, plan.fit.degrees, device, links, engine.dtype, plan.kv_dtype)


# --- the measurements --------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The median of `repeats`, after one that warms up."""
    taken = []
    for _ in range(repeats + 1):
        _wait_for(device)
        started = time.perf_counter()
        work()
        _wait_for(device)
        taken.append(time.perf_counter() - started)
    return sorted(taken[1:])[repeats // 2]


def measure_memory(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds_of(lambda: target.copy_(source), device)


def measure_arithmetic(device: torch.device, dtype: torch.dtype) -> float:
    size = MATRIX.get(device.type, MATRIX["cuda"])
    left = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / seconds_of(lambda: left @ left, device)


class LinkRates(NamedTuple):
    """Bytes/s of one rank, inside its node and to other nodes; None where there is nobody."""

    inside: float | None
    across: float | None


def measure_links(device: torch.device, ranks_per_node: int) -> LinkRates:
    """Collective. Ranks of a node are neighbours, as torchrun numbers them; all nodes measure at the same time."""
    if not dist.is_initialized():
        return LinkRates(None, None)
    world, num_bytes = dist.get_world_size(), LINK_BYTES.get(device.type, LINK_BYTES["cuda"])
    return LinkRates(
        measure_inside(device, ranks_per_node, num_bytes) if ranks_per_node > 1 else None,
        measure_across(device, world, ranks_per_node, num_bytes) if ranks_per_node < world else None,
    )


def measure_inside(device: torch.device, ranks_per_node: int, num_bytes: int) -> float:
    """Received of an all-gather over a node's ranks: what tensor parallelism has."""
    mine, _ = dist.new_subgroups(ranks_per_node)
    assert not isinstance(mine, int)
    part = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    whole = [torch.empty_like(part) for _ in range(ranks_per_node)]
    taken = seconds_of(lambda: dist.all_gather(whole, part, group=mine), device)
    dist.destroy_process_group(mine)
    return (ranks_per_node - 1) * part.nbytes / taken


def measure_across(device: torch.device, world: int, ranks_per_node: int, num_bytes: int) -> float:
    """Sent to other nodes in an all-to-all over all ranks: what expert parallelism has. The part that stays in the node goes
    over faster links meanwhile."""
    sent = torch.ones(num_bytes // world * world, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    leaving = sent.nbytes * (world - ranks_per_node) / world
    return leaving / seconds_of(lambda: dist.all_to_all_single(received, sent), device)


@torch.no_grad()
def measure_prefill(runner: Runner, tokens: int) -> float:
    """One prompt, in the decode loop's chunks; every rank loads one of its own."""
    chunk = max(1, min(runner.limits.prefill_tokens, runner.limits.prefill_pairs // tokens))
    ids_1T = torch.arange(tokens, device=runner.device)[None] % runner.vocab_size

    def load_prompt() -> None:
        cache = SlotCache(1, runner.num_layers, runner.device)
        for start in range(0, tokens, chunk):
            stop = min(tokens, start + chunk)
            positions_1S = torch.arange(start, stop, device=runner.device)[None]
            mask_ST = torch.arange(stop, device=runner.device) <= positions_1S[0, :, None]
            cache.select_span(slice(0, 1), start, stop)
            runner.forward(ids_1T[:, start:stop], positions_1S, mask_ST[None, None], cache, keep=1)

    return seconds_of(load_prompt, runner.device, repeats=3)


@torch.no_grad()
def measure_decode(runner: Runner, rows: int, context: int) -> float:
    """One step of `rows` requests that have `context` tokens each. The history is noise: a step's time does not depend on
    what it holds, but pages that were never written would cost nothing to read."""
    cache = SlotCache(rows, runner.num_layers, runner.device)
    ids_B1 = torch.arange(rows, device=runner.device)[:, None] % runner.vocab_size
    positions_B1 = torch.full_like(ids_B1, context - 1)
    mask_B11T: Tensor = torch.ones(rows, 1, 1, context, dtype=torch.bool, device=runner.device)

    def step() -> None:
        cache.select_next(positions_B1, context)
        runner.forward(ids_B1, positions_B1, mask_B11T, cache, keep=1)

    step()
    for buffer in cache.buffers():
        if buffer.data is not None:
            buffer.data.normal_()
    return seconds_of(step, runner.device)


def slowest(mine: Measured, device: torch.device) -> Measured:
    """The lowest rates and the longest times of all ranks."""
    if not dist.is_initialized():
        return mine
    found = [mine.memory_bytes_per_s, mine.flops, mine.link_bytes_per_s or 0.0, mine.network_bytes_per_s or 0.0]
    rates = torch.tensor(found, dtype=torch.float64, device=device)
    times = torch.tensor([mine.prefill_s, mine.decode_s], dtype=torch.float64, device=device)
    dist.all_reduce(rates, op=dist.ReduceOp.MIN)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    memory, flops, link, network = rates.tolist()
    return Measured(memory, flops, link or None, network or None, *times.tolist())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- what is shown -----------------------------------------------------------------------------------------------


def probe_table(found: Probe, data_sheet: Device | None) -> Table:
    """Measured beside calculated, at most 80 columns."""
    load, measured = found.load, found.measured
    network = found.network_bytes_per_s if measured.network_bytes_per_s else None
    table = Table("", "measured", "data sheet", "from measured", title="\nprobe", title_justify="left", show_edge=False)
    rates: Sequence[tuple[str, float | None, float | None, float, str]] = (
        ("memory", measured.memory_bytes_per_s, data_sheet and data_sheet.bandwidth, 1e9, "GB/s"),
        ("arithmetic", measured.flops, data_sheet and data_sheet.bf16_flops, 1e12, "TFLOP/s"),
        ("links in a node", measured.link_bytes_per_s, data_sheet and data_sheet.link, 1e9, "GB/s"),
        ("between nodes", measured.network_bytes_per_s, network, 1e9, "GB/s"),
    )
    for name, here, there, scale, unit in rates:
        table.add_row(name, _figure(here, 1 / scale, unit), _figure(there, 1 / scale, unit), "")
    sheet, own = found.data_sheet, found.from_measured
    rows: Sequence[tuple[str, float | None, float | None, float | None]] = (
        (f"prefill of {load.prefill_tokens:,}", measured.prefill_s, sheet and sheet.prefill_s, own.prefill_s),
        (f"step, {load.rows} x {load.context:,}", measured.decode_s, sheet and sheet.decode_s, own.decode_s),
        ("  at full rates", None, sheet and sheet.decode_bound_s, own.decode_bound_s),
    )
    for name, here, there, mine in rows:
        table.add_row(name, *(_figure(value, 1e3, "ms") for value in (here, there, mine)))
    table.caption, table.caption_justify = _how_calculated(found), "left"
    return table


def _how_calculated(found: Probe) -> str:
    return (
        "data sheet: what the plan says; between nodes, the recipe. from measured: the plan's formulas with the rates measured "
        f"here. Both take prefill at {found.prefill_efficiency:g} of the arithmetic and a step at {found.efficiency:g} of its "
        "full rates. They count bytes and operations; launches, Python and the latency of collectives they do not, and a small "
        "model is little else."
    )


def probe_json(found: Probe) -> dict[str, object]:
    return {
        "load": found.load._asdict(),
        "measured": found.measured._asdict(),
        "data_sheet": None if found.data_sheet is None else found.data_sheet._asdict(),
        "from_measured": found.from_measured._asdict(),
        "network_bytes_per_s": found.network_bytes_per_s,
        "prefill_efficiency": found.prefill_efficiency,
        "efficiency": found.efficiency,
    }


def probe_from_json(found: dict[str, Any]) -> Probe:
    """What `probe_json` made, as a value again: ranks hand it to their launcher as text."""
    sheet = found["data_sheet"]
    return Probe(
        Load(**found["load"]),
        Measured(**found["measured"]),
        None if sheet is None else Calculated(**sheet),
        Calculated(**found["from_measured"]),
        found["network_bytes_per_s"],
        found["prefill_efficiency"],
        found["efficiency"],
    )


def _figure(value: float | None, scale: float, unit: str) -> str:
    return "" if value is None else f"{value * scale:,.3g} {unit}"
