"""Which copy of a trace counts, from sidecars alone.

Leases are advisory, so a trace may have been finished twice. Segments form a totally ordered log: the first copy that
completed counts; where all of them are aborts, the first. Every reader uses this view; the other copies are superseded.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from data.columns import num_rows, tally, words_of

if TYPE_CHECKING:
    from data.store import Segment


def keys_of(trace_ids: Sequence[str] | str) -> np.ndarray:
    """uint64 [N, 2]: the 128 bits of each identity, from a list or a sidecar's one string. A million of them take 16 MB, as
    strings 90."""
    try:
        content = bytes.fromhex(trace_ids if isinstance(trace_ids, str) else "".join(trace_ids))
    except ValueError:
        content = b""
    if len(content) != 16 * num_rows(trace_ids):  # somebody else's identities: any text has 128 bits of its own
        words = words_of(trace_ids)
        content = b"".join(hashlib.blake2b(identity.encode(), digest_size=16).digest() for identity in words)
    return np.frombuffer(content, ">u8").astype(np.uint64).reshape(-1, 2)


def counting_rows(keys_N2: np.ndarray, is_abort_N: np.ndarray) -> np.ndarray:
    """bool [N], in log order: True for the copy that counts of each key."""
    first = np.ascontiguousarray(keys_N2[:, 0])
    order = np.argsort(first)  # rows of one key are put in order below: no stable sort, which takes three times as long
    first = first[order]
    repeated = np.zeros(len(order), dtype=bool)
    repeated[1:] = first[1:] == first[:-1]
    repeated[:-1] |= repeated[1:].copy()
    counts_N = np.ones(len(order), dtype=bool)
    best: dict[tuple[int, int], int] = {}
    for row in sorted(order[repeated].tolist()):  # few: two workers on one request, or one chance in 2^64
        key = int(keys_N2[row, 0]), int(keys_N2[row, 1])
        other = best.setdefault(key, row)
        if other != row:
            loser = other if is_abort_N[other] and not is_abort_N[row] else row
            best[key] = row if loser == other else other
            counts_N[loser] = False
    return counts_N


def segment_keys(committed: Sequence["Segment"]) -> tuple[np.ndarray, np.ndarray]:
    """keys [N, 2] and abort flags [N] of all rows of the segments, in log order."""
    keys = [keys_of(segment.facts["trace_ids"]) for segment in committed]
    aborts = [
        np.array([reason == "abort" for reason in words_of(segment.facts["finish_reasons"])], dtype=bool)
        if "abort" in tally(segment.facts.get("finish_reasons", []))
        else np.zeros(segment.rows, dtype=bool)
        for segment in committed
    ]
    empty = np.empty((0, 2), dtype=np.uint64)
    return np.concatenate([empty, *keys]), np.concatenate([np.empty(0, dtype=bool), *aborts])
