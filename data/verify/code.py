"""Code judged by its tests, in a sandbox, by what it returns.

`prompt.details` is JSON text, one of

    {"language": "python", "kind": "stdin", "tests": [{"stdin": "3 4\\n", "stdout": "7\\n"}, ...]}
    {"language": "python", "kind": "function", "function": "add", "tests": [{"arguments": [3, 4], "expected": 7}, ...]}
    {"language": "python", "kind": "asserts", "setup": "import math", "names": ["add"], "tests": ["assert add(3, 4) == 7", ...]}

- stdin: a test passes when the program ends with exit code 0 and its standard output is `stdout`, but for whitespace at the
  ends of lines and empty lines at the end.
- function: a test passes when `function` (`Solution.add`: the method of a new instance) returns the JSON value `expected`.
  Tuples are lists; a key that is no string is what JSON makes of it; true is not 1; where one of two numbers is a float they
  are equal within 1e-9, relative or absolute.
- asserts: a test passes when its statements (`setup` first, in a namespace of the test's own) run to the end. The names in
  `names` are the code's; without it, those that the reference (`prompt.answer`) defines at its top level. What it imports
  there, the tests have. Functions get and return plain data: None, booleans, numbers, strings, bytes, lists, tuples, sets,
  dicts, ranges; an iterator arrives with its first 10,000 items; a list, dict or set changed in place is seen where the call
  returned None. Objects are those of classes with a capital letter; methods return plain data. A test that needs more
  (a lambda as an argument, `==` of two objects) fails for the reference too, so data.verify.self_check drops the item.

The code is the last fenced block of the answer that says python, else the last that names no language, else the whole answer.

A test passes by a value that the code cannot know, never by what it says about itself: see data/verify/guest.py.
"""

import ast
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.records import Prompt
from data.verify import guest, sandbox
from data.verify.sandbox import Limits, Outcome, Program

VERSION = 1
TIMEOUT_S = 8.0
"""For all tests of an answer, start included. Below data.verify_timeout_s (10 s), so that it ends in order."""
MEMORY_BYTES = 1 << 30

_ROOM = 1024
"""Bytes of output that a test may have beyond twice what is expected: more cannot be right, and is not read."""


class Timeout(TimeoutError):
    """The tests had not ended in time; that says nothing about whether the code is right."""


class StdinTest(NamedTuple):
    stdin: str
    stdout: str


class Call(NamedTuple):
    """arguments and expected are JSON values."""

    arguments: list[Any]
    expected: Any


@dataclass(frozen=True, slots=True)
class StdinTests:
    tests: tuple[StdinTest, ...]


@dataclass(frozen=True, slots=True)
class FunctionTests:
    function: str
    tests: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class AssertTests:
    """names: what the tests ask of the code. imports: statements that come before each test."""

    setup: str
    names: tuple[str, ...]
    imports: tuple[str, ...]
    tests: tuple[str, ...]


Tests = StdinTests | FunctionTests | AssertTests


def score(prompt: Prompt, answer: str) -> float:
    """1.0 when all tests pass, else the share of them that do; 0.0 for an answer without code.

    Raises:
        Timeout: the tests took longer than TIMEOUT_S.
        SandboxUnavailable: nothing can be run here.
        RuntimeError: the sandbox did not start, though others do, or was killed from outside, or the code did as if it was.
        ValueError: the details hold no tests.
    """
    tests = read_tests(prompt)
    program = extract_code(answer)
    if not program.strip():
        return 0.0
    return sum(_passed(tests, program)) / len(tests.tests)


def prepare() -> None:
    """Raises SandboxUnavailable where nothing can be run, before the first answer is looked at."""
    sandbox.require()


def check(prompt: Prompt) -> bool:
    """Whether answers to this prompt can be judged: its details hold tests in the form above."""
    try:
        return bool(read_tests(prompt).tests)
    except ValueError:
        return False


# --- what the prompt says ----------------------------------------------------------------------------------------


