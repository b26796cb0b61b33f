"""tracestill distils a frontier mixture of experts into a small student: traces, verdicts, a dataset, LoRA, honesty
gates, an export. Try it: tracestill run embedded"""

# The front door. It parses the command line, puts the stages in order, and brings together what no package may import of
# another: engines from teacher/, judgements from student/. Whatever is heavy is imported by the command that needs it, so that
# `--help` answers without torch. A command that needs one package alone lies there, in its commands.py.

import contextlib
import dataclasses
import errno
import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from configs.errors import Interrupted, Refused, Stopped, TracestillError, UnusableInput
from configs.options import AsJson, Config, DryRun, Overrides, RunDir, RunFolderArgument
from data.commands import data_app
from data.invocation import Invocation, existing_run, print_plan, run_one
from generate.commands import generate, generate_stage, is_not_the_first_node, prompts, prompts_stage
from slurm.commands import cancel, logs, print_scripts, status, submit_run
from teacher.commands import Planned, plan_teacher, prepare
from train.commands import mask_pages, train, train_stage

if TYPE_CHECKING:
    from configs.judging import Judging
    from configs.schema import Recipe
    from data.asking import ControlWords, Model, Models
    from data.engine import Engine
    from data.row_check import TrainedIds
    from data.stage import Context, Stage
    from student.stages import OpenTarget, Target
    from teacher.judge import JudgeEngine
    from teacher.ranked_engine import RankedTeacher

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
DISK_AWAY = {errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EREMOTEIO}
"""A shared file system that has lost this node for a moment: whoever tries again, on this node or another, goes on."""


def application() -> typer.Typer:
    """The command line: every command by its name, in the order of the help page."""
    app = typer.Typer(
        add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__
    )
    commands = {
        "run": run, "prompts": prompts, "generate": generate, "train": train, "evaluate": evaluate, "export": export,
        "report": report, "submit": submit, "status": status, "logs": logs, "cancel": cancel, "plan": plan, "prepare": prepare,
    }  # fmt: skip
    for name, command in commands.items():
        app.command(name)(command)
    app.add_typer(data_app(_data_stage, _models, mask_pages), name="data")
    return app


def main() -> None:
    """The console script. Ends with 0 done, 1 failed, 2 unusable input, 3 refused, 75 interrupted and resumable."""
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):  # not SIGUSR1: NCCL catches it
        signal.signal(number, _interrupt)
    if "RANK" not in os.environ:
        sys.exit(_exit_code())
    from configs.launch import end_rank

    try:
        code = _exit_code()
    except Exception as error:
        traceback.print_exc()
        sys.last_value = error  # as the interpreter does at its end: exit handlers tell other ranks why this one went
        code = TracestillError.exit_code
    end_rank(code)


def _exit_code() -> int:
    """Of the command that was given, whose error was said."""
    try:
        application()(standalone_mode=False)
    except TracestillError as error:
        return _say(error)
    except Stopped as stop:
        return _say(Interrupted(str(stop)))
    except OSError as error:
        if error.errno in DISK_AWAY:
            said = f"{error.filename or 'run directory'}: {error.strerror}"
            return _say(Interrupted(f"{said}; everything committed so far is kept, the same command continues"))
        if error.errno not in DISK_ERRORS:
            raise
        return _say(
            UnusableInput(
                f"{error.filename or 'run directory'}: {error.strerror}; make room or restore it, then give the same command"
            )
        )
    except typer.Abort:
        return Interrupted.exit_code
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's own usage errors
        if usage is None:
            raise
        print(f"error: {usage()}", file=sys.stderr)
        return UnusableInput.exit_code
    return 0


def _interrupt(number: int, _: object) -> None:
    raise Stopped(f"stopped by {signal.Signals(number).name}; everything committed so far is kept, the same command continues")


def _say(error: TracestillError) -> int:
    if "RANK" in os.environ:
        from configs.launch import rank_error_line

        print(rank_error_line(error), file=sys.stderr, flush=True)
    else:
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code


# --- the whole pipeline ------------------------------------------------------------------------------------------


