"""Code judged by tests: honest code of all three kinds, and code that wants to pass without being right."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.records import Prompt
from data.verify import code, guest, sandbox
from data.verify.code import extract_code, same_value
from data.verify.sandbox import Limits, SandboxUnavailable
from tests.data.make_run import make_prompt

ADD = "def add(a, b):\n    return a + b"
NO_SANDBOX = ""
try:
    sandbox.require()
except SandboxUnavailable as unavailable:
    NO_SANDBOX = str(unavailable)
confined = pytest.mark.skipif(bool(NO_SANDBOX), reason=NO_SANDBOX)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no reason to fail; tests of the deadline set one of their own."""
    monkeypatch.setattr(code, "TIMEOUT_S", 120.0)


def make(kind: str, tests: list, reference: str = ADD, **more: object) -> Prompt:
    details = json.dumps({"language": "python", "kind": kind, "tests": tests, **more})
    return make_prompt("q", reference, verifier="code", details=details)


SUMS = make(
    "stdin", [{"stdin": "3 4\n", "stdout": "7\n"}, {"stdin": "10 -2\n", "stdout": "8\n"}, {"stdin": "0 0", "stdout": "0"}]
)
CALLS = make("function", [{"arguments": [3, 4], "expected": 7}, {"arguments": [10, -2], "expected": 8}], function="add")
ASSERTS = make("asserts", ["assert add(3, 4) == 7", "assert add('a', 'b') == 'ab'"])


# --- honest code -------------------------------------------------------------------------------------------------


@confined
@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        (SUMS, "print(sum(map(int, input().split())))", 1.0),
        (SUMS, "import sys\nprint(sum(map(int, sys.stdin.read().split())), end='  \\n\\n')\nsys.exit(0)", 1.0),
        (SUMS, "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()", 1.0),
        (SUMS, "a, b = map(int, input().split())\nprint(a + abs(b))", 2 / 3),
        (SUMS, "print(sum(map(int, input().split())))\nraise SystemExit(1)", 0.0),
        (SUMS, "print(sum(map(int, input().split())", 0.0),
        (SUMS, "", 0.0),
        (CALLS, "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1.0),
        (CALLS, "def add(a, b):\n    print('noise', flush=True)\n    return a + abs(b)", 0.5),
        (CALLS, "def add(a):\n    return a", 0.0),
        (CALLS, "def sub(a, b):\n    return a - b", 0.0),
        (
            CALLS,
            "import os\nseen = []\ndef add(a, b):\n    seen.append(a)\n    if len(seen) > 1: os._exit(1)\n    return a + b",
            1.0,
        ),
        (CALLS, "import os\ndef add(a, b):\n    if b < 0: os.abort()\n    return a + b", 0.5),
        (ASSERTS, ADD, 1.0),
        (ASSERTS, "def add(a, b):\n    return int(a) + int(b)", 0.5),
        (ASSERTS, "def add(a, b):\n    return 7", 0.5),
        (ASSERTS, "1 / 0", 0.0),
    ],
)
def test_the_score_is_the_share_of_tests_that_pass(prompt: Prompt, answer: str, expected: float) -> None:
    assert code.score(prompt, answer) == expected


@confined
def test_a_method_of_a_solution_class_is_called_on_a_new_instance() -> None:
    prompt = make("function", [{"arguments": [[2, 7], 9], "expected": [0, 1]}] * 2, function="Solution.two_sum")
    answer = "class Solution:\n    def __init__(self): self.calls = 0\n    def two_sum(self, numbers, target): return (0, 1)"
    assert code.score(prompt, answer) == 1.0


