"""Versioned Arrow schemas of the records, and the way in and out of them."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

import pyarrow as pa

from configs.errors import UnusableInput
from data.records import Prompt, Trace, Turn, Verdict

SCHEMA_VERSION = 2
"""Of what a run folder holds. 2: manifests have a checksum of their own."""

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
VERDICT = pa.schema([("trace_id", pa.string()), ("verdict", pa.string()), ("reason", pa.string()), ("score", pa.float64())])

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
    """The records of a table. Raises UnusableInput when its schema is not the current one."""
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
        raise UnusableInput(f"{kind.__name__} table: schema {found}, expected {schema_hash(expected)} (version {SCHEMA_VERSION})")


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
