"""A plan as it is read: tables for a terminal of 80 columns, and one JSON object."""

from rich.console import Group
from rich.table import Table

from configs.tables import short, table_of
from teacher.plan import Plan
from teacher.planning.architecture import Parts

MILLION = 1 << 20
"""Tokens that the published figures call 1 M."""


def plan_tables(plan: Plan) -> Group:
    tables = [_sizes(plan), _memory(plan)]
    if plan.contexts and plan.fit.room.usable is not None:
        tables.append(_contexts(plan))
    if plan.step is not None:
        tables += [_decode(plan), _money(plan)]
    return Group(*tables)


def plan_json(plan: Plan) -> dict[str, object]:
    """Bytes, seconds, dollars and tokens as plain numbers; null where the device's size or speed is unknown, and rates and
    cost also where the layout does not fit."""
    return _json_sizes(plan) | _json_verdict(plan) | _json_rates(plan)


def _sizes(plan: Plan) -> Table:
    model, layout = plan.architecture, plan.fit.degrees
    table = table_of(f"{plan.name}: {model.model_type} through {plan.teacher.engine.type}", "", "")
    table.add_row("parameters", f"{short(model.parts.total)}, {short(model.active)} active per token")
    table.add_row(
        "launch", f"{layout.world} x {plan.teacher.hardware.gpu} on {layout.nodes} node{'s' if layout.nodes > 1 else ''}"
    )
    attention = f"TP {layout.tensor}" if layout.tensor > 1 else "data-parallel attention"
    zero = ", ZeRO-3 dense weights" if layout.zero else ""
    table.add_row("layout", f"{_experts(plan)}, {attention}{zero}, cache {plan.teacher.layout.kv_cache}")
    per_token = model.cache_values() * plan.kv_bytes_per_value
    table.add_row("cache", f"{short(per_token, 'B')} a token, {short(per_token * MILLION, 'B')} per 2^20 tokens, {plan.kv_dtype}")
    return table


def _experts(plan: Plan) -> str:
    """Where the routed experts are; expert_parallel 1 leaves each whole, or lets a server cut every one of them."""
    layout = plan.fit.degrees
    if plan.architecture.num_experts == 0:
        return "no routed experts"
    if layout.expert > 1:
        return f"experts spread over {layout.expert} ranks"
    if layout.expert_slices > 1:
        return f"each expert cut over {layout.expert_slices} ranks"
    return "all experts in ZeRO-3 slices" if layout.zero else "all experts on every rank"


def _memory(plan: Plan) -> Table:
    room = plan.fit.room
    table = table_of("per GPU", "", "bytes", "")
    table.add_row("usable", short(room.usable, "B"), "92 % of the memory" if room.usable else "device of unknown size")
    table.add_row(f"weights, {plan.teacher.engine.dtype}", short(room.weights.total, "B"), _largest(room.weights._asdict()))
    table.add_row("free", short(room.free, "B"), "usable less weights")
    table.add_row("beside weights", short(sum(room.extra), "B"), _largest(room.extra._asdict()))
    table.add_row("buffers", short(sum(room.transients), "B"), _largest(room.transients._asdict()))
    table.add_row("cache", short(plan.fit.cache_bytes_per_gpu, "B"), _held(plan))
    table.add_row("fits", {None: "unknown", True: "yes", False: "no"}[plan.fit.fits], _wanted(plan))
    return table


def _largest(parts: dict[str, int]) -> str:
    """The two that matter most, largest first."""
    shown = sorted(((size, name) for name, size in parts.items() if size), reverse=True)[:2]
    return ", ".join(f"{name.replace('_', ' ')} {short(size)}" for size, name in shown)


def _held(plan: Plan) -> str:
    longest = plan.max_context_tokens
    return "" if longest is None else f"longest request {longest:,} tokens"


