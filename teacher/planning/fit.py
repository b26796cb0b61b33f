"""Does a layout fit? The demand of a recipe against the room of its GPUs, and what to say when it does not."""

from math import ceil
from typing import NamedTuple

from configs.devices import device_of
from configs.errors import UnusableInput
from configs.lengths import Lengths
from configs.schema import DeepSpeedEngine, HttpEngine, LocalEngine, Recipe, Teacher
from teacher.planning.architecture import Architecture
from teacher.planning.degrees import Degrees, degrees_of
from teacher.planning.placement import Cache, Room, admitted_bytes, cache, room
from teacher.planning.throughput import Machine, Step, decode_step


class Demand(NamedTuple):
    """What has to fit. request_tokens: a long request of the workload. longest_tokens: the longest that could come. Our decode
    loop refuses a request whose prompt and max_tokens its cache could not hold; a server is only asked for request_tokens.
    slot_tokens: what each request in flight is given: our engines keep a rectangle as wide as the longest row, a server's
    pages hold what is there (prompt and the average live output). requests: in flight over the launch, when the recipe says
    so. slots: as many as the engine takes."""

    request_tokens: int
    longest_tokens: int
    slot_tokens: int
    requests: int | None
    slots: int


class Fit(NamedTuple):
    """fits: None where the device's size is unknown. shortfall: bytes a GPU lacks for weights, what comes with them and the
    demand; None when unknown or when no amount of memory helps. refusal: why not, in words, with what would help besides
    another layout. by_layout: another layout may help; none does where engine.cache_bytes is too little."""

    degrees: Degrees
    room: Room
    cache: Cache
    fits: bool | None
    shortfall: int | None
    refusal: str | None
    by_layout: bool = True

    @property
    def cache_bytes_per_gpu(self) -> int | None:
        """What requests are let in by; negative where not even the weights fit."""
        pool = self.cache.pool_bytes
        return pool // self.degrees.ranks_per_node if pool is not None and self.degrees.kv_sharded else pool


def demand_of(architecture: Architecture, recipe: Recipe, lengths: Lengths) -> Demand:
    """The recipe's workload, within what the model's positions allow.

    Raises:
        UnusableInput: a stated length that is above them.
    """
    planning, workload, engine = recipe.plan, recipe.plan.workload, recipe.teacher.engine
    stated = {"plan.context_tokens": planning.context_tokens}
    if "prompt_tokens" in workload.model_fields_set:
        stated["plan.workload.prompt_tokens"] = workload.prompt_tokens
    for name, tokens in stated.items():
        if tokens is not None and tokens > architecture.max_positions:
            raise UnusableInput(f"{name} {tokens}: above the model's {architecture.max_positions} positions; lower it")
    output = min(workload.output_tokens_p99, recipe.generate.sampling.max_tokens)
    request = min(planning.context_tokens or workload.prompt_tokens + output, architecture.max_positions)
    live = min(request, ceil(workload.prompt_tokens + lengths.live))
    longest = min(workload.prompt_tokens + recipe.generate.sampling.max_tokens, architecture.max_positions)
    is_served = isinstance(engine, HttpEngine)
    return Demand(
        request_tokens=request,
        longest_tokens=request if is_served else max(request, longest),
        slot_tokens=live if is_served else request,
        requests=planning.concurrency,
        slots=engine_slots(recipe.teacher),
    )


def engine_slots(teacher: Teacher) -> int:
    """Requests in flight that the engine takes, over the launch: decode slots of every replica, or a client's requests."""
    match teacher.engine:
        case DeepSpeedEngine(batch_size=slots):
            return slots * degrees_of(teacher).replicas
        case LocalEngine(batch_size=slots):
            return slots
        case HttpEngine(concurrency=requests):
            return requests


def judge(architecture: Architecture, recipe: Recipe, teacher: Teacher, demand: Demand) -> Fit:
    """teacher: the recipe's, or one with another layout."""
    degrees, device = degrees_of(teacher), device_of(teacher.hardware.gpu)
    usable = device.usable if device else None
    placed = room(architecture, teacher, degrees, usable, recipe.plan, recipe.generate.sampling)
    admitted = admitted_bytes(architecture, teacher, degrees, usable, placed.cache)
    pools = cache(architecture, teacher, degrees, admitted)
    if (reason := indivisible(architecture, degrees)) is not None:
        return Fit(degrees, placed, pools, False, None, reason)
    shortfall = _shortfall(pools, demand, degrees)
    if not shortfall:
        return Fit(degrees, placed, pools, None if shortfall is None else True, shortfall, None)
    stated = getattr(teacher.engine, "cache_bytes", None)
    if admitted == stated:
        reason = _little_cache(pools, demand, admitted or 0, shortfall)
    else:
        reason = _too_large(placed, teacher, pools, demand, shortfall)
    return Fit(degrees, placed, pools, False, shortfall, reason + _shorter_outputs(pools, recipe, demand), admitted != stated)