# Each is run bare as well: what the judge says of honest code is what `exec` says of it.
HONEST = """
import collections, math
LIMIT = 3
def pair(x): return x, [x]
def inverse(d): return {v: k for k, v in d.items()}
def count(text): return collections.Counter(text)
def big(n): return 2 ** n
def half(x): return x / 2
def numbers(n):
    for i in range(n): yield i
def endless():
    while True: yield 1
def primes(): return {2, 3, 5}
def sort(xs): xs.sort()
def fill(d): d["a"] = 1
def positive(x):
    if x < 0: raise ValueError("negative")
    return x
class Odd(ValueError): pass
def even(x):
    if x % 2: raise Odd(f"{x} is odd")
    return x
def raw(): return b"\\x00\\xff"
def nothing(): pass
def keywords(a, *, b=1): return a - b
class Stack:
    def __init__(self, items=()): self.items = list(items); self.next = None
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
    def __str__(self): return f"Stack({self.items})"
def depth(stack): return 0 if stack is None else 1 + depth(stack.next)
"""
HONEST_TESTS = [
    "assert pair(1) == (1, [1])",
    "assert pair(1) == [1, [1]]",
    "assert inverse({1: 'a', (2, 3): 'b'}) == {'a': 1, 'b': (2, 3)}",
    "assert count('abca') == {'a': 2, 'b': 1, 'c': 1}",
    "assert big(20000) == 2 ** 20000 and big(3) == 8",
    "assert half(1) == 0.5 and half(0.1 + 0.2) == (0.1 + 0.2) / 2",
    "assert math.isclose(half(1), 0.5)",
    "assert math.isnan(half(float('nan'))) and half(float('inf')) == float('inf')",
    "assert list(numbers(4)) == [0, 1, 2, 3] and sum(numbers(4)) == 6",
    "import itertools\nassert list(itertools.islice(endless(), 3)) == [1, 1, 1]",
    "assert primes() == {5, 3, 2} and 3 in primes() and len(primes()) == 3",
    "xs = [3, 1, 2]\nassert sort(xs) is None\nassert xs == [1, 2, 3]",
    "d = {}\nfill(d)\nassert d == {'a': 1}",
    "try:\n    positive(-1)\nexcept ValueError as error:\n    assert str(error) == 'negative'\nelse:\n    assert False",
    "try:\n    even(3)\nexcept ValueError:\n    pass\nelse:\n    assert False",
    "assert raw() == b'\\x00\\xff' and nothing() is None and LIMIT == 3",
    "assert keywords(3, b=2) == 1 and keywords(b=1, a=3) == 2",
    "def check(candidate):\n    assert [candidate(i)[0] for i in range(3)] == [0, 1, 2]\ncheck(pair)",
    "assert all(positive(i) == i for i in range(50)) and list(map(half, [2, 4])) == [1, 2]",
    "s = Stack([1])\ns.push(2)\nassert len(s) == 2 and s.pop() == 2 and s[0] == 1 and list(s) == [1] and bool(s)",
    "s = Stack()\nassert not s\nassert str(s) == 'Stack([])' and s.items == []",
    "a, b = Stack(), Stack()\na.next = b\nassert depth(a) == 2 and a.next is not None and b.next is None",
    "s = Stack()\ntry:\n    s.pop()\nexcept IndexError:\n    pass\nelse:\n    assert False",
    "assert pair(1) == (1, [2])",
    "assert big(20000) == 2 ** 20000 + 1",
    "assert undefined(1)",
    "assert positive(-1) == -1",
    "syntax error",
]


@confined
def test_assert_statements_hold_apart_as_they_hold_in_one_process() -> None:
    def holds(test: str) -> bool:
        names: dict[str, Any] = {}
        exec(HONEST, names)
        try:
            exec(test, names)
        except Exception:
            return False
        return True

    expected = [holds(test) for test in HONEST_TESTS]
    assert expected.count(False) == 6
    prompt = make("asserts", HONEST_TESTS, reference=HONEST)
    assert code._passed(code.read_tests(prompt), HONEST) == expected


@confined
def test_a_test_that_needs_more_than_plain_data_fails_for_the_reference_too_and_is_dropped() -> None:
    reference = """
def apply(f, x): return f(x)
class P:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
"""
    for test in ("assert apply(lambda x: x + 1, 1) == 2", "assert P(1) == P(1)"):
        assert not self_check_code(make("asserts", [test], reference=reference))
    assert self_check_code(make("asserts", ["assert P(1).x == 1"], reference=reference))


def self_check_code(prompt: Prompt) -> bool:
    return code.score(prompt, prompt.answer) == 1.0


# --- code that wants to pass -------------------------------------------------------------------------------------

