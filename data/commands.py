"""`tracestill data`: the dataset is built, and traces, verdicts and hashes are looked at.

A command is a function of the values that its user gave; `data_app`, at the end, names them all. This module is imported for
every `--help`, so each imports what it needs.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from configs.errors import UnusableInput
from configs.options import Config, DryRun, Overrides, RunDir, RunFolderArgument
from data.invocation import Invocation, existing_run, run_one

if TYPE_CHECKING:
    from rich.table import Table

    from data.stage import Stage
    from data.stats import Stats
    from data.what_if import Difference

FATES = ("kept", "rejected", "unjudged")
FINISH_REASONS = ("stop", "length", "loop", "abort")
STATS = (
    "completed", "kept", "rejected", "unjudged", "train_rows", "validation_rows", "prompt_tokens", "reasoning_tokens",
    "answer_tokens",
)  # fmt: skip
"""Columns of `data stats`, in order."""
SHOWN_UNASKED = 5
"""Traces that `data show` prints where nobody can ask for the next one."""


def stats(run_dir: RunFolderArgument) -> None:
    """Rows, tokens and reasons by task."""
    from data.stats import dataset_stats

    found = dataset_stats(existing_run(run_dir))
    Console().print(_stats_table(found))
    for reason, count in {**found.total["rejected_by_reason"], **found.total["unjudged_by_reason"]}.items():
        print(f"{count:>8,}  {reason}")
    print(f"dataset sha256 {found.dataset_sha256}")


def _stats_table(found: "Stats") -> "Table":
    from rich.table import Table

    table = Table("task", *STATS)
    for name, counts in [*found.tasks.items(), ("all", found.total)]:
        table.add_row(name, *(f"{counts[column]:,}" for column in STATS))  # type: ignore[literal-required]
    return table


def show(
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
    from data import viewer

    _check_choice("--fate", fate, FATES)
    _check_choice("--finish", finish, FINISH_REASONS)
    wanted = viewer.Wanted(trace, task, fate or None, reason, finish, min_tokens, max_tokens)  # type: ignore[arg-type]
    console = Console(highlight=False)
    found = viewer.show(existing_run(run_dir), wanted, limit if limit is not None or console.is_terminal else SHOWN_UNASKED)
    one = None
    for one in found:
        console.print(viewer.rendered(one, unfold=unfold))
        if console.is_terminal and not _wants_more(console):
            break
    if one is None:
        print("no trace matches")


def _check_choice(option: str, given: str, choices: tuple[str, ...]) -> None:
    """Raises UnusableInput where something else is given; nothing is always allowed."""
    if given not in ("", *choices):
        raise UnusableInput(f"{option} {given}: expected {', '.join(choices[:-1])} or {choices[-1]}")


def _wants_more(console: Console) -> bool:
    """After each trace, as `more` asks: a key goes on, q ends."""
    console.print("[dim]Enter: next, q: end[/dim]", end="")
    return sys.stdin.readline().strip().lower() not in ("q", "quit") if sys.stdin.isatty() else True


def verify(run_dir: RunFolderArgument) -> None:
    """Every byte of every finished stage and committed segment, and both balances of the ledger."""
    from data.verification import verify_run

    found = verify_run(existing_run(run_dir))
    for path in found.strays:
        print(f"not of this run: {path}")
    ledger = found.ledger
    print(
        f"{found.files} files of {found.stages} stages verified; "
        f"{ledger.requested} requested = {ledger.completed} completed + {ledger.failed} failed + {ledger.pending} pending"
    )


def what_if(
    config: Config,
    view: Annotated[str, typer.Option(help="The view to compare with: raw, verified, calibrated, or one of data.views.")] = "",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """What a build with these settings would change, against the dataset that stands; builds nothing."""
    from dataclasses import asdict
    from json import dumps

    from data.rebuild import compare_with_built

    context = Invocation(config, overrides, run_dir).look()
    existing_run(context.run.root)
    names, found = compare_with_built(context, view)
    for table in _difference_tables(names, found):
        Console().print(table)
    if as_json:
        print(dumps({"current": names[0], "other": names[1], **asdict(found)}))


def _difference_tables(names: tuple[str, str], found: "Difference") -> list["Table"]:
    from rich.table import Table

    rows = Table("", *names, "gained", "lost")
    figures = (
        ("rows", found.current_rows, found.other_rows, found.gained_rows, found.lost_rows),
        ("prompts", found.current_prompts, found.other_prompts, "", ""),
        ("tokens", found.current_tokens, found.other_tokens, "", ""),
        ("relabelled", found.current_relabelled, found.other_relabelled, "", ""),
        *((f"  {task.task}", task.current_rows, task.other_rows, task.gained_rows, task.lost_rows) for task in found.by_task),
    )
    for name, *values in figures:
        rows.add_row(str(name), *(f"{value:,}" if isinstance(value, int) else value for value in values))
    why = Table("rows", "reason", title="", title_justify="left")
    for sign, reasons in (("+", found.gained_by_reason), ("-", found.lost_by_reason)):
        for reason, count in reasons.items():
            why.add_row(f"{sign}{count:,}", f"{reason} under {names[0] if sign == '+' else names[1]}")
    return [rows, why] if why.row_count else [rows]


def data_app(data_stage: Callable[[], "Stage"]) -> typer.Typer:
    """`tracestill data` with its commands, in the order of its help. data_stage: what `build` runs; the front door makes it,
    because engines of other packages may have to be given to it."""

    def build(config: Config, overrides: Overrides = None, run_dir: RunDir = None, dry_run: DryRun = False) -> None:
        """Judge the traces and build the dataset; nothing is ever deleted."""
        run_one(data_stage, Invocation(config, overrides, run_dir), dry_run=dry_run)

    app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build the dataset; look at traces and verdicts.")
    for name, command in {"build": build, "stats": stats, "what-if": what_if, "show": show, "verify": verify}.items():
        app.command(name)(command)
    return app
