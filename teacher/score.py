"""Log-probabilities of given sequences: one pass over each, in chunks, through the same cache as decoding.

Legend: B rows, S tokens of a chunk, T columns, V vocabulary, K kept logits, C temperatures.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from configs.errors import UnusableInput
from data.engine import Scores
from teacher.admission import Rectangle
from teacher.cache import SlotCache
from teacher.decode import PADDING_ID, Agreed, Forward, Limits, dummy_pass
from teacher.row import stack
from teacher.sampling import Best, best_logits, token_logprobs

LOGITS_PER_PASS = 1 << 26  # float32 logits held at once: 256 MB


class Wanted(NamedTuple):
    """Logits to keep of each prediction (0: none), and the temperatures of their log Z."""

    top_logits: int = 0
    log_z_temperatures: Sequence[float] = (1.0,)


def score_sequences(
    forward: Forward,
    sequences: Sequence[Sequence[int]],
    wanted: Wanted,
    limits: Limits,
    *,
    num_layers: int,
    vocab_size: int,
    device: torch.device,
    agree: Callable[[int], int] = int,
) -> list[Scores]:
    """One Scores per sequence, in the order given.

    Ranks that share a model call this together, each with its own sequences: as in `decode`, every pass is agreed on.

    Raises:
        UnusableInput: a sequence longer than the model's positions or the cache's budget.
    """
    check_lengths(sequences, limits)
    logprobs: list[list[float]] = [[] for _ in sequences]
    best: list[list[Best]] = [[] for _ in sequences]
    work = chunks_of(sequences, limits, vocab_size)
    cache, batch_in_cache = SlotCache(0, num_layers, device), ()
    while agree(Agreed.DONE if (item := next(work, None)) is None else Agreed.WORK):
        if item is None:
            dummy_pass(forward, device)
            continue
        batch, start, stop = item
        rows = [sequences[index] for index in batch]
        if batch != batch_in_cache:
            cache, batch_in_cache = SlotCache(len(batch), num_layers, device), batch
            cache.reserve(Rectangle(len(batch), len(rows[0])))
        logprobs_BS, best_BS = _score_chunk(forward, cache, rows, start, stop, wanted)
        for slot, (index, row) in enumerate(zip(batch, rows, strict=True)):
            logprobs[index] += logprobs_BS[slot, : max(0, len(row) - start)].tolist()
            if best_BS is not None:
                best[index].append(Best(*(column[slot, : max(0, len(row) - 1 - start)] for column in best_BS)))
    return [Scores((0.0, *values[:-1])[: len(values)], stack(kept)) for values, kept in zip(logprobs, best, strict=True)]


def check_lengths(sequences: Sequence[Sequence[int]], limits: Limits) -> None:
    most = min(limits.max_length, limits.cache_tokens or limits.max_length)
    longest = max(map(len, sequences), default=0)
    if longest > most:
        raise UnusableInput(
            f"score: a sequence of {longest} tokens, expected at most {most} by the model's positions and the cache's budget"
        )


class Chunk(NamedTuple):
    """Columns [start, stop) of the sequences `batch` (indices), longest first."""

    batch: tuple[int, ...]
    start: int
    stop: int


def chunks_of(sequences: Sequence[Sequence[int]], limits: Limits, vocab_size: int) -> Iterator[Chunk]:
    """Batches of like length within the cache's budget, each in passes of bounded logits, tokens and mask."""
    by_length = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    while by_length:
        longest = len(sequences[by_length[0]])
        rows = limits.num_slots if limits.cache_tokens is None else limits.cache_tokens // max(1, longest)
        batch, by_length = tuple(by_length[: min(rows, limits.num_slots)]), by_length[min(rows, limits.num_slots) :]
        most = min(LOGITS_PER_PASS // vocab_size, limits.prefill_tokens, limits.prefill_pairs // max(1, longest))
        chunk = max(1, most // len(batch))
        yield from (Chunk(batch, start, min(longest, start + chunk)) for start in range(0, longest, chunk))


def _score_chunk(
    forward: Forward, cache: SlotCache, rows: Sequence[Sequence[int]], start: int, stop: int, wanted: Wanted
) -> tuple[Tensor, Best | None]:
    """float64 log-probability of the token after each of columns [start, stop), and the logits kept of each row and
    column ([B, S, ...] on the CPU); what stands past a row's end is noise."""
    padded = [[*row[start : stop + 1], *([PADDING_ID] * (stop + 1 - max(start, len(row))))][: stop + 1 - start] for row in rows]
    ids_BS = torch.tensor(padded, device=cache.device)
    positions_S = torch.arange(start, stop, device=cache.device)
    mask_ST = torch.arange(stop, device=cache.device) <= positions_S[:, None]
    cache.select_span(slice(0, len(rows)), start, stop)
    mask_B1ST = mask_ST.expand(len(rows), 1, -1, -1)
    inputs_BS, next_BS = ids_BS[:, :-1], ids_BS[:, 1:]
    logits_BSV = forward(inputs_BS, positions_S.expand_as(inputs_BS), mask_B1ST, cache, keep=stop - start).float()
    logprobs_BS = token_logprobs(logits_BSV.flatten(0, 1), next_BS.flatten()).view_as(next_BS)
    if not wanted.top_logits:
        return logprobs_BS, None
    best = best_logits(logits_BSV.flatten(0, 1), *wanted)
    return logprobs_BS, Best(*(column.cpu().unflatten(0, next_BS.shape) for column in best))
