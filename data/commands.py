"""`tracestill data`: the dataset is built, and traces, verdicts and hashes are looked at.

A command is a function of the values that its user gave; `data_app`, at the end, names them all. This module is imported for
every `--help`, so each imports what it needs.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from configs.errors import UnusableInput
from configs.options import Config, DryRun, Overrides, RunDir, RunFolderArgument
from data.invocation import Invocation, existing_run, run_one

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from data.asking import Models
    from data.stage import Context, Stage
    from data.store import RunFolder
    from data.viewer import Wanted
    from data.what_if import Difference

    Pages = Callable[[RunFolder, Wanted, int | None, bool], Iterable[RenderableType]]

FATES = ("kept", "rejected", "unjudged")
FINISH_REASONS = ("stop", "length", "loop", "abort")
SHOWN_UNASKED = 5
"""Traces that `data show` prints where nobody can ask for the next one."""


def stats(
    run_dir: RunFolderArgument,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
    plots: Annotated[Path | None, typer.Option(help="Draw into this folder: lengths, fates, reliability, efficiency.")] = None,
) -> None:
    """What the dataset is made of: tasks, lengths, verdicts, reasons, copies, contamination, cost, p(correct)."""
    from data.grading import lines_of
    from data.stats import dataset_stats, stats_json
    from data.stats_tables import stats_tables

    found = dataset_stats(existing_run(run_dir))
    console = Console(highlight=False)
    for table in stats_tables(found):
        console.print(table)
        print()
    for line in [] if found.grading is None else lines_of(found.grading):
        print(line)
    print(f"dataset sha256 {found.dataset_sha256}")
    if plots is not None:
        from data.stats_plots import write_plots  # matplotlib

        for path in write_plots(found, plots):
            print(path)
    if as_json:
        print(stats_json(found))


def _show(named: "RunFolder", wanted: "Wanted", limit: int | None, pages: "Pages") -> None:
    """Prints what matches, page by page where somebody can ask for the next."""
    _check_choice("--fate", wanted.fate or "", FATES)
    _check_choice("--finish", wanted.finish, FINISH_REASONS)
    console = Console(highlight=False)
    shown = None
    for shown in pages(named, wanted, limit if limit is not None or console.is_terminal else SHOWN_UNASKED, console.is_terminal):
        console.print(shown, soft_wrap=isinstance(shown, Text))  # plain lines stay whole, however long
        if console.is_terminal and not _wants_more(console):
            break
    if shown is None:
        print("no trace matches")


def _folded_pages(unfold: bool) -> "Pages":
    from data import viewer

    return lambda run, wanted, limit, coloured: (viewer.rendered(one, unfold=unfold) for one in viewer.show(run, wanted, limit))


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
        print(f"no manifest names {path}: nothing reads it, it may go")
    ledger = found.ledger
    print(
        f"{found.files} files of {found.stages} stages verified; "
        f"{ledger.requested} requested = {ledger.completed} completed + {ledger.failed} failed + {ledger.pending} pending"
    )


def _what_if(models_of: Callable[["Context"], "Models"], named: Invocation, view: str, as_json: bool) -> None:
    from dataclasses import asdict
    from json import dumps

    from data.rebuild import compare_with_built

    context = named.look()
    existing_run(context.run.root)
    names, found = compare_with_built(context, view, models_of(context))
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


def data_app(
    data_stage: Callable[[], "Stage"], models_of: Callable[["Context"], "Models"], mask_pages: Callable[[], "Pages"]
) -> typer.Typer:
    """`tracestill data` with its commands, in the order of its help. data_stage: what `build` runs. models_of: what it and
    `what-if` may ask; their engines are other packages'. mask_pages: what `show --mask` prints of (run, wanted, limit, whether on
    a terminal); the student's tokenizer is another package's too."""

    def build(config: Config, overrides: Overrides = None, run_dir: RunDir = None, dry_run: DryRun = False) -> None:
        """Judge the traces and build the dataset; nothing is ever deleted."""
        run_one(data_stage, Invocation(config, overrides, run_dir), dry_run=dry_run)

    def what_if(
        config: Config,
        view: Annotated[
            str, typer.Option(help="The view to compare with: raw, verified, calibrated, or one of data.views.")
        ] = "",
        overrides: Overrides = None,
        run_dir: RunDir = None,
        as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
    ) -> None:
        """What a build with these settings would change, against the dataset that stands; builds nothing."""
        _what_if(models_of, Invocation(config, overrides, run_dir), view, as_json)

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
        mask: Annotated[bool, typer.Option("--mask", help="In the student's tokens: trained, masked and why, dropped.")] = False,
    ) -> None:
        """Traces in the terminal, page by page: prompt, folded reasoning, answer, verdicts; or what training makes of them."""
        from data.viewer import Wanted

        wanted = Wanted(trace, task, fate or None, reason, finish, min_tokens, max_tokens)  # type: ignore[arg-type]
        _show(existing_run(run_dir), wanted, limit, mask_pages() if mask else _folded_pages(unfold))

    app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build the dataset; look at traces and verdicts.")
    for name, command in {"build": build, "stats": stats, "what-if": what_if, "show": show, "verify": verify}.items():
        app.command(name)(command)
    return app
