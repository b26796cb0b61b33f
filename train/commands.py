"""`tracestill train`: the training, or the certificate of its gradients.

tracestill.py names the command. It imports this module for every `--help`, so each function imports what it needs, and only
once the recipe is known to be good.
"""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from configs.options import Config, DryRun, Overrides, RunDir
from data.invocation import Invocation, run_one

if TYPE_CHECKING:
    from data.commands import Pages
    from data.stage import Stage


def train_stage() -> "Stage":
    from train.stages import TRAIN

    return TRAIN


def mask_pages() -> "Pages":
    """What `data show --mask` prints of rendered traces."""
    from train.mask_view import mask_views

    return lambda run, wanted, limit, coloured: mask_views(run, wanted, limit, coloured=coloured)


def train(
    config: Config,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    dry_run: DryRun = False,
    certify: Annotated[
        bool, typer.Option("--certify", help="Train nothing: prove the gradients of this recipe against a float64 reference.")
    ] = False,
) -> None:
    """LoRA on the kept traces; resumes from the last checkpoint."""
    named = Invocation(config, overrides, run_dir)
    if dry_run:
        run_one(train_stage, named, dry_run=True)
    elif "RANK" in os.environ:
        take_part(named, certify=certify)
    else:
        lead(named, certify=certify)


def take_part(named: Invocation, *, certify: bool) -> None:
    """This rank's share. It ends with its launcher from its first line on: reading a run folder takes seconds."""
    from configs.launch import die_with_parent

    die_with_parent()
    from train.stages import certify_rank, train_rank

    context = named.open()
    certify_rank(context) if certify else train_rank(context)


def lead(named: Invocation, *, certify: bool) -> None:
    """Ranks are started, on the first node or on another, and waited for."""
    from train.stages import certify_training, join_training, nodes_of

    context = named.open()
    if certify:
        certify_training(context)
    elif (nodes := nodes_of(context)) is not None and nodes.rank > 0:
        join_training(context)
    else:
        from data.stage import run_stage
        from student.stages import headroom_refusal, headroom_stands

        if not headroom_stands(context):
            context.console.print("headroom  not measured; first: tracestill evaluate RECIPE --headroom", highlight=False)
        elif (refusal := headroom_refusal(context)) is not None:
            raise refusal
        run_stage(train_stage(), context)