def read_tests(prompt: Prompt) -> Tests:
    """The tests in prompt.details. Raises ValueError, naming the prompt, for anything but the form above."""
    try:
        details = json.loads(prompt.details)
        if details["language"] != "python":
            raise ValueError(f"language {details['language']!r}, expected 'python'")
        if not isinstance(details["tests"], list):
            raise ValueError("tests: expected a list")
        tests = _READERS[details["kind"]](details, prompt.answer)
    except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"prompt {prompt.prompt_id}: details hold no tests of code ({error!r}); see data/verify/code.py"
        ) from error
    if not tests.tests:
        raise ValueError(f"prompt {prompt.prompt_id}: details hold an empty list of tests; without one nothing can be judged")
    return tests


def _stdin_tests(details: Mapping[str, Any], reference: str) -> StdinTests:
    return StdinTests(tuple(StdinTest(_text(test["stdin"]), _text(test["stdout"])) for test in details["tests"]))


def _text(value: object) -> str:
    """Raises ValueError for anything else: `str` makes "None" of what was left out, and of an object a statement that passes."""
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} where a test is text; expected a string")
    return value


def _function_tests(details: Mapping[str, Any], reference: str) -> FunctionTests:
    return FunctionTests(
        str(details["function"]), tuple(Call(list(test["arguments"]), test["expected"]) for test in details["tests"])
    )


def _assert_tests(details: Mapping[str, Any], reference: str) -> AssertTests:
    body = ast.parse(extract_code(reference)).body
    names = tuple(details.get("names") or _defined(body))
    if not names:
        raise ValueError("no `names`, and the reference defines none")
    imports = tuple(ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom))
    return AssertTests(str(details.get("setup", "")), names, imports, tuple(map(_text, details["tests"])))


