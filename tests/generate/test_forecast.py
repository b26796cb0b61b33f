"""The dry run: counts, prompt tokens, hours, cost and storage of a run that has not begun."""

import os
from pathlib import Path

import pytest
from rich.console import Console

from configs.load import load_recipe
from configs.schema import Recipe
from data.store import RunFolder
from generate.forecast import Forecast, forecast, forecast_json, forecast_tables
from tests.generate.test_worker import Scripted, new_run, prompt, work

PROMPTS = [prompt("word " * count) for count in (1, 3, 8, 8, 100)]
PRICES = "teacher.engine={type: http, price_input_per_million: 2.0, price_output_per_million: 10.0}"


def forecast_of(recipe: Recipe, folder: Path) -> Forecast:
    return forecast(recipe, RunFolder(folder), lambda: PROMPTS, lambda one: len(one.messages[0].get("content", "").split()))


def test_a_prompt_set_that_is_not_made_yet_is_counted_and_not_left_behind(tmp_path: Path) -> None:
    recipe = load_recipe("embedded", ["generate.samples_per_prompt=3"]).recipe
    found = forecast_of(recipe, tmp_path / "run")
    assert (found.prompts, found.requests, found.by_task) == (5, 15, {"t": 5})
    assert list(found.prompt_tokens) == [1, 3, 8, 8, 100] and not (tmp_path / "run").exists()
    assert found.hours is None and found.dollars is None and not found.measured


def test_a_servers_prices_make_the_cost(tmp_path: Path) -> None:
    recipe = load_recipe("embedded", [PRICES, "generate.samples_per_prompt=2"]).recipe
    found = forecast_of(recipe, tmp_path)
    assert found.dollars == pytest.approx(10 * (24 * 2.0 + found.output_tokens_mean * 10.0) / 1e6)


def test_hours_and_dollars_on_our_own_gpus_are_the_plans(tmp_path: Path) -> None:
    from teacher.plan import plan_recipe

    recipe = load_recipe("glm52-bf16-16xh200", ["generate.samples_per_prompt=2"]).recipe
    found, cost = forecast_of(recipe, tmp_path), plan_recipe(recipe).cost
    assert cost is not None and found.hours is not None and found.dollars is not None
    share = found.requests * found.output_tokens_mean / cost.output_tokens
    assert found.hours == pytest.approx(cost.hours * share) and found.dollars == pytest.approx(cost.dollars * share)


def test_kept_logits_and_traces_of_the_run_itself_are_counted(tmp_path: Path) -> None:
    recipe = load_recipe("embedded", ["generate.samples_per_prompt=2", "generate.logits={top_k: 8}"]).recipe
    run = new_run(tmp_path, PROMPTS, requests=10)
    work(recipe, run, Scripted(stops_after=4))
    found = forecast_of(recipe, tmp_path)
    assert found.measured and found.output_tokens_mean == 6
    assert found.logits_bytes == 10 * 6 * (8 * 6 + 2 * 4)


def test_the_tables_show_a_histogram(tmp_path: Path) -> None:
    found = forecast_of(load_recipe("embedded").recipe, tmp_path)
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(forecast_tables(found))
    said = console.export_text()
    assert "unknown: teacher.hardware.gpu is cpu" in said and "128" in said
    assert forecast_json(found)["prompt_tokens"] == {"min": 1.0, "p50": 8.0, "p90": pytest.approx(63.2), "max": 100.0}