EQUAL_TO_ALL = """
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 1
    def __bool__(self): return True
    def __float__(self): return 7.0
    def __getattr__(self, name): return lambda *a, **k: True
    def __sub__(self, other): return 0
    __rsub__ = __radd__ = __add__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __sub__
"""
SUBCLASS = """
class Mine({base}):
    __eq__ = __ge__ = __le__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 1
    __sub__ = __rsub__ = lambda self, other: 0
    startswith = lambda self, other: True
def add(a, b): return Mine({value})
"""
FORGERIES = {
    "prints the marker": """
import sys
for stream in (sys.stdout, sys.stderr): stream.write("passed\\n[1, 1, 1]\\nOK\\n")
def add(a, b): print("[1, 1]")
""",
    "exits at once": "import os\nos._exit(0)",
    "exits when called": "import os\ndef add(a, b): os._exit(0)",
    "is equal to everything": EQUAL_TO_ALL + "def add(a, b): return Yes()",
    "is a class of its own": EQUAL_TO_ALL + "add = Yes",
    "an instance": EQUAL_TO_ALL + "class add(Yes):\n    def __init__(self, *a): pass",
    "an int equal to everything": SUBCLASS.format(base="int", value="1"),
    "a str equal to everything": SUBCLASS.format(base="str", value="'x'"),
    "a list equal to everything": SUBCLASS.format(base="list", value="[]"),
    "a float equal to everything": SUBCLASS.format(base="float", value="-1.5"),
    "lies about its class": EQUAL_TO_ALL + "Yes.__class__ = property(lambda s: int)\ndef add(a, b): return Yes()",
    "patches the exceptions": """
import builtins
builtins.AssertionError = type("Quiet", (BaseException,), {})
AssertionError = None
def add(a, b): pass
""",
    "patches json": """
import json
json.dumps = lambda *a, **k: "true"
json.loads = lambda *a, **k: {"do": "end"}
def add(a, b): return 0
""",
    "patches unittest": """
import unittest
unittest.TestCase.assertEqual = unittest.main = lambda *a: None
def add(a, b): pass
""",
    "writes to every descriptor": """
import os, struct
def everywhere():
    for descriptor in range(3, 64):
        for said in (b"[1, 1, 1]", struct.pack(">iI", 0, 4) + b"true"):
            try: os.write(descriptor, said)
            except OSError: pass
everywhere()
def add(a, b): everywhere()
""",
    "answers before it is asked": """
import os
for descriptor in range(3, 64):
    try: os.write(descriptor, b'{"value": true}\\n' * 50)
    except OSError: pass
def add(a, b): return None
""",
    "looks through the frames": """
import sys, gc
def add(a, b):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()):
            for word in ("expected", "stdout"):
                if isinstance(value, dict) and word in value: return value[word]
        frame = frame.f_back
    for one in gc.get_objects():
        if isinstance(one, dict) and "expected" in one: return one["expected"]
""",
    "reads the harness": """
import os, glob
said = ""
for path in glob.glob("/proc/*/cmdline") + glob.glob("/proc/*/environ") + glob.glob("/tmp/*") + glob.glob("/tmp/.*"):
    try: said += open(path, errors="replace").read()
    except OSError: pass
def add(a, b): return next((int(word) for word in said.split() if word in ("7", "8")), None)
""",
    "reads the memory of who started it": """
import os, re
def add(a, b):
    with open(f"/proc/{os.getppid()}/mem", "rb") as memory:
        for line in open(f"/proc/{os.getppid()}/maps"):
            start, end = (int(place, 16) for place in line.split()[0].split("-"))
            try:
                memory.seek(start)
                found = re.search(rb'"expected": (\\d+)', memory.read(end - start))
            except (OSError, OverflowError, ValueError): continue
            if found: return int(found[1])
""",
    "changes what runs it": """
import sys
guest = sys.modules.get("data.verify.guest")
if guest:
    guest.encode = lambda *a, **k: True
    guest.write = lambda *a: None
def add(a, b): return None
""",
    "traces its caller": """
import sys
def trace(frame, event, argument):
    frame.f_globals.update(held=True, passed=[1] * 99, result=True)
    return trace
sys.settrace(trace)
sys.setprofile(trace)
def add(a, b): return None
""",
    "a server that lies": """
import os
if "PEER_OUT" in os.environ:
    while os.read(int(os.environ["PEER_IN"]), 65536):
        os.write(int(os.environ["PEER_OUT"]), b'{"value": true, "callable": true, "changed": [], "passed": true}\\n')
def add(a, b): return True
""",
    "a reply without an end": """
import os
while "PEER_OUT" in os.environ: os.write(int(os.environ["PEER_OUT"]), b"[" * 65536)
""",
    "a deep reply": "def add(a, b):\n  x = []\n  for _ in range(900): x = [x]\n  return x",
    "kills who asks": "import os, signal\ndef add(a, b): os.kill(os.getppid(), signal.SIGKILL)",
    "empties its arguments": """
def add(a, b):
    for one in (a, b):
        try: one.clear()
        except AttributeError: pass
    return []
""",
    "brings helpers of its own": """
isclose = approx = isinstance = lambda *a, **k: True
math = sorted = abs = len = max = set = lambda *a: True
def add(a, b): return -1
""",
}
TARGETS = {
    "stdin": SUMS,
    "function": CALLS,
    "asserts": make(
        "asserts",
        [
            "assert add(3, 4) == 7",
            "assert abs(add(3, 4) - 7) < 1e-9",
            "assert not add(3, 4) != 7",
            "assert isclose(add(1.5, 2), 3.5)",
            "assert 7 in [add(3, 4)]",
            "assert {add(3, 4): 1}[7]",
            "assert add('ab', 'c').startswith('abc')",
            "xs = [1]\nassert add(xs, [2]) == xs + [2]",
            "xs, ys = [3], [1]\nassert sorted(add(xs, ys)) == sorted(xs + ys)",
            "assert set(add([1], [2])) >= {1, 2}",
            "try:\n    assert add(3, 4) == 7\nexcept Exception:\n    raise",
            "assert isinstance(add(3, 4), int) and add(3, 4) == 7",
            "assert str(add(3, 4)) == '7'",
            "assert max(add(3, 4), 0) == 7",
        ],
        reference="from math import isclose\n" + ADD,
    ),
}


