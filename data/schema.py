"""Versioned Arrow schemas of the records, and the way in and out of them.

What cost money is never asked for again: prompts and traces of every readable version are read, and a column that they lack
has the default that CHANGES states. What is made of them (verdicts, dataset) is read in the same way, and made again by the
next build.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import pyarrow as pa

from configs.errors import UnusableInput
from data.records import Prompt, Trace, Turn, Verdict


class Change(NamedTuple):
    """What a version of the run folder changed.

    added: by record, the columns that files of earlier versions lack, and the value that is read there. `Row` is a row of the
    dataset (data/shards.py), which the next build writes again and nobody fills in. rebuilt: stages whose files of earlier
    versions do not count as complete, because making them again costs time only.
    """

    what: str
    added: Mapping[str, Mapping[str, object]] = {}
    rebuilt: tuple[str, ...] = ()


CHANGES: Mapping[int, Change] = {
    2: Change("manifests have a checksum of their own"),
    3: Change(
        "verdicts have a detail, traces their evidence, rows of the dataset a provenance",
        added={"Verdict": {"detail": ""}, "Row": {"provenance": ""}},
        rebuilt=("data",),
    ),
    4: Change("rows of the dataset say what tools they were prompted with", added={"Row": {"tools": ""}}, rebuilt=("data",)),
    5: Change("prompts say which item they ask in other words", added={"Prompt": {"twin_of": ""}}),
}
"""Every version that this release reads, and what came with it."""
OLDEST_VERSION, SCHEMA_VERSION = min(CHANGES), max(CHANGES)

# Messages are text only: tool schemas and other open-ended structs travel as JSON strings, because Arrow unifies struct
# fields across rows and one tool's null keys would leak into another's schema.
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("reasoning_content", pa.string())])
_TURN = pa.struct(
    [("role", pa.string()), ("token_ids", pa.list_(pa.int32())), ("origin", pa.string()), ("logprobs", pa.list_(pa.float32()))]
)

PROMPT = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("task", pa.string()),
        ("prompt_version", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("answer", pa.string()),
        ("verifier", pa.string()),
        ("split", pa.string()),
        ("known", pa.bool_()),
        ("details", pa.string()),
        ("licence", pa.string()),
        ("tools", pa.string()),
        ("max_tokens", pa.int32()),
        ("reasoning_budget", pa.int32()),
        ("evidence", pa.string()),
        ("provenance", pa.string()),
        ("twin_of", pa.string()),
    ]
)
TRACE = pa.schema(
    [
        ("trace_id", pa.string()),
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("source", pa.string()),
        ("task", pa.string()),
        ("prompt_version", pa.string()),
        ("model_id", pa.string()),
        ("model_revision", pa.string()),
        ("teacher_fingerprint", pa.string()),
        ("engine", pa.string()),
        ("engine_version", pa.string()),
        ("turns", pa.list_(_TURN)),
        ("messages", pa.list_(_MESSAGE)),
        ("tools", pa.string()),
        ("raw_text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("reasoning_tokens", pa.int32()),
        ("answer_tokens", pa.int32()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("max_tokens", pa.int32()),
        ("seed", pa.int64()),
        ("expert_load", pa.string()),
        ("attempt", pa.int32()),
        ("worker", pa.string()),
        ("started_at", pa.float64()),
        ("seconds", pa.float64()),
        ("cost", pa.float64()),
        ("teacher_licence", pa.string()),
        ("source_licence", pa.string()),
        ("error", pa.string()),
        ("raw", pa.large_binary()),
    ]
)
VERDICT = pa.schema(
    [
        ("trace_id", pa.string()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("score", pa.float64()),
        ("detail", pa.string()),
    ]
)

_SCHEMAS: dict[type, pa.Schema] = {Prompt: PROMPT, Trace: TRACE, Verdict: VERDICT}
Record = TypeVar("Record", Prompt, Trace, Verdict)


def schema_hash(schema: pa.Schema) -> str:
    """Hex digest of names and types, in order."""
    return hashlib.sha256(repr([(field.name, str(field.type)) for field in schema]).encode()).hexdigest()[:16]


def to_table(records: Sequence[Record], kind: type[Record]) -> pa.Table:
    """One row a record, in the order given, under the schema of `kind`."""
    return pa.Table.from_pylist([_row(record) for record in records], schema=_SCHEMAS[kind])


def _row(record: object) -> dict[str, object]:
    """One level deep. dataclasses.asdict copies token ids one by one: 64 traces of 32,000 took 15 s, now 0.1 s."""
    row = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}  # type: ignore[arg-type]
    if "turns" in row:
        row["turns"] = [{field.name: getattr(turn, field.name) for field in dataclasses.fields(turn)} for turn in row["turns"]]
    return row


def from_table(table: pa.Table, kind: type[Record]) -> list[Record]:
    """The records of a table. Raises UnusableInput when its schema is of no readable version."""
    table = upgraded(table)
    check_schema(table, kind)
    return [kind(**_restore(row)) for row in table.to_pylist()]


def without_ids(table: pa.Table) -> list[Trace]:
    """The traces of a table with `turns` and `raw` left empty: text and figures alone. Token ids as Python objects take ten
    times as long as all the rest of a trace. Raises UnusableInput as from_table does."""
    check_schema(table, Trace)
    texts = table.select([name for name in TRACE.names if name not in ("turns", "raw")])
    return [Trace(**_restore(row), turns=()) for row in texts.to_pylist()]


def check_schema(table: pa.Table, kind: type[Record]) -> None:
    expected = _SCHEMAS[kind]
    if not table.schema.equals(expected):  # a hash of both took 0.2 ms, half of what one prompt costs
        found = schema_hash(table.schema)
        raise UnusableInput(
            f"{kind.__name__} table: schema {found}, expected {schema_hash(expected)} (version {SCHEMA_VERSION}); "
            "use the release that wrote it"
        )


def _restore(row: dict) -> dict:
    if "messages" in row:
        row["messages"] = tuple({key: text for key, text in message.items() if text is not None} for message in row["messages"])
    if "turns" in row:
        row["turns"] = tuple(
            Turn(turn["role"], tuple(turn["token_ids"]), turn["origin"], tuple(turn["logprobs"])) for turn in row["turns"]
        )
    return row


def concat(tables: Iterable[pa.Table], kind: type[Record]) -> pa.Table:
    return pa.concat_tables([_SCHEMAS[kind].empty_table(), *tables])


# --- versions ----------------------------------------------------------------------------------------------------


def check_version(what: str, version: object, revision: object) -> None:
    """Raises UnusableInput for what an earlier or later release wrote and this one cannot read. revision: of the code that
    wrote it, as its manifest says."""
    if version in CHANGES:
        return
    found = f"{what}: schema version {version}, this release reads {OLDEST_VERSION} to {SCHEMA_VERSION}"
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UnusableInput(f"{found}; a later release wrote it: update tracestill to that one (revision {revision})")
    raise UnusableInput(f"{found}; use the release that wrote it (revision {revision})")


def is_outdated(stage: str, version: int) -> bool:
    """Whether the stage's files of that version are made again."""
    return any(stage in change.rebuilt for later, change in CHANGES.items() if later > version)


