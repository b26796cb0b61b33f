"""The command that starts an interpreter where it can do no harm: namespaces, limits, a filter of system calls.

Layers, each of which stops something that the others do not:
- uid 65534 without capabilities (setpriv) when the caller is root; an ordinary user's sandbox keeps that user's uid, so
  there the namespaces stand alone between the program and the user's files;
- bubblewrap: namespaces of its own for files, processes, network, IPC and users, and none can be made inside. Of the host
  only /usr is there, read-only. What can be written is /tmp and /dev/shm, both bounded: bubblewrap's own root and /dev are
  tmpfs of half the machine's memory unless they are made read-only;
- a filter of system calls: AF_VSOCK reaches the hypervisor from any network namespace [seen], and what memfd_create, shmget
  or msgget hold is memory that no limit counts;
- resource limits of each process.

Wall time, output, and what all processes hold together are the parent's to bound (data/verify/sandbox.py).
"""

import os
import platform
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UnusableInput

PYTHON = os.environ.get("TRACESTILL_SANDBOX_PYTHON", "/usr/bin/python3")
"""The interpreter inside; below /usr. The caller's own is no choice: one in root's home is unreadable to uid 65534."""
NOBODY = 65534
READY = b"\x06"
"""What a started interpreter says on standard output, before it reads the program."""


@dataclass(frozen=True, slots=True)
class Limits:
    """cpu_s, file_bytes, open_files: of each process. memory_bytes: address space of each process, and resident memory of all
    together. disk_bytes: /tmp, and as much again in /dev/shm. output_bytes: standard output and error together. processes:
    threads count; before Linux 5.14 they are counted by uid, and sandboxes side by side share them. wall_s: from the call to
    the end, start included."""

    wall_s: float = 8.0
    cpu_s: int = 8
    memory_bytes: int = 1 << 30
    disk_bytes: int = 64 << 20
    file_bytes: int = 32 << 20
    output_bytes: int = 1 << 20
    processes: int = 32
    open_files: int = 64


class SandboxUnavailable(UnusableInput):
    """This machine cannot confine a program, so none is run."""


# --- the command -------------------------------------------------------------------------------------------------

# Runs first inside, on an interpreter that nothing has touched. The limits are set here and not outside because a user namespace
# has a count of processes of its own, which starts at zero. It says that it is there before the program is sent: by then
# bubblewrap has asked to die with us, so that no program starts whose caller is already gone.
_BOOTSTRAP = """
import os, resource, sys, types
for name, soft, hard in {limits}: resource.setrlimit(getattr(resource, name), (soft, hard))
os.write(1, {ready})
def take(count, found=b""):
    while len(found) < count:
        part = os.read(0, count - len(found))
        if not part: os._exit(1)
        found += part
    return found
source = take(int.from_bytes(take(8), "big"))
sys.argv = ["program.py"]
first, main = sys.modules["__main__"], types.ModuleType("__main__")
sys.modules["__main__"] = main
exec(compile(source, "program.py", "exec"), main.__dict__)
"""
SIGN = _BOOTSTRAP.partition("{")[0]
"""In the command line of every sandbox, and of nothing else."""


