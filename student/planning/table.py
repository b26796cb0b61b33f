"""A student's plan as it is read: tables for a terminal of 80 columns, and one JSON object."""

from rich.console import Group
from rich.table import Table

from configs.tables import short, table_of
from student.plan import StudentPlan
from student.planning.sharding import effective_stage


def student_tables(plan: StudentPlan) -> Group:
    return Group(_sizes(plan), _targets(plan), _memory(plan), *([_time(plan)] if plan.rate else []))


def student_json(plan: StudentPlan) -> dict[str, object]:
    """Bytes, seconds, dollars and tokens as plain numbers; null where the device's size or speed is unknown, and rates also
    where the training does not fit."""
    return _json_sizes(plan) | _json_memory(plan) | _json_rate(plan)


def _sizes(plan: StudentPlan) -> Table:
    shape, train, lora = plan.shape, plan.train, plan.adapter.lora
    table = table_of(f"{plan.name}: training {shape.model_type} by LoRA, {train.objective.type}", "", "")
    table.add_row("parameters", f"{short(shape.parameters)}, {shape.max_positions:,} positions")
    trained = plan.adapter.parameters
    kind = "".join(f", {name}" for name in ("rslora", "dora") if getattr(lora, name))
    table.add_row("trained", f"{short(trained)} ({trained / shape.parameters:.2%}), rank {lora.rank}, alpha {lora.alpha}{kind}")
    nodes = f"{train.nodes} node{'s' if train.nodes > 1 else ''}"
    table.add_row("launch", f"{train.ranks} x {train.gpu} on {nodes}, ZeRO-{effective_stage(train)}, {train.dtype}")
    shared = f", each shared by {train.sequence_parallel} ranks" if train.sequence_parallel > 1 else ""
    lengths = " or ".join(f"{row:,}" for row in train.row_lengths)
    table.add_row("rows", f"{train.rows_per_step} a step{shared}, of {lengths} tokens")
    return table


def _targets(plan: StudentPlan) -> Table:
    table = table_of(f"{plan.adapter.layers} modules with an adapter", "module", "number", "inputs", "outputs")
    for module in plan.adapter.targets:
        table.add_row(module.name, f"{module.count:,}", f"{module.inputs:,}", f"{module.outputs:,}")
    for module in plan.adapter.saved:
        table.add_row(f"{module.name}, whole", f"{module.count:,}", f"{module.inputs:,}", f"{module.outputs:,}")
    return table


def _memory(plan: StudentPlan) -> Table:
    room, state = plan.room, plan.room.state.gpu
    table = table_of(f"per GPU, a row of {room.row_tokens:,} tokens", "", "bytes", "")
    table.add_row("usable", short(room.usable, "B"), "92 % of the memory" if room.usable else "device of unknown size")
    table.add_row("weights", short(state.weights + state.persistent, "B"), "frozen" + _whole(state.persistent))
    table.add_row("adapter", short(state.adapter, "B"), plan.train.dtype)
    table.add_row("gradients", short(state.gradients, "B"), "float32")
    optimizer = {"masters": state.masters, "moments": state.moments}
    table.add_row("optimizer", short(sum(optimizer.values()), "B"), _largest(optimizer))
    table.add_row("buffers", short(sum(room.buffers), "B"), _largest(room.buffers._asdict()))
    again = "layers computed again" if plan.train.activation_checkpointing else "all layers kept"
    table.add_row("activations", short(room.activations.total, "B"), f"{again}: {_largest(room.activations._asdict())}")
    table.add_row("headroom", short(room.headroom, "B"), {None: "unknown", True: "fits", False: "does not fit"}[room.fits])
    if sum(room.state.host):
        table.add_row("on the host", short(sum(room.state.host), "B"), f"of each rank, {plan.train.processes} on a node")
    return table


def _whole(num_bytes: int) -> str:
    return f", {short(num_bytes, 'B')} of small tensors whole" if num_bytes else ""


def _largest(parts: dict[str, int]) -> str:
    """The two that matter most, largest first."""
    shown = sorted(((size, name) for name, size in parts.items() if size), reverse=True)[:2]
    return ", ".join(f"{name} {short(size)}" for size, name in shown)


def _time(plan: StudentPlan) -> Table:
    rate, traces, train = plan.rate, plan.traces, plan.train
    assert rate is not None
    price = plan.planning.price_per_gpu_hour
    table = table_of(f"{traces.number:,} traces, were all of them kept, at ${price:g} per GPU hour", "", "")
    table.add_row("a trace", f"{traces.tokens:,.0f} tokens on average, {traces.supervised:,.0f} of them trained")
    table.add_row("data", f"{short(rate.tokens)} tokens in {train.epochs:g} epochs, about {rate.steps:,} steps")
    share = f"{plan.planning.train_efficiency:g} of the peak"
    table.add_row("a row", f"{rate.compute_s:.3g} s of arithmetic at {share}, {rate.network_s:.3g} s on the links")
    launch = rate.tokens_per_s_per_gpu * train.ranks
    table.add_row("rate", f"{rate.tokens_per_s_per_gpu:,.0f} tokens/s per GPU, {launch:,.0f} in all")
    table.add_row("time", f"{rate.hours:,.1f} h on {train.ranks} GPUs, ${rate.dollars:,.0f}")
    return table


def _json_sizes(plan: StudentPlan) -> dict[str, object]:
    shape, train = plan.shape, plan.train
    return {
        "name": plan.name,
        "model": plan.model,
        "model_type": shape.model_type,
        "parameters_total": shape.parameters,
        "parameters_trained": plan.adapter.parameters,
        "adapted_layers": plan.adapter.layers,
        "targets": [
            {"name": one.name, "number": one.count, "inputs": one.inputs, "outputs": one.outputs} for one in plan.adapter.targets
        ],
        "saved": [one.name for one in plan.adapter.saved],
        "max_positions": shape.max_positions,
        "gpu": train.gpu,
        "gpus": train.ranks,
        "zero_stage": effective_stage(train),
        "sequence_parallel": train.sequence_parallel,
        "activation_checkpointing": train.activation_checkpointing,
        "offload": train.offload,
        "dtype": train.dtype,
    }


def _json_memory(plan: StudentPlan) -> dict[str, object]:
    room = plan.room
    return {
        "row_tokens": room.row_tokens,
        "usable_bytes_per_gpu": room.usable,
        "needed_bytes_per_gpu": room.needed,
        "headroom_bytes_per_gpu": room.headroom,
        "fits": room.fits and plan.why_not is None,
        "state_bytes_per_gpu": room.state.gpu._asdict(),
        "state_bytes_per_rank_on_host": room.state.host._asdict(),
        "buffer_bytes_per_gpu": room.buffers._asdict(),
        "activation_bytes_per_gpu": room.activations._asdict(),
        "refusal": plan.refusal,
        "nearest_settings": [one._asdict() for one in plan.alternatives],
    }


def _json_rate(plan: StudentPlan) -> dict[str, object]:
    return {
        "train_efficiency": plan.planning.train_efficiency,
        "price_per_gpu_hour": plan.planning.price_per_gpu_hour,
        "traces": plan.traces._asdict(),
        "rate": plan.rate and plan.rate._asdict(),
    }
