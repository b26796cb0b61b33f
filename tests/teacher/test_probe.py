"""The probe: measured beside calculated, on the machine at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import teacher.probe
from configs.errors import UnusableInput
from configs.load import load_recipe
from configs.schema import Recipe
from teacher.plan import plan_recipe
from teacher.planning.devices import DEVICES
from teacher.probe import Load, calculate, load_of, machine_as_measured, probe, probe_from_json, probe_json, probe_table

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(teacher.probe, "COPY_BYTES", 1 << 20)
    monkeypatch.setitem(teacher.probe.MATRIX, "cpu", 128)
    changes = ["teacher.engine={type: local, dtype: fp32, batch_size: 4}", "teacher.layout.expert_parallel=1"]
    return load_recipe("embedded", [*changes, "plan.workload.prompt_tokens=100", "plan.context_tokens=150"]).recipe


def test_one_process_is_measured_and_calculated(recipe: Recipe) -> None:
    found = probe(recipe)
    assert found.load == Load(prefill_tokens=100, rows=4, context=150)
    assert found.measured.link_bytes_per_s is None and found.data_sheet is None
    assert min(found.measured.prefill_s, found.measured.decode_s, found.measured.flops) > 0
    # a bound is a bound; the machine's own rates are in it, so no machine is faster but by noise of small measurements
    assert found.from_measured.decode_bound_s < found.measured.decode_s * 2
    assert found.from_measured.decode_s == pytest.approx(found.from_measured.decode_bound_s / recipe.plan.efficiency)
    assert probe_from_json(json.loads(json.dumps(probe_json(found)))) == found


def test_the_data_sheets_rates_give_the_plans_own_figures() -> None:
    plan = plan_recipe(load_recipe("glm52-bf16-16xh200", []).recipe)
    assert plan.step is not None and plan.machine is not None
    load = load_of(plan)
    sheet = calculate(plan, load, plan.machine)
    assert sheet.decode_bound_s == pytest.approx(plan.step.bound_s, rel=0.2)  # whole rows a replica
    device = DEVICES["h200"]
    same = teacher.probe.Measured(device.bandwidth, device.bf16_flops, device.link, 1.0, 1.0)
    again = machine_as_measured(plan, same)
    assert again.device.bandwidth == device.bandwidth and again.device.flops("bf16") == device.flops("bf16")


def test_the_table_stands_on_80_columns(recipe: Recipe) -> None:
    console = Console(width=80, record=True)
    console.print(probe_table(probe(recipe), DEVICES["h200"]))
    text = console.export_text()
    assert "4.8e+03 GB/s" in text and "prefill of 100" in text and "step, 4 x 150" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_server_is_not_probed() -> None:
    with pytest.raises(UnusableInput, match="a server is measured where it runs"):
        probe(load_recipe("glm52-fp8-8xh200", []).recipe)


@pytest.mark.long
def test_two_ranks_are_measured_at_the_recipes_layout() -> None:
    command = [sys.executable, "-m", "tracestill", "plan", "embedded", "--probe", "--json"]
    changes = ["teacher.engine.batch_size=4", "plan.context_tokens=150", "plan.workload.prompt_tokens=100"]
    words = [word for change in changes for word in ("-s", change)]
    done = subprocess.run(
        [*command, *words], cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])["probe"]
    assert found["load"] == {"prefill_tokens": 100, "rows": 4, "context": 150}
    assert found["measured"]["link_bytes_per_s"] > 0