def run(
    config: Config, overrides: Overrides = None, run_dir: RunDir = None, dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Every stage here and now; what is already complete is skipped."""
    named = Invocation(config, overrides, run_dir)
    if dry_run:
        print_plan(_all_stages, named)
        return
    recipe = named.load().recipe
    if not recipe.evaluate.prompt_suites:
        raise UnusableInput(
            "evaluate.suites: none that gives items, so nothing could be gated; add at least one beside any lm_eval, or run the "
            "stages one by one"
        )
    _require_models(recipe)
    context = named.open()
    from data.stage import run_stage
    from data.store import read_rollup
    from student.stages import gate_refusal

    refusal = None
    for stage in _all_stages():
        if stage.name == "headroom":
            if context.recipe.evaluate.headroom is not None:
                _require_headroom(context)
            continue
        if refusal is not None and stage.name == "export":
            if read_rollup(context.run.export) is None:
                context.console.print("export    not made: a gate refused this student")
                continue
            context.console.print("export    is there from before a gate refused this student; its card has to say so")
        run_stage(stage, context)
        if stage.name == "evaluate":
            refusal = gate_refusal(context)
    _print_result(context, as_json)
    if refusal is not None:
        raise refusal


def _require_models(recipe: "Recipe") -> None:
    """Both models are there before the run folder is made: a typo costs nothing, and no night."""
    from student.folders import resolve
    from teacher.folders import model_folder, weights_folder

    if recipe.teacher.engine.type == "http":
        model_folder(recipe.teacher.model)
    else:
        weights_folder(recipe.teacher)
    resolve(recipe.student.model)


def _all_stages() -> list["Stage"]:
    return [
        prompts_stage(),
        _headroom_stage(),
        generate_stage(),
        _data_stage(),
        train_stage(),
        _evaluate_stage(),
        _export_stage(),
        _report_stage(),
    ]


def _print_result(context: "Context", as_json: bool) -> None:
    from data.report import result_table
    from data.report_summary import report_json

    summary = report_json(context.run)
    context.console.print(result_table(summary))
    context.console.print(f"report: {context.run.report / 'index.html'}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(summary))


# --- one stage at a time -----------------------------------------------------------------------------------------


def evaluate(
    config: Config,
    models: Annotated[list[str] | None, typer.Argument(help="With --compare: teacher, base, student, export/FORMAT, ...")] = None,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="MODELS side by side, under one harness, with cost and tokens.")
    ] = False,
    headroom: Annotated[
        bool, typer.Option("--headroom", help="Teacher and base only: is there something to distil? Before any training.")
    ] = False,
) -> None:
    """Teacher, base and student on the same held-out items; exit code 3 when a gate says no."""
    from data.stage import run_stage

    named = Invocation(config, overrides, run_dir)
    if compare != bool(models) or (compare and headroom):
        raise UnusableInput("evaluate: expected --compare with the models to compare, --headroom alone, or neither")
    if dry_run:
        print_plan(lambda: [_headroom_stage() if headroom else _evaluate_stage()], named)
        return
    context = named.open()
    if "RANK" in os.environ:
        from teacher.ranked_engine import serve_rank

        serve_rank(context.recipe.teacher, _ranks_folder(context))
        return
    if "TRACESTILL_RENDEZVOUS" in os.environ and is_not_the_first_node(named):  # without, gates of a finished run are judged here
        from generate.launch import join_evaluation

        join_evaluation(context)
        return
    from student.stages import gate_refusal

    with _teacher_of_all_nodes(context) as open_target:
        if compare:
            _compare(context, models or [], open_target, as_json)
            return
        if headroom:
            _require_headroom(context, open_target)
            return
        run_stage(_evaluate_stage(open_target), context)
    refusal = gate_refusal(context)
    if as_json:
        from data.report_summary import report_json

        print(json.dumps(report_json(context.run)))
    if refusal is not None:
        raise refusal


@contextlib.contextmanager
def _teacher_of_all_nodes(context: "Context") -> Iterator["OpenTarget"]:
    """Opens evaluation targets. Where the teacher's ranks are on several nodes, the other nodes' are at the rendezvous already:
    this node's meet them, whether anything is left to ask the teacher or not, and end with them."""
    from generate.launch import nodes_of, run_evaluation_ranks

    if "TRACESTILL_RENDEZVOUS" not in os.environ or nodes_of(context.recipe) is None:
        yield _target
        return
    from teacher.engines import ranked_teacher

    engine = ranked_teacher(context.recipe.teacher, _ranks_folder(context), functools.partial(run_evaluation_ranks, context))
    engine.start()
    try:
        yield functools.partial(_target, ranks=engine)
    finally:
        engine.close()


def _compare(context: "Context", models: list[str], open_target: "OpenTarget", as_json: bool) -> None:
    from data.stage import exclusive
    from student.compare import compare_models

    with exclusive(context.run, "compare"):
        found = compare_models(context, models, open_target)
    print(found.text)
    context.console.print(f"written: {found.path}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(found.values))


def _require_headroom(context: "Context", open_target: "OpenTarget | None" = None) -> None:
    """Teacher and base are measured, and the teacher is better by more than chance; whatever else is refused (exit 3)."""
    from data.stage import run_stage
    from student.stages import headroom_refusal

    run_stage(_headroom_stage(open_target), context)
    if (refusal := headroom_refusal(context)) is not None:
        raise refusal


def export(
    config: Config,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    dry_run: DryRun = False,
    serve_check: Annotated[
        bool, typer.Option("--serve-check", help="Then serve it on loopback, and ask it what the student says.")
    ] = False,
) -> None:
    """What a server loads, in every format of the recipe: opened again and compared before it is sealed."""
    named = Invocation(config, overrides, run_dir)
    run_one(_export_stage, named, dry_run=dry_run)
    if serve_check and not dry_run:
        context = named.open()
        from student.serve_check import Served
        from student.stages import check_serving

        for one in check_serving(context):
            if isinstance(one, Served):
                words = f"{one.requests} chats, {one.tokens} tokens as generated here ({one.near_ties} near ties)"
                context.console.print(f"served    {one.format} by {one.server}: {words}", highlight=False, soft_wrap=True)
            else:
                context.console.print(f"served    not: {one}", highlight=False, soft_wrap=True)


def report(run_dir: RunFolderArgument, as_json: AsJson = False) -> None:
    """One self-contained HTML page of a run."""
    from data.report import write_report
    from data.report_summary import report_json
    from data.stages import reseal_report

    folder = existing_run(run_dir)
    page = write_report(folder)
    reseal_report(folder)
    if as_json:
        print(json.dumps(report_json(folder)))
    else:
        print(page)


# --- before a GPU is touched -------------------------------------------------------------------------------------


def submit(
    config: Config,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    dry_run: DryRun = False,
    first: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="This stage and those after it.")] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="STAGE", help="This stage alone.")] = None,
    max_nodes: Annotated[int | None, typer.Option("--max-nodes", min=1, help="Nodes held at the same time.")] = None,
) -> None:
    """The same stages as a chain of Slurm jobs; again: attaches to what runs and submits what is missing."""
    named = Invocation(config, overrides, run_dir)
    if dry_run:
        print_scripts(named, max_nodes, (first, only), _planned_hours)
    else:
        submit_run(named, max_nodes, (first, only), _require_models_to_submit, _is_current)


