"""Sbatch scripts: valid shell, in order, each with what its stage needs of a site; and what a script does with an exit code."""

import subprocess
from pathlib import Path

import pytest

from configs.errors import UnusableInput
from configs.load import load_recipe
from data.store import RunFolder
from slurm.scripts import Chain, Script, array_of, render_scripts
from slurm.site import settle_site
from slurm.topology import STAGES, stages_of
from tests.e2e.commands import command, environment

SITE = [
    "slurm.partition=h200",
    "slurm.account=distill",
    "slurm.gres=gpu:h200:8",
    "slurm.setup=[module load cuda]",
    "slurm.environment={NCCL_SOCKET_IFNAME: 'ib0 ib1'}",
    "teacher.hardware.gpu=h200",
]


def chain_of(tmp_path: Path, *overrides: str, max_nodes: int | None = None) -> Chain:
    recipe = load_recipe("embedded", overrides).recipe
    return Chain(recipe, "embedded", overrides, RunFolder(tmp_path / "my run"), recipe.slurm, tmp_path, tmp_path, max_nodes)


def scripts(tmp_path: Path, *overrides: str) -> dict[str, str]:
    return {script.stage: script.text for script in render_scripts(chain_of(tmp_path, *overrides))}


def test_there_is_one_script_a_stage_in_pipeline_order(tmp_path: Path) -> None:
    rendered = render_scripts(chain_of(tmp_path))
    optional = ("prepare", "serve", "canary")
    assert [script.stage for script in rendered] == [stage for stage in STAGES if stage not in optional]
    assert all(isinstance(script, Script) for script in rendered)
    recipe = load_recipe("embedded", ["teacher.engine.prepared=shards", "slurm.canary=0.1"]).recipe
    assert stages_of(recipe) == tuple(stage for stage in STAGES if stage != "serve")


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "serve"])
def test_every_script_is_valid_bash(tmp_path: Path, stage: str) -> None:
    text = scripts(tmp_path, *SITE, "teacher.engine.prepared=shards", "slurm.canary=0.1", "slurm.generate_jobs=3")[stage]
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_a_script_fails_with_its_step_and_requeues_itself_on_75(tmp_path: Path) -> None:
    for stage, text in scripts(tmp_path).items():
        assert text.rstrip().endswith('exit "$rc"'), stage  # a script that ends in echo hides a failed step
        assert 'case "$rc" in 75) requeue' in text and 'scontrol requeue "$SLURM_JOB_ID"' in text
        assert "#SBATCH --requeue" in text and "#SBATCH --signal=B:USR2@" in text and "--open-mode=append" in text


def test_gpus_are_asked_for_only_where_a_stage_uses_them(tmp_path: Path) -> None:
    rendered = scripts(tmp_path, *SITE)
    assert "--gres=gpu:h200:8" in rendered["generate"] and "--gres" not in rendered["data"]
    assert all("#SBATCH --partition=h200" in text and "#SBATCH --account=distill" in text for text in rendered.values())


def test_a_stage_may_go_elsewhere(tmp_path: Path) -> None:
    rendered = scripts(tmp_path, *SITE, "slurm.stages={data: {partition: cpu, time_limit: '02:00:00', options: [--exclusive]}}")
    data, train = rendered["data"], rendered["train"]
    assert (
        "--partition=cpu" in data and "--time=02:00:00" in data and "#SBATCH --exclusive" in data and "--account=distill" in data
    )
    assert "--partition=h200" in train and "--time=24:00:00" in train and "#SBATCH --exclusive" not in train


def test_what_a_site_exports_is_quoted(tmp_path: Path) -> None:
    text = scripts(tmp_path, *SITE)["train"]
    assert "-s 'slurm.setup=[module load cuda]'" in text and "export NCCL_SOCKET_IFNAME='ib0 ib1'" in text
    assert "\nmodule load cuda\n" in text


def test_a_multi_node_teacher_gets_a_rendezvous(tmp_path: Path) -> None:
    text = scripts(tmp_path, "teacher.hardware.nodes=4", "teacher.layout.expert_parallel=8")["generate"]
    assert "#SBATCH --nodes=4" in text and "TRACESTILL_RENDEZVOUS" in text
    assert "TRACESTILL_RENDEZVOUS" not in scripts(tmp_path)["generate"]


def test_jobs_that_generate_together_are_an_array_within_the_nodes(tmp_path: Path) -> None:
    overrides = ("slurm.generate_jobs=6", "teacher.hardware.nodes=2", "teacher.engine.processes=1")
    assert array_of(chain_of(tmp_path, *overrides), "generate") == "0-5"
    assert array_of(chain_of(tmp_path, *overrides, max_nodes=5), "generate") == "0-5%2"
    assert array_of(chain_of(tmp_path, *overrides, max_nodes=5), "train") is None
    assert "#SBATCH --array=0-5\n" in scripts(tmp_path, *overrides)["generate"]


