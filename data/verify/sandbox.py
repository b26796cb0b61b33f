"""Runs a program that a model wrote, where it can do no harm, and leaves nothing behind.

Who confines it is data/verify/confinement.py; this module bounds what only a parent can: wall time, output, and what all
processes inside hold together. The first process inside is the init of its process namespace: when it is gone, so is
everything it ever started. It dies with bubblewrap, and bubblewrap with the thread that called `run`, so that a verifier
worker that is killed takes its sandbox along; in the first milliseconds, before anything was run, what is left is asleep and
`sweep` ends it. Without bubblewrap nothing is run, ever.

What it costs beyond the same program run bare by the same python: tests/bench/sandbox.py. Most of it is bubblewrap's mounts.
"""

import contextlib
import functools
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Literal, NamedTuple

from data.verify.confinement import NOBODY, PYTHON, READY, SIGN, Limits, SandboxUnavailable, command, system_call_filter

Status = Literal["ok", "failed", "timed_out", "killed", "refused"]
TICK_S = 0.05
"""How often memory and files are looked at: 0.1 ms for each process inside. Between two looks a program takes about 100 MB."""
FILES = 20_000
"""In /tmp, and again in /dev/shm. An empty file takes nothing of their size and a kilobyte of the kernel's memory."""
_GONE_S = 10.0
_KILLED = 128 + signal.SIGKILL
_PF_EXITING, _PF_SIGNALED = 0x4, 0x400
"""Of the flags in /proc/PID/stat (linux/sched.h)."""
_PART = 1 << 16


class Program(NamedTuple):
    """Python source, and what it reads on standard input."""

    source: str
    stdin: str = ""


class Outcome(NamedTuple):
    """ok: exit code 0. failed: another one. timed_out: wall_s was over. killed: a limit ended it, `reason` is `memory`, `files`,
    `cpu` or `output`; or somebody did, `reason` is `signal`: itself, or the machine for want of memory. refused: nothing was run,
    `reason` says why. exit_code is 128 + signal where a signal ended it.

    stdout, stderr: together at most limits.output_bytes, the beginning of them.
    """

    status: Status
    reason: str
    exit_code: int
    stdout: bytes
    stderr: bytes


def run(program: str, *, stdin: str = "", limits: Limits | None = None, python: str = PYTHON) -> Outcome:
    """What became of `program`; nothing of it is left when this returns, neither a process nor a file.

    What an outcome says of a program is what the program wants it to say: an exit code, or a word in the output, proves
    nothing. data/verify/code.py compares values outside.
    Raises SandboxUnavailable where the tools are missing; where they fail, the outcome is `refused`.
    """
    limits = limits or Limits()
    deadline = time.monotonic() + limits.wall_s
    with _started(Program(program, stdin), limits, python) as sandbox:
        return _supervise([sandbox], limits, deadline)


def run_beside(leader: Program, follower: Program, *, limits: Limits | None = None, python: str = PYTHON) -> Outcome:
    """The leader's outcome; the follower ends with it. Each has a sandbox and the limits of its own. All that they share is two
    pipes: PEER_IN and PEER_OUT in the environment are the descriptors on which one hears the other and speaks to it."""
    limits = limits or Limits()
    deadline = time.monotonic() + limits.wall_s
    with contextlib.ExitStack() as stack:
        pipes = [*os.pipe(), *os.pipe()]
        try:
            heard, said, asked, asks = pipes
            one = stack.enter_context(_started(leader, limits, python, peer=(heard, asks)))
            other = stack.enter_context(_started(follower, limits, python, peer=(asked, said)))
        finally:
            for descriptor in pipes:  # held here, neither would hear that the other is gone
                os.close(descriptor)
        return _supervise([one, other], limits, deadline)


# --- is there a sandbox at all -----------------------------------------------------------------------------------

