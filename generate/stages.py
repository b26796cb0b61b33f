"""The two stages of this package: the prompt set, and the teacher's traces of it."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from configs.errors import UnusableInput
from configs.launch import StageFailed
from configs.progress import Count
from configs.schema import DeepSpeedEngine
from data.expert_counts import ALARMS_COUNT
from data.ledger import read_ledger
from data.prompt_set import write_prompts
from data.stage import Context, Outcome, Stage
from data.store import read_segment, segments
from data.work import WorkFolder, ages, clear
from generate.launch import ask_together, refuse_strangers, teacher_fingerprint

if TYPE_CHECKING:
    from generate.prompts import PromptStream
    from generate.telemetry import Written

log = logging.getLogger(__name__)


def _prompts(context: Context, show: Callable[[Count], None]) -> Outcome:
    stream = prompt_stream(context)
    path = write_prompts(context.run, stream)
    tally = stream.tally
    if tally.judged_by_model and context.recipe.data.judging is None:
        log.warning(
            "%d training prompts name the verifier llm_judge and the recipe has no data.judging: their traces can be generated, "
            "and a build of the dataset will refuse them", tally.judged_by_model,
        )  # fmt: skip
    counts = {
        "train": tally.train,
        "eval": tally.eval,
        "twins": tally.twins,
        "requests": tally.train * context.recipe.generate.samples_per_prompt,
        "by_task": dict(tally.by_task),
        "left_out": dict(tally.left_out),
        "escaped_control_tokens": dict(tally.escaped),
        "left_out_rows": {reason: lost.first for reason, lost in tally.rows.items() if lost.count},
    }
    left_out = ", ".join(f"{count} {reason}" for reason, count in tally.left_out.items())
    summary = f"{tally.train} training prompts, {tally.eval} evaluation items" + (f"; left out: {left_out}" if left_out else "")
    return Outcome([path], counts, summary)


def prompt_stream(context: Context) -> "PromptStream":
    """The recipe's prompts. The teacher's own tokenizer measures long contexts, and says which words no prompt may hold."""
    from generate.control_tokens import control_tokens_of
    from generate.prompts import PromptStream
    from teacher.engines import load_tokenizer

    recipe = context.recipe
    tokenizer = load_tokenizer(recipe.teacher)

    def count_tokens(texts: Sequence[str]) -> list[int]:
        found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
        return [len(ids) for ids in found]

    control = control_tokens_of(tokenizer)
    return PromptStream(recipe.generate.prompts, recipe.evaluate.prompt_suites, context.folders, count_tokens, control)


def _prompts_identity(context: Context) -> dict[str, Any]:
    from generate.prompts import source_hashes

    recipe = context.recipe
    sources = [*recipe.generate.prompts, *recipe.evaluate.prompt_suites]
    from teacher.folders import fingerprint_tokenizer_only

    found = {
        "prompts": [source.model_dump(mode="json") for source in recipe.generate.prompts],
        "suites": [source.model_dump(mode="json") for source in recipe.evaluate.prompt_suites],
        "samples": recipe.generate.samples_per_prompt,
        "files": source_hashes(sources, context.folders),
        # Its control tokens are refused or escaped in every prompt, and long ones are packed to a budget of its tokens.
        "tokenizer": fingerprint_tokenizer_only(recipe.teacher.model),
    }
    return found


def _seal_traces(context: Context, show: Callable[[Count], None]) -> Outcome:
    ledger = read_ledger(context.run)
    ledger.check(viewed=False)
    if ledger.failed == ledger.requested:
        said = ", ".join(f"{count} {reason}" for reason, count in ledger.failed_by_reason.items())
        raise StageFailed(
            f"{context.run.traces}: not one of {ledger.requested} requests completed ({said}); nothing is sealed: "
            "mend the cause, then: tracestill generate CONFIG -s generate.retry_failed=true"
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
    clear(WorkFolder.of(context.run), context.recipe.generate.lease_ttl_s)
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
    return f"{len(sources)} training sources, {len(context.recipe.evaluate.prompt_suites)} evaluation suites"


def _refuse_new_prompts(context: Context) -> None:
    """Traces are answers to the prompts that they were asked for, committed or still in the journal, and whoever is alive may
    bring one. A worker that never got any has left nothing but its identity, which must not bind those who come after it."""
    run, folder = context.run, WorkFolder.of(context.run)
    if any(run.traces.glob("*.json")) or any(path.stat().st_size for path in folder.journal.glob("*.log")):
        what = "there are traces of the one before"
    elif any(age <= context.recipe.generate.lease_ttl_s for age in ages(folder).values()):
        what = "workers are at the one before"
    else:
        folder.identity.unlink(missing_ok=True)
        return
    raise UnusableInput(
        f"{run.prompts}: the prompt set has changed or is damaged, and {what}; "
        "restore its sources and files, or use another --run-dir"
    )


PROMPTS = Stage(
    "prompts", "prompts", lambda run: run.prompts, (), _prompts_identity, _prompts, _prompts_plan, admit=_refuse_new_prompts
)
GENERATE = Stage(
    "generate", "traces", lambda run: run.traces, ("prompts",), _generate_identity, _seal_traces, _generate_plan, ask_together,
    refuse_strangers,
)  # fmt: skip
