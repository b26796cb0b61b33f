"""What a verdict says beyond its reason: which trace a copy repeats, which benchmark item stands where in a trace.

A detail is one JSON object as text, or "" where there is nothing to say, so that one column serves every judge:

    dedup           {"original": trace_id}
    near_dedup      {"original": trace_id, "similarity": estimated Jaccard similarity of the shingles}
    decontaminate   {"item": "file:item:field", "rule": ..., "coverage": share of the item, "place": ..., "excerpt": ...,
                     "others": [[item, rule, coverage, place], ...] of further hits, where there are any}

    N traces
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

LEAK = ("item", "rule", "coverage", "place", "excerpt")
_DIGITS = 3
"""Of shares: similarity is an estimate that is off by 0.03."""

Detail = Mapping[str, Any]


def of_copies(trace_ids: pa.Array, original_N: np.ndarray, similarity_N: np.ndarray | None = None) -> pa.Array:
    """N details. original_N: the row of the trace that each one repeats, -1 for none."""
    rows = np.flatnonzero(original_N >= 0)
    originals = trace_ids.take(pa.array(original_N[rows])).to_pylist()
    if similarity_N is None:
        return _spread(len(original_N), rows, [{"original": original} for original in originals])
    similar = similarity_N[rows].tolist()
    said = [{"original": one, "similarity": round(share, _DIGITS)} for one, share in zip(originals, similar, strict=True)]
    return _spread(len(original_N), rows, said)


def of_leaks(found: pa.Table) -> pa.Array:
    """N details of data.panel's CONTAMINATION columns."""
    rows = np.flatnonzero(found["reason"].to_numpy() != "")
    leaks = found.select(list(LEAK)).take(pa.array(rows)).to_pylist()
    others = [json.loads(text) if text else [] for text in found["others"].take(pa.array(rows)).to_pylist()]
    said = [leak | {"coverage": round(leak["coverage"], _DIGITS)} for leak in leaks]
    return _spread(len(found), rows, [one | ({"others": more} if more else {}) for one, more in zip(said, others, strict=True)])


def _spread(num_traces: int, rows: np.ndarray, said: Sequence[Detail]) -> pa.Array:
    place_N = np.zeros(num_traces, np.int32)
    place_N[rows] = np.arange(1, len(rows) + 1)
    return pa.array(["", *(json.dumps(one, ensure_ascii=False) for one in said)], pa.string()).take(pa.array(place_N))


def parsed(text: str) -> Detail:
    """Empty for "". Of text that this module wrote."""
    return json.loads(text) if text else {}


def in_words(detail: Detail) -> str:
    """For a person: `copy of 5f3a..., similarity 0.91`, or the item, how much of it, where, and how the passage begins."""
    if "original" in detail:
        return f"copy of {detail['original']}" + (f", similarity {detail['similarity']:.2f}" if "similarity" in detail else "")
    if "item" in detail:
        share = f"{100 * float(detail['coverage']):.0f} % of it"
        more = f" (and {len(detail['others'])} more hits)" if "others" in detail else ""
        return f"{detail['item']} ({detail['rule']}), {share} at {detail['place']}{more}: {detail['excerpt']}"
    return ", ".join(f"{name} {value}" for name, value in detail.items())
