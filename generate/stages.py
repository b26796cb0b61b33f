"""The two stages of this package: the prompt set, and the teacher's traces of it."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UnusableInput
from configs.launch import Nodes, StageFailed, read_nodes, run_ranks
from configs.progress import Count, file_reporter, read_counts
from configs.schema import DeepSpeedEngine, Recipe
from data.expert_counts import ALARMS_COUNT
from data.ledger import read_ledger
from data.prompt_set import write_prompts
from data.stage import Context, Outcome, Stage
from data.store import read_segment, segments

if TYPE_CHECKING:
    from generate.telemetry import Written


def _prompts(context: Context, show: Callable[[Count], None]) -> Outcome:
    from generate.prompts import build_prompt_set

    recipe = context.recipe
    found = build_prompt_set(recipe.generate.prompts, recipe.evaluate.suites, context.folders)
    path = write_prompts(context.run, found.prompts)
    train = [prompt for prompt in found.prompts if prompt.split == "train"]
    evaluation = len(found.prompts) - len(train)
    counts = {
        "train": len(train),
        "eval": evaluation,
        "requests": len(train) * recipe.generate.samples_per_prompt,
        "by_task": dict(Counter(prompt.task for prompt in train)),
        "left_out": dict(found.left_out),
    }
    left_out = ", ".join(f"{count} {reason}" for reason, count in found.left_out.items())
    return Outcome(
        [path],
        counts,
        f"{len(train)} training prompts, {evaluation} evaluation items" + (f"; left out: {left_out}" if left_out else ""),
    )


def _prompts_identity(context: Context) -> dict[str, Any]:
    from generate.prompts import source_hashes

    recipe = context.recipe
    return {
        "prompts": [source.model_dump(mode="json") for source in recipe.generate.prompts],
        "suites": [source.model_dump(mode="json") for source in recipe.evaluate.suites],
        "samples": recipe.generate.samples_per_prompt,
        "files": source_hashes([*recipe.generate.prompts, *recipe.evaluate.suites], context.folders),
    }


def teacher_fingerprint(context: Context) -> str:
    """Identity of what answers: the weights' hash and the compute dtype (for a server, its address and model name)."""
    from teacher.folders import fingerprint_teacher

    return fingerprint_teacher(context.recipe.teacher)


def _generate(context: Context, show: Callable[[Count], None]) -> Outcome:
    engine = context.recipe.teacher.engine
    before = read_ledger(context.run)
    if before.pending:
        if isinstance(engine, DeepSpeedEngine):
            _generate_on_ranks(context, show, before.completed + before.failed)
        else:
            generate_here(context, lambda count: show(_after(count, before.completed + before.failed)))
    ledger = read_ledger(context.run)
    ledger.check(viewed=False)
    if ledger.pending:
        raise StageFailed(
            f"{context.run.traces}: {ledger.pending} of {ledger.requested} requests are still pending; run the command again"
        )
    committed = segments(context.run.traces)
    for segment in committed:
        read_segment(segment)  # a damaged one is never sealed as what the teacher said
    files = [path for segment in committed for path in (segment.path, segment.path.with_suffix(".json"))]
    counts = {
        "requested": ledger.requested,
        "completed": ledger.completed,
        "failed_by_reason": ledger.failed_by_reason,
        "superseded": ledger.superseded,
    }
    tokens = sum(sum(segment.facts["output_tokens"]) for segment in committed)
    experts = _expert_load(context)
    return Outcome(
        [*files, *experts.files],
        counts | {"output_tokens": tokens, ALARMS_COUNT: list(map(str, experts.alarms))},
        f"{ledger.completed} traces, {tokens} tokens, {ledger.failed} failed",
    )


def _expert_load(context: Context) -> "Written":
    """The telemetry of all committed traces, written, and mirrored in W&B."""
    from generate.telemetry import write_expert_load
    from generate.tracking import Target, mirror_expert_load

    train, written = context.recipe.train, write_expert_load(context.run, context.recipe.teacher)
    mirror_expert_load(written.rows, Target(context.run.metrics, train.wandb, train.wandb_project, context.recipe.name))
    return written


def _after(count: Count, already: int) -> Count:
    return Count(count.done + already, count.total + already, count.note)


def nodes_of(recipe: Recipe) -> Nodes | None:
    """This node's place in a launch over several; None on one node, and with engines that start no ranks.

    Raises:
        UnusableInput: the recipe wants several nodes and the environment does not say where they meet.
    """
    teacher = recipe.teacher
    return read_nodes(teacher.hardware.nodes, os.environ) if isinstance(teacher.engine, DeepSpeedEngine) else None


