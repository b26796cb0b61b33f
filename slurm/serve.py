"""A server of the teacher on the nodes of a job: started, registered in the run folder while it answers, and ended with the job.

Run by srun on every node. The address of the first one stands in slurm/servers/JOB.url, whose age is its heartbeat: it is renewed
while the server answers. A server that answers no more is ended, and its job goes back into the queue.
"""

import argparse
import contextlib
import http.client
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from configs.errors import Interrupted, Stopped, TracestillError
from configs.launch import die_with_parent
from configs.progress import Count, own_beat, write_beat
from data.store import RunFolder, write_bytes
from slurm.attempts import JobFolder, append
from slurm.client import call
from slurm.servers import is_asked

BEAT_S = 5.0
LOOK_S = 60.0
ANSWER_S = 30.0
SILENT_BEATS = 6
END_S = 30.0


def main(words: Sequence[str]) -> int:
    """What the batch script says. Returns the exit code: 75 when it was asked to stop, 1 when the server ended or fell silent."""
    options = _options().parse_args(words)
    node, job = int(os.environ.get("SLURM_NODEID", "0")), int(os.environ["SLURM_JOB_ID"])
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    names = call("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    places = {
        "address": address_of(names[node]), "port": str(free_port(job)), "head": address_of(names[0]),
        "peer_port": str(20000 + (job + 101 * restart) % 12000), "node": str(node),
        "first_rank": str(node * options.ranks_per_node),
    }  # fmt: skip
    chosen = options.command if node == 0 else options.others
    command = [_filled(word, places) for word in chosen]
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, _stop)
    url = f"http://{places['address']}:{places['port']}/v1"
    folder = JobFolder.of(RunFolder(options.run_dir))
    if node == 0:
        for stale in (folder.server(job), folder.idle(job)):  # of an attempt that could not sign off
            stale.unlink(missing_ok=True)
    print(f"serve: {' '.join(command)}", flush=True)
    process = subprocess.Popen(command, preexec_fn=die_with_parent)
    try:
        return _keep(process, RunFolder(options.run_dir), job, url if node == 0 else "", options.start, options.idle)
    except Stopped:
        print("serve: asked to stop; requests in flight are asked again elsewhere", flush=True)
        return Interrupted.exit_code
    finally:
        if node == 0:
            folder.server(job).unlink(missing_ok=True)
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _keep(process: "subprocess.Popen[bytes]", run: RunFolder, job: int, url: str, start_s: float, idle_s: float) -> int:
    """Until the server ends, answers no more, or is not asked any more. url: empty on nodes that only help."""
    folder = JobFolder.of(run)
    started, silent, registered = time.monotonic(), 0, False
    askers = _Askers(run, min(LOOK_S, idle_s / 2)) if url else None
    while process.poll() is None:
        time.sleep(BEAT_S)
        if folder.idle(job).exists():
            print("serve: no job of the run asks any more", flush=True)
            return 0
        if askers is None:
            continue
        if time.monotonic() - askers.newest > idle_s:
            with contextlib.suppress(OSError):  # a full disk: it is tried again at the next beat
                write_bytes(folder.idle(job), b"")
            continue
        if answers(url):
            silent = 0
            try:
                if not registered:
                    append(folder.served, {"job_id": job, "url": url, "at": time.time(), "seconds": time.monotonic() - started})
                    registered = True
                write_bytes(folder.server(job), f"{url}\n".encode())
            except OSError as error:  # a full disk: those who know the address go on asking
                print(f"serve: {folder.server(job)}: {error.strerror}", file=sys.stderr, flush=True)
            _beat(url, time.monotonic() - started)
        elif registered or time.monotonic() - started > start_s:
            silent += 1
            if silent >= SILENT_BEATS or not registered:
                print(f"error: {url} does not answer", file=sys.stderr, flush=True)
                return TracestillError.exit_code
        else:
            _beat("loading", time.monotonic() - started)
    print(f"error: the server ended by itself with exit code {process.returncode}", file=sys.stderr, flush=True)
    return TracestillError.exit_code


class _Askers:
    """Jobs that ask the servers, looked for beside the heartbeat: a controller that hangs keeps a look waiting for a minute, in
    which the server would seem silent. newest: when there was one, by the monotonic clock."""

    def __init__(self, run: RunFolder, every_s: float) -> None:
        self.run, self.every_s, self.newest = run, every_s, time.monotonic()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            time.sleep(self.every_s)
            if is_asked(self.run):
                self.newest = time.monotonic()


def _beat(note: str, seconds: float) -> None:
    """For the watchdog: this program watches its server by itself, and only has to be alive."""
    if (path := own_beat()) is not None:
        write_beat(path, "serve", Count(int(seconds), 0, note, unit="seconds"))


def answers(url: str) -> bool:
    """Whether somebody says anything but a server's error to GET /health, which vLLM and SGLang answer by whether their engine
    lives; transformers has no such page, and says so."""
    host, _, port = url.removeprefix("http://").removesuffix("/v1").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=ANSWER_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def address_of(node: str) -> str:
    """Where Slurm itself reaches the node: names of nodes need not resolve."""
    for word in call("scontrol", "--oneliner", "show", "node", node).split():
        if word.startswith("NodeAddr="):
            return word.removeprefix("NodeAddr=")
    return node


def free_port(job: int) -> int:
    """One that nobody has. Two jobs may share a node and start at once, so each looks in a range of its own: a port between being
    found free and being listened on is nobody's, and what answers there later would be the other's server."""
    first = 42000 + 16 * job % 20000
    for port in range(first, first + 16):
        with socket.socket() as tried:
            try:
                tried.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {first} to {first + 15}")


def _filled(word: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        word = word.replace(f"{{{name}}}", value)
    return word


def _stop(number: int, _: FrameType | None) -> None:
    raise Stopped(signal.Signals(number).name)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m slurm.serve", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--start", type=float, required=True, help="seconds until the first answer")
    parser.add_argument("--idle", type=float, default=math.inf, help="seconds without a job that asks")
    parser.add_argument("--ranks-per-node", type=int, default=1, help="data-parallel ranks of a node")
    parser.add_argument("--others", type=shlex.split, default=[], help="the command of the job's other nodes")
    parser.add_argument("command", nargs="+")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
