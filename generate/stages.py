"""The two stages of this package: the prompt set, and the teacher's traces of it."""

import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import Interrupted, UnusableInput
from configs.launch import Nodes, StageFailed, read_nodes, run_ranks
from configs.progress import Count, file_reporter, read_counts
from configs.schema import DeepSpeedEngine, Recipe
from data.expert_counts import ALARMS_COUNT
from data.ledger import Ledger, read_ledger
from data.prompt_set import write_prompts
from data.stage import Context, Outcome, Stage
from data.store import read_segment, segments
from data.work import WorkFolder, ages, read_facts
from generate.budget import spent

if TYPE_CHECKING:
    from generate.telemetry import Written


log = logging.getLogger(__name__)

WAIT_S = 1.0


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


def _ask_together(context: Context, show: Callable[[Count], None]) -> None:
    """Every request has an answer, by these workers or by others on the same run folder.

    Raises:
        Interrupted: the budget is spent, or a launch over several nodes leaves requests of workers that are gone.
        StageFailed: requests stay pending though nobody is at them.
    """
    ledger, again = read_ledger(context.run), context.recipe.generate.retry_failed
    while ledger.pending or (again and ledger.failed):
        again, before = False, ledger
        _refuse_if_spent(context, ledger.pending)
        _launch(context, show, ledger)
        _wait_for_others(context)
        ledger = read_ledger(context.run)
        if ledger.pending:
            _refuse_if_spent(context, ledger.pending)
            if nodes_of(context.recipe) is not None:  # the other nodes have ended: none would join another launch
                raise Interrupted(f"{ledger.pending} requests were left by workers that are gone; the same command continues")
            if ledger.pending == before.pending:
                raise StageFailed(f"{context.run.traces}: {ledger.pending} of {ledger.requested} requests stay pending")


def _launch(context: Context, show: Callable[[Count], None], ledger: Ledger) -> None:
    already, requested = ledger.completed + ledger.failed, ledger.requested

    def tell(count: Count) -> None:
        show(Count(count.done + already, requested, count.note))

    if isinstance(context.recipe.teacher.engine, DeepSpeedEngine):
        _generate_on_ranks(context, tell)
    else:
        generate_here(context, tell)


def _wait_for_others(context: Context) -> None:
    """Whoever is alive and at requests of this run ends; a worker whose beat has stopped is waited for until its leases
    are free."""
    folder, ttl_s, told = WorkFolder.of(context.run), context.recipe.generate.lease_ttl_s, ""
    while living := {name: age for name, age in ages(folder).items() if age <= ttl_s}:
        if not read_ledger(context.run).pending:
            return
        if (names := ", ".join(sorted(living))) != told:
            log.info("waiting for requests that other workers hold: %s", names)
            told = names
        time.sleep(min(WAIT_S, ttl_s / 4))


def _refuse_if_spent(context: Context, pending: int) -> None:
    run, folder = context.run, WorkFolder.of(context.run)
    committed = segments(run.traces)
    cost = sum(float(segment.facts.get("cost", 0.0)) for segment in committed)
    tokens = sum(sum(segment.facts["output_tokens"]) for segment in committed)
    if said := spent(cost, tokens, read_facts(folder), ages(folder)).exceeds(context.recipe.generate.budget):
        raise Interrupted(f"{said}; {pending} requests stay pending: raise it, and the same command continues")


def _seal_traces(context: Context, show: Callable[[Count], None]) -> Outcome:
    ledger = read_ledger(context.run)
    ledger.check(viewed=False)
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
    for place in (WorkFolder.of(context.run).journal, WorkFolder.of(context.run).leases):
        shutil.rmtree(place, ignore_errors=True)  # of workers that are gone: what they had is committed
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


def nodes_of(recipe: Recipe) -> Nodes | None:
    """This node's place in a launch over several; None on one node, and with engines that start no ranks.

    Raises:
        UnusableInput: the recipe wants several nodes and the environment does not say where they meet.
    """
    teacher = recipe.teacher
    return read_nodes(teacher.hardware.nodes, os.environ) if isinstance(teacher.engine, DeepSpeedEngine) else None


def join_generation(context: Context) -> None:
    """Another node's part of the stage: its ranks, and nothing else.

    The first node shows progress and seals. Both read the same ledger before any rank can commit (ranks start once all
    launchers have met), so they agree on whether there is anything to do; and a rank commits before the collective in
    which its engine closes, so the first node's ranks end after everybody's last commit.
    """
    if read_ledger(context.run).pending:
        nodes = nodes_of(context.recipe)
        _run_ranks_here(context, nodes, context.run.logs / f"generate.n{nodes.rank if nodes else 0}.log", lambda: None)


def _run_ranks_here(context: Context, nodes: Nodes | None, log: Path, poll: Callable[[], None]) -> None:
    """Runs this same command on every rank of this node."""
    processes, extensions = context.recipe.teacher.ranks_per_node, context.run.cache / "torch_extensions"
    run_ranks(context.words("generate"), processes=processes, extensions=extensions, log=log, poll=poll, nodes=nodes)


def _generate_on_ranks(context: Context, tell: Callable[[Count], None]) -> None:
    teacher = context.recipe.teacher
    progress = [_progress_file(context, rank) for rank in range(teacher.world // teacher.layout.tensor_parallel)]
    for path in progress:
        path.unlink(missing_ok=True)

    def poll() -> None:
        if (count := read_counts(progress)) is not None:
            tell(count)

    _run_ranks_here(context, nodes_of(context.recipe), context.run.logs / "generate.log", poll)


def _progress_file(context: Context, rank: int) -> Path:
    return context.run.cache / f"generate.r{rank}.progress"


def generate_rank(context: Context) -> None:
    """One rank, started by torchrun. Ranks of one tensor-parallel group (neighbours) hold slices of one layer and answer
    the same requests together: the first of them claims, journals and writes, the others lend their slices."""
    rank, group = int(os.environ["RANK"]), context.recipe.teacher.layout.tensor_parallel
    if rank % group:
        _lend_a_slice(context)
    else:
        generate_here(context, file_reporter(_progress_file(context, rank // group)), rank=rank)


def generate_here(context: Context, report: Callable[[Count], None], *, rank: int = 0) -> None:
    from generate.worker import generate_traces
    from teacher.engines import load_tokenizer, open_engine

    recipe = context.recipe
    engine, tokenizer = open_engine(recipe.teacher), load_tokenizer(recipe.teacher)
    generate_traces(recipe, context.run, engine, tokenizer, teacher_fingerprint(context), rank=rank, report=report)
    # Only after success: closing is collective, and a rank that failed must end at once, not wait for the others.
    engine.close()


def _lend_a_slice(context: Context) -> None:
    from configs.draining import draining
    from data.engine import Handout
    from teacher.engines import open_engine

    engine = open_engine(context.recipe.teacher)
    with draining(context.recipe.generate.drain_seconds) as drain:
        for _ in engine.generate((), Handout(stop=lambda: bool(drain.requested))):
            pass
        drain.end()
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
GENERATE = Stage(
    "generate", "traces", lambda run: run.traces, ("prompts",), _generate_identity, _seal_traces, _generate_plan, _ask_together
)
