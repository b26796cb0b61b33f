"""Jobs of a shell on a real Slurm: bad nodes are left out, a silent step is ended, what Slurm does to jobs is survived."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.load import load_recipe
from data.store import RunFolder
from slurm import attempts
from slurm.attempts import JobFolder, excluded_nodes, read_attempts
from slurm.scripts import Chain, render_scripts
from tests.slurm.cluster import Cluster, releasing, running, wait_for

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.long]


class ShellJob:
    """A `train` job of the product, whose command is a shell script of the test's instead of tracestill."""

    def __init__(
        self, cluster: Cluster, folder: Path, step: str, *overrides: str, stage: str = "train", max_nodes: int | None = None
    ) -> None:
        self.cluster, self.run, self.stage = cluster, RunFolder(folder), stage
        recipe = load_recipe("embedded", ["train.processes=1", *overrides]).recipe
        chain = Chain(recipe, "embedded", (), self.run, recipe.slurm, folder, folder, max_nodes)
        text = next(script.text for script in render_scripts(chain) if script.stage == stage)
        (folder / "step").write_text(f"#!/bin/bash\ncd {folder}\n{step}\n")
        (folder / "step").chmod(0o755)
        for name in ("dataset", "prompts", "headroom"):
            (folder / name).mkdir()
        (folder / "dataset" / "manifest.json").write_text("{}")
        (folder / "headroom" / "manifest.json").write_text("{}")
        self.run.logs.mkdir()
        before, after = text.split(f"    tracestill {stage}")
        words, rest = after.split(" &\n", 1)
        staged = words[words.index(' -s "') :] if ' -s "' in words else ""
        script = folder / "job.sbatch"
        script.write_text(f"{before}    {folder / 'step'}{staged} &\n{rest}")
        environment = cluster.environment | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(["sbatch", "--parsable", str(script)], env=environment, capture_output=True, text=True, check=True)
        self.job_id = int(done.stdout)

    def state(self) -> str:
        return self.cluster.job(self.job_id)["JobState"]

    def wait(self, state: str, seconds: float = 90.0) -> None:
        try:
            wait_for(lambda: self.state() == state, f"{state} of job {self.job_id}", seconds)
        except AssertionError as error:
            logs = "\n".join(path.read_text()[-2000:] for path in self.run.logs.glob("*.log"))
            raise AssertionError(f"{error}: {self.cluster.job(self.job_id)}\n{logs}") from error

    def attempts(self) -> list[tuple[str, str]]:
        return [(one.outcome, one.reason) for one in read_attempts(JobFolder.of(self.run), self.stage)]


LIMITS = ("slurm.time_limit=00:10:00", "slurm.warning_seconds=60")


@pytest.mark.parametrize("wants_gpus", [False, True])
def test_a_bad_node_is_left_out_and_the_job_goes_on_elsewhere(cluster: Cluster, tmp_path: Path, wants_gpus: bool) -> None:
    """Also where the partition lets nobody in who asks for no GPU, as the small job that leaves the node out at first does."""
    (tmp_path / "bin").mkdir()
    refuses = '#!/bin/bash\ncase "$*" in *--gres=gpu:1*) exec /usr/bin/sbatch "$@" ;; esac\necho "QOSMinGRES" >&2\nexit 1\n'
    (tmp_path / "bin" / "sbatch").write_text(refuses if wants_gpus else '#!/bin/bash\nexec /usr/bin/sbatch "$@"\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    overrides = (
        f"slurm.setup=['export PATH={tmp_path}/bin:$PATH']",
        "slurm.health={command: '[ \"$SLURMD_NODENAME\" != n1 ] || { echo link 3 is down; exit 1; }'}",
    )
    job = ShellJob(cluster, tmp_path, 'echo "$SLURM_JOB_NODELIST" > where', *LIMITS, *overrides)
    job.wait("COMPLETED")
    assert (tmp_path / "where").read_text().strip() != "n1"
    assert excluded_nodes(JobFolder.of(job.run)) == {"n1": "link 3 is down"}
    (first, reason), (second, _) = job.attempts()
    assert (first, reason, second) == ("bad node", "n1: link 3 is down", "done")
    wait_for(lambda: not cluster.call("squeue", "-h"), "the end of the small job", 30)
    small = next(job.run.logs.glob("exclude-*.log")).stem.removeprefix("exclude-")
    assert ("gpu:1" in cluster.job(int(small)).get("TresPerNode", "")) is wants_gpus


