"""Sbatch scripts: valid shell, in order, each with what its stage needs of a site; and what a script does with an exit code."""

import subprocess
from pathlib import Path

import pytest

import tracestill
from configs.cluster import Slurm
from configs.errors import UnusableInput
from configs.load import load_recipe
from data.store import RunFolder
from slurm.attempts import JobFolder, append
from slurm.scripts import Chain, Script, array_of, jobs_in, render_scripts, silence_of
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
        assert 'case "$rc" in 75) requeue' in text and 'scontrol requeue "$job"' in text
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
    assert [jobs_in(said) for said in ("0-5", "0-5%2", "damaged")] == [6, 6, 1]


def run_script(
    text: str, step_exit: int, tmp_path: Path, shown: str = "JobState=RUNNING PreemptTime=None", *, seconds: float = 0.0,
    environment: dict[str, str] | None = None, refuses: str = "",
) -> tuple[int, str]:  # fmt: skip
    """Runs a rendered script with stand-ins for slurm.attempt, which takes `seconds`, and the Slurm command that it calls. shown:
    of the job. refuses: what scontrol says instead of requeueing."""
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    requeue = f"echo '{refuses}'; exit 1" if refuses else f'echo "$@" >> {calls}'
    for name, body in (
        ("python", f"sleep {seconds}; exit {step_exit}"),
        ("scontrol", f'case "$*" in *show*) echo "{shown}" ;; *) {requeue} ;; esac'),
    ):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    first = text.replace("export PATH=", "unused=")
    done = subprocess.run(
        ["bash"], input=first, text=True, check=False,
        env={"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "2"} | (environment or {}),
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


def test_a_signal_that_comes_with_the_end_of_the_step_does_not_hide_how_it_ended(tmp_path: Path) -> None:
    """bash says 140 of a wait that a signal has interrupted; the attempt had ended with 3."""
    text = scripts(tmp_path)["prompts"]
    late = text.replace(
        """trap 'kill -USR2 "$attempt" 2>/dev/null' USR2 TERM""", """trap 'sleep 1' USR2 TERM; (sleep 0.3; kill -USR2 $$) &"""
    )
    assert late != text
    assert run_script(late, 3, tmp_path, seconds=0.5) == (3, "")


def test_an_element_of_an_array_requeues_itself_alone(tmp_path: Path) -> None:
    """The last element to start has the array's own number, which means all of them."""
    text = scripts(tmp_path, "slurm.generate_jobs=3")["generate"]
    element = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
    assert run_script(text, 75, tmp_path, environment=element) == (75, "requeue 17_2\n")


def test_a_site_that_requeues_nothing_is_told_at_once(tmp_path: Path) -> None:
    text = scripts(tmp_path)["prompts"]
    assert run_script(text, 75, tmp_path, refuses="Requested operation is presently disabled")[0] == 1


def test_what_the_sites_own_lines_end_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An empty log looks like a job that never ran."""
    assert run_script(scripts(tmp_path, "slurm.setup=[exit 3]")["prompts"], 0, tmp_path) == (3, "")
    assert capfd.readouterr().err.splitlines()[-1] == "error: slurm.setup has ended the job with exit code 3"


def test_unset_variables_in_the_sites_own_lines_are_the_sites_business(tmp_path: Path) -> None:
    text = scripts(tmp_path, "slurm.setup=['echo $NOT_SET_ANYWHERE']")["prompts"]
    assert run_script(text, 0, tmp_path) == (0, "")


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb"])
def test_a_folder_that_sbatch_cannot_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnusableInput, match="sbatch reads no path with a quotation mark"):
        scripts(tmp_path / name)


def test_a_report_is_made_on_whatever_node_is_left(tmp_path: Path) -> None:
    append(JobFolder.of(chain_of(tmp_path).run).excluded, {"node": "n3", "reason": "7 GPUs of 8"})
    found = {stage: "#SBATCH --exclude=n3" in text for stage, text in scripts(tmp_path).items()}
    assert [stage for stage, leaves_out in found.items() if not leaves_out] == ["report"]


def test_servers_weights_are_looked_for_before_anything_is_submitted(tmp_path: Path) -> None:
    wanted = ["teacher.engine={type: http, servers_file: x}", f"slurm.servers={{model: {tmp_path}/none}}"]
    with pytest.raises(UnusableInput, match=r"^slurm.servers.model .*/none: no such folder"):
        tracestill._require_models_to_submit(load_recipe("embedded", wanted).recipe)


def test_a_percent_sign_in_a_folder_is_no_pattern(tmp_path: Path) -> None:
    assert "/a%%j/my run/logs/prompts-%j.log" in scripts(tmp_path / "a%j")["prompts"]


@pytest.mark.parametrize(("gres", "gpus"), [("gpu:h200:4", 4), ("nvme:1,gpu:2", 2), ("gpu:a100:1(S:0)", 1), (None, 8)])
def test_a_node_is_to_show_the_gpus_that_its_stage_asks_for(tmp_path: Path, gres: str | None, gpus: int) -> None:
    recipe = load_recipe("glm52-bf16-16xh200", [] if gres is None else [f"slurm.stages={{train: {{gres: '{gres}'}}}}"]).recipe
    chain = Chain(recipe, "glm52-bf16-16xh200", (), RunFolder(tmp_path / "run"), recipe.slurm, tmp_path, tmp_path)
    texts = {script.stage: script.text for script in render_scripts(chain)}
    assert f"--gpus={gpus}" in texts["train"] and "--gpus=8" in texts["generate"]


def test_what_says_nothing_of_its_counts_has_no_watchdog(tmp_path: Path) -> None:
    """Merging and quantising a 13B takes longer than half an hour without a word."""
    texts = scripts(tmp_path)
    assert [stage for stage, text in texts.items() if "--silence=inf" in text] == ["prompts", "export", "report"]
    assert "--silence=1800.0" in texts["train"]


def test_a_server_that_says_nothing_before_the_end_of_an_answer_has_its_own_time(tmp_path: Path) -> None:
    """An hour, by the engine's own settings; and servers that have all gone have an hour to start again."""
    http = "teacher.engine={type: http, base_urls: [http://h/v1]}"

    def silence(*overrides: str, stage: str = "generate") -> float:
        return silence_of(chain_of(tmp_path, http, *overrides), stage)  # type: ignore[arg-type]

    assert silence() == silence(stage="evaluate") == 3900.0
    assert silence("slurm.silence_seconds=9000") == 9000.0
    assert silence("teacher.engine.stream=true") == silence(stage="train") == 1800.0
    assert silence("teacher.engine.stream=true", "slurm.servers={start_seconds: 5000}") == 5300.0
    assert silence_of(chain_of(tmp_path), "generate") == 1800.0


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


def test_what_a_recipe_wants_may_need_what_its_site_says(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("scratch: /local/$USER\n")
    wanted = ["slurm.site=cluster.yaml", "slurm.stage_weights=true", "slurm.health={scratch_gib: 9}"]
    assert settle_site(load_recipe("embedded", wanted).recipe.slurm, (tmp_path,)).scratch == "/local/$USER"
    (tmp_path / "cluster.yaml").write_text("partition: gpu\n")
    with pytest.raises(UnusableInput, match="stage_weights needs scratch"):
        settle_site(load_recipe("embedded", wanted).recipe.slurm, (tmp_path,))


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
        ("time_limit: 24:00:00", "put it in quotes"),
        ("memory: 0", "put it in quotes"),
        ("partition: a b", "'a b': expected one word"),
        ("options: [--array=0-3]", "--array is what a job is known and ended by here"),
        ("options: [--comment mine]", "--comment is what a job is known and ended by here"),
        ("options: [--arr=0-3]", "--array is what a job is known and ended by here"),
        ("options: [-N3]", "-N is what a job is known and ended by here"),
        ("options: ['--mem=1G --nodes=3']", "--nodes is what a job is known and ended by here"),
        ("options: [--wait]", "--wait is what a job is known and ended by here"),
        ("options: [--exclude=n1]", "--exclude has a key of its own; expected slurm.exclude"),
        ('options: ["--comment=\'a"]', "no closing quotation"),
        ("partitions: gpu", "partitions: unknown key; did you mean partition?"),
        ("health: {gpu_gib: 3}", "health.gpu_gib: unknown key; did you mean"),
    ],
)
def test_a_site_that_cannot_be_used_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "cluster.yaml").write_text(text)
    settings = load_recipe("embedded", ["slurm.site=cluster.yaml"]).recipe.slurm
    with pytest.raises(UnusableInput) as refused:
        settle_site(settings, (tmp_path,))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_what_sbatch_has_beside_is_free_to_use() -> None:
    options = (
        "--exclusive",
        "--mem-bind=local",
        "--gres=gpu:8",
        "--no-kill",
        "--reservation=night",
        "-w n1",
        "--export=ALL",
        "-H",
    )
    assert Slurm(options=options).job("train").options == options


def test_a_machine_without_slurm_is_told_so_and_nothing_is_written(tmp_path: Path) -> None:
    ended = subprocess.run(
        command("submit", "embedded", "--run-dir", "run"), cwd=tmp_path, env=environment() | {"PATH": str(tmp_path)}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (
        2, "error: squeue: not found on this machine; give this command on a login node of the cluster\n"
    )  # fmt: skip
    assert not list(tmp_path.iterdir())