def _require_models_to_submit(recipe: "Recipe") -> None:
    """Shards may still be to prepare, from the checkpoint; servers may have weights of their own."""
    from configs.schema import DeepSpeedEngine
    from teacher.checkpoint.manifest import is_prepared
    from teacher.folders import model_folder, prepared_folder

    if (servers := recipe.slurm.servers) is not None and servers.model:
        model_folder(servers.model, "slurm.servers.model")
    shards, engine = prepared_folder(recipe.teacher), recipe.teacher.engine
    if isinstance(engine, DeepSpeedEngine) and shards is not None and not is_prepared(shards):
        engine = engine.model_copy(update={"prepared": ""})
    teacher = recipe.teacher.model_copy(update={"engine": engine})
    _require_models(recipe.model_copy(update={"teacher": teacher}))


def _is_current(context: "Context", name: str) -> bool:
    """Whether what a stage has sealed is what this configuration makes, and what it judged would be let through again."""
    from data.stage import is_current
    from student.gates import require
    from student.stages import gate_rows, headroom_refusal

    quiet = dataclasses.replace(context, console=Console(quiet=True))
    stage = next((one for one in _all_stages() if one.name == name), None)
    if stage is not None and name != "report" and not is_current(stage, quiet):
        return False
    try:
        if name == "evaluate":
            require(gate_rows(quiet))
        return name != "headroom" or headroom_refusal(quiet) is None
    except (Refused, UnusableInput):  # or its figures are gone
        return False