def _defined(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Names of functions, classes and constants. Not what is imported: the code could import an `isclose` of its own making."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


_READERS = {"stdin": _stdin_tests, "function": _function_tests, "asserts": _assert_tests}


# --- what the answer says ----------------------------------------------------------------------------------------


class _Block(NamedTuple):
    language: str
    text: str


def extract_code(answer: str) -> str:
    """The last fenced block that says python, else the last that names no language, else the whole answer. A fence that is
    never closed runs to the end."""
    blocks = list(_fenced(answer))
    for languages in (("python", "python3", "py"), ("",)):
        for block in reversed(blocks):
            if block.language in languages:
                return block.text
    return answer


def _fenced(answer: str) -> Iterator[_Block]:
    """Blocks as CommonMark has them: closed by at least as many of the same character, with nothing behind them."""
    fence, language, lines = "", "", list[str]()
    for line in answer.split("\n"):
        bare = line.strip()
        if not fence and bare.startswith(("```", "~~~")):
            fence = bare[: len(bare) - len(bare.lstrip(bare[0]))]
            language, lines = bare[len(fence) :].strip().split(" ")[0].lower(), []
        elif fence and set(bare) == {fence[0]} and len(bare) >= len(fence):
            yield _Block(language, "\n".join(lines))
            fence = ""
        elif fence:
            lines.append(line)
    if fence:
        yield _Block(language, "\n".join(lines))


# --- running -----------------------------------------------------------------------------------------------------


def _passed(tests: Tests, program: str) -> list[bool]:
    """One word a test. What has not come back has not passed."""
    if isinstance(tests, StdinTests):
        given, most = [test.stdin for test in tests.tests], [_most(test.stdout) for test in tests.tests]
        frames = _frames(_guest("programs", program, given, most), most)
        return [code == 0 and _same_text(test.stdout, said) for test, (code, said) in zip(tests.tests, frames, strict=False)]
    if isinstance(tests, FunctionTests):
        given, most = [test.arguments for test in tests.tests], [8 * _most(json.dumps(test.expected)) for test in tests.tests]
        frames = _frames(_guest("calls", program, given, most, function=tests.function), most)
        return [code == 0 and _same_reply(test.expected, said) for test, (code, said) in zip(tests.tests, frames, strict=False)]
    return _judged(tests, program)


def _most(expected: str) -> int:
    return 2 * len(expected.encode(errors="surrogatepass")) + _ROOM


def _guest(entry: str, program: str, tests: Sequence[object], most: Sequence[int], **more: str) -> Program:
    return _program("guest", entry, {"program": program, "tests": tests, "most": most, **more})


def _program(module: str, entry: str, payload: Mapping[str, object]) -> Program:
    """The guest's modules as they stand here, loaded by name, and `entry` of the last of them."""
    folder = Path(guest.__file__).parent
    names = [f"data.verify.{name}" for name in dict.fromkeys(("guest", module))]
    sources = {name: (folder / f"{name.rpartition('.')[2]}.py").read_text() for name in names}
    return Program(_LOADER.format(sources=sources, entry=entry), json.dumps(payload))


_LOADER = """
import sys, types
for name, source in {sources!r}.items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
sys.modules["data.verify.guest"].main(module.{entry})
"""


def _frames(program: Program, most: Sequence[int]) -> list[tuple[int, bytes]]:
    """Exit code and output of each test, as far as they came."""
    output = sum(most) + len(most) * guest.FRAME.size
    said = _said(sandbox.run(program.source, stdin=program.stdin, limits=_limits(output)))
    frames, at = [], 0
    while at + guest.FRAME.size <= len(said):
        code, length = guest.FRAME.unpack_from(said, at)
        at += guest.FRAME.size
        frames.append((code, said[at : at + length]))
        at += length
    return frames


def _judged(tests: AssertTests, program: str) -> list[bool]:
    asked = {"setup": tests.setup, "names": tests.names, "imports": tests.imports, "tests": tests.tests}
    judge, code = _program("guest_asserts", "judge", asked), _program("guest_asserts", "serve", {"program": program})
    said = _said(sandbox.run_beside(judge, code, limits=_limits(4 * len(tests.tests))))
    try:
        return [held == 1 for held in json.loads(said)]
    except ValueError:
        return []  # the judge was ended: by its own tests, or by what it was told


def _limits(output_bytes: int) -> Limits:
    """Processor time that no process reaches before wall time is over: which of the two ends it must not depend on the load."""
    cpu_s = math.ceil(TIMEOUT_S * (os.cpu_count() or 1)) + 1
    return Limits(wall_s=TIMEOUT_S, cpu_s=cpu_s, memory_bytes=MEMORY_BYTES, output_bytes=output_bytes + _ROOM)


def _said(outcome: Outcome) -> bytes:
    """Standard output, whatever became of the program after it. What is raised says nothing of the program."""
    if outcome.status == "timed_out" or outcome.reason == "cpu":
        raise Timeout(f"the tests had not ended after {TIMEOUT_S:.0f} s")
    if outcome.status == "refused":
        sandbox.require.__wrapped__()  # is there none any more, or was this one unlucky?
    if outcome.status == "refused" or outcome.reason == "signal":
        raise RuntimeError(f"the tests did not run to their end: {outcome.status}, {outcome.reason}")
    return outcome.stdout


# --- equal or not ------------------------------------------------------------------------------------------------


def _same_text(expected: str, said: bytes) -> bool:
    return _lines(expected) == _lines(said.decode(errors="replace"))


def _lines(text: str) -> list[str]:
    return "\n".join(line.rstrip() for line in text.split("\n")).rstrip("\n").split("\n")


def _same_reply(expected: Any, said: bytes) -> bool:
    """said: JSON that the sandbox wrote, so anything at all."""
    try:
        return same_value(expected, guest.decode(json.loads(said)))
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return False


def same_value(expected: Any, actual: Any) -> bool:
    """Equality of a JSON value and plain data, as the module's docstring has it. NaN equals NaN."""
    if isinstance(expected, bool) or isinstance(actual, bool) or expected is None or isinstance(expected, str):
        return type(expected) is type(actual) and expected == actual
    if isinstance(expected, list):
        return isinstance(actual, list | tuple) and len(expected) == len(actual) and all(map(same_value, expected, actual))
    if isinstance(expected, dict):
        found = {_json_key(key): value for key, value in actual.items()} if isinstance(actual, dict) else {}
        return isinstance(actual, dict) and len(found) == len(actual) and found.keys() == expected.keys() and all(
            same_value(value, found[key]) for key, value in expected.items()
        )  # fmt: skip
    if isinstance(expected, int) and isinstance(actual, int):
        return expected == actual
    return isinstance(actual, int | float) and (
        math.isclose(expected, actual, rel_tol=1e-9, abs_tol=1e-9) or (expected != expected and actual != actual)
    )


def _json_key(key: object) -> str:
    """As json.dumps writes a key. Raises TypeError for one that it has no form for."""
    return next(iter(json.loads(json.dumps({key: None}))))
