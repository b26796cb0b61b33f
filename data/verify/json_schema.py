"""An answer that is JSON and follows a schema.

`prompt.details` is JSON text {"schema": {...}, "equal": false}: a JSON Schema of draft 2020-12, whose `format` keywords are
checked, and whether the answer must also equal the reference, which may be absent otherwise. The JSON is the whole answer,
or else its last ```json block. Duplicate keys, NaN and infinities are no JSON.

Two defaults of the jsonschema package would be wrong here: a `format` that it has no checker for passes silently, and a `$ref`
to another document is fetched from the network. Both make the schema unusable.
"""

import functools
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

from data.records import Prompt

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

VERSION = 1
Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
_DATA_KEYWORDS = frozenset({"const", "enum", "default", "examples"})
"""What stands under these is data and holds no subschema."""


def score(prompt: Prompt, answer: str) -> float:
    """1.0 when the answer's JSON is valid under the schema (and equals the reference, where that is asked), else 0.0.

    Raises:
        ValueError: the details hold no usable schema, or equality is asked and the reference is no JSON.
    """
    validator, equal = _details(prompt.details)
    reference = _reference(prompt) if equal else None
    given = parse(answer)
    if given is None or not validator.is_valid(given[0]):
        return 0.0
    return float(reference is None or same(reference[0], given[0]))


def quick(prompt: Prompt, answer: str) -> float | None:
    """0.0 where nothing in the answer is JSON: that needs no schema."""
    return 0.0 if parse(answer) is None else None


def check(prompt: Prompt) -> bool:
    """True when answers can be judged without a reference. Raises ValueError for an unusable schema."""
    _, equal = _details(prompt.details)
    return not equal


def prepare() -> None:
    """Pays for the imports (0.3 s)."""
    _validator('{"format": "date-time"}').is_valid("2026-01-01T00:00:00Z")


def parse(answer: str) -> tuple[Json] | None:
    """The answer's JSON value, in a tuple because it may be null; None when it holds none."""
    for text in (answer, _last_block(answer)):
        try:
            if text is not None:
                return (strict(text),)
        except (ValueError, RecursionError):  # ValueError: also a number of more than 4,300 digits
            continue
    return None


def _last_block(answer: str) -> str | None:
    """Line by line: a regular expression took minutes for a text of nothing but opening fences."""
    last: str | None = None
    lines: list[str] | None = None
    for line in answer.split("\n"):  # not splitlines: U+2028 may stand inside a JSON string
        fence = line.strip().lower()
        if lines is None:
            lines = [] if fence == "```json" else None
        elif fence == "```":
            last, lines = "\n".join(lines), None
        else:
            lines.append(line)
    return last


def strict(text: str) -> Json:
    """The JSON value of the whole text. Raises ValueError for what is none, which duplicate keys, NaN and infinities make it, and
    RecursionError for brackets a thousand deep."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def same(one: Json, other: Json) -> bool:
    """Equal as JSON: 1 and 1.0 are, true and 1 are not; the order of keys does not count."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def _reference(prompt: Prompt) -> tuple[Json]:
    found = parse(prompt.answer)
    if found is None:
        raise ValueError(f"prompt {prompt.prompt_id}: details ask for equality and the reference is no JSON")
    return found


# --- the schema --------------------------------------------------------------------------------------------------


@functools.lru_cache(1024)
def _details(text: str) -> "tuple[Draft202012Validator, bool]":
    try:
        details = strict(text)
    except ValueError as error:
        raise ValueError(f"details are no JSON ({error}); expected an object with a schema") from error
    if not isinstance(details, dict) or not isinstance(details.get("schema"), dict | bool):
        raise ValueError("details hold no schema; expected {'schema': {...}}")
    if details.keys() - {"schema", "equal"} or not isinstance(details.get("equal", False), bool):
        raise ValueError("details of json_schema: expected the keys schema and, true or false, equal")
    return _validator(json.dumps(details["schema"])), bool(details.get("equal", False))


def _validator(text: str) -> "Draft202012Validator":
    """Raises ValueError for a schema that is invalid, points outside itself, or has a format that nothing checks."""
    from jsonschema import Draft202012Validator, SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    schema: Json = json.loads(text)
    checker = Draft202012Validator.FORMAT_CHECKER
    try:
        Draft202012Validator.check_schema(schema)  # type: ignore[arg-type]
    except SchemaError as error:
        raise ValueError(f"the schema is invalid: {error.message}") from error
    subschemas = list(_subschemas(schema))
    own = {name for found in subschemas if isinstance(name := found.get("$id"), str)}
    for found in subschemas:
        _require_here(found, own, frozenset(checker.checkers))
    if not own:  # an $id changes what a pointer is relative to; then a dangling one is found by the reference's self-check
        resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()  # type: ignore[arg-type]
        for pointer in [found["$ref"] for found in subschemas if isinstance(found.get("$ref"), str)]:
            try:
                resolver.lookup(pointer)  # type: ignore[arg-type]
            except Unresolvable as error:
                raise ValueError(f"$ref {pointer!r} points to nothing in the schema") from error
    return Draft202012Validator(schema, format_checker=checker, registry=Registry())  # type: ignore[arg-type]


def _require_here(schema: "dict[str, Json]", own: set[str], formats: frozenset[str]) -> None:
    for keyword in ("$ref", "$dynamicRef"):
        target = schema.get(keyword)
        if isinstance(target, str) and not target.startswith("#") and target.partition("#")[0] not in own:
            raise ValueError(f"{keyword} {target!r} points outside the schema; nothing is fetched: put it under $defs")
    if isinstance(stated := schema.get("format"), str) and stated not in formats:
        raise ValueError(f"format {stated!r} is not checked by jsonschema; expected one of {', '.join(sorted(formats))}")


def _subschemas(schema: Json) -> "Iterator[dict[str, Json]]":
    """Every object in the schema that is not data. A property may be called `$ref`: its value is then no string."""
    if isinstance(schema, dict):
        yield schema
        for keyword, value in schema.items():
            if keyword not in _DATA_KEYWORDS:
                yield from _subschemas(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _subschemas(value)