def command(limits: Limits, python: str, *, filter_fd: int, info_fd: int, environment: Mapping[str, str]) -> list[str]:
    """The argument vector. The program follows on standard input, after READY: 8 bytes of length, big-endian, then the source;
    what comes after it is the program's own standard input.

    filter_fd: where bubblewrap reads `system_call_filter`. info_fd: where it writes JSON with `child-pid`.
    Raises SandboxUnavailable for a missing tool, or an interpreter that the sandbox would not have.
    """
    drop = [
        _tool("setpriv", "util-linux"), f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs",
        "--bounding-set=-all", "--inh-caps=-all", "--",
    ]  # fmt: skip
    variables = {"HOME": "/tmp", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"} | dict(environment)
    disk = str(limits.disk_bytes)
    return [
        *(drop if os.geteuid() == 0 else ()), _tool("bwrap", "bubblewrap"),
        "--unshare-user", "--unshare-all", "--disable-userns", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
        "--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox",
        "--clearenv", *(word for name, value in variables.items() for word in ("--setenv", name, value)),
        "--seccomp", str(filter_fd), "--info-fd", str(info_fd),
        "--ro-bind", "/usr", "/usr", *(word for name in ("bin", "lib", "lib32", "lib64") for word in _root_entry(name)),
        "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache",
        "--proc", "/proc", "--dev", "/dev", "--size", disk, "--tmpfs", "/dev/shm", "--remount-ro", "/dev",
        "--size", disk, "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/",
        "--", _interpreter(python), "-I", "-X", "utf8", "-c",
        _BOOTSTRAP.format(limits=_resource_limits(limits), ready=READY),
    ]  # fmt: skip


def _tool(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SandboxUnavailable(
            f"sandbox: {name} is not installed, and code that a model wrote is never run without it; expected on the PATH: "
            f"apt-get install {package}, or leave out prompts with verifier `code`"
        )
    return found


def _interpreter(python: str) -> str:
    if not os.access(python, os.X_OK) or not os.path.realpath(python).startswith("/usr/"):
        raise SandboxUnavailable(
            f"sandbox: {python} is no interpreter below /usr, the one folder of the host that a sandbox has; install the "
            "system's (apt-get install python3-minimal) or name another in TRACESTILL_SANDBOX_PYTHON"
        )
    return python


def _root_entry(name: str) -> list[str]:
    """/lib and the like as the host has it: a link into /usr, or a folder where /usr is not merged."""
    path = Path("/", name)
    if path.is_symlink():
        return ["--symlink", str(path.readlink()), str(path)]
    return ["--ro-bind", str(path), str(path)] if path.is_dir() else []


def _resource_limits(limits: Limits) -> list[tuple[str, int, int]]:
    """Name, soft, hard. Processor time ends with SIGXCPU, which names the reason, and a second later with SIGKILL."""
    exact = {
        "AS": limits.memory_bytes, "NPROC": limits.processes, "FSIZE": limits.file_bytes, "NOFILE": limits.open_files,
        "CORE": 0, "MSGQUEUE": 0,
    }  # fmt: skip
    bounds = [(f"RLIMIT_{name}", bound, bound) for name, bound in exact.items()]
    return [*bounds, ("RLIMIT_CPU", limits.cpu_s, limits.cpu_s + 1)]


# --- the filter of system calls ----------------------------------------------------------------------------------

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH of linux/audit.h, by platform.machine()."""
_SOCKET = {"x86_64": 41, "aarch64": 198}
_FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6: the families that a network namespace confines, and that programs use."""
_DENIED = {
    # memory that belongs to no process and no bounded file system
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    # wide doors into the kernel that no exercise needs
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
}  # fmt: skip
"""Numbers on x86_64 and on aarch64: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux."""
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_X32 = 0x40000000


def system_call_filter(machine: str | None = None) -> bytes:
    """A seccomp program (struct sock_filter, 8 bytes each): what is denied fails with EPERM, everything else goes on.

    Raises SandboxUnavailable for a machine whose numbers are not in the table.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise SandboxUnavailable(
            f"sandbox: no table of system calls for {machine}; expected {' or '.join(_ARCHITECTURES)}; leave out prompts with "
            "verifier `code`"
        )
    denied = [numbers[list(_ARCHITECTURES).index(machine)] for numbers in _DENIED.values()]
    # seccomp_data: number at 0, architecture at 4, arguments from 16. Calls of another architecture have other numbers.
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    tests = [(_AT_LEAST, _X32), *((_EQUAL, number) for number in denied)]
    rest = len(_FAMILIES) + 3  # instructions between the last of these tests and the denial
    code += [(test, len(tests) - 1 - index + rest, 0, number) for index, (test, number) in enumerate(tests)]
    code += [(_EQUAL, 1, 0, _SOCKET[machine]), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 16)]
    code += [(_EQUAL, len(_FAMILIES) - index, 0, family) for index, family in enumerate(_FAMILIES)]
    code += [(_RETURN, 0, 0, _DENY), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