def test_shards_are_on_every_node_before_the_step(cluster: Cluster, tmp_path: Path) -> None:
    """A generate job of two nodes; both copies are one here, because virtual nodes share a disk."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "rank-0.bin").write_bytes(b"weights")
    overrides = (f"teacher.engine.prepared={tmp_path / 'shards'}", f"slurm.scratch={tmp_path}/local/$SLURM_JOB_NUM_NODES",
                 "slurm.stage_weights=true", "teacher.hardware.nodes=2", "teacher.engine.processes=1")  # fmt: skip
    job = ShellJob(cluster, tmp_path, 'echo "$@" > words', *LIMITS, *overrides, stage="generate")
    job.wait("COMPLETED")
    [staged] = (tmp_path / "local" / "2" / "tracestill").glob("shards-*")
    assert (staged / "rank-0.bin").read_bytes() == b"weights"
    assert (tmp_path / "words").read_text().split() == ["-s", f"teacher.engine.prepared={staged}"]


def test_a_node_that_cannot_take_the_shards_ends_the_job_before_it_loads(cluster: Cluster, tmp_path: Path) -> None:
    """One of two: its disk is read-only, say. Another attempt may get other nodes; two in vain are enough."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "rank-0.bin").write_bytes(b"weights")
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "1").touch()  # where the second node's copy would go there is no folder
    overrides = (f"teacher.engine.prepared={tmp_path / 'shards'}", f"slurm.scratch={tmp_path}/local/$SLURM_NODEID",
                 "slurm.stage_weights=true", "teacher.hardware.nodes=2", "teacher.engine.processes=1")  # fmt: skip
    job = ShellJob(cluster, tmp_path, "touch ran", *LIMITS, *overrides, stage="generate")
    with releasing(cluster):
        job.wait("FAILED", 120)
    (first, reason), (last, _) = job.attempts()
    assert (first, last) == ("failed", "stuck") and "slurm.stage_weights: " in reason and "Not a directory" in reason
    assert not (tmp_path / "ran").exists()


def test_servers_of_two_nodes_end_together_when_nobody_asks(cluster: Cluster, tmp_path: Path) -> None:
    """The first node looks for askers; the other hears of it through the run folder."""
    run = RunFolder(tmp_path)
    run.logs.mkdir()
    serve = f"{sys.executable} -P -m slurm.serve {tmp_path} --start=30 --idle=6 '--others=sleep 600'"
    server = f"{sys.executable} -m http.server --bind {{address}} {{port}}"
    job = int(cluster.call(
        "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/log", f"--export=ALL,PYTHONPATH={ROOT}",
        f"--wrap=srun {serve} -- {server}",
    ))  # fmt: skip
    folder = JobFolder.of(run)
    wait_for(folder.server(job).exists, "a server", 60)
    wait_for(lambda: cluster.job(job)["JobState"] == "COMPLETED", "an end of its own", 60)
    said = (tmp_path / "log").read_text()
    assert said.count("serve: no job of the run asks any more") == 2, said
    assert not folder.server(job).exists()