def upgraded(table: pa.Table) -> pa.Table:
    """The same rows under the current schema of their record; a table that is of no earlier version comes back as it is."""
    for current, earlier in _EARLIER:
        if table.schema.equals(earlier.schema):
            return filled(table, current, earlier.defaults)
    return table


def is_readable(schema: pa.Schema, kind: type[Record]) -> bool:
    """Whether rows of that schema are records of `kind`, of this version or an earlier one."""
    return schema.equals(_SCHEMAS[kind]) or any(
        current is _SCHEMAS[kind] and schema.equals(earlier.schema) for current, earlier in _EARLIER
    )


def filled(table: pa.Table, schema: pa.Schema, defaults: Mapping[str, object]) -> pa.Table:
    """The table's columns in the schema's order, and the default in every row where it has none."""
    columns = [
        table[field.name] if field.name in table.column_names
        else pa.array([defaults[field.name]] * table.num_rows, field.type)
        for field in schema
    ]  # fmt: skip
    return pa.table(columns, schema=schema)


class Earlier(NamedTuple):
    """A record's schema as it once was, and what is read where it lacks a column."""

    schema: pa.Schema
    defaults: Mapping[str, object]


def earlier_schemas(name: str, current: pa.Schema, changes: Mapping[int, Change] = CHANGES) -> list[Earlier]:
    """Of each readable version in which the record `name` had fewer columns, newest first."""
    found: list[Earlier] = []
    defaults: dict[str, object] = {}
    for version in sorted(changes, reverse=True)[:-1]:  # what the oldest added, every version has
        if added := changes[version].added.get(name):
            defaults |= added
            found.append(Earlier(pa.schema([field for field in current if field.name not in defaults]), dict(defaults)))
    return found


_EARLIER = [(schema, earlier) for kind, schema in _SCHEMAS.items() for earlier in earlier_schemas(kind.__name__, schema)]
