"""tracestill distils a frontier mixture of experts into a small student: traces, verdicts, a dataset, LoRA, honesty
gates, an export. Try it: tracestill run embedded"""

# The front door. It parses the command line and opens the run folder; whatever is heavy is imported by the command that
# needs it, so that `--help` answers without torch.

import errno
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from configs.errors import Interrupted, Refused, Stopped, TracestillError, UnusableInput

if TYPE_CHECKING:
    from data.stage import Context, Stage
    from teacher.plan import Plan

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build the dataset; look at traces and verdicts.")
app.add_typer(data_app, name="data")

Config = Annotated[str, typer.Argument(help="YAML path, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a recipe value, e.g. -s train.lr=2e-4; repeatable."),
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Run folder. [default: runs/NAME]")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and exit.")]
AsJson = Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")]
Probe = Annotated[bool, typer.Option("--probe", help="Load the teacher and measure what was calculated, on this machine.")]
RunFolderArgument = Annotated[Path, typer.Argument(help="A run folder, e.g. runs/embedded.")]


DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EREMOTEIO,
}  # fmt: skip


def main() -> None:
    """The console script. Ends with 0 done, 1 failed, 2 unusable input, 3 refused, 75 interrupted and resumable."""
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):  # not SIGUSR1: NCCL catches it
        signal.signal(number, _interrupt)
    try:
        app(standalone_mode=False)
    except TracestillError as error:
        _fail(error)
    except Stopped as stop:
        _fail(Interrupted(str(stop)))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _fail(
            UnusableInput(
                f"{error.filename or 'run directory'}: {error.strerror}; make room or restore it, then give the same command"
            )
        )
    except typer.Abort:
        sys.exit(Interrupted.exit_code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's own usage errors
        if usage is None:
            raise
        print(f"error: {usage()}", file=sys.stderr)
        sys.exit(UnusableInput.exit_code)


def _interrupt(number: int, _: object) -> None:
    raise Stopped(f"stopped by {signal.Signals(number).name}; everything committed so far is kept, the same command continues")


def _fail(error: TracestillError) -> None:
    if "RANK" in os.environ:
        from configs.launch import rank_error_line

        print(rank_error_line(error), file=sys.stderr, flush=True)
    else:
        print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _open(config: str, overrides: list[str] | None, run_dir: Path | None) -> "Context":
    from configs.load import load_recipe
    from configs.logging import configure_logging
    from data.stage import Context, open_run

    configure_logging()
    loaded = load_recipe(config, overrides or [])
    return Context(loaded, open_run(loaded, run_dir), str(loaded.path), tuple(overrides or ()), Console())


def _plan(stages: Callable[[], list["Stage"]], config: str, overrides: list[str] | None, run_dir: Path | None) -> None:
    """Prints what would be done; touches nothing."""
    from configs.load import load_recipe
    from data.stage import Context
    from data.store import RunFolder, read_rollup

    loaded = load_recipe(config, overrides or [])
    run = RunFolder((run_dir or Path("runs") / loaded.recipe.name).resolve())
    context = Context(loaded, run, str(loaded.path), tuple(overrides or ()), Console())
    for stage in stages():
        done = "  (a finished one is there)" if read_rollup(stage.folder(run)) is not None else ""
        print(f"{stage.name:<9} -> {stage.folder(run)}{done}\n          {stage.plan(context)}")


def _run_one(stage: Callable[[], "Stage"], config: str, overrides: list[str] | None, run_dir: Path | None, dry_run: bool) -> None:
    """One stage. The recipe is judged before the stage is imported: a typo answers in half a second, without torch."""
    from data.stage import run_stage

    if dry_run:
        _plan(lambda: [stage()], config, overrides, run_dir)
    else:
        context = _open(config, overrides, run_dir)
        run_stage(stage(), context)


# --- the whole pipeline ------------------------------------------------------------------------------------------


@app.command()
def run(
    config: Config, overrides: Overrides = None, run_dir: RunDir = None, dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Every stage here and now; what is already complete is skipped."""
    if dry_run:
        _plan(_all_stages, config, overrides, run_dir)
        return
    _check_models(config, overrides)
    context = _open(config, overrides, run_dir)
    from data.stage import run_stage
    from student.stages import gate_refusal

    refusal = None
    for stage in _all_stages():
        if refusal is not None and stage.name == "export":
            context.console.print("export    not made: a gate refused this student")
            continue
        run_stage(stage, context)
        if stage.name == "evaluate":
            refusal = gate_refusal(context)
    _print_result(context, as_json)
    if refusal is not None:
        raise refusal


def _check_models(config: str, overrides: list[str] | None) -> None:
    """Both models are there before the run folder is made: a typo costs nothing."""
    from configs.load import load_recipe

    recipe = load_recipe(config, overrides or []).recipe
    from student.folders import resolve
    from teacher.folders import model_folder, weights_folder

    if not recipe.evaluate.suites:
        raise UnusableInput(
            "evaluate.suites: none given, so nothing could be measured; add at least one, or run the stages one by one"
        )
    if recipe.teacher.engine.type == "http":
        model_folder(recipe.teacher.model)
    else:
        weights_folder(recipe.teacher)
    resolve(recipe.student.model)


def _prompts_stage() -> "Stage":
    from generate.stages import PROMPTS

    return PROMPTS


def _generate_stage() -> "Stage":
    from generate.stages import GENERATE

    return GENERATE


def _data_stage() -> "Stage":
    from data.stages import DATA

    return DATA


def _train_stage() -> "Stage":
    from train.stages import TRAIN

    return TRAIN


def _all_stages() -> list["Stage"]:
    return [
        _prompts_stage(),
        _generate_stage(),
        _data_stage(),
        _train_stage(),
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


@app.command()
def prompts(config: Config, overrides: Overrides = None, run_dir: RunDir = None, dry_run: DryRun = False) -> None:
    """The prompt set: what the teacher is asked, and what evaluation holds back."""
    _run_one(_prompts_stage, config, overrides, run_dir, dry_run)


@app.command()
def generate(
    config: Config,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    dry_run: DryRun = False,
    canary: Annotated[
        float | None,
        typer.Option("--canary", metavar="SHARE", help="Ask a share of the prompts, judge it, and exit 3 if it disappoints."),
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Show the ledger, who is at it, and what it has cost.")] = False,
    as_json: AsJson = False,
) -> None:
    """Teacher traces; any number of workers on one run folder, each of which may be killed and started again."""
    if status:
        _generation_status(config, overrides, run_dir, as_json)
    elif canary is not None and not dry_run:
        _canary(config, [*(overrides or []), f"generate.canary.share={canary}"], run_dir, as_json)
    elif dry_run:
        _plan(lambda: [_generate_stage()], config, overrides, run_dir)
        _forecast(config, overrides, run_dir, as_json)
    elif "RANK" in os.environ:
        _as_rank("generate.launch", "generate_rank", config, overrides, run_dir)
    elif _is_not_the_first_node(config, overrides):
        from generate.launch import join_generation

        join_generation(_open(config, overrides, run_dir))
    else:
        context = _open(config, overrides, run_dir)
        from data.stage import run_stage
        from generate.launch import unseal_for_retry

        unseal_for_retry(context)
        run_stage(_generate_stage(), context)


def _canary(config: str, overrides: list[str], run_dir: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    context = _open(config, overrides, run_dir)
    from generate.canary import canary_table, refusal, violations
    from generate.launch import ask_canary

    found, thresholds = ask_canary(context), context.recipe.generate.canary
    context.console.print(canary_table(found, thresholds))
    said = violations(found, thresholds)
    if as_json:
        print(json.dumps(asdict(found) | {"violations": said}))
    if said:
        raise refusal(said)


def _forecast(config: str, overrides: list[str] | None, run_dir: Path | None, as_json: bool) -> None:
    """What generation is going to take. Touches nothing: a prompt set that is not made yet is made in a temporary folder."""
    from configs.load import load_recipe
    from data.stage import Context
    from data.store import RunFolder

    loaded = load_recipe(config, overrides or [])
    run = RunFolder((run_dir or Path("runs") / loaded.recipe.name).resolve())
    from data.chat import encode_prompt
    from generate.forecast import forecast, forecast_json, forecast_tables
    from generate.stages import prompt_stream
    from teacher.engines import load_tokenizer

    context, tokenizer = (
        Context(loaded, run, str(loaded.path), tuple(overrides or ()), Console()),
        load_tokenizer(loaded.recipe.teacher),
    )
    found = forecast(
        loaded.recipe,
        run,
        lambda: prompt_stream(context),
        lambda prompt: len(encode_prompt(tokenizer, prompt.messages, prompt.tools)),
    )
    Console(highlight=False).print(forecast_tables(found))
    if as_json:
        print(json.dumps(forecast_json(found)))


def _generation_status(config: str, overrides: list[str] | None, run_dir: Path | None, as_json: bool) -> None:
    from configs.load import load_recipe
    from generate.status import read_status, status_json, status_tables

    settings = load_recipe(config, overrides or []).recipe
    found = read_status(_existing_run(run_dir or Path("runs") / settings.name), settings.generate.lease_ttl_s)
    Console(highlight=False).print(status_tables(found, settings.generate.budget))
    if as_json:
        print(json.dumps(status_json(found)))


def _is_not_the_first_node(config: str, overrides: list[str] | None) -> bool:
    from configs.load import load_recipe
    from generate.launch import nodes_of

    nodes = nodes_of(load_recipe(config, overrides or []).recipe)
    return nodes is not None and nodes.rank > 0


@data_app.command("build")
def data_build(config: Config, overrides: Overrides = None, run_dir: RunDir = None, dry_run: DryRun = False) -> None:
    """Judge the traces and build the dataset; nothing is ever deleted."""
    _run_one(_data_stage, config, overrides, run_dir, dry_run)


@app.command()
def train(config: Config, overrides: Overrides = None, run_dir: RunDir = None, dry_run: DryRun = False) -> None:
    """LoRA on the kept traces; resumes from the last checkpoint."""
    if "RANK" in os.environ and not dry_run:
        _as_rank("train.stages", "train_rank", config, overrides, run_dir)
    else:
        _run_one(_train_stage, config, overrides, run_dir, dry_run)


@app.command()
def evaluate(
    config: Config, overrides: Overrides = None, run_dir: RunDir = None, dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Teacher, base and student on the same held-out items; exit code 3 when a gate says no."""
    from data.stage import run_stage

    if dry_run:
        _plan(lambda: [_evaluate_stage()], config, overrides, run_dir)
        return
    context = _open(config, overrides, run_dir)
    from student.stages import gate_refusal

    run_stage(_evaluate_stage(), context)
    refusal = gate_refusal(context)
    if as_json:
        from data.report_summary import report_json

        print(json.dumps(report_json(context.run)))
    if refusal is not None:
        raise refusal


@app.command()
def export(config: Config, overrides: Overrides = None, run_dir: RunDir = None, dry_run: DryRun = False) -> None:
    """What a server loads: merged weights, tokenizer, model card; reloaded and compared before it is sealed."""
    _run_one(_export_stage, config, overrides, run_dir, dry_run)


@app.command()
def report(run_dir: RunFolderArgument, as_json: AsJson = False) -> None:
    """One self-contained HTML page of a run."""
    from data.report import write_report
    from data.report_summary import report_json
    from data.stages import reseal_report

    folder = _existing_run(run_dir)
    page = write_report(folder)
    reseal_report(folder)
    if as_json:
        print(json.dumps(report_json(folder)))
    else:
        print(page)


@app.command()
def submit(config: Config, overrides: Overrides = None, run_dir: RunDir = None, dry_run: DryRun = False) -> None:
    """The same stages as a chain of Slurm jobs; --dry-run prints the scripts."""
    from configs.load import load_recipe
    from data.store import RunFolder
    from slurm.submit import render_scripts

    loaded = load_recipe(config, overrides or [])
    if not dry_run:
        raise UnusableInput(
            "submit: this release renders the scripts only; run it with --dry-run and hand them to sbatch in order"
        )
    folder = RunFolder((run_dir or Path("runs") / loaded.recipe.name).resolve())
    for script in render_scripts(loaded.recipe, config=str(loaded.path), overrides=overrides or [], run=folder):
        print(f"# ---- {script.stage}.sbatch {'-' * (80 - len(script.stage))}\n{script.text}")


@app.command()
def plan(config: Config, overrides: Overrides = None, as_json: AsJson = False, probe: Probe = False) -> None:
    """What fits, how fast and at what price, before a GPU is touched; exit code 3 when the layout does not fit."""
    from configs.load import load_recipe
    from teacher.plan import plan_recipe
    from teacher.planning.table import plan_json, plan_tables

    recipe = load_recipe(config, overrides or []).recipe
    if probe and "RANK" in os.environ:
        from teacher.probe_launch import probe_as_rank

        probe_as_rank(recipe, int(os.environ["RANK"]))
        return
    result = plan_recipe(recipe)
    Console(highlight=False).print(plan_tables(result))
    measured = _probe(result, config, overrides) if probe and result.refusal is None else {}
    if as_json:
        print(json.dumps(plan_json(result) | measured))
    if result.refusal is not None:
        raise Refused(result.refusal)


def _probe(result: "Plan", config: str, overrides: list[str] | None) -> dict[str, object]:
    from configs.load import load_recipe
    from teacher.planning.devices import device_of
    from teacher.probe import probe_json, probe_table
    from teacher.probe_launch import probe_recipe

    loaded = load_recipe(config, overrides or [])
    words = [word for override in overrides or () for word in ("-s", override)]
    found = probe_recipe(loaded.recipe, ["plan", str(loaded.path), *words, "--probe"], dict(os.environ))
    if found is None:
        print("probe: the first rank runs on another node, which prints what was measured")
        return {}
    Console(highlight=False).print(probe_table(found, device_of(result.teacher.hardware)))
    return {"probe": probe_json(found)}


@app.command()
def prepare(
    config: Config,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", help="Folder of the shards. [default: beside the model]")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Once: cut the teacher's checkpoint into what each rank of the recipe's layout loads; a killed one continues."""
    from configs.load import load_recipe
    from configs.logging import configure_logging
    from configs.progress import Display

    configure_logging()
    teacher = load_recipe(config, overrides or []).recipe.teacher
    from teacher import prepare as preparation
    from teacher.checkpoint import shard_plan
    from teacher.checkpoint.source import checkpoint_folder

    layout, dtype = shard_plan.layout_of(teacher)
    folder = checkpoint_folder(teacher.model)
    output = output or shard_plan.default_output(teacher, layout, dtype)
    if dry_run:
        said = preparation.describe_plan(shard_plan.plan_shards(folder, layout, dtype), output)
    else:
        with Display("prepare", "MB", Console(stderr=True)) as display:
            said = preparation.describe_prepared(preparation.prepare(folder, output, layout, dtype, display.show))
    print(said.text)
    if as_json:
        print(json.dumps(said.values))


@data_app.command("stats")
def data_stats(run_dir: RunFolderArgument) -> None:
    """Rows, tokens and reasons by task."""
    from rich.table import Table

    from data.stats import dataset_stats

    stats = dataset_stats(_existing_run(run_dir))
    columns = (
        "completed",
        "kept",
        "rejected",
        "unjudged",
        "train_rows",
        "validation_rows",
        "prompt_tokens",
        "reasoning_tokens",
        "answer_tokens",
    )
    table = Table("task", *columns)
    for name, counts in [*stats.tasks.items(), ("all", stats.total)]:
        table.add_row(name, *(f"{counts[column]:,}" for column in columns))  # type: ignore[literal-required]
    Console().print(table)
    for reason, count in {**stats.total["rejected_by_reason"], **stats.total["unjudged_by_reason"]}.items():
        print(f"{count:>8,}  {reason}")
    print(f"dataset sha256 {stats.dataset_sha256}")


@data_app.command("show")
def data_show(
    run_dir: RunFolderArgument,
    trace: Annotated[str, typer.Option(help="Only traces whose id starts with this.")] = "",
    task: Annotated[str, typer.Option(help="Only tasks that start with this.")] = "",
    fate: Annotated[str, typer.Option(help="Only kept, rejected or unjudged traces.")] = "",
    reason: Annotated[str, typer.Option(help="Only traces with this reason.")] = "",
    finish: Annotated[str, typer.Option(help="Only traces that ended so: stop, length, loop, abort.")] = "",
    min_tokens: Annotated[int, typer.Option(help="Only outputs of at least so many tokens.")] = 0,
    max_tokens: Annotated[int | None, typer.Option(help="Only outputs of at most so many tokens.")] = None,
    unfold: Annotated[bool, typer.Option("--unfold", help="Show reasoning and long prompts whole.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="How many. [default: all on a terminal, else 5]")] = None,
) -> None:
    """Traces in the terminal, page by page: prompt, folded reasoning, answer, verdicts."""
    from data.viewer import Wanted, rendered, show

    if fate not in ("", "kept", "rejected", "unjudged"):
        raise UnusableInput(f"--fate {fate}: expected kept, rejected or unjudged")
    if finish not in ("", "stop", "length", "loop", "abort"):
        raise UnusableInput(f"--finish {finish}: expected stop, length, loop or abort")
    wanted = Wanted(trace, task, fate or None, reason, finish, min_tokens, max_tokens)  # type: ignore[arg-type]
    console = Console(highlight=False)
    found = show(_existing_run(run_dir), wanted, limit if limit is not None or console.is_terminal else 5)
    one = None
    for one in found:
        console.print(rendered(one, unfold=unfold))
        if console.is_terminal and not _wants_more(console):
            break
    if one is None:
        print("no trace matches")


def _wants_more(console: Console) -> bool:
    """After each trace, as `more` asks: a key goes on, q ends."""
    console.print("[dim]Enter: next, q: end[/dim]", end="")
    return sys.stdin.readline().strip().lower() not in ("q", "quit") if sys.stdin.isatty() else True


@data_app.command("verify")
def data_verify(run_dir: RunFolderArgument) -> None:
    """Every hash of every manifest, and both balances of the ledger."""
    from data.ledger import read_ledger
    from data.store import read_rollup, read_segment, segments, verify_files

    folder = _existing_run(run_dir)
    for segment in segments(folder.traces):
        read_segment(segment)
    sealed = [rollup for path in sorted(folder.root.glob("*/manifest.json")) if (rollup := read_rollup(path.parent)) is not None]
    for rollup in sealed:
        verify_files(folder, rollup)
    ledger = read_ledger(folder)
    ledger.check(viewed=read_rollup(folder.dataset) is not None)
    print(
        f"{sum(len(rollup.files) for rollup in sealed)} files of {len(sealed)} stages verified; "
        f"{ledger.requested} requested = {ledger.completed} completed + {ledger.failed} failed + {ledger.pending} pending"
    )


def _existing_run(path: Path) -> Any:
    from data.store import RunFolder

    folder = RunFolder(path.resolve())
    if not folder.config.is_file():
        raise UnusableInput(f"{path}: not a run folder (no config.yaml); make one with: tracestill run RECIPE --run-dir {path}")
    return folder


def _as_rank(module: str, function: str, config: str, overrides: list[str] | None, run_dir: Path | None) -> None:
    """This process is one of torchrun's: it does its part and reports to a file."""
    from configs.launch import die_with_parent

    die_with_parent()
    getattr(importlib.import_module(module), function)(_open(config, overrides, run_dir))


# --- stages that need both sides: the engine comes from teacher/, the judgement from student/ ---------------------


def _target(context: "Context", name: str) -> Any:
    """An evaluation target: the teacher through its recipe's engine, students through the local one."""
    from data.store import sha256_file
    from student.folders import resolve, weights_sha256
    from student.model import load_tokenizer as load_student_tokenizer
    from student.stages import Target
    from teacher.engines import load_tokenizer as load_teacher_tokenizer
    from teacher.engines import open_evaluation_engine, open_local_engine

    recipe, run = context.recipe, context.run
    settings = recipe.evaluate
    if name == "teacher":
        from generate.launch import teacher_fingerprint

        engine = open_evaluation_engine(recipe.teacher, batch_size=settings.batch_size)
        return Target(engine, load_teacher_tokenizer(recipe.teacher), teacher_fingerprint(context))
    folder, adapter = resolve(recipe.student.model), None
    if name == "student":
        adapter = run.checkpoints / "adapter"
    elif name == "export":
        folder = run.export / "merged"
    dtype = recipe.export.dtype if name == "export" else recipe.train.dtype
    engine = open_local_engine(folder, adapter=adapter, dtype=dtype, batch_size=settings.batch_size)
    fingerprint = weights_sha256(folder) + (sha256_file(adapter / "adapter_model.safetensors") if adapter else "")
    return Target(engine, load_student_tokenizer(str(folder)), fingerprint)


def _evaluate_stage() -> "Stage":
    from generate.launch import teacher_fingerprint
    from student.stages import evaluate_stage

    return evaluate_stage(_target, teacher_fingerprint)


def _export_stage() -> "Stage":
    from student.stages import export_stage

    return export_stage(_target)


def _report_stage() -> "Stage":
    from data.stages import REPORT

    return REPORT


if __name__ == "__main__":
    main()