def _wanted(plan: Plan) -> str:
    demand = plan.demand
    if plan.fit.shortfall:
        return f"{short(plan.fit.shortfall, 'B')} short for {demand.longest_tokens:,} tokens"
    if plan.fit.refusal:
        return "the degrees do not divide the model"
    if demand.requests:
        return f"{demand.requests} requests of {demand.slot_tokens:,} tokens"
    is_all = demand.longest_tokens > demand.request_tokens
    return f"a request of {demand.longest_tokens:,} tokens" + (", prompt and max_tokens" if is_all else "")


def _contexts(plan: Plan) -> Table:
    table = table_of("by context", "tokens", "requests that fit", "expected tok/s per GPU", "first token, s")
    for row in plan.contexts:
        rate = "-" if row.decode_tokens_per_s_per_gpu is None else f"{row.decode_tokens_per_s_per_gpu:.1f}"
        prefill = "-" if row.prefill_seconds is None else f"{row.prefill_seconds:.3g}"
        table.add_row(f"{row.context_tokens:,}", "unknown" if row.requests is None else str(row.requests), rate, prefill)
    return table


def _decode(plan: Plan) -> Table:
    step, bytes_of = plan.step, plan.step.traffic if plan.step else None
    assert step is not None and bytes_of is not None
    load = f"{step.concurrency} requests of {step.context_tokens:,} tokens"
    table = table_of(f"a decode step, {load}", "", "ms", "bytes per GPU")
    table.caption, table.caption_justify = _why_so_long(plan), "left"
    reads = f"dense {short(bytes_of.dense_read)}, experts {short(bytes_of.experts_read)}, cache {short(bytes_of.cache_read)}"
    table.add_row("memory", f"{step.memory_s * 1e3:.2f}", reads)
    moved = ((bytes_of.gathered, "gathered"), (bytes_of.all_to_all, "all-to-all"), (bytes_of.tensor_parallel, "tensor parallel"))
    table.add_row("links", f"{step.network_s * 1e3:.2f}", ", ".join(f"{name} {short(size)}" for size, name in moved if size))
    table.add_row("arithmetic", f"{step.compute_s * 1e3:.2f}", "")
    bound = step.tokens_per_s() / plan.fit.degrees.world
    table.add_row("bound", f"{step.bound_s * 1e3:.2f}", f"{step.bound_by}: {bound:.0f} tok/s per GPU")
    expected = f"{plan.decode_tokens_per_s_per_gpu:.0f} tok/s per GPU at efficiency {plan.planning.efficiency:g}"
    table.add_row("expected", f"{step.bound_s / plan.planning.efficiency * 1e3:.1f}", expected)
    return table


def _why_so_long(plan: Plan) -> str:
    """What a request in flight is counted as: a third as long behind a server as in our own cache."""
    if plan.teacher.engine.type == "http":
        return "each as long as it is on average: a server's pages hold what is there"
    if plan.planning.context_tokens:
        return "each as long as plan.context_tokens: our cache's rows are as wide as the longest"
    return "each of the prompt and the p99 output: our cache's rows are as wide as the longest"


def _money(plan: Plan) -> Table:
    cost = plan.cost
    assert cost is not None
    price = plan.planning.price_per_gpu_hour
    table = table_of(f"{cost.traces:,} traces at ${price:g} per GPU hour", "", "")
    table.add_row("output", f"{short(cost.output_tokens)} tokens, after {short(cost.prompt_tokens)} of prompts")
    table.add_row("time", f"{cost.hours:,.0f} h: {cost.decode_hours:,.0f} decoding, {cost.prefill_hours:,.1f} reading prompts")
    table.add_row("cost", f"${cost.dollars:,.0f}; the same through the API ${cost.api_dollars:,.0f}")
    decoding = plan.cost_per_million_output_tokens
    table.add_row("per 1 M output", f"${decoding:,.2f} decoding, ${cost.cost_per_million_output_tokens:,.2f} with the prompts")
    verdict = "" if cost.cheaper_than_api else ", out of reach:"
    even, most = short(cost.break_even_tokens_per_month), short(cost.capacity_tokens_per_month)
    table.add_row("break-even", f"{even} output tokens a month{verdict or ';'} the launch writes {most}")
    return table


