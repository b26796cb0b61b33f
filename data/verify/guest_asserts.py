"""Assert statements, run where the code under test cannot reach: guest code, as data/verify/guest.py.

`judge` runs the statements in a sandbox of its own. The names they test are stand-ins there, which ask `serve`, in the
sandbox of the code, over a pipe: all that the two share. What comes back is plain data, compared by the judge's own types, or
the number of an object, which the judge neither compares nor calculates with. So an `__eq__` that agrees with everything, an
`os._exit(0)`, a patched `assert` or a marker on standard output never gets where a verdict is made.

    judge's line                                                       serve's line
    {"do": "begin"} | {"do": "end"}                                    {}
    {"do": "get", "handle": 3 | null, "name"}                          {"value"} | {"callable": true}
    {"do": "set", "handle", "name", "value"}                           {"value": null}
    {"do": "call", "handle" | null, "name", "arguments", "options"}    {"value"} | {"value": null, "changed": [...]}
    any                                                                {"raised": [class names], "text"} | {"died": true}
"""

import ast
import builtins
import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data.verify.guest import decode, encode, load, own_output, write

Request = Mapping[str, Any]
Reply = dict[str, Any]
LARGEST_REPLY = 4 << 20
_IN_ORDER = 86
"""Exit code of a child that came to the end of its test. Not 0: code under test may leave by os._exit(0)."""


# --- the side of the code under test -------------------------------------------------------------------------------


def serve(payload: Mapping[str, Any]) -> None:
    """Answers the judge's requests, one line of JSON each. The first of a test begins it: a forked child answers the rest."""
    asked, said = int(os.environ["PEER_IN"]), int(os.environ["PEER_OUT"])
    own_output()
    names = load(payload["program"])
    while _line(asked):
        child = os.fork()
        if child == 0:
            _serve_test(names, asked, said)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != _IN_ORDER:
            write(said, b'{"died": true}\n')


def _line(descriptor: int) -> bytes:
    """One line, or b"" at the end. The judge waits for each reply, so a read never takes a line meant for the next reader."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(descriptor, 1 << 16)
        if not part:
            return b""
        line += part
    return line


def _serve_test(names: Mapping[str, Any], asked: int, said: int) -> None:
    objects: list[Any] = []

    def handle(value: Any) -> int:
        objects.append(value)  # the same object has the number that it had first, so that `is` means what it says
        return next(number for number, one in enumerate(objects) if one is value)

    reply: Reply = {}
    while True:
        write(said, json.dumps(reply).encode() + b"\n")
        request = json.loads(_line(asked))
        if request["do"] == "end":
            break
        try:
            reply = _ACTIONS[request["do"]](request, names, objects, handle)
        except BaseException as error:
            reply = {"raised": [kind.__name__ for kind in type(error).__mro__], "text": str(error)[:1000]}
    write(said, b"{}\n")
    os._exit(_IN_ORDER)


def _get(request: Request, names: Mapping[str, Any], objects: list[Any], handle: Callable[[Any], int]) -> Reply:
    """{"value"}, or {"callable"} for what can only be called."""
    number, name = request["handle"], request["name"]
    value = names[name] if number is None else getattr(objects[number], name)
    return {"callable": True} if callable(value) else {"value": encode(value, handle)}


def _set(request: Request, names: Mapping[str, Any], objects: list[Any], handle: Callable[[Any], int]) -> Reply:
    setattr(objects[request["handle"]], request["name"], decode(request["value"], objects.__getitem__))
    return {"value": None}


_SPECIAL: dict[str, Callable[..., Any]] = {"__bool__": bool, "__iter__": iter}


def _call(request: Request, names: Mapping[str, Any], objects: list[Any], handle: Callable[[Any], int]) -> Reply:
    """{"value"}, and where that is None {"changed"}: the arguments as the call left them."""
    number, name = request["handle"], request["name"]
    arguments, options = (decode(request[part], objects.__getitem__) for part in ("arguments", "options"))
    if name in _SPECIAL:
        value = _SPECIAL[name](objects[number], *arguments)
    else:
        value = (names[name] if number is None else getattr(objects[number], name))(*arguments, **options)
    reply = {"value": encode(value, handle)}
    return reply if value is not None else reply | {"changed": encode(arguments, handle)}


_ACTIONS = {"get": _get, "set": _set, "call": _call}


# --- the judge's side ---------------------------------------------------------------------------------------------


class Gone(BaseException):
    """The code under test ended while it was asked. No Exception: a test that expects one must not take it for that."""


class Peer:
    """The code under test, as the judge hears it. lost: it no longer answers line by line, so no later test can be judged."""

    def __init__(self) -> None:
        self.said = open(int(os.environ["PEER_IN"]), "rb")  # noqa: PTH123, SIM115
        self.asks = int(os.environ["PEER_OUT"])
        self.objects: dict[int, Object] = {}
        self.died = self.lost = False

    def begin(self) -> None:
        self.objects, self.died = {}, False
        self._exchange({"do": "begin"})

    def end(self) -> None:
        if not self.died:
            self._exchange({"do": "end"})

    def get(self, name: str, number: int | None = None) -> Any:
        reply = self._ask({"do": "get", "handle": number, "name": name})
        return (
            Function(self, name, number)
            if reply.get("callable")
            else decode(reply["value"], None if number is None else self._object)
        )

    def set(self, number: int, name: str, value: Any) -> None:
        self._ask({"do": "set", "handle": number, "name": name, "value": encode(value, _number)})

    def call(self, name: str, number: int | None, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """What the call returned. Objects come from calls of a class alone, which by its name is one: an object has methods of
        the code's own making, and `f(x).startswith("right")` or `f(x) - 3.14` would ask them."""
        makes_objects = number is None and name[:1].isupper()
        sent = encode(list(arguments), _number), encode(dict(options), _number)
        reply = self._ask({"do": "call", "handle": number, "name": name, "arguments": sent[0], "options": sent[1]})
        value = decode(reply["value"], self._object if makes_objects else None)
        if value is None:
            # Seen only where nothing is returned: sort(xs) is meant so, and in `f(xs) == sorted(xs)` a change of xs is a trick.
            for given, left in zip(arguments, decode(reply["changed"], self._object), strict=False):
                _become(given, left)
        return value

    def _object(self, number: int) -> "Object":
        return self.objects.setdefault(number, Object(self, number))

    def _ask(self, request: Request) -> Reply:
        reply = self._exchange(request)
        if "raised" in reply:
            raise _exception(reply["raised"], str(reply["text"]))
        return reply

    def _exchange(self, request: Request) -> Reply:
        if self.died or self.lost:
            raise Gone
        try:
            write(self.asks, json.dumps(request).encode() + b"\n")
            line = self.said.readline(LARGEST_REPLY)
            reply = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            self.lost = self.died = True
            raise Gone
        if "died" in reply:
            self.died = True
            raise Gone
        return reply


