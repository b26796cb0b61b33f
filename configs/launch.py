"""Starts a stage's ranks with torchrun and stays with them: no rank outlives its parent, no lock outlives a run."""

import atexit
import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from configs.errors import Interrupted, Refused, TracestillError, UnusableInput

PR_SET_PDEATHSIG = 1
POLL_S = 0.2
END_S = 35  # torchrun gives its ranks 30 s after SIGTERM: time to drain
RENDEZVOUS_S = 600  # nodes of one job start their launchers minutes apart
MESSAGE_ROOM = 1 << 20  # bytes of disk below which a rank's last words may not have reached its log


class StageFailed(TracestillError):
    """A rank ended with an error; the log says why."""


def die_with_parent() -> None:
    """The kernel ends this process when its parent dies, even by SIGKILL: a rank that nobody waits for would go on
    writing beside the run that replaced it."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _as_launcher() -> None:
    """torchrun has no handler for SIGUSR2, which a scheduler sends to every process of a step: it would die of it, and its
    ranks with it. Ranks set their own."""
    die_with_parent()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def end_rank(code: int) -> NoReturn:
    """Ends this rank as multiprocessing ends its children: exit handlers run and streams are flushed, but the interpreter is
    not finalised: now and then a rank that has done all its work is aborted meanwhile, by which thread is not known (`terminate
    called without an active exception`; 3 of some 60 launches of two gloo ranks, torch 2.13, Python 3.11)."""
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the work is done; torchrun ends a rank that hangs here
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk, a closed stream: the exit code still tells
            stream.flush()
    os._exit(code)


def rank_environment(extensions: Path, nodes: "Nodes | None" = None) -> dict[str, str]:
    """The environment of a rank. Nothing is compiled today (DeepSpeed's shared-memory collective is turned off in both
    modules that import it); should a release compile something after all, a private TORCH_EXTENSIONS_DIR keeps the
    lock of a killed build from making the ranks of every later run wait for ever without a word."""
    environment = os.environ | {
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    environment["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"  # ninja lies beside the interpreter
    )
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("DS_ACCELERATOR", "cpu" if not Path("/proc/driver/nvidia").exists() else "cuda")
    if environment["DS_ACCELERATOR"] == "cpu":
        environment.setdefault("OMP_NUM_THREADS", "1")  # two ranks on two cores; more threads only fight
        if nodes is None or _is_loopback(nodes):
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


class Nodes(NamedTuple):
    """A launch over several nodes, as this node sees it. rank: 0 for the node that owns the stage and seals it.
    rendezvous: HOST:PORT on that node, where torchrun meets. launch_id: the same on every node, another for every job."""

    number: int
    rank: int
    rendezvous: str
    launch_id: str


def read_nodes(wanted: int, environment: Mapping[str, str], setting: str = "teacher.hardware.nodes") -> Nodes | None:
    """How this node joins a launch over the `wanted` nodes of `setting`; None when there is only one.

    Raises:
        UnusableInput: the environment names no rendezvous, another number of nodes, or no place for this one.
    """
    if wanted == 1:
        return None
    ranks = f"0..{wanted - 1}"
    what = f"{setting} {wanted}"
    rendezvous = environment.get("TRACESTILL_RENDEZVOUS", "")
    if not re.fullmatch(r"[^\s:]+:\d+", rendezvous):
        raise UnusableInput(
            f"{what}: no rendezvous in the environment; use tracestill submit, or give the same command on every node with "
            f"TRACESTILL_NODES={wanted}, TRACESTILL_RENDEZVOUS=HOST:PORT (on the first) and TRACESTILL_NODE_RANK ({ranks})"
        )
    if (number := environment.get("TRACESTILL_NODES", "")) != str(wanted):
        raise UnusableInput(f"{what}: the environment says TRACESTILL_NODES={number or '(nothing)'}; expected {wanted}")
    rank = environment.get("TRACESTILL_NODE_RANK", environment.get("SLURM_NODEID", ""))
    if rank not in {str(index) for index in range(wanted)}:
        raise UnusableInput(f"{what}: neither TRACESTILL_NODE_RANK nor SLURM_NODEID says which node this is; expected {ranks}")
    return Nodes(wanted, int(rank), rendezvous, environment.get("SLURM_JOB_ID", "tracestill"))


def run_ranks(
    arguments: Sequence[str], *, processes: int, extensions: Path, log: Path, poll: Callable[[], None], nodes: Nodes | None = None
) -> None:
    """Runs `tracestill ARGUMENTS` on `processes` ranks of this node and returns when all ended well, those of the other
    nodes included. `poll` is called a few times a second meanwhile. Output goes to `log`.

    Raises:
        TracestillError: what a rank reported of itself, in its own kind (unusable input, refused, interrupted).
        StageFailed: any other exit; the message names the log and its first exception.
    """
    command = [sys.executable, "-m", "torch.distributed.run", *_meeting(nodes), f"--nproc-per-node={processes}",
               "-m", "tracestill", *arguments]  # fmt: skip
    _run(command, rank_environment(extensions, nodes), log, poll)


def _meeting(nodes: Nodes | None) -> list[str]:
    """torchrun's words for where the agents meet. With c10d the agents themselves decide which node's ranks come first;
    the store is told who serves it, because a guess by host name fails where names resolve to several addresses."""
    if nodes is None:
        return ["--standalone", "--local-addr=127.0.0.1"]
    settings = f"is_host={int(nodes.rank == 0)},read_timeout={RENDEZVOUS_S},join_timeout={RENDEZVOUS_S}"
    address = ["--local-addr=127.0.0.1"] if _is_loopback(nodes) else []
    return [f"--nnodes={nodes.number}", "--rdzv-backend=c10d", f"--rdzv-endpoint={nodes.rendezvous}",
            f"--rdzv-id={nodes.launch_id}", f"--rdzv-conf={settings}", *address]  # fmt: skip


def _is_loopback(nodes: Nodes) -> bool:
    return nodes.rendezvous.split(":")[0] in ("localhost", "127.0.0.1")


def _run(command: list[str], environment: dict[str, str], log: Path, poll: Callable[[], None]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    repository = str(Path(__file__).parent.parent)
    environment = environment | {"PYTHONPATH": os.pathsep.join(filter(None, [repository, environment.get("PYTHONPATH", "")]))}
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, preexec_fn=_as_launcher)
        try:
            while process.poll() is None:
                poll()
                time.sleep(POLL_S)
        except BaseException:
            process.terminate()
            try:
                process.wait(timeout=END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    if process.returncode != 0:
        raise _failure(log, start, process.returncode)


_MARK = re.compile(r"^error\[(\d+)\]: (.*)$")
_RANK = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)")
_SIGNAL = re.compile(r"Signal \d+ \((SIG\w+)\) received by PID \d+|exitcode\s*: (-\d+ \(pid: \d+\))")
# Not 75: torchrun ends the other ranks with SIGTERM when one has failed, and they call that an interruption; so it is one
# only when nobody says anything else. A launcher that was itself asked to stop never comes here.
_KINDS: dict[int, type[TracestillError]] = {kind.exit_code: kind for kind in (UnusableInput, Refused)}


def rank_error_line(error: TracestillError) -> str:
    """How a rank tells its launcher what went wrong: torchrun itself turns every exit code into 1."""
    return f"error[{error.exit_code}]: {error}"


def _failure(log: Path, start: int, code: int) -> TracestillError:
    """The error a rank reported of itself, else the signal that ended one, else the first exception in its part of the log."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    marks = [found for line in lines if (found := _MARK.match(line)) is not None]
    for mark in marks:
        if (kind := _KINDS.get(int(mark[1]))) is not None:
            return kind(mark[2])
    raised = [line.strip()[-300:] for line in lines if "Error:" in line and "ChildFailedError" not in line]
    ended = list(_ended_by_signal(lines))
    reported = [mark[2] for mark in marks if int(mark[1]) != Interrupted.exit_code]
    if marks and not (reported or ended or raised):  # somebody asked one rank, and all have drained
        return Interrupted(marks[0][2])
    if not (reported or ended or raised) and (free := shutil.disk_usage(log.parent).free) < MESSAGE_ROOM:
        return UnusableInput(
            f"{log.parent}: the disk is full ({free} bytes left), so that the ranks could not say why they ended; make room, "
            "then give the same command"
        )
    why = next(iter([*reported, *ended, *raised]), "no message")
    return StageFailed(f"ranks ended with exit code {code}: {why}; see {log}; the same command continues from what is committed")


def _ended_by_signal(lines: Sequence[str]) -> Iterator[str]:
    """From torchrun's summary, which names a rank, then its exit code or the signal that ended it. SIGTERM is torchrun's own."""
    rank = "a rank"
    for line in lines:
        if (found := _RANK.search(line)) is not None:
            rank = f"rank {found[1]}"
        elif (found := _SIGNAL.search(line)) is not None:
            name = found[1] or found[2]
            if "SIGTERM" not in name and not name.startswith("-15"):
                yield f"{rank} was ended by {name}"
