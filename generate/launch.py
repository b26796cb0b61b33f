"""Getting the requests of a run answered: by this process or by the ranks it starts, and beside whoever else is at it."""

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import Interrupted, UnusableInput
from configs.launch import Nodes, StageFailed, read_nodes, run_ranks
from configs.progress import Count, Display, Report, expect_loading, file_reporter, read_counts
from configs.schema import DeepSpeedEngine, Recipe
from data.ledger import Ledger, read_ledger
from data.stage import Context, exclusive, folder_stays
from data.store import ROLLUP, RunFolder, SegmentLog, read_rollup, segments, verify_files
from data.work import WorkFolder, ages, read_facts
from generate import identity
from generate.budget import number_of, others, spent

if TYPE_CHECKING:
    from generate.canary import CanaryReport

log = logging.getLogger(__name__)

WAIT_S = 1.0
LOOK_S = 5.0


def teacher_fingerprint(context: Context) -> str:
    """Identity of what answers: the weights' hash and the compute dtype (for a server, its model's name)."""
    from teacher.folders import fingerprint_teacher

    return fingerprint_teacher(context.recipe.teacher)


def ask_together(context: Context, show: Callable[[Count], None]) -> None:
    """Every request has an answer, by these workers or by others on the same run folder.

    Raises:
        Interrupted: the budget is spent, or a launch over several nodes leaves requests of workers that are gone.
        StageFailed: requests stay pending though nobody is at them.
    """
    ledger, again = read_ledger(context.run), context.recipe.generate.retry_failed
    while ledger.pending or (again and ledger.failed):
        again, before = False, ledger
        refuse_if_spent(context, ledger.pending)
        launch(context, show, ledger)
        waited = wait_for_others(context, show)
        ledger = read_ledger(context.run)
        if ledger.pending:
            refuse_if_spent(context, ledger.pending)
            if nodes_of(context.recipe) is not None:  # the other nodes have ended: none would join another launch
                raise Interrupted(f"{ledger.pending} requests were left by workers that are gone; the same command continues")
            if ledger.pending == before.pending and not waited:
                left = f"{ledger.pending} of {ledger.requested} requests stay pending, and nobody is at them"
                raise StageFailed(f"{context.run.traces}: {left}; expected none; see the log, then give the same command")
    if context.recipe.generate.retry_failed:
        wait_until_alone(context, show)
        unseal_if_grown(context.run)


def refuse_strangers(context: Context) -> None:
    """Raises UnusableInput when what the folder holds was begun with something else. The ranks would say so too, half a minute
    later."""
    if (share := context.recipe.generate.canary.share) is not None:
        raise UnusableInput(f"generate.canary.share {share} in the recipe: a canary is asked with --canary {share}; leave it out")
    mine = identity.cheap_identity(context.recipe, context.run, teacher_fingerprint(context))
    identity.refuse_others(context.recipe, context.run, mine)
    if (rollup := read_rollup(context.run.traces)) is not None:
        verify_files(context.run, rollup)  # sealed, and not complete: something of it is gone, or was changed


def unseal_if_grown(run: RunFolder) -> None:
    """Somebody who asked nothing again sealed while we did: what we added has to be in the view, so the stage is sealed once
    more."""
    with exclusive(run, "generate", waits=True):
        if (rollup := read_rollup(run.traces)) is not None:
            sealed = {Path(path).name for path in rollup.files}
            if any(segment.path.name not in sealed for segment in SegmentLog(run.traces).look()):
                (run.traces / ROLLUP).unlink(missing_ok=True)


def unseal_for_retry(context: Context) -> None:
    """A sealed run whose failed requests are to be asked again is open once more."""
    if context.recipe.generate.retry_failed and (context.run.traces / ROLLUP).is_file() and read_ledger(context.run).failed:
        (context.run.traces / ROLLUP).unlink(missing_ok=True)  # somebody may have done so while we read the ledger


def ask_canary(context: Context) -> "CanaryReport":
    """The canary's requests are answered, and judged. Nothing is sealed: the run goes on from there."""
    from generate.canary import measure

    ledger, run = read_ledger(context.run), context.run
    mine = identity.cheap_identity(context.recipe, run, teacher_fingerprint(context))
    identity.refuse_others(context.recipe, run, mine)
    refuse_if_spent(context, ledger.pending)
    open_before = -1
    with folder_stays(run), Display("canary", "traces", context.console) as display:
        while (left := num_open(context)) and left != open_before:
            open_before = left
            launch(context, display.show, ledger)
            wait_for_others(context, display.show)
            if nodes_of(context.recipe) is not None:  # as in ask_together
                left = num_open(context)
                break
        if left:
            raise Interrupted(f"{left} requests of the canary are still open; the same command continues")
        return measure(context.recipe, run, context.folders, display.show)


def num_open(context: Context) -> int:
    """Requests of the pool, or of its canary, that have not ended."""
    from generate.worker import make_pool

    pool = make_pool(context.recipe, context.run, teacher_fingerprint(context))
    for segment in segments(context.run.traces):
        pool.add(segment)
    return pool.num_open