def workload_step(runs_on: Machine, fit: Fit, demand: Demand) -> Step:
    """The decode step of a launch that is as full as the recipe asks for, or else as memory and engine allow."""
    fitting = fit.cache.requests(demand.slot_tokens)
    assert fitting, "asked of a layout that does not fit"
    return decode_step(runs_on, demand.requests or min(fitting, demand.slots), demand.slot_tokens)


def indivisible(architecture: Architecture, degrees: Degrees) -> str | None:
    """What a degree does not divide, in words; the ranks themselves are checked by the recipe."""
    experts, heads = architecture.num_experts, architecture.attention.heads
    if degrees.expert > 1 and experts == 0:
        return f"layout.expert_parallel {degrees.expert}: the model has no routed experts; set it to 1"
    if experts % degrees.expert:
        return f"layout.expert_parallel {degrees.expert} does not divide the model's {experts} experts"
    if not degrees.server and degrees.ranks_per_node % degrees.tensor:
        return (
            f"layout.tensor_parallel {degrees.tensor} does not divide the {degrees.ranks_per_node} ranks of a node: a layer's "
            "slices are summed at every matrix and must not cross the network"
        )
    if heads % degrees.tensor:
        return f"layout.tensor_parallel {degrees.tensor} does not divide the model's {heads} attention heads"
    kv_heads = getattr(architecture.attention, "kv_heads", 0)  # latents have none; servers copy the heads they cannot cut
    if not degrees.server and kv_heads % degrees.tensor:
        return f"layout.tensor_parallel {degrees.tensor} does not divide the model's {kv_heads} key-value heads"
    return None


def needed_bytes(pools: Cache, demand: Demand) -> int:
    """Of one pool: one longest request, or its share of the stated concurrency."""
    return ceil(max(demand.longest_tokens, _stated_tokens(pools, demand)) * pools.token_bytes)


def _stated_tokens(pools: Cache, demand: Demand) -> int:
    return ceil((demand.requests or 0) / pools.pools) * demand.slot_tokens


def _shortfall(pools: Cache, demand: Demand, degrees: Degrees) -> int | None:
    if pools.pool_bytes is None:
        return None
    lacking = max(0, needed_bytes(pools, demand) - pools.pool_bytes)
    return ceil(lacking / degrees.ranks_per_node) if degrees.kv_sharded else lacking


def _load(pools: Cache, demand: Demand) -> str:
    """Of what is needed, the part that decides."""
    if _stated_tokens(pools, demand) > demand.longest_tokens:
        return f"{demand.requests} requests of {demand.slot_tokens:,} tokens"
    return f"a request of {demand.longest_tokens:,} tokens"


def _little_cache(pools: Cache, demand: Demand, stated: int, shortfall: int) -> str:
    return (
        f"teacher.engine.cache_bytes {stated} holds {pools.max_tokens:,} tokens of cache, too few for "
        f"{_load(pools, demand)}; set it to {stated + shortfall} or more"
    )


def _too_large(placed: Room, teacher: Teacher, pools: Cache, demand: Demand, shortfall: int) -> str:
    assert placed.usable is not None
    beside = sum(placed.extra) + sum(placed.transients)
    needs = (
        f"{placed.weights.total / 1e9:.1f} GB of weights, {beside / 1e9:.1f} GB beside them and "
        f"{(shortfall + placed.usable - placed.weights.total - beside) / 1e9:.1f} GB of cache for {_load(pools, demand)}"
    )
    gpu = f"{placed.usable / 1e9:.1f} GB of each {teacher.hardware.gpu}"
    return f"{needs} do not fit {gpu}: {shortfall / 1e9:.1f} GB short per GPU"


def _shorter_outputs(pools: Cache, recipe: Recipe, demand: Demand) -> str:
    """The remedy that leaves the layout alone: a max_tokens whose longest request fits. Empty where it would not help: for a
    server, too many requests, a stated context, or no room for as much as the prompt."""
    room_for = (pools.max_tokens or 0) - recipe.plan.workload.prompt_tokens
    stated = max(recipe.plan.context_tokens or 0, _stated_tokens(pools, demand))
    if isinstance(recipe.teacher.engine, HttpEngine) or room_for < 1 or stated > (pools.max_tokens or 0):
        return ""
    return f"; -s generate.sampling.max_tokens={room_for} would fit"
