"""Programs that mean harm, run for real. Each says what it reached; whether the host was touched is looked at from outside."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UnusableInput
from data.verify import sandbox
from data.verify.confinement import NOBODY, Limits, SandboxUnavailable, system_call_filter
from data.verify.sandbox import Outcome

Run = Callable[..., Outcome]
REPOSITORY = Path(__file__).parents[2]
PATIENT = Limits(wall_s=120.0)
"""A busy machine is no reason to fail: with ten processes on each core a start of 60 ms takes seconds."""

# `reached(name, attempt)` prints the name of whatever did not fail.
ATTACKER = """
import ctypes, os, signal, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    if libc.syscall(*arguments) < 0: raise OSError(ctypes.get_errno(), "denied")
def reached(name, attempt, *arguments):
    try: attempt(*arguments)
    except (NameError, TypeError): raise
    except Exception: return
    print("REACHED", name, flush=True)
"""


@pytest.fixture
def run() -> Run:
    try:
        sandbox.require()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    return partial(sandbox.run, limits=PATIENT)


@pytest.fixture
def attack(run: Run) -> Run:
    def attacked(program: str, **options: object) -> Outcome:
        outcome = run(ATTACKER + program, **options)
        assert b"REACHED" not in outcome.stdout, outcome.stdout.decode()
        # an attack that broke down on the way has shown nothing
        assert b"Traceback" not in outcome.stderr or outcome.status == "killed", outcome.stderr.decode()
        return outcome

    return attacked


def named(mark: str) -> list[int]:
    """Host processes with this name: a program inside names itself, and its children are named like it."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "comm").read_text().strip() == mark:
                found.append(int(entry.name))
    return found


def until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


# --- what a run says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "stdin", "expected"),
    [
        ("print(input()[::-1])", "abc\n", ("ok", "", 0, b"cba\n")),
        ("import sys; print(sys.argv, __name__)", "", ("ok", "", 0, b"['program.py'] __main__\n")),
        ("print('ü😀')", "", ("ok", "", 0, "ü😀\n".encode())),
        ("pass", "x" * 3_000_000, ("ok", "", 0, b"")),
        ("import sys; print(len(sys.stdin.read()))", "x" * 3_000_000, ("ok", "", 0, b"3000000\n")),
        ("print(1); exit(7)", "", ("failed", "", 7, b"1\n")),
        ("print(1); raise KeyError(2)", "", ("failed", "", 1, b"1\n")),
        ("def (", "", ("failed", "", 1, b"")),
        ("import os; os.kill(os.getpid(), 11)", "", ("failed", "", 139, b"")),
        ("import os; os.kill(os.getpid(), 9)", "", ("killed", "signal", 137, b"")),
        ("bytearray(2 << 30)", "", ("killed", "memory", 1, b"")),
    ],
)
def test_an_outcome_says_how_the_program_ended(run: Run, program: str, stdin: str, expected: tuple) -> None:
    outcome = run(program, stdin=stdin)
    assert (outcome.status, outcome.reason, outcome.exit_code, outcome.stdout) == expected


def test_the_traceback_of_a_program_names_its_line_and_nothing_of_the_host(run: Run) -> None:
    stderr = run("x = 1\nx / 0").stderr.decode()
    assert 'File "program.py", line 2' in stderr
    assert str(REPOSITORY) not in stderr


def test_the_deadline_is_wall_time_and_sleeping_does_not_help(run: Run) -> None:
    started = time.monotonic()
    outcome = run("import time\nprint('begun', flush=True)\ntime.sleep(60)", limits=Limits(wall_s=1.5))
    assert outcome.status == "timed_out"
    assert outcome.stdout in (b"begun\n", b"")
    assert time.monotonic() - started < 20