_PROBE = """
import os, re, socket
status = dict(re.findall(r"(\\w+):\\t(\\S*)", open("/proc/self/status").read()))
def denied(attempt, *arguments):
    try: attempt(*arguments)
    except OSError: return 1
    return 0
print(os.getuid(), int(status["CapEff"], 16), status["NoNewPrivs"], status["Seccomp"], denied(open, "/usr/x", "w"),
      denied(open, "/x", "w"), denied(os.listdir, "/root"), denied(socket.socket, 40), len(open("/proc/net/dev").readlines()) - 2,
      sum(name.isdigit() for name in os.listdir("/proc")))
"""
_HELD = f"{NOBODY} 0 1 2 1 1 1 1 1 2"


@functools.cache
def require(python: str = PYTHON) -> None:
    """Returns when a program that was run just now was confined: no capabilities, no host files, no network, no other processes.
    Call it once, before a build begins (0.1 s).

    Raises SandboxUnavailable with what is missing and what to do about it.
    """
    sweep()
    outcome = run(_PROBE, python=python, limits=Limits(wall_s=60.0))
    said = outcome.stdout.decode(errors="replace").strip()
    if outcome.status == "refused":
        raise SandboxUnavailable(
            f"sandbox: bubblewrap cannot confine a program here ({outcome.reason}); expected user namespaces: allow them "
            "(sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a container "
            "--security-opt seccomp=unconfined) or leave out prompts with verifier `code`"
        )
    if outcome.status != "ok" or said != _HELD:
        raise SandboxUnavailable(
            f"sandbox: the probe ended as {outcome.status} {outcome.reason} and found {said[:80]!r}, expected {_HELD!r}: this "
            "machine does not confine; leave out prompts with verifier `code`"
        )


def sweep() -> int:
    """Ends the sandboxes whose bubblewrap is gone or about to go, and returns how many. Call it when killed workers have ended.

    bubblewrap's child sleeps until it is told that its ids are mapped, and only later asks to die with its parent. Of 300
    callers killed within 60 ms of the start, 59 left such a sleeper, which has run nothing and would sleep for ever.
    """
    swept = 0
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            if SIGN.encode() not in words:
                continue
            status = _status(entry)
            is_init = len(status["NSpid"].split()) > 1 and status["NSpid"].split()[-1] == "1"
            if is_init and not _is_monitor(Path("/proc", status["PPid"]), words):
                os.kill(int(entry.name), signal.SIGKILL)
                swept += 1
    return swept


def _status(process: Path) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)


def _is_monitor(process: Path, words: bytes) -> bool:
    """Whether this is the bubblewrap that was started with these words, and goes on. Its caller's end has sent it a SIGKILL
    before anybody could wait for that end, but when it goes is the scheduler's to say."""
    with contextlib.suppress(OSError):
        said, status = (process / "cmdline").read_bytes(), _status(process)
        flags = int((process / "stat").read_text().rpartition(")")[2].split()[6])
        pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
        return said == words and not (pending >> (signal.SIGKILL - 1) & 1 or flags & (_PF_EXITING | _PF_SIGNALED))
    return False


# --- one sandbox -------------------------------------------------------------------------------------------------


