"""Sbatch scripts: valid shell, in order, each gated on the manifest of the stage before it."""

import subprocess
from pathlib import Path

import pytest

from configs.load import load_recipe
from data.store import RunFolder
from slurm.submit import Script, render_scripts
from slurm.topology import STAGES

SITE = [
    "slurm.partition=h200",
    "slurm.account=distill",
    "slurm.gres=gpu:h200:8",
    "slurm.setup=[module load cuda]",
    "teacher.hardware.gpu=h200",
]


def scripts(tmp_path: Path, *overrides: str) -> dict[str, str]:
    recipe = load_recipe("embedded", overrides).recipe
    rendered = render_scripts(recipe, config="embedded", overrides=overrides, run=RunFolder(tmp_path / "my run"))
    return {script.stage: script.text for script in rendered}


def test_there_is_one_script_a_stage_in_pipeline_order(tmp_path: Path) -> None:
    rendered = render_scripts(load_recipe("embedded").recipe, config="embedded", overrides=[], run=RunFolder(tmp_path))
    assert tuple(script.stage for script in rendered) == STAGES and all(isinstance(script, Script) for script in rendered)


@pytest.mark.parametrize("stage", STAGES)
def test_every_script_is_valid_bash(tmp_path: Path, stage: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=scripts(tmp_path, *SITE)[stage], text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_a_script_fails_with_its_step_and_requeues_itself_on_75(tmp_path: Path) -> None:
    for stage, text in scripts(tmp_path).items():
        assert text.rstrip().endswith('exit "$rc"'), stage  # a script that ends in echo hides a failed step
        assert "-eq 75" in text and 'scontrol requeue "$SLURM_JOB_ID"' in text
        assert "#SBATCH --requeue" in text and "#SBATCH --signal=B:USR2@" in text and "--open-mode=append" in text


def test_a_stage_waits_for_the_manifest_of_its_input(tmp_path: Path) -> None:
    text = scripts(tmp_path)["data"]
    assert f"'{tmp_path / 'my run' / 'traces' / 'manifest.json'}'" in text  # quoted: run folders may hold spaces
    ran = subprocess.run(["bash"], input=text, text=True, capture_output=True)
    assert ran.returncode == 2 and "the generate stage has not finished" in ran.stderr


def test_gpus_are_asked_for_only_where_a_stage_uses_them(tmp_path: Path) -> None:
    rendered = scripts(tmp_path, *SITE)
    assert (
        "--gres=gpu:h200:8" in rendered["generate"]
        and "--gres" not in rendered["data"]
        and "--partition=h200" in rendered["data"]
    )


def test_overrides_reach_the_command_quoted(tmp_path: Path) -> None:
    assert "-s 'slurm.setup=[module load cuda]'" in scripts(tmp_path, *SITE)["train"]


def test_a_multi_node_teacher_gets_a_rendezvous(tmp_path: Path) -> None:
    text = scripts(tmp_path, "teacher.hardware.nodes=4", "teacher.layout.expert_parallel=8")["generate"]
    assert "#SBATCH --nodes=4" in text and "TRACESTILL_RENDEZVOUS" in text
    assert "TRACESTILL_RENDEZVOUS" not in scripts(tmp_path)["generate"]


def run_script(text: str, step_exit: int, tmp_path: Path) -> tuple[int, str]:
    """Runs a rendered script with stand-ins for the two Slurm commands it calls."""
    tools = tmp_path / "bin"
    tools.mkdir()
    calls = tmp_path / "calls"
    for name, body in (("srun", f"exit {step_exit}"), ("scontrol", f'echo "$@" >> {calls}')):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["bash"], input=text, text=True, env={"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}, check=False
    )
    return done.returncode, calls.read_text() if calls.exists() else ""


@pytest.mark.parametrize(("step_exit", "requeued"), [(0, ""), (1, ""), (3, ""), (75, "requeue 17\n")])
def test_the_exit_code_of_the_step_is_the_exit_code_of_the_job(tmp_path: Path, step_exit: int, requeued: str) -> None:
    assert run_script(scripts(tmp_path)["prompts"], step_exit, tmp_path) == (step_exit, requeued)
