"""`tracestill prompts` and `tracestill generate`: what is asked, the asking, and all that may be known before and meanwhile.

tracestill.py names these commands. It imports this module for every `--help`, so each imports what it needs, and only once
the recipe is known to be good.
"""

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from configs.options import AsJson, Config, DryRun, Overrides, RunDir
from data.invocation import Invocation, existing_run, print_plan, run_one

if TYPE_CHECKING:
    from data.stage import Stage


def prompts_stage() -> "Stage":
    from generate.stages import PROMPTS

    return PROMPTS


def generate_stage() -> "Stage":
    from generate.stages import GENERATE

    return GENERATE


def prompts(config: Config, overrides: Overrides = None, run_dir: RunDir = None, dry_run: DryRun = False) -> None:
    """The prompt set: what the teacher is asked, and what evaluation holds back."""
    run_one(prompts_stage, Invocation(config, overrides, run_dir), dry_run=dry_run)


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
    named = Invocation(config, overrides, run_dir)
    if status:
        print_status(named, as_json=as_json)
    elif canary is not None and not dry_run:
        ask_a_share(named._replace(overrides=[*(overrides or []), f"generate.canary.share={canary}"]), as_json=as_json)
    elif dry_run:
        print_plan(lambda: [generate_stage()], named)
        print_forecast(named, as_json=as_json)
    else:
        ask(named)


def ask(named: Invocation) -> None:
    """This process's part of the stage: a rank's, another node's, or all of it, sealed in the end."""
    if "RANK" in os.environ:
        from configs.launch import die_with_parent

        die_with_parent()
        from generate.launch import generate_rank

        generate_rank(named.open())
    elif is_not_the_first_node(named):
        from generate.launch import join_generation

        join_generation(named.open())
    else:
        context = named.open()
        from data.stage import run_stage
        from generate.launch import unseal_for_retry

        unseal_for_retry(context)
        run_stage(generate_stage(), context)


def is_not_the_first_node(named: Invocation) -> bool:
    """Of a launch of the teacher's ranks over several nodes. Raises UnusableInput where nothing says which node this is."""
    recipe = named.load().recipe
    from generate.launch import nodes_of

    nodes = nodes_of(recipe)
    return nodes is not None and nodes.rank > 0


def ask_a_share(named: Invocation, *, as_json: bool) -> None:
    """The canary is answered, judged and printed. Raises Refused when it disappoints."""
    context = named.open()
    from generate.canary import canary_table, refusal, violations
    from generate.launch import ask_canary, join_canary

    if is_not_the_first_node(named):
        join_canary(context)
        return
    found, thresholds = ask_canary(context), context.recipe.generate.canary
    context.console.print(canary_table(found, thresholds))
    said = violations(found, thresholds)
    if as_json:
        print(json.dumps(asdict(found) | {"violations": said}))
    if said:
        raise refusal(said)


def print_forecast(named: Invocation, *, as_json: bool) -> None:
    """What generation is going to take. Touches nothing: a prompt set that is not made yet is made in a temporary folder."""
    context = named.look()
    from data.chat import encode_prompt
    from generate.forecast import forecast, forecast_json, forecast_tables
    from generate.stages import prompt_stream
    from teacher.engines import load_tokenizer

    tokenizer = load_tokenizer(context.recipe.teacher)
    found = forecast(
        context.recipe,
        context.run,
        lambda: prompt_stream(context),
        lambda prompt: len(encode_prompt(tokenizer, prompt.messages, prompt.tools)),
    )
    Console(highlight=False).print(forecast_tables(found))
    if as_json:
        print(json.dumps(forecast_json(found)))


def print_status(named: Invocation, *, as_json: bool) -> None:
    """The ledger and who is at it, from the run folder alone."""
    loaded = named.load()
    from generate.status import read_status, status_json, status_tables

    settings = loaded.recipe.generate
    found = read_status(existing_run(named.folder_of(loaded)), settings.lease_ttl_s)
    Console(highlight=False).print(status_tables(found, settings.budget))
    if as_json:
        print(json.dumps(status_json(found)))
