"""The probe: measured beside calculated, on the machine at hand."""

import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

import teacher.probe
from configs.devices import DEVICES, Links
from configs.errors import UnusableInput
from configs.load import load_recipe
from configs.schema import Recipe
from teacher.plan import plan_recipe
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
    assert found.measured.link_bytes_per_s is found.measured.network_bytes_per_s is found.data_sheet is None
    assert min(found.measured.prefill_s, found.measured.decode_s, found.measured.flops) > 0
    # a bound is a bound; the machine's own rates are in it, so no machine is faster but by noise of small measurements (a
    # neighbour that takes the memory bus during one of them: 10 times)
    attempts = itertools.chain([found], (probe(recipe) for _ in range(2)))
    assert any(one.from_measured.decode_bound_s < one.measured.decode_s * 2 for one in attempts)
    assert found.from_measured.decode_s == pytest.approx(found.from_measured.decode_bound_s / recipe.plan.efficiency)
    assert probe_from_json(json.loads(json.dumps(probe_json(found)))) == found


def test_the_data_sheets_rates_give_the_plans_own_figures() -> None:
    plan = plan_recipe(load_recipe("glm52-bf16-16xh200", []).recipe)
    assert plan.step is not None and plan.machine is not None
    load = load_of(plan)
    sheet = calculate(plan, load, plan.machine)
    assert sheet.decode_bound_s == pytest.approx(plan.step.bound_s, rel=0.2)  # whole rows a replica
    device = DEVICES["h200"]
    same = teacher.probe.Measured(device.bandwidth, device.bf16_flops, device.link, 50e9, 1.0, 1.0)
    again = machine_as_measured(plan, same)
    assert again.device.bandwidth == device.bandwidth and again.device.flops("bf16") == device.flops("bf16")
    assert again.links == plan.machine.links


def test_a_measured_network_slows_the_experts_and_a_measured_node_tensor_parallelism() -> None:
    plan = plan_recipe(load_recipe("glm52-bf16-16xh200", []).recipe)
    even = teacher.probe.Measured(4.8e12, 989e12, 100e9, 100e9, 1.0, 1.0)
    slow_network, slow_node = even._replace(network_bytes_per_s=1e9), even._replace(link_bytes_per_s=1e9)
    experts, tensor = (Links.all_to_all, 1e9, 16), (Links.within, 8)
    for measured, expert_s, tensor_rate in ((even, 8 / 16 / 100, 100e9), (slow_network, 8 / 16, 100e9), (slow_node, 7 / 16, 1e9)):
        links = machine_as_measured(plan, measured).links
        assert experts[0](links, *experts[1:]) == pytest.approx(expert_s) and tensor[0](links, *tensor[1:]) == tensor_rate


NODES = {2: [1 << 20, 1 << 19], 4: [3 << 20, None], 1: [None, 3 << 18]}  # ranks a node: bytes inside, across


def measure_as_rank(rank: int, world: int, folder: Path) -> None:
    def one_second(work: Callable[[], object], device: torch.device) -> float:
        work()
        return 1.0

    teacher.probe.seconds_of = one_second
    teacher.probe.LINK_BYTES["cpu"] = 1 << 20
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    found = {ranks_per_node: teacher.probe.measure_links(torch.device("cpu"), ranks_per_node) for ranks_per_node in NODES}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
def test_links_inside_a_node_and_between_nodes_are_measured_apart(tmp_path: Path) -> None:
    """Four processes that take themselves for 2, 1 or 4 nodes, 1 MiB a rank; with every collective said to take a second, a
    rate is the bytes: of 1 MiB each from the neighbours in the node, and of the quarters of 1 MiB that go to other nodes."""
    spawn = multiprocessing.get_context("spawn")  # a fork of a process where torch has threads hangs in its first operator
    ranks = [spawn.Process(target=measure_as_rank, args=(rank, 4, tmp_path), daemon=True) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * 4
    expected = {str(ranks_per_node): rates for ranks_per_node, rates in NODES.items()}
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)] == [expected] * 4


def test_the_table_stands_on_80_columns(recipe: Recipe) -> None:
    console = Console(width=80, record=True)
    console.print(probe_table(probe(recipe), DEVICES["h200"]))
    text = console.export_text()
    assert "4.8e+03 GB/s" in text and "prefill of 100" in text and "step, 4 x 150" in text
    assert "links in a node" in text and "prefill at 0.4 of the arithmetic" in " ".join(text.split())
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
    assert found["measured"]["link_bytes_per_s"] > 0 and found["measured"]["network_bytes_per_s"] is None


@pytest.mark.long
def test_two_nodes_are_measured_across_and_the_first_says_what_was_found() -> None:
    """Two launchers on this machine, TP 2 in each, experts over all four ranks. Which of them has the first rank is torchrun's to
    say: its rendezvous sorts nodes by address and process id."""
    layout = ["teacher.hardware.nodes=2", "teacher.engine.processes=2", "teacher.layout.tensor_parallel=2",
              "teacher.layout.expert_parallel=4", "teacher.engine.batch_size=2"]  # fmt: skip
    changes = [*layout, "plan.context_tokens=64", "plan.workload.prompt_tokens=32"]
    words = [word for change in changes for word in ("-s", change)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"TRACESTILL_NODES": "2", "TRACESTILL_RENDEZVOUS": f"127.0.0.1:{free.getsockname()[1]}"}
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "tracestill", "plan", "embedded", "--probe", "--json", *words], cwd=REPOSITORY, text=True,
            env=os.environ | meeting | {"OMP_NUM_THREADS": "1", "TRACESTILL_NODE_RANK": str(node)}, stdout=subprocess.PIPE,
        )
        for node in (0, 1)
    ]  # fmt: skip
    said = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    first, other = sorted(said, key=lambda text: "the first rank runs on another node" in text)
    measured = json.loads(first.splitlines()[-1])["probe"]["measured"]
    assert min(measured["link_bytes_per_s"], measured["network_bytes_per_s"]) > 0
    assert "probe" not in json.loads(other.splitlines()[-1]) and "the first rank runs on another node" in other