def launch(context: Context, show: Callable[[Count], None], ledger: Ledger) -> None:
    """This process's part, or its ranks'. What is shown as done is what all workers of the run have done."""
    already, committed = ledger.completed + ledger.failed, Committed(SegmentLog(context.run.traces))
    expect_loading()  # once more, when requests that others have left are asked

    def tell(count: Count) -> None:
        done = min(ledger.requested, max(already + count.done, committed.rows()))
        show(count._replace(done=done, total=ledger.requested))

    if isinstance(context.recipe.teacher.engine, DeepSpeedEngine):
        _generate_on_ranks(context, tell)
    else:
        generate_here(context, tell)


@dataclass
class Committed:
    """Rows of the trace segments, looked at now and then."""

    log: SegmentLog
    found: int = 0
    looked: float = -math.inf

    def rows(self) -> int:
        if time.monotonic() - self.looked >= LOOK_S:
            self.looked = time.monotonic()
            self.found += sum(segment.rows for segment in self.log.look())
        return self.found


def wait_for_others(context: Context, show: Report) -> bool:
    """Whoever is alive and at requests of this run has ended them, or has gone and left some: those are free then, or will be
    when their leases are stale. Returns whether there was anybody."""
    folder, ttl_s = WorkFolder.of(context.run), context.recipe.generate.lease_ttl_s
    committed, seen, known = Committed(SegmentLog(context.run.traces)), set[str](), -1
    requested, since = 0, time.monotonic()
    while living := {name for name, age in ages(folder).items() if age <= ttl_s}:
        if living - seen:
            log.info("waiting for requests that other workers hold: %s", ", ".join(sorted(living)))
        seen |= living
        facts = read_facts(folder)
        if any(number_of(facts.get(name, {}), "in_flight") for name in seen - living):
            break
        if (rows := committed.rows()) != known:  # a ledger is read when there is something new in it
            known, ledger = rows, read_ledger(context.run)
            requested = ledger.requested
            if not ledger.pending:
                break
        _show_waiting(show, min(rows, requested), requested, len(living), since)
        time.sleep(min(WAIT_S, ttl_s / 4))
    return bool(seen)


def wait_until_alone(context: Context, show: Report) -> None:
    """Failed requests that others ask again are not pending: only their workers' ends say that they are done."""
    folder, ttl_s = WorkFolder.of(context.run), context.recipe.generate.lease_ttl_s
    ledger, since = read_ledger(context.run), time.monotonic()
    while living := sum(age <= ttl_s for age in ages(folder).values()):
        _show_waiting(show, ledger.completed, ledger.requested, living, since)
        time.sleep(min(WAIT_S, ttl_s / 4))


def _show_waiting(show: Report, done: int, requested: int, workers: int, since: float) -> None:
    """A sign of life every minute: each of those that are waited for has a watchdog of its own."""
    minutes = int((time.monotonic() - since) / 60)
    show(Count(done, requested, f"{workers} other workers at the rest" + (f" for {minutes} min" if minutes else "")))


def refuse_if_spent(context: Context, pending: int) -> None:
    run, folder = context.run, WorkFolder.of(context.run)
    committed = segments(run.traces)
    cost = sum(float(segment.facts.get("cost", 0.0)) for segment in committed)
    tokens = sum(sum(segment.facts["output_tokens"]) for segment in committed)
    ttl_s = context.recipe.generate.lease_ttl_s
    living = [name for name, age in ages(folder).items() if age <= ttl_s]
    if said := spent(cost, tokens, others(read_facts(folder), living)).exceeds(context.recipe.generate.budget):
        raise Interrupted(f"{said}; {pending} requests stay pending: raise it, and the same command continues")


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
    ledger = read_ledger(context.run)
    if ledger.pending or (context.recipe.generate.retry_failed and ledger.failed):
        refuse_strangers(context)  # as the first node does, which would be waited for at the rendezvous
        refuse_if_spent(context, ledger.pending)
        _join_ranks(context)


def join_canary(context: Context) -> None:
    """Another node's part of a canary, likewise."""
    if num_open(context):
        refuse_if_spent(context, read_ledger(context.run).pending)
        _join_ranks(context)


def _join_ranks(context: Context) -> None:
    nodes = nodes_of(context.recipe)
    _run_ranks_here(context, nodes, context.run.logs / f"generate.n{nodes.rank if nodes else 0}.log", lambda: None)


def _run_ranks_here(
    context: Context, nodes: Nodes | None, log: Path, poll: Callable[[], None], command: str = "generate"
) -> None:
    """Runs the command of this run on every rank of this node."""
    processes, extensions = context.recipe.teacher.ranks_per_node, context.run.cache / "torch_extensions"
    run_ranks(context.words(command), processes=processes, extensions=extensions, log=log, poll=poll, nodes=nodes)


def join_evaluation(context: Context) -> None:
    """Another node's part of an evaluation: its ranks of the teacher, until the first node tells them to end. Whether the teacher
    is asked anything the first node finds out by itself, and loads it only then: nodes that each judged by their own view of the
    files would wait for each other."""
    run_evaluation_ranks(context, lambda: None)


def run_evaluation_ranks(context: Context, poll: Callable[[], None]) -> None:
    """This node's ranks of the teacher for an evaluation, until they are told to end (teacher/ranked_engine.py)."""
    nodes = nodes_of(context.recipe)
    log = context.run.logs / ("evaluate.log" if nodes is None or not nodes.rank else f"evaluate.n{nodes.rank}.log")
    _run_ranks_here(context, nodes, log, poll, "evaluate")


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
        for _ in engine.generate((), Handout(stop=lambda: bool(drain.requested), stopped=drain.join)):
            pass
        drain.end()
    engine.close()