def test_two_that_miss_servers_call_them_back_once(cluster: Cluster, tmp_path: Path) -> None:
    """They ended while nobody asked, and both who ask find that at the same moment."""
    folder = JobFolder.of(RunFolder(tmp_path))
    folder.servers.mkdir(parents=True)
    attempts.begin(folder, "serve", 1, 0, "n1", "")
    attempts.end(folder, "serve", 1, after="", code=0, outcome="done", reason="")
    folder.script("serve").write_text(f'#!/bin/bash\n#SBATCH --comment="tracestill serve {tmp_path}"\nsleep 60\n')
    words = (
        "from pathlib import Path; from data.store import RunFolder; import slurm.servers as servers; servers.ASK_SLURM_S = 1; "
        f"print(repr(servers.wait_for_server(RunFolder(Path({str(tmp_path)!r})))))"
    )
    environment = cluster.environment | {"PYTHONPATH": str(ROOT)}
    waiting = [
        subprocess.Popen([sys.executable, "-c", words], env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        for _ in range(3)
    ]
    wait_for(lambda: cluster.call("squeue", "-h", "-o", "%k") != "", "servers", 30)
    time.sleep(4)
    assert cluster.call("squeue", "-h", "-o", "%k") == f"tracestill serve {tmp_path}"
    folder.server(2).write_text("http://n1:1/v1")
    assert [process.communicate(timeout=30)[0] for process in waiting] == ["''\n"] * 3
    folder.server(2).unlink()
    folder.closed.touch()
    cluster.call("scancel", "--user=root")
    wait_for(lambda: not cluster.call("squeue", "-h"), "an empty queue", 30)
    done = subprocess.run(
        [sys.executable, "-c", words], env=environment, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "no job is left that could" in done.stdout and not cluster.call("squeue", "-h")


def test_twenty_preemptions_are_twenty_requeues(cluster: Cluster, tmp_path: Path) -> None:
    """The step counts to sixty, committing each number, and stops when it is asked to."""
    step = (
        "trap 'exit 75' USR2 TERM\n"
        "for n in $(seq $(( $(ls checkpoints 2>/dev/null | wc -l) + 1 )) 60); do\n"
        "    mkdir -p checkpoints/step-$(printf %08d $n); sleep 0.5\n"
        "done"
    )
    job = ShellJob(cluster, tmp_path, step, *LIMITS)
    with releasing(cluster):
        for number in range(1, 21):
            count = len(list(tmp_path.glob("checkpoints/step-*")))
            wait_for(lambda: len(list(tmp_path.glob("checkpoints/step-*"))) > count, f"step {count + 1}", 60)  # noqa: B023
            cluster.preempt(job.job_id, 0.1)
            wait_for(lambda: cluster.job(job.job_id)["Restarts"] == str(number), f"requeue {number}", 60)  # noqa: B023
        job.wait("COMPLETED", 120)
    outcomes = [outcome for outcome, _ in job.attempts()]
    assert len(outcomes) == 21 and outcomes[-1] == "done", outcomes
    assert len(list(tmp_path.glob("checkpoints/step-*"))) == 60


def test_an_element_of_an_array_goes_back_alone(cluster: Cluster, tmp_path: Path) -> None:
    """The one whose number is the array's: requeued by that number, all of them would be."""
    step = (
        "trap 'exit 75' USR2 TERM\ntouch up.$SLURM_ARRAY_TASK_ID.${SLURM_RESTART_COUNT:-0}; while [ ! -e go ]; do sleep 0.2; done"
    )
    job = ShellJob(cluster, tmp_path, step, *LIMITS, "slurm.generate_jobs=3", stage="generate")
    wait_for(lambda: len(list(tmp_path.glob("up.*.0"))) == 3, "three elements", 60)
    elements = dict(line.split() for line in cluster.call("squeue", "-h", "-r", "-o", "%A %i").splitlines())
    address = elements[str(job.job_id)]
    cluster.call("scancel", "--signal=USR2", "--batch", address)
    with releasing(cluster):
        wait_for((tmp_path / f"up.{address.split('_')[1]}.1").exists, "its second start", 60)
        (tmp_path / "go").touch()
        wait_for(lambda: not cluster.call("squeue", "-h"), "the end", 90)
    assert len(list(tmp_path.glob("up.*.1"))) == 1
    assert sorted(outcome for outcome, _ in job.attempts()) == ["done", "done", "done", "interrupted"]


def test_cancel_asks_the_elements_that_run_and_takes_out_those_that_wait(cluster: Cluster, tmp_path: Path) -> None:
    step = "trap 'touch stopped.$SLURM_ARRAY_TASK_ID; exit 75' USR2\ntouch up; while :; do sleep 0.2; done"
    job = ShellJob(cluster, tmp_path, step, *LIMITS, "slurm.generate_jobs=3", stage="generate", max_nodes=1)
    wait_for((tmp_path / "up").exists, "a start", 60)
    words = (
        "from pathlib import Path; from data.store import RunFolder; from slurm.cancel import cancel_chain; "
        f"print(cancel_chain(RunFolder(Path({str(tmp_path)!r}))))"
    )
    environment = cluster.environment | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", words], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "{'generate': 'stopped'}\n" and done.stderr == "", done
    assert not cluster.call("squeue", "-h")
    assert len(list(tmp_path.glob("stopped.*"))) == 1 and [outcome for outcome, _ in job.attempts()] == ["cancelled"]


def test_one_node_that_refuses_stops_a_job_of_two_at_once(cluster: Cluster, tmp_path: Path) -> None:
    """srun ends the other node's part, which says that it was stopped; the higher code is not the reason."""
    step = (
        "trap 'echo \"error: stopped by SIGTERM; the same command continues\" >&2; exit 75' TERM\n"
        '[ "$SLURM_NODEID" = 0 ] && { sleep 1; echo "error: gates: accuracy 0.1" >&2; exit 3; }\n'
        "while :; do sleep 0.2; done"
    )
    nodes = ("teacher.hardware.nodes=2", "teacher.engine.processes=1")
    job = ShellJob(cluster, tmp_path, step, *LIMITS, *nodes, stage="generate")
    job.wait("FAILED")
    assert job.attempts() == [("refused", "gates: accuracy 0.1")]


def test_a_node_that_has_ended_ends_nobody_else(cluster: Cluster, tmp_path: Path) -> None:
    """As when an evaluation goes on with the student, on the first node alone. WaitTime is a minute or less on many a site."""
    step = '[ "$SLURM_NODEID" = 1 ] || { sleep 12; touch whole; }'
    nodes = ("teacher.hardware.nodes=2", "teacher.engine.processes=1")
    job = ShellJob(cluster, tmp_path, step, *LIMITS, *nodes, stage="generate")
    job.wait("COMPLETED")
    assert (tmp_path / "whole").exists()


def test_a_bad_node_of_a_full_cluster_is_kept_until_slurm_knows(cluster: Cluster, tmp_path: Path) -> None:
    """The small job that tells it waits for a core; whoever went back before would get the same node again."""
    for node in cluster.nodes[1:]:
        cluster.call("sbatch", "--exclusive", f"--nodelist={node}", "--output=/dev/null", "--wrap=sleep 600")
    wait_for(lambda: cluster.call("squeue", "-h", "-o", "%T").split() == ["RUNNING"] * 3, "a full cluster", 30)
    health = "slurm.health={command: '[ \"$SLURMD_NODENAME\" != n1 ] || { echo link 3 is down; exit 1; }'}"
    job = ShellJob(cluster, tmp_path, "true", *LIMITS, health)
    wait_for(lambda: "exclude" in cluster.call("squeue", "-h", "-t", "PENDING", "-o", "%j"), "the small job", 60)
    time.sleep(10)
    assert job.state() == "RUNNING" and cluster.job(job.job_id)["Restarts"] == "0"
    cluster.call("scancel", "--state=RUNNING", "--nodelist=n2,n3,n4", "--user=root")
    job.wait("COMPLETED", 120)
    assert [outcome for outcome, _ in job.attempts()] == ["bad node", "done"]


@pytest.mark.parametrize("held", ["step", "staging"])
def test_a_preemption_of_a_site_that_tells_the_steps_alone(tmp_path: Path, held: str) -> None:
    """Without preempt_send_user_signal the batch script hears nothing: what Slurm has ended was no failure."""
    (tmp_path / "job" / "bin").mkdir(parents=True)
    (tmp_path / "job" / "shards").mkdir()
    (tmp_path / "job" / "shards" / "rank-0.bin").write_bytes(b"weights")
    slow = tmp_path / "job" / "bin" / "srun"  # staging takes its time at first
    slow.write_text(
        '#!/bin/bash\ncase "$*" in *slurm.staging*) [ -e go ] || { touch up; exec /usr/bin/srun sleep 100; } ;; esac\n'
        'exec /usr/bin/srun "$@"\n'
    )
    slow.chmod(0o755)
    overrides = [f"slurm.setup=['cd {tmp_path}/job', 'export PATH={tmp_path}/job/bin:$PATH']"]
    if held == "staging":
        overrides += [
            f"teacher.engine.prepared={tmp_path}/job/shards",
            f"slurm.scratch={tmp_path}/local",
            "slurm.stage_weights=true",
        ]
    step = "[ -e go ] && exit 0; touch up; while :; do sleep 0.2; done"
    with running(tmp_path / "cluster", 2, settings={"SlurmctldParameters": "enable_configless"}) as cluster, releasing(cluster):
        job = ShellJob(cluster, tmp_path / "job", step, *LIMITS, *overrides, stage="generate")
        wait_for((tmp_path / "job" / "up").exists, "a start", 60)
        cluster.preempt(job.job_id, 1.0)
        (tmp_path / "job" / "go").touch()
        job.wait("COMPLETED", 120)
        assert cluster.job(job.job_id)["Restarts"] == "1"
    first, last = (outcome for outcome, _ in job.attempts())
    assert first in ("interrupted", "not begun", "") and last == "done"


def test_a_second_job_at_a_stage_waits_for_the_first(cluster: Cluster, tmp_path: Path) -> None:
    """Also where the file system's locks hold on one node alone: Slurm's queue says so."""
    job = ShellJob(cluster, tmp_path, "echo ran >> ran; while [ ! -e go ]; do sleep 0.2; done", *LIMITS)
    wait_for((tmp_path / "ran").exists, "a start", 60)
    environment = cluster.environment | {"PYTHONPATH": str(ROOT)}
    again = subprocess.run(
        ["sbatch", "--parsable", str(tmp_path / "job.sbatch")], env=environment, capture_output=True, text=True, check=True
    )
    second = int(again.stdout)
    wait_for(lambda: cluster.job(second)["Restarts"] == "1", "its return to the queue", 60)
    (tmp_path / "go").touch()
    job.wait("COMPLETED")
    with releasing(cluster):
        wait_for(lambda: cluster.job(second)["JobState"] == "COMPLETED", "the second job's turn", 90)
    assert (tmp_path / "ran").read_text() == "ran\n" * 2
    assert [one.outcome for one in attempts.attempts_of(JobFolder.of(job.run), "train", second)] == ["busy", "done"]


def test_a_health_check_that_cannot_run_condemns_no_node(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    broken = tmp_path / "bin" / "srun"  # for the health check alone
    broken.write_text(
        '#!/bin/bash\ncase "$*" in *slurm.health*) echo "srun: error: no such plugin" >&2; exit 1 ;; esac\n'
        'exec /usr/bin/srun "$@"\n'
    )
    broken.chmod(0o755)
    overrides = (f"slurm.setup=['export PATH={tmp_path}/bin:$PATH']", "slurm.health={command: 'true'}")
    job = ShellJob(cluster, tmp_path, "exit 0", *LIMITS, *overrides)
    with releasing(cluster):
        job.wait("FAILED", 120)
    assert excluded_nodes(JobFolder.of(job.run)) == {}
    assert [outcome for outcome, _ in job.attempts()] == ["failed", "stuck"]
    assert "no such plugin" in job.attempts()[0][1]


@pytest.mark.parametrize("hears", ["TERM", "nothing"])
def test_what_somebody_has_cancelled_stays_cancelled(cluster: Cluster, tmp_path: Path, hears: str) -> None:
    """By Slurm's own command, whether the step commits and ends by itself or is killed."""
    trap = "mkdir -p checkpoints/step-00000003; exit 75" if hears == "TERM" else ""
    job = ShellJob(cluster, tmp_path, f"trap '{trap}' USR2 TERM\ntouch up\nwhile :; do sleep 0.2; done", *LIMITS)
    wait_for((tmp_path / "up").exists, "a start", 60)
    cluster.call("scancel", str(job.job_id))
    job.wait("CANCELLED", 60)
    wait_for(lambda: not cluster.call("squeue", "-h", f"--jobs={job.job_id}"), "an end", 60)
    assert cluster.job(job.job_id)["Restarts"] == "0"
    assert job.state() == "CANCELLED"
    if hears == "TERM":
        assert job.attempts()[0][0] == "cancelled" and (tmp_path / "checkpoints" / "step-00000003").is_dir()


def test_the_time_limit_requeues_and_twice_in_vain_stops(cluster: Cluster, tmp_path: Path) -> None:
    """A limit of three minutes, warned of 80 s before (Slurm may send it a minute early); the step commits nothing."""
    job = ShellJob(
        cluster, tmp_path, "trap 'exit 75' USR2 TERM\nwhile :; do sleep 0.2; done", "slurm.time_limit=00:03:00",
        "slurm.warning_seconds=80",
    )  # fmt: skip
    with releasing(cluster):
        job.wait("FAILED", 420)
    assert [outcome for outcome, _ in job.attempts()] == ["interrupted", "stuck"]
    assert "no progress in two attempts (step 0)" in job.attempts()[-1][1]


def test_a_stopped_step_is_ended_within_twice_the_silence(cluster: Cluster, tmp_path: Path) -> None:
    """SIGSTOP reaches neither the shell nor srun: only its count stands still. The second attempt is let through."""
    step = (
        '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0\n'
        'echo "{\\"done\\": 1, \\"total\\": 2, \\"unit\\": \\"steps\\"}" > "$TRACESTILL_BEAT"\n'
        "date +%s > stopped; kill -STOP $$; sleep 600"
    )
    job = ShellJob(cluster, tmp_path, step, *LIMITS, "slurm.silence_seconds=10")
    wait_for((tmp_path / "stopped").exists, "a stopped step", 60)
    wait_for(lambda: "watchdog" in "".join(path.read_text() for path in job.run.logs.glob("*.log")), "watchdog", 20)
    assert time.time() - int((tmp_path / "stopped").read_text()) <= 20 + 1
    with releasing(cluster):
        job.wait("COMPLETED", 200)
    assert job.attempts()[0] == ("hung", "nothing has moved for 10 s, at 1 of 2 steps")


def test_a_stopped_element_of_an_array_is_killed_alone(cluster: Cluster, tmp_path: Path) -> None:
    """The one that has the array's number; the other counts on."""
    step = (
        'beat() { echo "{\\"done\\": $1, \\"total\\": 9, \\"unit\\": \\"steps\\"}" > "$TRACESTILL_BEAT"; }\n'
        'touch "up.$SLURM_ARRAY_TASK_ID.${SLURM_RESTART_COUNT:-0}"; beat 1\n'
        '[ "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" != "$SLURM_ARRAY_JOB_ID.0" ] || { kill -STOP $$; sleep 600; }\n'
        "n=1; while [ ! -e go ]; do sleep 1; n=$((n + 1)); beat $n; done"
    )
    job = ShellJob(cluster, tmp_path, step, *LIMITS, "slurm.silence_seconds=8", "slurm.generate_jobs=2", stage="generate")
    with releasing(cluster):
        wait_for(lambda: len(list(tmp_path.glob("up.*.1"))) == 1, "a second start", 150)
        (tmp_path / "go").touch()
        wait_for(lambda: not cluster.call("squeue", "-h"), "the end", 90)
    assert sorted(outcome for outcome, _ in job.attempts()) == ["done", "done", "hung"]


def test_a_node_that_dies_costs_its_attempt(cluster: Cluster, tmp_path: Path) -> None:
    step = "echo $SLURM_JOB_NODELIST >> where; mkdir -p checkpoints/step-$(printf %08d $$); [ -e go ] || sleep 600"
    job = ShellJob(cluster, tmp_path, step, *LIMITS)
    wait_for((tmp_path / "where").exists, "a start", 60)
    node = (tmp_path / "where").read_text().strip()
    cluster.kill_node(node)
    (tmp_path / "go").touch()
    try:
        with releasing(cluster):
            wait_for(lambda: cluster.job(job.job_id)["Restarts"] == "1", "a requeue", 120)
            job.wait("COMPLETED", 120)
    finally:
        cluster.start_node(node)
    first, last = (tmp_path / "where").read_text().split()
    assert first == node != last
    assert [outcome for outcome, _ in job.attempts()] == ["", "done"]


def test_a_controller_that_is_down_for_a_minute_is_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    """The step is asked to stop while nobody can requeue it."""
    step = (
        "trap 'mkdir -p checkpoints/step-00000005; exit 75' USR2\n"
        "touch up.${SLURM_RESTART_COUNT:-0}; [ -e go ] || while :; do sleep 0.2; done"
    )
    job = ShellJob(cluster, tmp_path, step, *LIMITS)
    wait_for((tmp_path / "up.0").exists, "a start", 60)
    time.sleep(10)  # it writes its state every five seconds: a younger job is forgotten, which nobody can help
    cluster.kill_controller()
    words = f"slurm.attempt train {tmp_path}".split()
    [attempt] = [process for process in cluster.processes() if set(words) <= set(command_of(process))]
    os.kill(attempt, signal.SIGUSR2)  # as the batch script would pass it on
    (tmp_path / "go").touch()
    time.sleep(60)
    cluster.start_controller()
    with releasing(cluster):
        job.wait("COMPLETED", 200)
    assert [outcome for outcome, _ in job.attempts()] == ["interrupted", "done"]


def command_of(process: int) -> list[str]:
    return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")


def test_this_interpreter_finds_the_package_from_anywhere(tmp_path: Path) -> None:
    """A job starts in the user's folder, which may hold a `data.py` or a folder `slurm`."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "data.py").write_text("raise SystemExit(9)")
    done = subprocess.run([sys.executable, "-P", "-m", "slurm.attempt", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--silence" in done.stdout, done.stderr
