"""A real Slurm on this machine: one controller, virtual nodes with GPUs that are only device files, no systemd, no cgroups, no
database. Needs root (slurmd starts jobs as their owners) and Debian's slurmctld, slurmd, slurm-client and munge.

Settings that tests lean on: a preempted job gets five seconds and SIGTERM, batch script included; a step is ended five seconds
after the first of its tasks unless srun is told otherwise; a node that falls silent is down after twenty seconds; a requeued job
is held for two minutes, as everywhere, unless `release` lets it go.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
GPUS = 8
RELEASE_AFTER_S = 3.0
"""A job that is let go within half a second of its requeue fails with a revoked credential (Slurm 22.05)."""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    remedy = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
    return f"no {', '.join(absent)} here: {remedy}" if absent else ""


@dataclass
class Cluster:
    """A running one. `environment` makes Slurm's commands talk to it. inside: words before every program of it, such as those
    that enter another network. settings: of slurm.conf, over the tests' own."""

    folder: Path
    num_nodes: int = 4
    inside: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    ports: tuple[int, int] = (0, 0)
    daemons: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    @property
    def nodes(self) -> list[str]:
        return [f"n{index}" for index in range(1, self.num_nodes + 1)]

    # --- daemons -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        for name in ("state", "log", "spool", "run", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(GPUS):
            device = self.folder / "dev" / f"nvidia{index}"
            try:
                os.mknod(device, 0o020666, os.makedev(1, 3))
            except PermissionError:  # root of a container: jobs get their nodes, and no CUDA_VISIBLE_DEVICES
                device.touch()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.ports = free_ports(1 + self.num_nodes)
        (self.folder / "slurm.conf").write_text(self._conf())
        (self.folder / "gres.conf").write_text(
            f"NodeName=n[1-{self.num_nodes}] Name=gpu File={self.folder}/dev/nvidia[0-{GPUS - 1}]\n"
        )
        run, log = self.folder / "run", self.folder / "log"
        self._launch(
            "munged", "munged", "--foreground", "--force", f"--socket={run}/munge.sock", f"--key-file={key}",
            f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log", f"--seed-file={run}/munged.seed",
        )  # fmt: skip
        wait_for(lambda: (run / "munge.sock").exists(), "munge", 20)
        self.start_controller(clean=True)
        for node in self.nodes:
            self.start_node(node)
        wait_for(lambda: set(self.call("sinfo", "-h", "-p", "main", "-o", "%T").split()) == {"idle"}, "idle nodes", 60)

    def _launch(self, name: str, *words: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                (*self.inside, *words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                start_new_session=True,
            )

    def start_controller(self, *, clean: bool = False) -> None:
        """clean: without any memory of jobs."""
        self._launch("slurmctld", "slurmctld", "-D", *(["-c"] if clean else []))

    def kill_controller(self) -> None:
        self.daemons["slurmctld"].kill()
        self.daemons.pop("slurmctld").wait()

    def start_node(self, node: str) -> None:
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self._launch(node, "slurmd", "-D", "-N", node, "-c")

    def kill_node(self, node: str) -> None:
        """As when its power goes: the daemon and every process of every job on it, at once."""
        daemon = self.daemons.pop(node)
        mine = self.processes(f"SLURMD_NODENAME={node}")
        sessions = {os.getsid(process) for process in mine}  # slurmstepd itself does not know its node
        mine += [process for process in self.processes() if os.getsid(process) in sessions]
        daemon.kill()
        daemon.wait()
        _kill(mine)

    def processes(self, *variables: str) -> list[int]:
        """Of this cluster's jobs, slurmstepd included, with these variables in their environment."""
        wanted = {f"SLURM_CONF={self.folder}/slurm.conf", *variables}
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if wanted <= set(_variables(path))]

    def stop(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.call("scancel", "--user=root")
            wait_for(lambda: not self.call("squeue", "-h"), "an empty queue", 30)
        for name in [*self.nodes, "slurmctld", "munged"]:
            if (daemon := self.daemons.pop(name, None)) is not None:
                daemon.terminate()
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
        _kill(self.processes())

    def _conf(self) -> str:
        folder, (controller, first) = self.folder, self.ports
        settings = {
            "ClusterName": "tests", "SlurmctldHost": "localhost(127.0.0.1)", "SlurmUser": "root",
            "AuthInfo": f"socket={folder}/run/munge.sock", "SlurmctldPort": controller,
            "SlurmctldPidFile": f"{folder}/run/slurmctld.pid", "SlurmdPidFile": f"{folder}/run/slurmd.%n.pid",
            "SlurmdSpoolDir": f"{folder}/spool/%n", "StateSaveLocation": f"{folder}/state",
            "SlurmctldLogFile": f"{folder}/log/slurmctld.log", "SlurmdLogFile": f"{folder}/log/slurmd.%n.log",
            "SlurmdParameters": "config_overrides", "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none",
            "MpiDefault": "none", "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core",
            "SchedulerParameters": "sched_interval=1,bf_interval=1", "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE", "SlurmctldParameters": "preempt_send_user_signal", "ReturnToService": 2,
            "MinJobAge": 3600, "KillWait": 5, "WaitTime": 5, "SlurmdTimeout": 20, "JobAcctGatherType": "jobacct_gather/linux",
            "JobCompType": "jobcomp/filetxt", "JobCompLoc": f"{folder}/log/jobcomp.txt", "GresTypes": "gpu",
        }  # fmt: skip
        parts = [f"{key}={value}" for key, value in (settings | self.settings).items()]
        last = first + self.num_nodes - 1
        parts += [
            f"NodeName=n[1-{self.num_nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 "
            f"RealMemory=100000 Gres=gpu:{GPUS}",
            "PartitionName=main Nodes=ALL Default=YES MaxTime=60 DefaultTime=5 PriorityTier=1 GraceTime=5",
            "PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF",
        ]
        return "\n".join(parts) + "\n"

    # --- its commands ----------------------------------------------------------------------------------------------------

    def call(self, *words: str) -> str:
        done = subprocess.run(
            (*self.inside, *words), env=self.environment, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.strip()

    def states(self) -> dict[int, str]:
        """Of every job that Slurm remembers, by its id."""
        found = {}
        for line in self.call("scontrol", "--oneliner", "show", "jobs").splitlines():
            values = dict(word.split("=", 1) for word in line.split() if "=" in word)
            if "JobId" in values:
                found[int(values["JobId"])] = values["JobState"]
        return found

    def job(self, job_id: int) -> dict[str, str]:
        """Of an array it is shown element by element: the one of this number is meant."""
        shown = self.call("scontrol", "--oneliner", "show", "job", str(job_id)).splitlines()
        line = next((line for line in shown if line.startswith(f"JobId={job_id} ")), shown[0])
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def preempt(self, job_id: int, seconds: float = 1.0) -> None:
        """A more important job takes the job's nodes for a moment."""
        nodes = self.job(job_id)["NodeList"]
        num_nodes = self.call("scontrol", "show", "hostnames", nodes).count("\n") + 1
        self.call(
            "sbatch", "--partition=high", f"--nodelist={nodes}", f"--nodes={num_nodes}", "--exclusive", "--output=/dev/null",
            f"--wrap=sleep {seconds}",
        )  # fmt: skip

    def release(self, job_id: int) -> None:
        """A requeued job may start now instead of in two minutes."""
        self.call("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def limit_in_a_minute(self, job_id: int) -> None:
        """The job's time limit, and a bit: Slurm counts limits in minutes from a job's start."""
        minutes, seconds = (int(part) for part in self.job(job_id)["RunTime"].split(":")[-2:])
        self.call("scontrol", "update", f"JobId={job_id}", f"TimeLimit={minutes + (seconds > 0) + 1}")

    def resume_nodes(self) -> None:
        """Those that the controller has drained are taken back into service."""
        for line in self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%N|%T").splitlines():
            node, state = line.split("|")
            if state.startswith(("drain", "drng")):
                self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")


@contextlib.contextmanager
def running(
    folder: Path, num_nodes: int = 4, inside: tuple[str, ...] = (), settings: dict[str, str] | None = None
) -> Iterator[Cluster]:  # fmt: skip
    """Skips the test where there can be none."""
    if why := missing():
        pytest.skip(why)
    cluster = Cluster(folder, num_nodes, inside, settings or {})
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@contextlib.contextmanager
def releasing(cluster: Cluster, *, repairs: bool = False) -> Iterator[None]:
    """Requeued jobs go on after a few seconds while this lasts, and not only after two minutes. repairs: as if an operator sat
    there besides, nodes that the controller has taken out of service are put back, and jobs that it holds are let go."""
    import threading

    stop = threading.Event()

    def let_go() -> None:
        since: dict[int, float] = {}
        while not stop.wait(0.5):
            with contextlib.suppress(subprocess.SubprocessError, KeyError, ValueError):
                if repairs:
                    cluster.resume_nodes()
                pending = cluster.call("squeue", "-h", "-r", "-t", "PENDING", "-o", "%A|%r").splitlines()
                why = {int(job): reason for job, reason in (line.split("|") for line in pending)}
                held = [job for job, reason in why.items() if reason == "BeginTime" or (repairs and "held" in reason)]
                since = {job: since.get(job, time.monotonic()) for job in held}
                for job in [job for job, at in since.items() if time.monotonic() - at > RELEASE_AFTER_S]:
                    if "held" in why[job]:
                        cluster.call("scontrol", "release", str(job))
                    cluster.release(job)

    thread = threading.Thread(target=let_go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)


def wait_for(ready: Callable[[], bool], what: str, seconds: float, poll_s: float = 0.1) -> None:
    """Raises AssertionError when it is not so in time. A command that fails meanwhile means: not yet."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.CalledProcessError):
            if ready():
                return
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
        time.sleep(poll_s)


def free_ports(count: int) -> tuple[int, int]:
    """A port for the controller, and the first of a run of ports for the nodes, that nobody listens on now."""
    for first in range(36000, 60000, 50):
        ports = range(first, first + count)
        with contextlib.ExitStack() as held:
            try:
                for port in ports:
                    held.enter_context(contextlib.closing(socket.socket())).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first, first + 1
    raise RuntimeError("no free ports")


def _variables(process: Path) -> list[str]:
    try:
        return process.joinpath("environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _kill(processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
