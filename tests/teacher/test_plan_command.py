"""`tracestill plan` as it is used: exit codes, the JSON line, 80 columns, no torch."""

import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.errors import UnusableInput
from configs.load import load_recipe, shipped_recipes
from teacher.plan import plan_recipe
from teacher.planning.table import plan_json, plan_tables

REPOSITORY = Path(__file__).parents[2]
KEYS = {
    "parameters_total", "parameters_active", "weights_bytes_per_gpu", "free_bytes_per_gpu", "kv_bytes_per_token",
    "max_context_tokens", "fits", "decode_tokens_per_s_per_gpu", "cost_per_million_output_tokens", "prefill_seconds",
}  # fmt: skip


def run(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tracestill", "plan", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "80"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])


def test_a_plan_ends_with_one_json_object_and_takes_less_than_a_second(tmp_path: Path) -> None:
    """Of processor time: a busy machine takes its own. Run from elsewhere: the shipped architectures are found."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("glm52-bf16-32xh200", "--json", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    found = last_line(done)
    assert found.keys() >= KEYS and found["fits"] is True and found["parameters_total"] == 743_377_000_704
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert set(found["prefill_seconds"]) == {"8192", "32768", "131072", "1048576"}


def test_a_layout_that_does_not_fit_is_exit_3_with_its_json() -> None:
    done = run("glm52-bf16-16xh200", "-s", "teacher.hardware.nodes=1", "--json")
    assert done.returncode == 3 and done.stderr.startswith("error: glm52-bf16-16xh200: 185.8 GB of weights")
    assert len(done.stderr.splitlines()) == 1
    found = last_line(done)
    assert found["fits"] is False and found["shortfall_bytes_per_gpu"] > 56e9
    assert found["nearest_layouts"][0]["overrides"] == "-s teacher.hardware.nodes=2"
    assert found["decode_tokens_per_s_per_gpu"] is found["cost_per_million_output_tokens"] is None
    assert found["refusal"] in done.stderr


def test_a_mistake_in_the_recipe_is_exit_2() -> None:
    assert run("glm52-bf16-16xh200", "-s", "teacher.layout.tensor_parallel=3").returncode == 2
    assert run("glm52-bf16-16xh200", "-s", "teacher.model=nowhere").returncode == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teacher.hardware.gpus_per_node=10000000000", "gpus_per_node: input should be less than or equal to 1024"),
        ("teacher.hardware.nodes=10000000000", "nodes: input should be less than or equal to 16384"),
        ("teacher.hardware.network_gb_per_s=5e-324", "network_gb_per_s: input should be greater than or equal to 0.001"),
        ("plan.efficiency=1e-308", "plan.efficiency: input should be greater than or equal to 0.0001"),
        ("plan.prefill_efficiency=1e-308", "plan.prefill_efficiency: input should be greater than"),
        ("plan.price_per_gpu_hour=1e308", "plan.price_per_gpu_hour: input should be less than or equal to 1000000"),
        ("plan.api.output=5e-324", "plan.api.output: input should be greater than"),
        ("plan.api.input=1e308", "plan.api.input: input should be less than"),
        ("plan.workload.traces=" + "9" * 30, "plan.workload.traces: input should be less than"),
        ("plan.concurrency=" + "9" * 30, "plan.concurrency: input should be less than"),
        ("teacher.layout.expert_parallel=al", "teacher.layout.expert_parallel: expected a positive integer or all, found 'al'"),
        ("teacher.layout.expert_parallel=0", "teacher.layout.expert_parallel: expected a positive integer or all, found 0"),
    ],
)
def test_a_figure_that_cannot_be_meant_is_one_line_with_its_bounds(override: str, said: str) -> None:
    with pytest.raises(UnusableInput, match=re.escape(said)) as refused:
        load_recipe("glm52-bf16-16xh200", [override])
    assert "more)" not in str(refused.value)


EXTREMES = (
    "teacher.hardware={gpu: h200, gpus_per_node: 1024, nodes: 16384, network_gb_per_s: 0.001}",
    "teacher.hardware.network_gb_per_s=100000", "plan.efficiency=0.0001", "plan.prefill_efficiency=0.0001",
    "plan.price_per_gpu_hour=1000000", "plan.price_per_gpu_hour=0.0001", "plan.api={input: 0, cached_input: 0, output: 0.000001}",
    "plan.api={input: 1000000, output: 1000000}", "plan.workload.traces=1000000000000", "plan.prefill_chunk_tokens=1000000000000",
    "plan.workload={output_tokens_median: 1, output_tokens_p99: 1000000000000}", "generate.sampling.max_tokens=" + "9" * 400,
)  # fmt: skip


@pytest.mark.parametrize("name", ["glm52-fp8-16xh200", "glm52-bf16-32xh200"])
@pytest.mark.parametrize("override", EXTREMES)
def test_the_json_of_the_most_extreme_plan_holds_finite_numbers(name: str, override: str) -> None:
    json.dumps(plan_json(plan_recipe(load_recipe(name, [override]).recipe)), allow_nan=False)


def test_a_figure_beyond_counting_is_one_line() -> None:
    with pytest.raises(UnusableInput, match="a figure of the recipe is too large to count with"):
        plan_recipe(load_recipe("glm52-bf16-16xh200", ["teacher.engine.batch_size=" + "9" * 400]).recipe)


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from configs.load import load_recipe; from teacher.plan import plan_recipe;"
        "from teacher.planning.table import plan_json; plan_json(plan_recipe(load_recipe('glm52-bf16-16xh200').recipe));"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'deepspeed')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def rendered(name: str, *overrides: str) -> str:
    output = io.StringIO()
    Console(file=output, width=80, highlight=False).print(plan_tables(plan_recipe(load_recipe(name, overrides).recipe)))
    return output.getvalue()


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_tables_fit_80_columns_and_cut_nothing_off(name: str) -> None:
    text = rendered(name)
    assert max(len(line) for line in text.splitlines()) <= 80 and "…" not in text
    for row in ("parameters", "usable", "weights, ", "cache", "fits"):
        assert f"\n{row}" in text, row


def test_a_table_says_where_experts_are_and_what_a_request_is_counted_as() -> None:
    served, ours = rendered("glm52-fp8-8xh200"), rendered("glm52-bf16-16xh200")
    assert "each expert cut over 8 ranks" in served and "experts spread over 16 ranks" in ours
    assert "experts spread over 16 ranks" in rendered("glm52-fp8-16xh200")
    assert "a server's pages hold what is there" in served and "the prompt and the p99 output" in ours
    assert "each as long as plan.context_tokens" in rendered("glm52-bf16-16xh200", "plan.context_tokens=9000")
    assert "a request of 69,536 tokens, prompt and max_tokens" in ours and "prompt and max_tokens" not in served
    assert "expected tok/s per GPU" in ours and "expected tok/s per GPU" in served


def test_a_plan_of_a_cpu_has_no_table_of_contexts() -> None:
    for model in ("embedded", "configs/architectures/glm-5.2"):
        assert "by context" not in rendered("embedded", f"teacher.model={model}")


def test_a_stated_cache_is_what_the_table_shows() -> None:
    assert "cache            10 MB      longest request 1,024 tokens" in rendered(
        "embedded", "teacher.engine.cache_bytes=10000000"
    )


def test_a_plan_that_does_not_fit_still_shows_where_the_memory_goes() -> None:
    text = rendered("glm52-bf16-16xh200", "teacher.hardware.nodes=1")
    assert "185.8 GB" in text and "short for" in text and "tok/s per GPU at efficiency" not in text


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_plan_is_json_without_infinities(name: str) -> None:
    found = json.loads(json.dumps(plan_json(plan_recipe(load_recipe(name).recipe)), allow_nan=False))
    assert found.keys() >= KEYS


def test_json_names_every_part_of_the_weights() -> None:
    found = plan_json(plan_recipe(load_recipe("glm52-bf16-16xh200").recipe))
    parts = found["weights_bytes_per_gpu_by_part"]
    assert isinstance(parts, dict) and sum(parts.values()) == found["weights_bytes_per_gpu"]
    assert {"routed_experts", "shared_experts", "attention", "indexer", "dense_mlp", "router", "embeddings"} <= parts.keys()


def test_what_is_unknown_is_null() -> None:
    found = plan_json(plan_recipe(load_recipe("embedded").recipe))
    unknown = ("free_bytes_per_gpu", "max_context_tokens", "fits", "decode_tokens_per_s_per_gpu", "workload", "decode_step")
    assert [found[key] for key in unknown] == [None] * len(unknown)
