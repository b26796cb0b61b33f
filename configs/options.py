"""Arguments and options that several commands share, as typer reads them from a signature."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(help="YAML path, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a recipe value, e.g. -s train.lr=2e-4; repeatable."),
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Run folder. [default: runs/NAME]")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and exit.")]
AsJson = Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")]
RunFolderArgument = Annotated[Path, typer.Argument(help="A run folder, e.g. runs/embedded.")]