def _planned_hours(recipe: "Recipe") -> dict[str, float]:
    """Of the stages that a plan has hours of; none of a model that cannot be planned."""
    from student.plan import plan_student
    from teacher.plan import plan_recipe

    hours = {}
    with contextlib.suppress(UnusableInput):
        if (cost := plan_recipe(recipe).cost) is not None:
            hours["generate"] = cost.hours
    with contextlib.suppress(UnusableInput):
        if (rate := plan_student(recipe).rate) is not None:
            hours["train"] = rate.hours
    return hours


def plan(
    config: Config,
    overrides: Overrides = None,
    as_json: AsJson = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the teacher and measure what was calculated, on this machine.")
    ] = False,
    only: Annotated[Literal["teacher", "student"] | None, typer.Option("--only", help="One of the two models.")] = None,
) -> None:
    """What fits, how fast and at what price, before a GPU is touched; exit code 3 when something does not fit."""
    named = Invocation(config, overrides)
    recipe = named.load().recipe
    if probe and "RANK" in os.environ:
        from teacher.probe_launch import probe_as_rank

        probe_as_rank(recipe, int(os.environ["RANK"]))
        return
    if probe and only == "student":
        raise UnusableInput("--probe measures the teacher; leave out --only student")
    teacher = None if only == "student" else plan_teacher(named, probe=probe)
    student = None if only == "teacher" else _plan_student(recipe, is_asked_for=only == "student")
    planned = [one for one in (teacher, student) if one is not None]
    if as_json:
        values = {} if teacher is None else teacher.values
        print(json.dumps(values | ({} if only == "teacher" else {"student": student and student.values})))
    if refusals := [one.refusal for one in planned if one.refusal is not None]:
        raise Refused("; ".join(refusals))


def _plan_student(recipe: "Recipe", *, is_asked_for: bool) -> Planned | None:
    """None: it cannot be planned, which is said, and is no error while the teacher can: many a recipe is planned before there
    is a base."""
    from student.plan import plan_student
    from student.planning.table import student_json, student_tables

    try:
        result = plan_student(recipe)
    except UnusableInput as error:
        if is_asked_for:
            raise
        print(f"\nstudent not planned: {error}")
        return None
    Console(highlight=False).print(student_tables(result))
    return Planned(student_json(result), result.refusal)


# --- stages that need both sides: the engine comes from teacher/, the judgement from student/ ---------------------


def _data_stage() -> "Stage":
    from data.stages import data_stage

    return data_stage(_models)


def _models(context: "Context") -> "Models":
    """What a build of the dataset may ask; nothing is opened here."""
    from data.asking import Models

    judging = context.recipe.data.judging
    return Models(
        student=_base_student(context.recipe),
        judge=None if judging is None else _judge(judging),
        control_words=_control_words(context.recipe),
        trained_ids=lambda: _trained_ids(context.recipe),
    )


def _trained_ids(recipe: "Recipe") -> "TrainedIds":
    from data.codec import trained_ids_of
    from student.model import load_tokenizer

    return trained_ids_of(load_tokenizer(recipe.student.model))