class _Sandbox:
    """bubblewrap outside (`monitor`), and what has been heard of it. init: the pid and a pidfd of the first process inside."""

    def __init__(self, monitor: subprocess.Popen[bytes], info: socket.socket, program: Program, output_bytes: int) -> None:
        source, stdin = (text.encode(errors="surrogatepass") for text in program)
        self.unsaid = memoryview(len(source).to_bytes(8, "big") + source + stdin)
        self.monitor, self.info, self.room = monitor, info, output_bytes + len(READY)
        self.stdout, self.stderr, self.told = bytearray(), bytearray(), bytearray()
        self.init: tuple[int, int] | None = None
        self.introduced = self.ended = False

    @property
    def ready(self) -> bool:
        return self.stdout.startswith(READY)

    @property
    def overflowed(self) -> bool:
        return len(self.stdout) + len(self.stderr) > self.room

    def watch(self, selector: selectors.BaseSelector, end: int) -> None:
        """end: a pidfd of the monitor, which ends with the program itself, whoever else is left inside."""
        for stream in (self.monitor.stdout, self.monitor.stderr, self.monitor.stdin, self.info):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
        selector.register(end, selectors.EVENT_READ, self._end)
        selector.register(self.info, selectors.EVENT_READ, partial(self._learn, selector))
        for stream, heard in ((self.monitor.stdout, self.stdout), (self.monitor.stderr, self.stderr)):
            assert stream is not None
            selector.register(stream, selectors.EVENT_READ, partial(self._hear, selector, stream, heard))

    def _end(self) -> None:
        self.ended = True

    def _learn(self, selector: selectors.BaseSelector) -> None:
        if self._told():
            selector.unregister(self.info)

    def _told(self) -> bool:
        """True at the end of what bubblewrap says of itself: {"child-pid": N, ...}, or nothing where it failed."""
        part = self.info.recv(4096)
        self.told += part
        self.introduced = not part
        if not part and self.told:
            pid = int(json.loads(self.told)["child-pid"])
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile, and everyone with it
                self.init = pid, os.pidfd_open(pid)
        return self.introduced

    def _hear(self, selector: selectors.BaseSelector, stream: IO[bytes], heard: bytearray) -> None:
        was_ready, part = self.ready, os.read(stream.fileno(), _PART)
        heard += part
        if not part:
            selector.unregister(stream)
        if self.ready and not was_ready:
            assert self.monitor.stdin is not None
            selector.register(self.monitor.stdin, selectors.EVENT_WRITE, partial(self._say, selector))

    def _say(self, selector: selectors.BaseSelector) -> None:
        assert self.monitor.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a program need not listen to the end
            self.unsaid = self.unsaid[os.write(self.monitor.stdin.fileno(), self.unsaid[:_PART]) :]
            if self.unsaid:
                return
        selector.unregister(self.monitor.stdin)
        self.monitor.stdin.close()

    def end(self) -> None:
        """Returns when nobody is left inside; what they had said is heard to the end, within the limit."""
        if not self.introduced:
            # Its child sleeps until bubblewrap has mapped its ids. Killed before that, bubblewrap leaves it asleep for ever.
            self.info.settimeout(_GONE_S)
            with contextlib.suppress(TimeoutError):
                while not self._told():
                    pass
        if self.init is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.init[1], signal.SIGKILL)
            select.select([self.init[1]], [], [], _GONE_S)
            os.close(self.init[1])
            self.init = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.monitor.wait(_GONE_S)  # it buries the init; killed first, it would leave that to the machine's
        self.monitor.kill()
        self.monitor.wait()
        for stream, heard in ((self.monitor.stdout, self.stdout), (self.monitor.stderr, self.stderr)):
            assert stream is not None
            with contextlib.suppress(BlockingIOError):
                while not self.overflowed and (part := os.read(stream.fileno(), _PART)):
                    heard += part


@contextlib.contextmanager
def _started(program: Program, limits: Limits, python: str, peer: Sequence[int] = ()) -> Iterator[_Sandbox]:
    """A sandbox whose interpreter waits for the program. On leaving nothing of it is left."""
    environment = {name: str(number) for name, number in zip(("PEER_IN", "PEER_OUT"), peer, strict=False)}
    info, theirs = socket.socketpair()
    with info, theirs, os.fdopen(os.memfd_create("filter"), "w+b") as calls:
        calls.write(system_call_filter())
        calls.seek(0)
        monitor = subprocess.Popen(
            command(limits, python, filter_fd=calls.fileno(), info_fd=theirs.fileno(), environment=environment),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, cwd="/",
            env={},  # the init's environment is the program's to read, whatever --clearenv does to the program's own
            pass_fds=(calls.fileno(), theirs.fileno(), *peer),
        )  # fmt: skip
        theirs.close()
        sandbox = _Sandbox(monitor, info, program, limits.output_bytes)
        with monitor:
            try:
                yield sandbox
            finally:
                sandbox.end()


