"""The teacher's best logits of each trace: side segments beside the traces, keyed by trace_id, prunable.

They are large (128 of them take 100 MB on a trace of 131,072 tokens), so they never ride in the trace segments, and a
run whose `logits` folder was deleted loses nothing else. A token's logits are stored below its best one, in half
precision: what carries probability lies near zero, where half precision is fine (2^-11 of the value), and the whole
distribution is kept exact by log Z, which moves by the same amount.

Legend: T tokens, K kept logits, C temperatures.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from configs.schema import KeptLogits
from data.engine import TopLogits
from data.store import RunFolder, commit_segment, read_first_copies, read_segment, segments

LOGITS = pa.schema(
    [
        ("trace_id", pa.string()),
        ("worker", pa.string()),
        ("top_k", pa.int32()),
        ("temperatures", pa.list_(pa.float64())),
        ("ids", pa.large_list(pa.int32())),  # 64-bit offsets: 2^31 ids are 128 traces of 131,072 tokens
        ("logits", pa.large_list(pa.float16())),
        ("log_z", pa.large_list(pa.float32())),
    ]
)


class StoredLogits(NamedTuple):
    """Of one trace's generated tokens. log p of a kept id at temperatures[c] is logits / temperature - log_z; logits of
    the likeliest id are 0."""

    trace_id: str
    temperatures: tuple[float, ...]
    top: TopLogits


def bytes_per_token(kept: KeptLogits) -> int:
    """Uncompressed: an id and half a float for each logit, one float for each temperature."""
    return kept.top_k * 6 + len(kept.temperatures) * 4


def to_row(trace_id: str, worker: str, top: TopLogits, temperatures: Sequence[float]) -> dict[str, object]:
    """The row of LOGITS for one trace."""
    best_T1 = top.logits_TK[:, :1]
    shift_TC = best_T1.astype(np.float64) / np.asarray(temperatures)
    return {
        "trace_id": trace_id,
        "worker": worker,
        "top_k": top.ids_TK.shape[1],
        "temperatures": list(temperatures),
        "ids": top.ids_TK.ravel(),
        "logits": (top.logits_TK - best_T1).astype(np.float16).ravel(),
        "log_z": (top.log_z_TC - shift_TC).astype(np.float32).ravel(),
    }


def commit_logits(run: RunFolder, rows: Sequence[Mapping[str, object]], *, worker: str) -> None:
    """Durable before the traces they belong to: a trace is never without its logits, and a worker killed in between
    leaves logits that no trace claims."""
    if rows:
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=LOGITS)
        commit_segment(run.logits, table, worker=worker, facts={"trace_ids": [row["trace_id"] for row in rows]})


def read_logits(run: RunFolder) -> Iterator[StoredLogits]:
    """Of each trace that counts, the logits by the worker that wrote it: in bf16 two workers' copies of a trace may differ,
    and logits of the other one would belong to other tokens. Raises UnusableInput when a segment is damaged."""
    writers: dict[str, str] = {}
    for table in read_first_copies(run.traces):
        writers |= dict(zip(table["trace_id"].to_pylist(), table["worker"].to_pylist(), strict=True))
    for segment in segments(run.logits) if run.logits.is_dir() else ():
        table = read_segment(segment)
        for row in range(table.num_rows):
            cell = {name: table[name][row] for name in LOGITS.names}
            if writers.get(cell["trace_id"].as_py()) != cell["worker"].as_py():
                continue
            temperatures, top_k = tuple(cell["temperatures"].as_py()), cell["top_k"].as_py()
            ids, logits, log_z = (cell[name].values.to_numpy(zero_copy_only=False) for name in ("ids", "logits", "log_z"))
            top = TopLogits(
                ids.reshape(-1, top_k), logits.astype(np.float32).reshape(-1, top_k), log_z.reshape(-1, len(temperatures))
            )
            yield StoredLogits(cell["trace_id"].as_py(), temperatures, top)
