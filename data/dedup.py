"""Exact deduplication: the same conversation with the same reasoning and answer, up to whitespace, is kept once."""

import hashlib
from collections.abc import Sequence

import numpy as np

from data.records import Message

VERSION = 2

_PARTS = ("role", "content", "reasoning_content")


def conversation_key(messages: Sequence[Message]) -> bytes:
    """16 bytes over every turn's role, content and reasoning, with runs of whitespace made one.

    Case and punctuation count: two traces that differ in them are two lessons for a byte-level or BPE student.
    """
    words = ("\x1f".join(message.get(part, "").split()) for message in messages for part in _PARTS)
    return hashlib.blake2b("\x1e".join(words).encode(), digest_size=16).digest()


def originals(keys_N: np.ndarray, preference_N: np.ndarray, eligible_N: np.ndarray) -> np.ndarray:
    """int64 [N]: the row of the preferred trace that each one repeats; -1 where it repeats none.

    keys_N: equal for equal conversations. preference_N: lower is kept; it must differ between any two traces, so that what
    stays depends on the traces alone and never on their order. A copy that another judgement has turned down (truncated, say)
    is neither an original nor a repeat: dropping it can never take its healthy twin along.
    """
    rows = np.flatnonzero(eligible_N)
    order = rows[np.lexsort((preference_N[rows], keys_N[rows]))]
    repeated = np.zeros(len(order), bool)
    repeated[1:] = keys_N[order[1:]] == keys_N[order[:-1]]
    first_of = np.maximum.accumulate(np.where(repeated, 0, np.arange(len(order))))  # of each run of equal keys the preferred one
    original_N = np.full(len(keys_N), -1, np.int64)
    original_N[order[repeated]] = order[first_of[repeated]]
    return original_N