def _become(given: Any, left: Any) -> None:
    if isinstance(given, (list, bytearray)):
        given[:] = left
    elif isinstance(given, (dict, set)):
        given.clear()
        given.update(left)


def _exception(kinds: Sequence[str], text: str) -> Exception:
    """The builtin that stands for it: of a class of the code's own, its nearest base. RuntimeError for what is no Exception."""
    for kind in kinds:
        found = getattr(builtins, str(kind), None)
        if isinstance(found, type) and issubclass(found, Exception):
            try:
                return found(text)
            except TypeError:  # UnicodeDecodeError takes five arguments
                continue
    return RuntimeError(text)


class Function:
    """Stands for a function, a class or a method."""

    def __init__(self, peer: Peer, name: str, number: int | None) -> None:
        self._parts = peer, name, number

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        peer, name, number = self._parts
        return peer.call(name, number, arguments, options)


class Object:
    """Stands for an instance of a class under test. Equal to itself alone, and no operand: who compares or calculates with it
    would tell it the expected value, and ask it what comes out."""

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_parts", (peer, number))

    def __getattr__(self, name: str) -> Any:
        peer, number = self._parts
        return peer.get(name, number)

    def __setattr__(self, name: str, value: Any) -> None:
        peer, number = self._parts
        peer.set(number, name, value)


def _special(name: str) -> Callable[..., Any]:
    def method(self: Object, *arguments: Any) -> Any:
        peer, number = self._parts
        return peer.call(name, number, arguments, {})

    return method


for _name in ("__bool__", "__len__", "__iter__", "__str__", "__repr__", "__getitem__", "__setitem__", "__delitem__"):
    setattr(Object, _name, _special(_name))


def _number(value: Any) -> int:
    """Of an Object, for encode."""
    if type(value) is not Object:
        raise TypeError(f"a {type(value).__name__} cannot be handed to the code under test")
    return object.__getattribute__(value, "_parts")[1]


def judge(payload: Mapping[str, Any]) -> None:
    """A JSON list of 1 and 0: which tests ran to their end without an exception, each in a namespace of its own."""
    results = own_output()
    peer = Peer()
    passed = [_holds(peer, payload["setup"] + "\n" + test, payload) for test in payload["tests"]]
    write(results, json.dumps(passed).encode())


def _holds(peer: Peer, test: str, payload: Mapping[str, Any]) -> int:
    names: dict[str, Any] = {"__name__": "test"}
    try:
        peer.begin()
        _import(payload["imports"], names)
        used = {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
        names.update({name: peer.get(name) for name in sorted(used.intersection(payload["names"]))})
        exec(compile(test, "test.py", "exec"), names)
        held = not peer.died  # a bare `except:` in a test hears of it too
    except BaseException:
        held = False
    with contextlib.suppress(Gone):
        peer.end()
    return int(held)


def _import(statements: Sequence[str], names: dict[str, Any]) -> None:
    for statement in statements:
        with contextlib.suppress(ImportError):
            exec(statement, names)