def _control_words(recipe: "Recipe") -> "ControlWords":
    """Of the teacher's and of the student's tokenizer."""
    from data.asking import ControlWords
    from generate.control_words import control_words, tokenizers_sha256
    from student.folders import EMBEDDED as STUDENT
    from teacher.folders import EMBEDDED as TEACHER
    from teacher.folders import prepared_folder

    teacher, student = recipe.teacher.model, recipe.student.model
    folders = (
        prepared_folder(recipe.teacher) or (TEACHER if teacher == "embedded" else Path(teacher)),
        STUDENT if student == "embedded" else Path(student),
    )
    return ControlWords(lambda: tokenizers_sha256(folders), lambda: control_words(folders))


def _base_student(recipe: "Recipe") -> "Model":
    from data.asking import Codec, Model

    def identity() -> str:
        from student.folders import model_sha256, resolve

        return f"{model_sha256(resolve(recipe.student.model))} {recipe.train.dtype}"

    def codec() -> Codec:
        from data.codec import codec_of
        from student.model import load_tokenizer

        return codec_of(load_tokenizer(recipe.student.model))

    def engine() -> "Engine":
        from student.folders import resolve
        from teacher.engines import open_local_engine

        folder = resolve(recipe.student.model)
        return open_local_engine(folder, dtype=recipe.train.dtype, batch_size=recipe.evaluate.batch_size)

    return Model(identity, codec, engine)


def _judge(settings: "Judging") -> "Model":
    from data.asking import Model
    from data.verify.llm_judge import identity_of

    @functools.cache
    def engine() -> "JudgeEngine":
        from teacher.judge import JudgeEngine

        return JudgeEngine(settings)

    return Model(lambda: identity_of(settings), lambda: engine().codec, engine)


def _ranks_folder(context: "Context") -> Path:
    return context.run.cache / "teacher"


def _target(context: "Context", name: str, *, ranks: "RankedTeacher | None" = None) -> "Target":
    """An evaluation target: the teacher through its recipe's engine, others through the local one or their server. ranks: the
    teacher's, where they have been started."""
    from generate.launch import run_evaluation_ranks, teacher_fingerprint
    from student.export import merged_with
    from student.model import load_tokenizer as load_student_tokenizer
    from student.stages import Target
    from student.targets import target_spec
    from teacher.engines import load_tokenizer as load_teacher_tokenizer
    from teacher.engines import open_evaluation_engine, open_local_engine, open_server

    spec, settings = target_spec(context.recipe, context.run, name), context.recipe.evaluate
    judging = context.recipe.data.judging
    judge = None if judging is None else _judge(judging)
    if spec.kind == "teacher":
        teacher = context.recipe.teacher
        launch = functools.partial(run_evaluation_ranks, context)
        engine = ranks or open_evaluation_engine(teacher, _ranks_folder(context), launch, batch_size=settings.batch_size)
        return Target(spec, engine, load_teacher_tokenizer(teacher), teacher_fingerprint(context), judge)
    if spec.server is not None:
        tokenizer = load_student_tokenizer(spec.tokenizer)
        return Target(spec, open_server(spec.server, tokenizer), tokenizer, spec.fingerprint(), judge)
    assert spec.folder is not None
    adapt = None if spec.adapter is None else functools.partial(merged_with, spec.adapter)
    engine = open_local_engine(spec.folder, adapt=adapt, dtype=spec.dtype, batch_size=settings.batch_size)
    return Target(spec, engine, load_student_tokenizer(str(spec.folder)), spec.fingerprint(), judge)


def _evaluate_stage(open_target: "OpenTarget | None" = None) -> "Stage":
    from generate.launch import teacher_fingerprint
    from student.stages import evaluate_stage

    return evaluate_stage(open_target or _target, teacher_fingerprint)


def _headroom_stage(open_target: "OpenTarget | None" = None) -> "Stage":
    from generate.launch import teacher_fingerprint
    from student.stages import headroom_stage

    return headroom_stage(open_target or _target, teacher_fingerprint)


def _export_stage() -> "Stage":
    from student.stages import export_stage

    return export_stage(_target)


def _report_stage() -> "Stage":
    from data.stages import REPORT

    return REPORT


if __name__ == "__main__":
    main()
