"""What a trace is, in columns: identity, sizes, licences, and the hashes by which copies of it are found."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.dedup import conversation_key
from data.look import Look

VERSION = 1

FACTS = pa.schema(
    [
        ("trace_id", pa.string()),
        ("prompt_id", pa.string()),
        ("task", pa.string()),
        ("source", pa.string()),
        ("model_id", pa.string()),
        ("model_revision", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("reasoning_tokens", pa.int32()),
        ("answer_tokens", pa.int32()),
        ("text_bytes", pa.int64()),
        ("cost", pa.float64()),
        ("seconds", pa.float64()),
        ("teacher_licence", pa.string()),
        ("source_licence", pa.string()),
        ("conversation", pa.binary(16)),
    ]
)
"""text_bytes: UTF-8 of all messages. conversation: hash of everything that training would see, runs of whitespace made one."""


def facts(look: Look) -> pa.Table:
    """One row a trace of the look."""
    columns = {name: look.table[name] for name in FACTS.names if name in look.table.column_names}
    columns["text_bytes"] = pa.array(text_bytes(look.table["messages"]))
    columns["conversation"] = pa.array([conversation_key(trace.messages) for trace in look.traces], pa.binary(16))
    return pa.table([columns[name] for name in FACTS.names], schema=FACTS)


def text_bytes(messages: pa.ChunkedArray) -> np.ndarray:
    """int64: bytes of every field of every message, a row each."""
    lists = messages.combine_chunks()
    said = lists.flatten()
    lengths = np.zeros(len(said) + 1, np.int64)
    for field in said.type.names:
        num_bytes = pc.call_function("binary_length", [said.field(field)])
        lengths[1:] += num_bytes.fill_null(0).to_numpy(zero_copy_only=False)
    counts_L = lists.value_lengths().to_numpy(zero_copy_only=False)
    return np.diff(np.cumsum(lengths)[np.concatenate(([0], np.cumsum(counts_L)))])