def run_script(text: str, step_exit: int, tmp_path: Path, shown: str = "JobState=RUNNING PreemptTime=None") -> tuple[int, str]:
    """Runs a rendered script with stand-ins for slurm.attempt and the Slurm command that it calls; shown: of the job."""
    tools = tmp_path / "bin"
    tools.mkdir()
    calls = tmp_path / "calls"
    for name, body in (
        ("python", f"exit {step_exit}"),
        ("scontrol", f'[ "$2" = show ] && echo "{shown}" || echo "$@" >> {calls}'),
    ):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    first = text.replace("export PATH=", "unused=")
    done = subprocess.run(
        ["bash"], input=first, text=True, check=False,
        env={"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "2"},
    )  # fmt: skip
    return done.returncode, calls.read_text() if calls.exists() else ""


@pytest.mark.parametrize(("step_exit", "requeued"), [(0, ""), (1, ""), (3, ""), (130, ""), (75, "requeue 17\n")])
def test_the_exit_code_of_the_step_is_the_exit_code_of_the_job(tmp_path: Path, step_exit: int, requeued: str) -> None:
    assert run_script(scripts(tmp_path)["prompts"], step_exit, tmp_path) == (step_exit, requeued)


@pytest.mark.parametrize("met", [140, 143])
def test_a_signal_that_came_before_anybody_could_hear_it_requeues(tmp_path: Path, met: int) -> None:
    """slurm.attempt takes half a second to start; a job that ends with 140 in its grace time is never seen again."""
    assert run_script(scripts(tmp_path)["prompts"], met, tmp_path) == (75, "requeue 17\n")


@pytest.mark.parametrize("met", [140, 143])
@pytest.mark.parametrize("shown", ["JobState=CANCELLED PreemptTime=None", "JobState=COMPLETING ExitCode=0:0 PreemptTime=None"])
def test_what_somebody_has_cancelled_before_it_began_is_not_requeued(tmp_path: Path, met: int, shown: str) -> None:
    assert run_script(scripts(tmp_path)["prompts"], met, tmp_path, shown) == (130, "")


def test_a_signal_during_the_sites_own_lines_requeues(tmp_path: Path) -> None:
    text = scripts(tmp_path, "slurm.setup=['kill -USR2 $$', touch late]")["prompts"]
    assert run_script(text, 0, tmp_path) == (75, "requeue 17\n")


def test_what_says_nothing_of_its_counts_has_no_watchdog(tmp_path: Path) -> None:
    """Merging and quantising a 13B takes longer than half an hour without a word."""
    texts = scripts(tmp_path)
    assert [stage for stage, text in texts.items() if "--silence=inf" in text] == ["prompts", "export", "report"]
    assert "--silence=1800.0" in texts["train"]


# --- a site's own YAML ----------------------------------------------------------------------------------------------


def test_a_recipe_counts_before_its_site(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(
        "partition: gpu\ntime_limit: '12:00:00'\nenvironment: {NCCL_DEBUG: WARN, A: '1'}\nstages: {data: {partition: cpu}}\n"
    )
    overrides = ["slurm.site=cluster.yaml", "slurm.time_limit=06:00:00", "slurm.environment={A: '2'}",
                 "slurm.stages={data: {qos: low}}"]  # fmt: skip
    found = settle_site(load_recipe("embedded", overrides).recipe.slurm, (tmp_path,))
    assert (found.partition, found.time_limit, found.environment) == ("gpu", "06:00:00", {"NCCL_DEBUG": "WARN", "A": "2"})
    assert (found.job("data").partition, found.job("data").qos, found.job("train").partition) == ("cpu", "low", "gpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "slurm.site cluster.yaml: no such file (looked at"),
        ("[1, 2]", "expected the keys of the slurm section"),
        ("site: other.yaml", "expected the keys of the slurm section, such as partition, without site"),
        ("partition: [", "not a YAML file"),
        ("time_limit: tomorrow", "time_limit: 'tomorrow' is no time of Slurm's"),
        ("time_limit: '00:05:00'", "leaves no time to work"),
        ("environment: {'A B': '1'}", "expected a variable's name"),
        ("stage_weights: true", "stage_weights needs scratch"),
    ],
)
def test_a_site_that_cannot_be_used_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "cluster.yaml").write_text(text)
    settings = load_recipe("embedded", ["slurm.site=cluster.yaml"]).recipe.slurm
    with pytest.raises(UnusableInput) as refused:
        settle_site(settings, (tmp_path,))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_machine_without_slurm_is_told_so_and_nothing_is_written(tmp_path: Path) -> None:
    ended = subprocess.run(
        command("submit", "embedded", "--run-dir", "run"), cwd=tmp_path, env=environment() | {"PATH": str(tmp_path)}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (
        2, "error: squeue: not found on this machine; give this command on a login node of the cluster\n"
    )  # fmt: skip
    assert not list(tmp_path.iterdir())