def _json_sizes(plan: Plan) -> dict[str, object]:
    model, room, layout = plan.architecture, plan.fit.room, plan.fit.degrees
    per_token = model.cache_values() * plan.kv_bytes_per_value
    return {
        "name": plan.name,
        "model": plan.teacher.model,
        "model_type": model.model_type,
        "engine": plan.teacher.engine.type,
        "gpu": plan.teacher.hardware.gpu,
        "nodes": layout.nodes,
        "gpus": layout.world,
        "dtype": plan.teacher.engine.dtype,
        "kv_dtype": plan.kv_dtype,
        "layout": {
            "expert_parallel": layout.expert,
            "expert_slices": layout.expert_slices,
            "tensor_parallel": layout.tensor,
            "data_parallel": layout.replicas,
            "zero_stage": 3 if layout.zero else 0,
            "kv_cache": plan.teacher.layout.kv_cache,
        },
        "parameters_total": model.parts.total,
        "parameters_active": model.active,
        "parameters": _nonzero(model.parts),
        "usable_bytes_per_gpu": room.usable,
        "weights_bytes_per_gpu": room.weights.total,
        "weights_bytes_per_gpu_by_part": _nonzero(room.weights),
        "free_bytes_per_gpu": room.free,
        "extra_bytes_per_gpu": room.extra._asdict(),
        "transient_bytes_per_gpu": room.transients._asdict(),
        "kv_budget_bytes_per_gpu": plan.fit.cache_bytes_per_gpu,
        "kv_bytes_per_token": int(per_token),
        "kv_bytes_per_1m_tokens": int(per_token) * MILLION,
        "kv_bytes_per_token_per_gpu": plan.fit.cache.token_bytes / (layout.ranks_per_node if layout.kv_sharded else 1),
    }


def _json_verdict(plan: Plan) -> dict[str, object]:
    return {
        "max_context_tokens": plan.max_context_tokens,
        "fits": plan.fit.fits,
        "refusal": plan.refusal,
        "shortfall_bytes_per_gpu": plan.fit.shortfall,
        "nearest_layouts": [one._asdict() for one in plan.alternatives],
        "demand": plan.demand._asdict(),
        "contexts": [row._asdict() for row in plan.contexts],
        "prefill_seconds": {str(row.context_tokens): row.prefill_seconds for row in plan.contexts},
    }


def _json_rates(plan: Plan) -> dict[str, object]:
    step = plan.step
    return {
        "efficiency": plan.planning.efficiency,
        "prefill_efficiency": plan.planning.prefill_efficiency,
        "decode_step": step
        and {
            "concurrency": step.concurrency,
            "context_tokens": step.context_tokens,
            "bytes_per_gpu": step.traffic._asdict(),
            "weights_s": step.weights_s,
            "memory_s": step.memory_s,
            "compute_s": step.compute_s,
            "network_s": step.network_s,
            "bound_s": step.bound_s,
            "bound_by": step.bound_by,
            "expected_s": step.bound_s / plan.planning.efficiency,
        },
        "decode_tokens_per_s_per_gpu": plan.decode_tokens_per_s_per_gpu,
        "decode_tokens_per_s_per_gpu_bound": step and step.tokens_per_s() / plan.fit.degrees.world,
        "cost_per_million_output_tokens": plan.cost_per_million_output_tokens,
        "break_even_tokens_per_month": plan.cost and plan.cost.break_even_tokens_per_month,
        "price_per_gpu_hour": plan.planning.price_per_gpu_hour,
        "workload": plan.cost and plan.cost._asdict(),
    }


def _nonzero(parts: Parts) -> dict[str, int]:
    return {name: size for name, size in parts._asdict().items() if size}
