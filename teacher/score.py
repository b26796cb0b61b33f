"""Log-probabilities of given sequences: one pass over each, in chunks, through the same cache as decoding.

Legend: B rows, S tokens of a chunk, T columns, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from teacher.cache import SlotCache
from teacher.decode import PADDING_ID, Forward
from teacher.sampling import token_logprobs

LOGITS_PER_PASS = 1 << 26  # float32 logits held at once: 256 MB


def score_sequences(
    forward: Forward,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int,
    num_layers: int,
    vocab_size: int,
    device: torch.device,
    any_rank_has_work: Callable[[bool], bool] = bool,
) -> list[list[float]]:
    """Per-token natural-log probabilities, in the order given; a sequence's first token has no prediction and gets 0.0.

    Ranks that share a model call this together, each with its own sequences: as in `decode`, every pass is agreed on.
    """
    scores: list[list[float]] = [[] for _ in sequences]
    by_length = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    chunk = max(1, LOGITS_PER_PASS // (vocab_size * batch_size))
    work = iter([(batch, start) for batch in batches for start in range(0, len(sequences[batch[0]]), chunk)])
    cache = SlotCache(batch_size, num_layers, device)
    while any_rank_has_work((item := next(work, None)) is not None):
        if item is None:
            zero_11 = torch.zeros(1, 1, dtype=torch.long, device=device)
            forward(zero_11, zero_11, (zero_11 == 0)[None, None], None, keep=1)
            continue
        batch, start = item
        rows = [sequences[index] for index in batch]
        scores_BS = _score_chunk(forward, cache, rows, start, min(len(rows[0]), start + chunk))
        for index, row, values in zip(batch, rows, scores_BS.tolist(), strict=True):
            scores[index] += values[: max(0, len(row) - start)]
    return [[0.0, *values[:-1]] for values in scores]


def _score_chunk(forward: Forward, cache: SlotCache, rows: Sequence[Sequence[int]], start: int, stop: int) -> Tensor:
    """float64 log-probability of the token after each of columns [start, stop); what stands past a row's end is noise."""
    padded = [[*row[start : stop + 1], *([PADDING_ID] * (stop + 1 - max(start, len(row))))][: stop + 1 - start] for row in rows]
    ids_BS = torch.tensor(padded, device=cache.device)
    positions_S = torch.arange(start, stop, device=cache.device)
    mask_ST = torch.arange(stop, device=cache.device) <= positions_S[:, None]
    cache.select_span(slice(0, len(rows)), start, stop)
    mask_B1ST = mask_ST.expand(len(rows), 1, -1, -1)
    inputs_BS, next_BS = ids_BS[:, :-1], ids_BS[:, 1:]
    logits_BSV = forward(inputs_BS, positions_S.expand_as(inputs_BS), mask_B1ST, cache, keep=stop - start)
    return token_logprobs(logits_BSV.float().flatten(0, 1), next_BS.flatten()).view_as(next_BS)