@confined
@pytest.mark.parametrize("kind", TARGETS)
def test_every_target_is_passed_by_the_right_code(kind: str) -> None:
    right = "print(sum(map(int, input().split())))" if kind == "stdin" else "from math import isclose\n" + ADD
    assert code.score(TARGETS[kind], right) == 1.0


@confined
@pytest.mark.parametrize("kind", [pytest.param("stdin", marks=pytest.mark.long), "function", "asserts"])
def test_no_test_is_passed_by_code_that_does_not_know_the_answer(kind: str) -> None:
    tests = code.read_tests(TARGETS[kind])

    def passed(forgery: str) -> list[object]:
        try:
            found = code._passed(tests, FORGERIES[forgery])
        except (TimeoutError, RuntimeError):  # neither passed nor wrong
            return []
        return [test for test, held in zip(tests.tests, found, strict=False) if held]

    with ThreadPoolExecutor(4) as pool:
        assert dict(zip(FORGERIES, pool.map(passed, FORGERIES), strict=True)) == {forgery: [] for forgery in FORGERIES}


@confined
def test_code_that_ends_itself_is_not_judged_by_what_it_pretends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="did not run to their end"):
        code.score(CALLS, "import os\nos.kill(os.getpid(), 9)")
    monkeypatch.setattr(code, "TIMEOUT_S", 1.0)
    with pytest.raises(TimeoutError):
        code.score(ASSERTS, "import os\ndef add(a, b): os._exit(86)")


# --- what is no judgement ----------------------------------------------------------------------------------------


@confined
@pytest.mark.parametrize("prompt", [SUMS, CALLS, ASSERTS])
@pytest.mark.parametrize("where", ["at the top", "in a call"])
def test_a_hang_is_a_timeout_and_no_score(prompt: Prompt, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "TIMEOUT_S", 1.0)
    hang = "while True: pass" if where == "at the top" or prompt is SUMS else "def add(a, b):\n    while True: pass"
    with pytest.raises(TimeoutError):
        code.score(prompt, hang)


