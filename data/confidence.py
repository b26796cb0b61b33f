"""How sure the teacher was of what it wrote: from the logprobs that a trace has stored, with no further call.

Over the generated tokens of a trace, l = natural log probability of each sampled token under the unmodified distribution:

    answer      mean l over the answer, the last answer_tokens generated ids. exp(answer) is the answer's geometric mean
                probability per token, the length-normalised likelihood (Malinin and Gales 2021, arXiv 2002.07650, eq. 5).
    reasoning   mean l over everything generated before the answer.
    lowest      least mean l over any `window` successive generated tokens (the whole, where it is shorter): one lost passage
                sinks a trace whose mean looks well ("lowest group confidence", DeepConf, arXiv 2508.15260; there over
                the top-k candidates, which are not stored).

A whole segment at a time, without a Python loop over tokens.  N traces    T tokens    U turns
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

VERSION = 1
WINDOW_TOKENS = 128
FLOOR = -20.0
"""p = 2e-9. A sampled token is never rarer under top_p; what is lower is a server's stand-in for "not among the top" (-9999)."""
FIXED_POINT = float(1 << 24)
"""Logprobs are summed as integer multiples of 2**-24, the resolution of a float32 at 0.5. Integer sums are exact, so a figure
does not depend on which other traces stood in the segment: 2**24 x 20 x 10**7 tokens is 3e15, far below 2**63."""
BATCH_TOKENS = 1 << 20
"""Held as 8-byte sums at a time: 30 MB, also for a segment of 128 k-token traces."""


class Confidence(NamedTuple):
    """Mean natural logprobs, in [FLOOR, 0]; NaN where no token of that part has one. Each float64 [N]."""

    answer_N: np.ndarray
    reasoning_N: np.ndarray
    lowest_N: np.ndarray


class _Generated(NamedTuple):
    """The generated tokens of N traces, one trace after the other. complete_N: every generated id has its logprob."""

    logprobs_T: np.ndarray
    ends_N: np.ndarray
    complete_N: np.ndarray


def confidence(
    turns: pa.Array | pa.ChunkedArray, answer_tokens_N: np.ndarray, *, window_tokens: int = WINDOW_TOKENS
) -> Confidence:
    """turns: the column of data.schema.TRACE. answer_tokens_N: generated ids of the answer, stop token included.

    A trace whose generated turns lack some logprobs (a server that gives none, or not for every id) has NaN throughout: nobody
    knows which token a logprob belongs to. A logprob that is null or NaN by itself is left out of the means.
    """
    parts = [
        _of_batch(batch, np.asarray(answer_tokens_N[start : start + len(batch)], np.int64), window_tokens)
        for start, batch in _batches(turns)
    ]
    empty = np.empty(0)
    return (
        Confidence(*(np.concatenate([empty, *column]) for column in zip(*parts, strict=True)))
        if parts
        else Confidence(*[empty] * 3)
    )


def _batches(turns: pa.Array | pa.ChunkedArray) -> Iterator[tuple[int, pa.ListArray]]:
    """(first row, rows) with about BATCH_TOKENS generated tokens each, never fewer than one row."""
    start = 0
    for chunk in turns.chunks if isinstance(turns, pa.ChunkedArray) else [turns]:
        tokens_N = np.cumsum(_logprobs_of_each(chunk))
        row = 0
        while row < len(chunk):
            before = tokens_N[row - 1] if row else 0
            stop = max(row + 1, int(np.searchsorted(tokens_N, before + BATCH_TOKENS, side="right")))
            yield start + row, chunk.slice(row, stop - row)
            row = stop
        start += len(chunk)


def _logprobs_of_each(turns: pa.ListArray) -> np.ndarray:
    """Stored logprobs of each trace, whoever wrote them: int64 [N]."""
    _, _, _, logprobs = turns.flatten().flatten()
    return np.bincount(_trace_of_each(turns), _lengths(logprobs), minlength=len(turns)).astype(np.int64)


def _trace_of_each(turns: pa.ListArray) -> np.ndarray:
    """Position of its trace, for each turn: int64 [U]."""
    return turns.value_parent_indices().to_numpy()


def _lengths(lists: pa.ListArray) -> np.ndarray:
    """int64 [U]; a null has none."""
    return np.nan_to_num(lists.value_lengths().to_numpy(zero_copy_only=False)).astype(np.int64)


def _of_batch(turns: pa.ListArray, answer_tokens_N: np.ndarray, window_tokens: int) -> Confidence:
    generated = _generated(turns)
    ends_N = generated.ends_N
    starts_N = np.concatenate([[0], ends_N[:-1]])
    answers_N = np.maximum(ends_N - answer_tokens_N, starts_N)
    known_T = ~np.isnan(generated.logprobs_T)
    held_T = np.clip(np.nan_to_num(generated.logprobs_T), FLOOR, 0.0).astype(np.float64)
    fixed_T = np.rint(held_T * FIXED_POINT).astype(np.int64)
    sums, counts = (np.concatenate([[0], np.cumsum(values)]) for values in (fixed_T, known_T))

    def mean(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        number = counts[end] - counts[begin]
        return np.where(number > 0, (sums[end] - sums[begin]) / (np.maximum(number, 1) * FIXED_POINT), np.nan)

    lowest_N = _lowest(sums, counts, starts_N, ends_N, window_tokens)
    lowest_N = np.where(ends_N - starts_N > window_tokens, lowest_N, mean(starts_N, ends_N))
    columns = (mean(answers_N, ends_N), mean(starts_N, answers_N), lowest_N)
    return Confidence(*(np.where(generated.complete_N, column, np.nan) for column in columns))


def _generated(turns: pa.ListArray) -> _Generated:
    flat = turns.flatten()
    _, token_ids, origin, logprobs = flat.flatten()
    mine_U = origin.to_numpy(zero_copy_only=False) == "generated"
    trace_U = _trace_of_each(turns)[mine_U]
    ids_U, logs_U = _lengths(token_ids)[mine_U], _lengths(logprobs)[mine_U]
    values_T = logprobs.filter(pa.array(mine_U)).flatten().to_numpy(zero_copy_only=False)
    partial_N = np.bincount(trace_U, ids_U != logs_U, minlength=len(turns)) > 0
    ends_N = np.cumsum(np.bincount(trace_U, logs_U, minlength=len(turns)).astype(np.int64))
    return _Generated(values_T, ends_N, ~partial_N)


def _lowest(sums: np.ndarray, counts: np.ndarray, starts_N: np.ndarray, ends_N: np.ndarray, window: int) -> np.ndarray:
    """Least mean over the windows inside each trace that is longer than one; NaN for the others. Windows without any logprob are
    passed over. sums, counts: running totals, one longer than the tokens.

    Means are taken of every window of the batch, across traces too, and those are left out of the minimum: shifted slices cost
    a fifth of picking the right windows one by one.
    """
    lowest_N = np.full(len(starts_N), np.nan)
    long = np.flatnonzero(ends_N - starts_N > window)
    if len(long):
        number = counts[window:] - counts[:-window]
        means = np.full(len(number) + 1, np.nan)  # one more: reduceat takes no end beyond its input
        np.divide(sums[window:] - sums[:-window], number * FIXED_POINT, out=means[:-1], where=number > 0)
        between = np.column_stack([starts_N[long], ends_N[long] - window + 1]).ravel()
        lowest_N[long] = np.fmin.reduceat(means, between)[::2]
    return lowest_N