def join_generation(context: Context) -> None:
    """Another node's part of the stage: its ranks, and nothing else.

    The first node holds the stage's lock, shows progress and seals. Both read the same ledger before any rank can commit
    (ranks start once all launchers have met), so they agree on whether there is anything to do; and a rank commits
    before the collective in which its engine closes, so the first node's ranks end after everybody's last commit.
    """
    if read_ledger(context.run).pending:
        nodes = nodes_of(context.recipe)
        _run_ranks_here(context, nodes, context.run.logs / f"generate.n{nodes.rank if nodes else 0}.log", lambda: None)


def _run_ranks_here(context: Context, nodes: Nodes | None, log: Path, poll: Callable[[], None]) -> None:
    """Runs this same command on every rank of this node."""
    processes, extensions = context.recipe.teacher.ranks_per_node, context.run.cache / "torch_extensions"
    run_ranks(context.words("generate"), processes=processes, extensions=extensions, log=log, poll=poll, nodes=nodes)


def _generate_on_ranks(context: Context, show: Callable[[Count], None], already: int) -> None:
    teacher = context.recipe.teacher
    progress = [_progress_file(context, rank) for rank in range(teacher.world // teacher.layout.tensor_parallel)]
    for path in progress:
        path.unlink(missing_ok=True)

    def poll() -> None:
        if (count := read_counts(progress)) is not None:
            show(_after(count, already))

    _run_ranks_here(context, nodes_of(context.recipe), context.run.logs / "generate.log", poll)


def _progress_file(context: Context, rank: int) -> Any:
    return context.run.cache / f"generate.r{rank}.progress"


def generate_rank(context: Context) -> None:
    """One rank, started by torchrun: RANK and WORLD_SIZE say which part is ours."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Ranks of one tensor-parallel group (neighbours) hold slices of one layer: they answer the same requests together,
    # and the first of them writes.
    group = context.recipe.teacher.layout.tensor_parallel
    report = file_reporter(_progress_file(context, rank // group)) if rank % group == 0 else lambda count: None
    generate_here(context, report, rank=rank // group, world=world // group, writes=rank % group == 0)


def generate_here(
    context: Context, report: Callable[[Count], None], *, rank: int = 0, world: int = 1, writes: bool = True
) -> None:
    from generate.worker import generate_share
    from teacher.engines import load_tokenizer, open_engine

    recipe = context.recipe
    engine = open_engine(recipe.teacher)
    tokenizer, fingerprint = load_tokenizer(recipe.teacher), teacher_fingerprint(context)
    generate_share(recipe, context.run, engine, tokenizer, fingerprint, rank=rank, world=world, writes=writes, report=report)
    # Only after success: closing is collective, and a rank that failed must end at once, not wait for the others.
    engine.close()


def _generate_plan(context: Context) -> str:
    teacher, settings = context.recipe.teacher, context.recipe.generate
    where = f"{teacher.model} through the {teacher.engine.type} engine"
    if isinstance(teacher.engine, DeepSpeedEngine):
        layout = teacher.layout
        where += f" over {teacher.world} ranks, expert parallel {teacher.expert_parallel}, ZeRO-{layout.zero_stage}"
    sampling = settings.sampling
    return (
        f"{where}; {settings.samples_per_prompt} samples a prompt, temperature {sampling.temperature:g}, "
        f"top-p {sampling.top_p:g}, at most {sampling.max_tokens} tokens each{_logits_plan(context)}"
    )


def _logits_plan(context: Context) -> str:
    settings = context.recipe.generate
    if settings.logits is None:
        return ""
    from data.logits import bytes_per_token

    price = bytes_per_token(settings.logits)
    longest = price * settings.sampling.max_tokens / 1e6
    return f"; {settings.logits.top_k} logits kept: {price} bytes a token, up to {longest:,.1f} MB a trace"


def _generate_identity(context: Context) -> dict[str, Any]:
    settings = context.recipe.generate
    return {"teacher": teacher_fingerprint(context), "sampling": settings.sampling.model_dump(mode="json"), "seed": settings.seed}


def _prompts_plan(context: Context) -> str:
    sources = context.recipe.generate.prompts
    if not sources:
        raise UnusableInput("generate.prompts: the prompt set is empty; expected at least one source")
    return f"{len(sources)} training sources, {len(context.recipe.evaluate.suites)} evaluation suites"


PROMPTS = Stage("prompts", "prompts", lambda run: run.prompts, (), _prompts_identity, _prompts, _prompts_plan)
GENERATE = Stage("generate", "traces", lambda run: run.traces, ("prompts",), _generate_identity, _generate, _generate_plan)