def test_sandboxes_side_by_side_do_not_meet(run: Run) -> None:
    program = (
        "import os\nopen('/tmp/x', 'x').write('1')\n[os.fork() or os._exit(0) for _ in range(20)]\nprint(os.listdir('/tmp'))"
    )
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda _: run(program, limits=Limits(processes=24, wall_s=120.0)), range(4)))
    assert [outcome.stdout for outcome in outcomes] == [b"['x']\n"] * 4


def test_the_next_program_finds_nothing_of_the_last_one_and_no_descriptor_is_left_open(run: Run) -> None:
    run("open('/tmp/left', 'w'); open('/dev/shm/left', 'w')")
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert run("import os; print(os.listdir('/tmp'), os.listdir('/dev/shm'))").stdout == b"[] []\n"
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- attacks -----------------------------------------------------------------------------------------------------


def test_a_fork_bomb_stays_below_its_limit_and_leaves_no_process(attack: Run) -> None:
    bomb = """
open("/proc/self/comm", "w").write("tstill-bomb")
for _ in range(200):
    try: child = os.fork()
    except OSError: break
    if child == 0: time.sleep(60)
print(sum(name.isdigit() for name in os.listdir("/proc")))
"""
    outcome = attack(bomb, limits=Limits(processes=16, wall_s=120.0))
    assert 4 <= int(outcome.stdout) <= 17  # bubblewrap's init may be counted outside
    assert named("tstill-bomb") == []
    endless = attack(bomb + "while True:\n  try: os.fork()\n  except OSError: pass", limits=Limits(processes=16, wall_s=1.5))
    assert endless.status == "timed_out"
    assert named("tstill-bomb") == []


def test_no_file_of_the_host_is_read(attack: Run, tmp_path: Path) -> None:
    secret = tmp_path / "expected.json"
    secret.write_text("the expected answers")
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        if folder != Path("/tmp"):
            folder.chmod(0o755)
    secret.chmod(0o644)
    attack(f"""
paths = ["/etc/shadow", "/etc/passwd", "/etc/hostname", {str(secret)!r}, {str(Path(__file__))!r}, "/proc/kcore", "/boot", "/var"]
for path in paths + ["/root", "/home", {str(REPOSITORY)!r}, os.path.expanduser("~/.ssh"), "/sys", "/run", "/mnt"]:
    for base in ("", "/proc/1/root", "/proc/self/root", "/proc/1/cwd/..", "/../.."):
        reached(base + path, open, base + path)
        reached(base + path, os.listdir, base + path)
""")


