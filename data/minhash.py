"""What near deduplication keeps of a text: 128 bytes whose agreement is the Jaccard similarity of two texts' shingles.

A shingle is five consecutive words (data.words: case, punctuation and line breaks gone). Every shingle falls into one of 128
slots with one hash, and a slot keeps its smallest; slots that stay empty are thrown for again, with the next round's hash,
until none is empty (fast similarity sketching: Dahlgaard, Knudsen, Thorup, FOCS 2017, arXiv 1704.04370). Two texts agree in a
slot with probability exactly their Jaccard similarity, as with 128 permutations, for a hundredth of the hashes and with
less noise, because a slot draws from shingles no other slot has. Root mean square error at a true similarity of 0.8,
3,000 pairs, 45 / 100 / 330 / 1,000 shingles a text:

    this                                  0.025  0.026  0.030  0.034
    128 permutations                      0.036  0.036  0.036  0.035
    one permutation, optimal densification 0.039  0.035  0.031  0.034

Of a slot's 32-bit minimum one byte is kept. Two different minima agree in it once in 256, which `similarity` takes out
again; the noise that adds is a hundredth of the noise there is. A million traces are 128 MB instead of 512.

Suffixes of arrays: N texts, S slots, G shingles.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data import words
from data.words import ngram_hashes

VERSION = 100 * words.VERSION + 1
SHINGLE_WORDS = 5
NUM_SLOTS = 128
LEAST_SHINGLES = 20
"""Of a text with fewer different shingles nothing is kept. near_dedup.least_shingles says which texts are compared."""

_BATCH_CHARACTERS = 1 << 17
"""26 us a text of 2.5 KB on an idle core with 2 MB of cache, 30 at half or four times the size: smaller batches pay for numpy's
calls, larger ones for arrays that leave the cache. One longer text is a batch alone."""
_EMPTY = np.uint32(0xFFFFFFFF)
_SLOT_SHIFT, _VALUE_SHIFT = np.uint64(57), np.uint64(26)
_VALUE_MASK = np.uint32(0x7FFFFFFF)
"""The top 7 bits name the slot, the next 31 are the value, so that none is _EMPTY."""
_MULTIPLIER = 0x9E3779B97F4A7C15
_CHANCE = 1 / 256


class Signatures(NamedTuple):
    """slots_NS: uint8 [N, 128], zeros for a text below LEAST_SHINGLES. shingles_N: float32 [N], different shingles, estimated by
    how many slots one throw filled (standard deviation 3 at 45, 16 at 195; never above 621). 132 bytes a text."""

    slots_NS: NDArray[np.uint8]
    shingles_N: NDArray[np.float32]


def signatures(texts: Sequence[str]) -> Signatures:
    """One row a text, in order; a row depends on its own text alone, whatever stands beside it.

    Hand over what the model wrote (reasoning and answer), without the prompt: two answers to one long prompt would agree in the
    prompt's shingles, and one of them would be called a copy.
    """
    slots_NS = np.zeros((len(texts), NUM_SLOTS), np.uint8)
    shingles_N = np.zeros(len(texts), np.float32)
    for first, last in _batches(texts):
        slots_NS[first:last], shingles_N[first:last] = _sketch(texts[first:last])
    return Signatures(slots_NS, shingles_N)


def similarity(agreeing: NDArray[np.int64]) -> NDArray[np.float64]:
    """The estimated Jaccard similarity of texts that agree in so many slots; below 0 by chance where it is 0."""
    return (agreeing / NUM_SLOTS - _CHANCE) / (1 - _CHANCE)


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of at most _BATCH_CHARACTERS, or of one text."""
    first = characters = 0
    for index, text in enumerate(texts):
        if index > first and characters + len(text) > _BATCH_CHARACTERS:
            yield first, index
            first, characters = index, 0
        characters += len(text)
    if first < len(texts):
        yield first, len(texts)


def _sketch(texts: Sequence[str]) -> Signatures:
    shingles = ngram_hashes(words.words(texts), SHINGLE_WORDS)
    row_G = shingles.text_G
    row_G *= NUM_SLOTS
    smallest_NS = np.full((len(texts), NUM_SLOTS), _EMPTY)
    drawn_G, slot_G = _draw(shingles.hashes_G, row_G, 0)
    _keep_smallest(smallest_NS.ravel(), drawn_G, slot_G)
    shingles_N = _linear_count(np.count_nonzero(smallest_NS != _EMPTY, axis=1))
    smallest_NS[shingles_N < LEAST_SHINGLES] = 0  # full: no further round is for them
    _fill(smallest_NS, shingles.hashes_G, row_G)
    return Signatures(smallest_NS.astype(np.uint8), shingles_N)  # the low byte


def _fill(smallest_NS: NDArray[np.uint32], hashes_G: NDArray[np.uint64], row_G: NDArray[np.int64]) -> None:
    """No slot is empty; those that were not stay as they are. A round leaves one so with probability 0.86 at LEAST_SHINGLES, 0.07
    at 340: most texts need three."""
    turn = 1
    while (empty_NS := smallest_NS == _EMPTY).any():
        wanted_N = empty_NS.any(axis=1)
        if not wanted_N.all():
            wanted_G = np.flatnonzero(np.repeat(wanted_N, NUM_SLOTS).take(row_G))
            hashes_G, row_G = hashes_G.take(wanted_G), row_G.take(wanted_G)
        drawn_G, slot_G = _draw(hashes_G, row_G, turn)
        hits = np.flatnonzero(empty_NS.ravel().take(slot_G))
        _keep_smallest(smallest_NS.ravel(), drawn_G.take(hits), slot_G.take(hits))
        turn += 1


def _draw(hashes_G: NDArray[np.uint64], row_G: NDArray[np.int64], turn: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """This round's hash of each shingle, and the slot that it names. row_G: the first slot of the shingle's text.

    The round's hash is the shingle's times an odd number: multiply-shift, which is enough for hashes that are mixed already.
    """
    drawn_G = hashes_G * np.uint64(pow(_MULTIPLIER, turn + 1, 1 << 64))
    slot_G = (drawn_G >> _SLOT_SHIFT).view(np.int64)
    slot_G += row_G
    return drawn_G, slot_G


def _keep_smallest(smallest: NDArray[np.uint32], drawn: NDArray[np.uint64], slots: NDArray[np.int64]) -> None:
    """Each slot holds the smallest of what it held and the values drawn for it."""
    np.minimum.at(smallest, slots, (drawn >> _VALUE_SHIFT).astype(np.uint32) & _VALUE_MASK)


def _linear_count(filled_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """How many different things fill so many of 128 slots (Whang et al. 1990). All 128 count as 127: 621."""
    return (-NUM_SLOTS * np.log1p(-np.minimum(filled_N, NUM_SLOTS - 1) / NUM_SLOTS)).astype(np.float32)