def test_code_is_not_judged_without_a_sandbox(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for prompt in (SUMS, CALLS, ASSERTS):
        with pytest.raises(SandboxUnavailable, match="apt-get install"):
            code.score(prompt, ADD)


@confined
def test_a_flood_costs_its_own_test_and_no_other() -> None:
    flood = "a, b = map(int, input().split())\nwhile b == 4: print('x' * 1000)\nprint(a + b)"
    assert code.score(SUMS, flood) == 2 / 3


@pytest.mark.parametrize(
    "details",
    [
        "",
        "[]",
        '{"language": "rust", "kind": "stdin", "tests": []}',
        '{"language": "python", "kind": "stdin", "tests": []}',
        '{"language": "python", "kind": "stdin", "tests": [{"stdin": ""}]}',
        '{"language": "python", "kind": "function", "tests": [{"arguments": [], "expected": 1}]}',
        '{"language": "python", "kind": "pytest", "tests": ["x"]}',
    ],
)
def test_details_without_tests_are_an_error_that_names_the_prompt(details: str) -> None:
    prompt = make_prompt("q", ADD, verifier="code", details=details)
    assert not code.check(prompt)
    with pytest.raises(ValueError, match=prompt.prompt_id):
        code.score(prompt, ADD)


def test_asserts_need_names_and_take_them_from_the_reference() -> None:
    tests = code.read_tests(
        make("asserts", ["assert f(1)"], "import math\nfrom os import path\nX = 1\ndef f(x): pass\nclass C: pass")
    )
    assert isinstance(tests, code.AssertTests)
    assert (tests.names, tests.imports) == (("X", "f", "C"), ("import math", "from os import path"))
    assert not code.check(make("asserts", ["assert f(1)"], ""))
    assert code.check(make("asserts", ["assert f(1)"], "", names=["f"]))


# --- the code in an answer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("x = 1", "x = 1"),
        ("First:\n```python\nx = 1\n```\nBetter:\n```python\nx = 2\n```\nIt prints:\n```\n2\n```", "x = 2"),
        ("```py\nx = 1\n```", "x = 1"),
        ("```Python title=a.py\nx = 1\n```", "x = 1"),
        ("```\nx = 1\n```\n```text\nno\n```", "x = 1"),
        ("~~~python\nx = '```'\n~~~", "x = '```'"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
        ("```python\nx = 1", "x = 1"),
        ("1. Do\n   ```python\n   x = 1\n   ```", "   x = 1"),
        ("```bash\nls\n```", "```bash\nls\n```"),
        ("", ""),
    ],
)
def test_the_last_python_block_is_the_code(answer: str, expected: str) -> None:
    assert extract_code(answer) == expected


# --- values ------------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
JSON_VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=5
)
HASHABLE = SCALARS | st.binary(max_size=5) | st.complex_numbers(allow_nan=False) | st.tuples(SCALARS, SCALARS)
PLAIN = st.recursive(
    HASHABLE,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.sets(HASHABLE, max_size=3)
        | st.frozensets(HASHABLE, max_size=3)
        | st.tuples(inner)
    ),
    max_leaves=5,
)


@settings(max_examples=50)
@given(PLAIN)
def test_plain_data_arrives_as_it_was_sent(value: object) -> None:
    arrived = guest.decode(json.loads(json.dumps(guest.encode(value))))
    assert arrived == value
    assert type(arrived) is type(value)


@settings(max_examples=50)
@given(JSON_VALUES)
def test_a_value_is_the_same_as_what_json_makes_of_it(value: object) -> None:
    assert same_value(json.loads(json.dumps(value)), value)


def slow_same(expected: object, actual: object) -> bool:
    """By json's own text, where no float is in it."""
    return json.dumps(expected, sort_keys=True) == json.dumps(actual, sort_keys=True)


WHOLE = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "1", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=5,
)


@given(WHOLE, WHOLE)
def test_values_without_floats_are_the_same_when_their_json_is(one: object, other: object) -> None:
    assert same_value(one, other) == slow_same(one, other)


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        (1, 1.0, True),
        (1.0, 1, True),
        (True, 1, False),
        (1, True, False),
        (0.3, 0.1 + 0.2, True),
        (0.3, 0.3001, False),
        (math.nan, math.nan, True),
        (10**400, 1e300, False),
        (10**400, 10**400, True),
        ([1, [2]], (1, (2,)), True),
        ([1], {1}, False),
        ({"1": 2}, {1: 2}, True),
        ({"true": 2}, {True: 2}, True),
        ({"1": 2}, {1: 2, "1": 2}, False),
        (None, 0, False),
        ("1", 1, False),
        ([], None, False),
        ({}, [], False),
    ],
)
def test_what_counts_as_the_expected_value(expected: object, actual: object, same: bool) -> None:
    try:
        found = same_value(expected, actual)
    except OverflowError:  # as the judge's side takes it
        found = False
    assert found == same


@confined
def test_a_value_beyond_what_is_expected_is_not_read_to_its_end() -> None:
    prompt = make("function", [{"arguments": [1, 2], "expected": [1]}] * 2, function="add")
    assert code.score(prompt, "def add(a, b):\n    return [1] * 100_000") == 0.0
    assert sandbox.run("print(1)", limits=Limits()).status == "ok"