def test_nothing_of_the_host_is_written(attack: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    before = sorted(os.listdir("/")), sorted(os.listdir("/dev")), sorted(os.listdir("/usr/lib"))  # noqa: PTH208
    attack(f"""
for folder in ("/", "/usr", "/usr/lib", "/usr/local", "/etc", "/dev", "/proc", "/proc/sys", "/var/tmp", {str(tmp_path)!r}):
    reached(folder, open, folder + "/tstill-was-here", "w")
    reached(folder, os.mkdir, folder + "/tstill-folder")
reached("remove", os.remove, "/usr/bin/env")
reached("chmod", os.chmod, "/usr/bin/env", 0o777)
reached("core pattern", lambda: open("/proc/sys/kernel/core_pattern", "w").write("|/bin/sh"))
reached("sysrq", lambda: open("/proc/sysrq-trigger", "w").write("c"))
open("/tmp/tstill-was-here", "w").write("mine")
""")
    assert (sorted(os.listdir("/")), sorted(os.listdir("/dev")), sorted(os.listdir("/usr/lib"))) == before  # noqa: PTH208
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    assert not Path("/tmp/tstill-was-here").exists()


@pytest.fixture
def listeners() -> Iterator[tuple[int, str, list[object]]]:
    """A TCP port on the loopback, an abstract unix socket, and who has come to either."""
    came: list[object] = []
    name = f"tstill-{os.getpid()}"
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        unix.bind(f"\0{name}")
        for one in (tcp, unix):
            one.listen()
            threading.Thread(target=lambda one=one: came.append(_accepted(one)), daemon=True).start()
        yield tcp.getsockname()[1], name, came
        for one in (tcp, unix):
            one.shutdown(socket.SHUT_RDWR)


def _accepted(listener: socket.socket) -> object:
    with contextlib.suppress(OSError):
        return listener.accept()
    return None


def test_no_network_is_reached_neither_outside_nor_the_hosts_own(attack: Run, listeners: tuple[int, str, list[object]]) -> None:
    port, name, came = listeners
    attack(f"""
def connect(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as one:
        one.settimeout(1)
        one.connect(address)
        one.send(b"hello")
for address in (("127.0.0.1", {port}), ("1.1.1.1", 53), ("169.254.169.254", 80), ("10.0.0.1", 22)):
    reached(f"tcp {{address}}", connect, socket.AF_INET, address)
for address in (("1.1.1.1", 53), ("255.255.255.255", 9)):
    reached(f"udp {{address}}", connect, socket.AF_INET, address, socket.SOCK_DGRAM)
reached("abstract unix socket", connect, socket.AF_UNIX, "\\0{name}")
reached("unix socket", connect, socket.AF_UNIX, "/run/systemd/private")
reached("hypervisor", connect, 40, (2, 1024))
for family in (16, 17, 38, 40):
    reached(f"family {{family}}", socket.socket, family, socket.SOCK_RAW if family == 17 else socket.SOCK_DGRAM)
""")
    assert came == []


def test_the_disk_is_bounded_whatever_it_is_filled_with(attack: Run) -> None:
    outcome = attack(
        """
written = 0
def fill(folder):
    global written
    for number in range(100):
        with open(f"{folder}/{number}", "wb", buffering=0) as file:
            for _ in range(100): written += file.write(bytes(1 << 20))
for folder in ("/tmp", "/dev/shm"):
    try: fill(folder)
    except OSError: pass
reached("large file", lambda: os.truncate("/tmp/0", 1 << 30))
print(written >> 20)
""",
        limits=Limits(disk_bytes=8 << 20, file_bytes=4 << 20, wall_s=120.0),
    )
    assert int(outcome.stdout) <= 16


def test_empty_files_are_counted_because_each_takes_memory_of_the_kernel(attack: Run) -> None:
    outcome = attack("number = 0\nwhile True:\n  open(f'/tmp/{number}', 'w').close(); number += 1", limits=PATIENT)
    assert (outcome.status, outcome.reason) == ("killed", "files")


def test_memory_is_bounded_for_one_process_for_all_and_for_what_belongs_to_none(attack: Run) -> None:
    limits = Limits(memory_bytes=128 << 20, wall_s=120.0)
    alone = attack("x = []\nwhile True: x.append(bytes(1 << 20))", limits=limits)
    assert (alone.status, alone.reason) == ("killed", "memory")
    together = attack(
        "for _ in range(4): os.fork()\nx = bytearray(64 << 20)\nx[::4096] = x[::4096]\ntime.sleep(50)", limits=limits
    )
    assert (together.status, together.reason) == ("killed", "memory")
    attack("""
reached("memfd", os.memfd_create, "x")
reached("shmget", call, 29 if os.uname().machine == "x86_64" else 194, 0, 1 << 20, 0o1600)
reached("msgget", call, 68 if os.uname().machine == "x86_64" else 186, 0, 0o1600)
reached("mq", lambda: open("/dev/mqueue/x", "w"))
""")


@pytest.mark.long
def test_processor_time_is_bounded_even_for_who_ignores_the_warning(attack: Run) -> None:
    limits = Limits(cpu_s=1, wall_s=600.0)
    assert attack("while True: pass", limits=limits)[:2] == ("killed", "cpu")
    stubborn = attack("signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", limits=limits)
    assert stubborn[:3] == ("killed", "signal", 128 + 9)


@pytest.mark.parametrize("descriptor", [1, 2])
def test_a_flood_of_output_is_cut_off(attack: Run, descriptor: int) -> None:
    flood = f"while True: os.write({descriptor}, b'x' * 65536)"
    outcome = attack(flood, limits=Limits(output_bytes=100_000, wall_s=120.0))
    assert (outcome.status, outcome.reason) == ("killed", "output")
    assert 90_000 < len(outcome.stdout) + len(outcome.stderr) <= 100_000


def test_output_of_exactly_the_limit_is_whole_and_one_byte_more_is_none_too_early(attack: Run) -> None:
    limits = Limits(output_bytes=1000, wall_s=120.0)
    assert attack("os.write(1, b'x' * 1000)", limits=limits)[:2] == ("ok", "")
    assert attack("os.write(1, b'x' * 1001)", limits=limits)[:2] == ("killed", "output")


def test_no_other_process_is_traced_or_read(attack: Run) -> None:
    attack("""
x86 = os.uname().machine == "x86_64"
child = os.fork() or time.sleep(60)
for pid in (1, child):
    reached(f"attach {pid}", call, 101 if x86 else 117, 16, pid, 0, 0)
    reached(f"seize {pid}", call, 101 if x86 else 117, 0x4206, pid, 0, 0)
    reached(f"readv {pid}", call, 310 if x86 else 270, pid, 0, 0, 0, 0, 0)
reached("init's memory", lambda: open("/proc/1/mem", "rb").read(1))
""")


def test_no_namespace_is_made_and_nothing_is_mounted_inside(attack: Run) -> None:
    attack("""
import subprocess
x86 = os.uname().machine == "x86_64"
for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x8000000):
    reached(f"unshare {flag:x}", call, 272 if x86 else 97, flag)
    def clone():
        pid = libc.syscall(56 if x86 else 220, flag | 17, 0, 0, 0, 0)
        if pid == 0: os._exit(0)
        if pid < 0: raise OSError
    reached(f"clone {flag:x}", clone)
reached("mount", call, 165 if x86 else 40, b"tmpfs", b"/tmp", b"tmpfs", 0, 0)
for command in (["unshare", "-Ur", "true"], ["bwrap", "--ro-bind", "/", "/", "true"], ["chroot", "/tmp", "true"]):
    reached(command[0], lambda: subprocess.run(command, check=True, capture_output=True))
""")


def test_a_daemon_does_not_outlive_the_run(attack: Run) -> None:
    outcome = attack("""
open("/proc/self/comm", "w").write("tstill-daemon")
for number in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for descriptor in range(3 * (number > 0)): os.close(descriptor)
            for number in range(1, 32):
                try: signal.signal(number, signal.SIG_IGN)
                except OSError: pass
            time.sleep(600)
        os._exit(0)
print("parent done")
""")
    assert (outcome.status, outcome.stdout) == ("ok", b"parent done\n")
    assert named("tstill-daemon") == []


def test_no_process_outside_gets_a_signal(attack: Run) -> None:
    with subprocess.Popen(["sleep", "60"], user=NOBODY if os.geteuid() == 0 else None) as victim:
        outcome = attack(f"""
for pid in {sorted({victim.pid, os.getpid(), os.getppid()} - {1})}:  # 1 is the sandbox's own
    reached(f"kill {{pid}}", os.kill, pid, 0)
for number in (signal.SIGTERM, signal.SIGKILL):
    try: os.kill(-1, number)
    except OSError: pass
os.kill(1, signal.SIGKILL)
print("still here")
""")
        assert victim.poll() is None
        victim.kill()
    assert outcome.stdout == b"still here\n"


def test_proc_tells_of_nobody_else(attack: Run) -> None:
    outcome = attack("""
print(sorted(int(name) for name in os.listdir("/proc") if name.isdigit()), os.getpid())
said = open("/proc/1/environ").read() + open("/proc/1/cmdline").read() + open("/proc/self/environ").read()
print(said, [os.readlink(f"/proc/self/fd/{number}") for number in range(3)])
""")
    first, _, rest = outcome.stdout.decode().partition("\n")
    assert first == "[1, 2] 2"
    assert str(REPOSITORY) not in rest
    assert "pytest" not in rest.lower()


def test_no_capability_and_no_other_user_is_gained(attack: Run) -> None:
    outcome = attack("""
import subprocess
reached("setuid", os.setuid, 0)
reached("setgroups", os.setgroups, [0])
reached("chroot", os.chroot, "/tmp")
reached("chown", lambda: (open("/tmp/x", "w"), os.chown("/tmp/x", 0, 0)))
reached("nice", os.nice, -5)
reached("hostname", socket.sethostname, "x")
for command in (["su", "-c", "true"], ["mount", "-t", "tmpfs", "x", "/tmp"], ["setpriv", "--reuid=0", "true"]):
    reached(command[0], lambda: subprocess.run(command, check=True, capture_output=True, input=b""))
os.chmod("/tmp/x", 0o4755)
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status"))
print([status[name].strip() for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")], os.getuid(), os.getgroups())
""")
    none = "0" * 16
    assert outcome.stdout.decode().startswith(f"{[none] * 4 + ['1']} {NOBODY}")


def test_no_device_is_there_but_the_harmless_ones(attack: Run) -> None:
    outcome = attack("""
import stat
reached("mknod", os.mknod, "/tmp/disk", 0o600 | stat.S_IFBLK, os.makedev(254, 0))
reached("mem", os.mknod, "/tmp/mem", 0o600 | stat.S_IFCHR, os.makedev(1, 1))
for name in ("mem", "kmsg", "vda", "sda", "kvm", "vsock", "fuse", "loop-control", "nvidia0", "net/tun"):
    reached(name, open, f"/dev/{name}")
reached("terminal", os.open, "/dev/tty", os.O_RDWR)
print(sorted(name for name in os.listdir("/dev") if not os.path.islink(f"/dev/{name}")))
""")
    assert outcome.stdout.decode().strip() == str(["full", "null", "pts", "random", "shm", "tty", "urandom", "zero"])


def test_no_secret_of_the_environment_and_no_open_file_is_inherited(
    attack: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "tstill-secret")
    (tmp_path / "open").write_text("tstill-secret")
    with (tmp_path / "open").open() as file:
        os.set_inheritable(file.fileno(), True)
        outcome = attack("""
for name in os.listdir("/proc"):
    for part in ("environ", "cmdline") if name.isdigit() else ():
        print(name, part, open(f"/proc/{name}/{part}").read())
print(os.environ)
for descriptor in range(3, 64):
    reached(f"descriptor {descriptor}", os.read, descriptor, 100)
""")
    assert b"tstill-secret" not in outcome.stdout


def test_links_and_names_in_tmp_lead_nowhere(attack: Run, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("untouched")
    target.chmod(0o666)
    outcome = attack(f"""
os.symlink({str(target)!r}, "/tmp/link")
reached("through a link", lambda: open("/tmp/link").read())
reached("written through a link", lambda: open("/tmp/link", "r+").write("gone"))
os.mkdir("/tmp/folder")
folder = os.open("/", os.O_RDONLY)
reached("above the root", os.open, "../../etc/shadow", os.O_RDONLY, 0o777)
reached("beside a descriptor", lambda: os.open({str(target)[1:]!r}, os.O_RDONLY, dir_fd=folder))
reached("hard link", os.link, "/usr/bin/env", "/tmp/env")
os.rename("/tmp/folder", "/tmp/newroot")
reached("remounted", lambda: os.rename("/usr", "/tmp/usr"))
print("done")
""")
    assert outcome.stdout == b"done\n"
    assert target.read_text() == "untouched"


# --- whose end is whose ------------------------------------------------------------------------------------------

WORKER = """
from data.verify import sandbox
sandbox.run("open('/proc/self/comm', 'w').write('{mark}')\\nimport os, time\\nos.fork()\\nos.setsid()\\ntime.sleep(600)",
            limits=sandbox.Limits(wall_s=600.0))
"""


@pytest.mark.parametrize("peer", [False, True])
def test_a_killed_worker_takes_its_sandbox_with_it(run: Run, peer: bool) -> None:
    mark = f"tstill-w{os.getpid() % 10_000}{int(peer)}"
    program = WORKER.format(mark=mark)
    if peer:
        program = program.replace(
            "sandbox.run(", "sandbox.run_beside(sandbox.Program('import time; time.sleep(600)'), sandbox.Program("
        )
        program = program.replace('time.sleep(600)",', 'time.sleep(600)"),')
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY) as worker:
        assert until(lambda: len(named(mark)) == 2, 60)
        worker.kill()
    assert until(lambda: named(mark) == [], 10)


KILLED_EARLY = """
import os, time
from data.verify import sandbox
for trial in range(40):
    worker = os.fork()
    if worker == 0:
        sandbox.run("import time; time.sleep(600)", limits=sandbox.Limits(wall_s=600.0, file_bytes={odd}))
        os._exit(0)
    time.sleep(trial * 0.0015)
    os.kill(worker, 9)
    os.waitpid(worker, 0)
"""


def sandboxes_with(file_bytes: int) -> list[str]:
    """Command lines that state this limit; an odd one is a test's own."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(entry.read_text(errors="replace"))
    return [line for line in lines if f"('RLIMIT_FSIZE', {file_bytes}" in line]


def test_what_a_worker_leaves_that_is_killed_while_its_sandbox_starts_is_swept_away(run: Run) -> None:
    odd = (48 << 20) + os.getpid()
    with sandbox._started(sandbox.Program("pass"), Limits(file_bytes=odd), sandbox.PYTHON):
        subprocess.run([sys.executable, "-c", KILLED_EARLY.format(odd=odd + 1)], cwd=REPOSITORY, check=True)
        assert until(lambda: sandbox.sweep() >= 0 and sandboxes_with(odd + 1) == [], 30)
        assert sandboxes_with(odd) != []  # that of a living caller stays


def test_a_deadline_at_any_moment_of_the_start_leaves_nothing(run: Run) -> None:
    odd = (32 << 20) + os.getpid()  # among the limits, so on the command line of these sandboxes and no others
    for step in range(25):
        limits = Limits(wall_s=step * 0.004, file_bytes=odd)
        assert run("pass", limits=limits).status in ("timed_out", "ok")
    assert sandboxes_with(odd) == []


def test_a_caller_that_is_interrupted_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox, "_excess", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("open('/proc/self/comm', 'w').write('tstill-int')\nimport time\ntime.sleep(600)", limits=Limits(wall_s=120.0))
    assert named("tstill-int") == []


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become an ordinary user; run by one, every test here shows it")
def test_an_ordinary_user_has_a_sandbox_too(run: Run) -> None:
    program = """
import os
from data.verify import sandbox
os.setgroups([]); os.setgid(54321); os.setuid(54321)
sandbox.require()
print(sandbox.run("import os; print(os.getuid(), os.listdir('/tmp'))").stdout)
limits = sandbox.Limits(memory_bytes=128 << 20, wall_s=120.0)
eaters = "import os, time\\nfor _ in range(4): os.fork()\\nx = bytearray(64 << 20)\\nx[::4096] = x[::4096]\\ntime.sleep(50)"
print(sandbox.run(eaters, limits=limits)[:2])
print(sandbox.run("number = 0\\nwhile True:\\n  open(f'/tmp/{number}', 'w'); number += 1", limits=sandbox.Limits(wall_s=60))[:2])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert lines == [f"b'{NOBODY} []\\n'", "('killed', 'memory')", "('killed', 'files')"], done.stderr


# --- without a sandbox nothing is run ----------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, and that uid 65534 may read."""
    folder = tmp_path_factory.mktemp("tools")
    for part in (folder, folder.parent, folder.parent.parent):
        part.chmod(0o755)
    (folder / "setpriv").symlink_to("/usr/bin/setpriv")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def write_tool(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_without_bubblewrap_nothing_is_run_and_the_remedy_is_named(tools: Path) -> None:
    with pytest.raises(UnusableInput, match="bwrap is not installed.*apt-get install bubblewrap"):
        sandbox.require.__wrapped__()
    with pytest.raises(SandboxUnavailable):
        sandbox.run("print(1)")


def test_a_bubblewrap_that_cannot_make_its_namespaces_is_refused_with_its_words(tools: Path) -> None:
    write_tool(tools / "bwrap", "echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    with pytest.raises(SandboxUnavailable, match="No permissions to create new namespace.*unprivileged_userns_clone"):
        sandbox.require.__wrapped__()
    assert sandbox.run("print(1)")[:2] == ("refused", "bwrap: No permissions to create new namespace")


def test_a_bubblewrap_that_confines_nothing_is_found_out(tools: Path) -> None:
    write_tool(tools / "bwrap", 'while [ "$1" != "--" ]; do shift; done; shift; exec "$@"')
    with pytest.raises(SandboxUnavailable, match="does not confine"):
        sandbox.require.__wrapped__()


@pytest.mark.parametrize("python", ["/nowhere/python3", "/bin/sh/../../etc/hostname", "/opt/python3"])
def test_an_interpreter_that_the_sandbox_would_not_have_is_refused(run: Run, python: str) -> None:
    with pytest.raises(SandboxUnavailable, match="no interpreter below /usr"):
        run("print(1)", python=python)


# --- the filter of system calls ----------------------------------------------------------------------------------

ALLOW, DENY, KILL = 0x7FFF0000, 0x00050001, 0x80000000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
DENIED_X86 = {
    319, 447, 29, 68, 64, 248, 249, 250, 101, 310, 311, 312, 438, 440, 272, 308, 165, 166, 155, 428, 429, 430, 432, 433, 442,
    304, 303, 321, 298, 323, 425,
}  # fmt: skip


def interpret(program: bytes, number: int, architecture: int, argument: int) -> int:
    """What the kernel's interpreter does with a classic BPF program of the four instructions that ours uses."""
    memory = {0: number, 4: architecture, 16: argument}
    code, at, value = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        instruction, yes, no, operand = code[at]
        at += 1
        if instruction == 0x20:
            value = memory[operand]
        elif instruction == 0x15:
            at += yes if value == operand else no
        elif instruction == 0x35:
            at += yes if value >= operand else no
        elif instruction == 0x06:
            return operand


@given(
    st.one_of(st.integers(0, 500), st.sampled_from(sorted(DENIED_X86)), st.just(41), st.integers(2**30, 2**32 - 1)),
    st.sampled_from([*AUDIT.values(), 0x40000003]),
    st.integers(0, 50),
)
def test_the_filter_denies_its_list_and_strange_sockets_and_nothing_else(number: int, architecture: int, argument: int) -> None:
    expected = ALLOW
    if architecture != AUDIT["x86_64"]:
        expected = KILL
    elif number >= 2**30 or number in DENIED_X86 or (number == 41 and argument not in (1, 2, 10)):
        expected = DENY
    assert interpret(system_call_filter("x86_64"), number, architecture, argument) == expected


def test_a_machine_whose_system_calls_are_not_known_runs_nothing() -> None:
    assert interpret(system_call_filter("aarch64"), 279, AUDIT["aarch64"], 0) == DENY
    assert interpret(system_call_filter("aarch64"), 198, AUDIT["aarch64"], 40) == DENY
    assert interpret(system_call_filter("aarch64"), 198, AUDIT["aarch64"], 2) == ALLOW
    with pytest.raises(SandboxUnavailable, match="expected x86_64 or aarch64"):
        system_call_filter("riscv64")