def _supervise(sandboxes: Sequence[_Sandbox], limits: Limits, deadline: float) -> Outcome:
    """Follows them until the first of them has ended or a limit is met, and ends them all."""
    leader, stopped = sandboxes[0], ""
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for sandbox in sandboxes:
            end = os.pidfd_open(sandbox.monitor.pid)
            stack.callback(os.close, end)
            sandbox.watch(selector, end)
        look = time.monotonic() + TICK_S
        while not leader.ended and not stopped:
            for key, _ in selector.select(max(0.0, min(look, deadline) - time.monotonic())):
                key.data()
            now = time.monotonic()
            if now > deadline and not leader.ended:
                stopped = "wall"
            elif any(sandbox.overflowed for sandbox in sandboxes):
                stopped = "output"
            elif now > look:
                stopped = next(filter(None, (_excess(sandbox, limits) for sandbox in sandboxes)), "")
                look = time.monotonic() + TICK_S
        ended = [sandbox for sandbox in sandboxes if sandbox.ended]
    for sandbox in sandboxes:
        sandbox.end()
    if not stopped and leader.overflowed:
        stopped = "output"
    if not stopped and any(sandbox.monitor.returncode == _KILLED for sandbox in ended if sandbox.ready):
        stopped = "signal"
    return _outcome(leader, next((one for one in sandboxes if not one.ready), None), stopped, limits.output_bytes)


def _outcome(leader: _Sandbox, unready: _Sandbox | None, stopped: str, output_bytes: int) -> Outcome:
    code, error = leader.monitor.returncode, bytes(leader.stderr)
    said = bytes(leader.stdout[len(READY) :])[:output_bytes], error[: max(0, output_bytes - len(leader.stdout))]
    if stopped == "wall":
        return Outcome("timed_out", "", code, *said)
    if stopped:
        return Outcome("killed", stopped, code, *said)
    if unready is not None:
        words = unready.stderr.decode(errors="replace").strip().splitlines()
        return Outcome("refused", words[-1] if words else f"bubblewrap ended with {unready.monitor.returncode}", code, b"", b"")
    if code == 128 + signal.SIGXCPU:
        return Outcome("killed", "cpu", code, *said)
    if code == 1 and error.rstrip().endswith(b"MemoryError"):
        return Outcome("killed", "memory", code, *said)
    return Outcome("failed" if code else "ok", "", code, *said)


# --- what all processes hold together ----------------------------------------------------------------------------


def _excess(sandbox: _Sandbox, limits: Limits) -> str:
    """`memory` or `files` where the sandbox holds more of it than it may, else "". What has ended meanwhile holds nothing."""
    if sandbox.init is None or not sandbox.ready:  # before it is ready, the init's root is still the host's
        return ""
    pid = sandbox.init[0]
    with contextlib.suppress(OSError):
        processes = list(_family(pid))
        # The resident size counts what forked processes share once for each, and is read in 10 us; the proportional one in 1 ms.
        if sum(map(_resident_bytes, processes)) > limits.memory_bytes < sum(map(_proportional_bytes, processes)):
            return "memory"
        for folder in ("tmp", "dev/shm"):
            found = os.statvfs(f"/proc/{pid}/root/{folder}")
            if found.f_files - found.f_ffree > FILES:
                return "files"
    return ""


def _family(pid: int) -> Iterator[int]:
    """pid and all its descendants. Orphans inside are the init's children, so none is missed."""
    yield pid
    for thread in Path("/proc", str(pid), "task").iterdir():
        with contextlib.suppress(OSError):
            for child in (thread / "children").read_text().split():
                yield from _family(int(child))


def _resident_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc", str(pid), "statm").read_text().split()[1])
    return 0


def _proportional_bytes(pid: int) -> int:
    """Resident, but what n processes share counts 1/n; resident where the kernel does not tell."""
    with contextlib.suppress(OSError, IndexError):
        return 1024 * int(Path("/proc", str(pid), "smaps_rollup").read_text().partition("\nPss:")[2].split()[0])
    return _resident_bytes(pid)
