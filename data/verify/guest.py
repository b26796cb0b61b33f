"""What runs inside a sandbox beside the code under test: its source is sent there (data/verify/code.py), and imports nothing
of this project.

No expected value ever enters the sandbox of the code under test, so that nothing the code does to this module, to its pipes or
to the interpreter can say "passed": all it can say is a value, and to say the right one it has to know it.
- `programs` runs a program once for each standard input, `calls` calls a function once for each list of arguments; each in a
  forked child, so that a crash or a global variable is one test's own.
- Assert statements hold both question and answer: they run elsewhere (data/verify/guest_asserts.py).

Runs on the system's python, 3.10 or later.
"""

import atexit
import json
import os
import select
import signal
import struct
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

FRAME = struct.Struct(">iI")
"""Exit code and length of what a child said, which follows."""
LONGEST_ITERATOR = 10_000
NUM_NATIVE_BITS = 63


# --- plain data over a pipe --------------------------------------------------------------------------------------


def encode(value: Any, handle: Callable[[Any], int] | None = None) -> Any:
    """`value` in JSON's types: what JSON has no word for is an object of one key, its type. Iterators are read, up to
    LONGEST_ITERATOR. An instance of a subclass goes as its base (a Counter as a dict): its own methods do not count.

    handle: makes a number of any other object. Raises TypeError for one where handle is None.
    """
    if value is None or value is True or value is False or isinstance(value, str):
        return str.__str__(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value) if int.bit_length(value) <= NUM_NATIVE_BITS else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return [encode(item, handle) for item in list.__iter__(value)]
    if isinstance(value, dict):
        return {"dict": [[encode(key, handle), encode(item, handle)] for key, item in dict.items(value)]}
    if isinstance(value, tuple):
        return {"tuple": [encode(item, handle) for item in tuple.__iter__(value)]}
    if isinstance(value, set):
        return {"set": [encode(item, handle) for item in set.__iter__(value)]}
    if isinstance(value, frozenset):
        return {"frozenset": [encode(item, handle) for item in frozenset.__iter__(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [encode(part) for part in (value.start, value.stop, value.step)]}
    if hasattr(value, "__next__") or isinstance(value, (type({}.keys()), type({}.values()), type({}.items()))):
        return {"iterator": [encode(item, handle) for item, _ in zip(value, range(LONGEST_ITERATOR), strict=False)]}
    if handle is None:
        raise TypeError(f"a {type(value).__name__} is no plain data")
    return {"handle": handle(value)}


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "dict": dict,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "bytes": bytes.fromhex,
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
    "iterator": iter,
}


def decode(value: Any, handle: Callable[[int], Any] | None = None) -> Any:
    """The inverse of encode. Raises ValueError, TypeError or KeyError for anything that encode does not write."""
    if isinstance(value, list):
        return [decode(item, handle) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "handle" and handle is not None:
        return handle(inner)
    return _DECODERS[kind](decode(inner, handle))


def write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


# --- a child for each test ---------------------------------------------------------------------------------------


def _frame(work: Callable[[int], None], most: int) -> bytes:
    """Runs work(descriptor), which ends its process, in a forked child; its exit code and the first `most` bytes it wrote there.

    A negative exit code is a signal's; SIGKILL where it wrote more. A child that it left behind is not waited for.
    """
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        work(said)
    os.close(said)
    end, data, ended = os.pidfd_open(child), b"", False
    while len(data) <= most:
        readable = select.select([heard] if ended else [heard, end], [], [], 0 if ended else None)[0]
        part = os.read(heard, 1 << 16) if heard in readable else b""
        data += part
        if not part and (ended or heard in readable):
            break
        ended = ended or end in readable
    else:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(heard)
    os.close(end)
    return FRAME.pack(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), len(data[:most])) + data[:most]


def programs(payload: Mapping[str, Any]) -> None:
    """One frame for each standard input: what the program wrote to standard output."""
    code = compile(payload["program"], "program.py", "exec")
    frames = own_output()
    for text, most in zip(payload["tests"], payload["most"], strict=True):

        def work(said: int, text: str = text) -> None:
            path = "/tmp/.stdin"
            with open(path, "wb") as file:  # noqa: PTH123
                file.write(text.encode(errors="surrogatepass"))
            given = os.open(path, os.O_RDONLY)
            os.unlink(path)  # noqa: PTH108
            os.dup2(given, 0)
            os.dup2(said, 1)
            _leave(code)

        write(frames, _frame(work, most))


def _leave(code: types.CodeType) -> None:
    """Runs a program and ends the process as the interpreter would, but for taking itself apart: of a forked child that costs
    10 to 25 ms, because every object it lets go of is on a page that has to be copied first."""
    status = 0
    try:
        exec(code, _new_main().__dict__)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        status = 1
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):  # closed, or replaced by something that is no file
        status = status or 120
    os._exit(status & 0xFF)


def calls(payload: Mapping[str, Any]) -> None:
    """One frame for each list of arguments: JSON of what the function returned, encoded."""
    frames = own_output()
    function = _find(load(payload["program"]), payload["function"])
    for arguments, most in zip(payload["tests"], payload["most"], strict=True):

        def work(said: int, arguments: list[Any] = arguments) -> None:
            write(said, json.dumps(encode(function(*arguments))).encode())
            os._exit(0)  # where it raises, the interpreter ends with 1

        write(frames, _frame(work, most))


def own_output() -> int:
    """Standard output for this module alone; what the code under test prints goes nowhere."""
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    return own


def _new_main() -> types.ModuleType:
    """The program's `__main__`; pickle and dataclasses look it up by name."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    return main


def load(program: str) -> dict[str, Any]:
    """The names that `program` defines when it is imported: what stands under `if __name__ == "__main__"` does not run."""
    module = sys.modules["solution"] = types.ModuleType("solution")
    exec(compile(program, "solution.py", "exec"), module.__dict__)
    return module.__dict__


def _find(names: Mapping[str, Any], path: str) -> Any:
    """A function, or `Solution.method` of a new instance."""
    first, _, method = path.partition(".")
    return getattr(names[first](), method) if method else names[first]


def main(entry: Callable[[Mapping[str, Any]], None]) -> None:
    """Runs `entry` on the JSON that standard input holds to its end."""
    payload = b""
    while part := os.read(0, 1 << 20):
        payload += part
    entry(json.loads(payload))
