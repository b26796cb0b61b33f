import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.records import Prompt
from data.verify import VERIFIERS, self_check
from data.verify.json_schema import parse, same, score
from data.verify.runner import RIGHT, Item, Judgement, judge
from tests.data.make_run import make_prompt

CITY = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "founded": {"type": "string", "format": "date"}, "people": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}
WRONG = Judgement("fail", "wrong", 0.0)


def schema_prompt(schema: Any = None, answer: str = "", **details: Any) -> Prompt:
    stated = {"schema": CITY if schema is None else schema} | details
    return make_prompt("q", answer, verifier="json_schema", details=json.dumps(stated))


# --- which JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"name": "Rome"}', ({"name": "Rome"},)),
        (' \n{"name": "Rome"}\n', ({"name": "Rome"},)),
        ("null", (None,)),
        ('Here it is:\n```json\n{"name": "Rome"}\n```\nDone.', ({"name": "Rome"},)),
        ('```json\n{"name": "Oslo"}\n```\nor\n```JSON\n{"name": "Rome"}\n```', ({"name": "Rome"},)),
        ('  ```json\n{"name": "Rome"}\n  ```', ({"name": "Rome"},)),
        ('```json\n{"name": "Rome"}\n```\n```json\nnot this\n```', None),
        ('```json\n{"name": "Rome"}', None),
        ('```\n{"name": "Rome"}\n```', None),
        ('The city is {"name": "Rome"}.', None),
        ('{"name": "Rome"} {"name": "Oslo"}', None),
        ('{"name": "Rome", "name": "Oslo"}', None),
        ('{"a": {"b": 1, "b": 1}}', None),
        ("NaN", None),
        ("[Infinity]", None),
        ("-Infinity", None),
        ("1e999", None),
        ("{'name': 'Rome'}", None),
        ('{"name": "Rome",}', None),
        ("[" * 100_000, None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_the_json_is_the_whole_answer_or_its_last_block(answer: str, expected: tuple[Any] | None) -> None:
    assert parse(answer) == expected


def test_opening_fences_do_not_make_reading_slow() -> None:
    started = time.process_time()
    assert parse("```json\n" * 50_000) is None
    assert time.process_time() - started < 2.0


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_what_json_writes_is_read_back_the_same(value: Any) -> None:  # fmt: skip
    for text in (json.dumps(value), f"So:\n```json\n{json.dumps(value, indent=1)}\n```"):
        found = parse(text)
        assert found is not None and same(found[0], value)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (False, 0, False),
        (None, False, False),
        ({"a": 1, "b": [2]}, {"b": [2.0], "a": 1}, True),
        ([1, 2], [2, 1], False),
        ([True], [1], False),
        ({"a": 1}, {"a": 1, "b": None}, False),
        ("1", 1, False),
    ],
)
def test_equality_is_jsons_and_not_pythons(one: Any, other: Any, expected: bool) -> None:
    assert same(one, other) == same(other, one) == expected


# --- validity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"name": "Rome"}', 1.0),
        ('{"name": "Rome", "founded": "0753-04-21"}', 1.0),
        ('{"name": "Rome", "founded": "yesterday"}', 0.0),
        ('{"name": "Rome", "people": 3.0}', 1.0),
        ('{"name": "Rome", "people": true}', 0.0),
        ('{"name": 1}', 0.0),
        ('{"people": 1}', 0.0),
        ('{"name": "Rome", "river": "Tiber"}', 0.0),
        ("no JSON", 0.0),
    ],
)
def test_an_answer_is_right_when_it_follows_the_schema(answer: str, expected: float) -> None:
    assert score(schema_prompt(), answer) == expected


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date-time", "2026-01-31T12:00:00Z", "2026-02-31"),
        ("email", "a@b.c", "a"),
        ("ipv4", "127.0.0.1", "300.0.0.1"),
        ("uri", "http://a.b/c", "a b"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123e"),
        ("duration", "P1D", "one day"),
        ("hostname", "a.b", "-"),
        ("regex", "a+", "("),
    ],
)
def test_a_stated_format_is_checked(name: str, good: str, bad: str) -> None:
    prompt = schema_prompt({"type": "string", "format": name})
    assert (score(prompt, json.dumps(good)), score(prompt, json.dumps(bad))) == (1.0, 0.0)


def test_equality_counts_only_where_the_details_ask_for_it() -> None:
    reference = '{"name": "Rome", "people": 3}'
    for equal, expected in ((False, 1.0), (True, 0.0)):
        prompt = schema_prompt(answer=reference, equal=equal)
        assert score(prompt, '{"name": "Oslo"}') == expected
        assert score(prompt, '```json\n{"people": 3.0, "name": "Rome"}\n```') == 1.0
        assert self_check(prompt)


def test_references_inside_the_schema_work() -> None:
    tree = {"$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}}, "$ref": "#/$defs/node"}
    assert (score(schema_prompt(tree), "[[], [[]]]"), score(schema_prompt(tree), "[[1]]")) == (1.0, 0.0)


# --- unusable details --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("details", "words"),
    [
        ("", "no JSON"),
        ("[]", "no schema"),
        ('{"schema": 1}', "no schema"),
        ('{"schema": {}, "schema": {}}', "no JSON"),
        ('{"schema": {}, "equals": true}', "expected the keys"),
        ('{"schema": {}, "equal": 1}', "expected the keys"),
        ('{"schema": {"type": "strnig"}}', "is invalid"),
        ('{"schema": {"minimum": "3"}}', "is invalid"),
        ('{"schema": {"$ref": "http://example.com/s.json"}}', "outside the schema"),
        ('{"schema": {"items": {"$ref": "other.json#/a"}}}', "outside the schema"),
        ('{"schema": {"$ref": "file:///etc/passwd"}}', "outside the schema"),
        ('{"schema": {"items": {"$ref": "#/$defs/none"}}}', "points to nothing"),
        ('{"schema": {"format": "phone"}}', "is not checked"),
    ],
)
def test_a_schema_that_cannot_judge_fails_its_self_check_with_a_reason(details: str, words: str) -> None:
    for answer in ("", "{}"):
        prompt = make_prompt("q", answer, verifier="json_schema", details=details)
        assert not self_check(prompt)
        with pytest.raises(ValueError, match=words):
            score(prompt, "{}")


def test_without_a_reference_a_schema_is_enough_and_equality_is_not() -> None:
    assert self_check(schema_prompt()) and not self_check(schema_prompt(equal=True))
    assert not self_check(schema_prompt(answer="no JSON", equal=True)) and not self_check(schema_prompt(answer='{"name": 1}'))


def test_a_property_may_be_called_like_a_keyword() -> None:
    prompt = schema_prompt({"properties": {"$ref": {"type": "string"}, "format": {"const": {"format": "phone"}}}})
    assert self_check(prompt) and score(prompt, '{"$ref": 1}') == 0.0 and score(prompt, '{"$ref": "x"}') == 1.0


def test_a_pattern_that_explodes_is_timed_out_and_text_without_json_needs_no_worker() -> None:
    prompt = schema_prompt({"type": "string", "pattern": "^(a+)+$"})
    answers = ["no JSON", json.dumps("a" * 40 + "b"), json.dumps("aa")]
    judgements = judge([Item(prompt, answer) for answer in answers], timeout_s=1.0, num_workers=1)
    assert judgements == [WRONG, Judgement("unjudged", "timed_out", 0.0), RIGHT]
    assert VERIFIERS["json_schema"].quick is not None and VERIFIERS["json_schema"].quick(prompt, '"x"') is None
