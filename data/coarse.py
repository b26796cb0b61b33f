"""Which of many texts may hold an evaluation item: a sieve in front of the scan.

Coarse words are runs of ASCII letters and digits, each known by one byte that depends on its first four letters: no operators, no
normal forms. Equal codes prove nothing, and what passes for nothing costs one scan.

In a text whose other characters are all separators or operators, words that follow one another (data/characters.py) do so as
coarse words as well, less the operators. So each thing that the scan looks for (a core, a 13-gram of an original) has one n-gram
of coarse words in it that such a text must hold as well. A text with letters beyond ASCII passes unseen; what has such letters
itself is in no other text. 13-grams have several, next to each other; with STRIDE of them known, only every fourth n-gram of a
text has to be looked up.

Suffixes of arrays: V coarse words of a batch, G n-grams, T words of all entries, N texts.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.characters import ALONE, OPERATORS, WORD, class_table
from data.words import Hashes, Offsets, batches, decode

LONG, SHORT = 8, 4
"""Coarse words of an n-gram. What has fewer than SHORT cannot be sieved for."""
STRIDE = SHORT
BITS_PER_GRAM = 32
_SMALLEST_TABLE = 16
"""log2 of bits: 8 KB."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd
_LETTERS = 4
_CASE, _A, _NUM_LETTERS, _ZERO, _NUM_DIGITS = (np.uint8(number) for number in (0x20, ord("a"), 26, ord("0"), 10))
_SECOND, _THIRD = np.uint8(29), np.uint8(163)


class Grams(NamedTuple):
    """Sorted hashes of n-grams, and two bit tables that spare 1,599 of 1,600 look-ups, each some ten cache misses."""

    hashes: Hashes
    bits: NDArray[np.uint8]
    second_bits: NDArray[np.uint8]


def bit_table(hashes: Hashes) -> NDArray[np.uint8]:
    """2**k bits, 32 to 64 for a hash; the bit of a hash's k leading binary digits is 1. An empty table for no hash."""
    if not len(hashes):
        return np.zeros(0, np.uint8)
    digits = max(_SMALLEST_TABLE, (BITS_PER_GRAM * len(hashes) - 1).bit_length())
    places = (hashes >> np.uint64(64 - digits)).astype(np.int64)
    table = np.zeros(1 << (digits - 3), np.uint8)
    np.bitwise_or.at(table, places >> 3, np.left_shift(1, places & 7).astype(np.uint8))
    return table


def may_hold(table: NDArray[np.uint8], hashes: Hashes) -> Offsets:
    """Where the hashes' bits are set: every hash of the table, and of others about one in 40."""
    if not len(table):
        return np.zeros(0, np.int64)
    digits = len(table).bit_length() + 2
    places = (hashes >> np.uint64(64 - digits)).view(np.int64)
    bits = table.take(places >> 3)
    places &= 7
    bits >>= places.astype(np.uint8)
    bits &= np.uint8(1)
    return np.flatnonzero(bits.view(np.bool_))


def is_member(values: Hashes, ascending: Hashes) -> NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(values), np.bool_)
    return ascending[np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)] == values


def make_grams(hashes: Hashes) -> Grams:
    ascending = np.sort(hashes)
    return Grams(ascending, bit_table(hashes), bit_table(hashes * _MULTIPLIER))


class Coarse(NamedTuple):
    """codes_V: uint8, a hash of the first four letters. pairs_V: int64, in which pair of the bytes they begin, ascending."""

    codes_V: NDArray[np.uint8]
    pairs_V: Offsets


def coarse_words(joined: bytes) -> Coarse:
    """Every coarse word of some bytes. Whatever parts texts must be a separator.

    The code of each byte's next four letters is computed for all bytes alike, in 8 bits and without an index: 4 microseconds a
    step for 64 KB, where reading eight bytes at each word takes 55. Only then are words counted. Two of them begin two bytes
    apart or more, so of two neighbouring bytes one at most begins a word, and half as many places are looked through.
    """
    num_places = len(joined) + 2 - len(joined) % 2
    bytes_B = np.frombuffer(joined + bytes(num_places + _LETTERS - 1 - len(joined)), np.uint8)
    letters_B = bytes_B | _CASE
    is_word_B = letters_B - _A < _NUM_LETTERS
    is_word_B |= bytes_B - _ZERO < _NUM_DIGITS
    in_word_B = is_word_B.view(np.uint8)
    letters_B *= in_word_B
    twos_B = letters_B[:-1] * _SECOND
    twos_B += letters_B[1:]
    twos_B *= in_word_B[:-1]
    codes_B = twos_B[:-2] * _THIRD
    codes_B += twos_B[2:] * in_word_B[1:-2]
    begins_B = np.empty(num_places, np.bool_)
    begins_B[0] = is_word_B[0]
    np.greater(is_word_B[1:num_places], is_word_B[: num_places - 1], out=begins_B[1:])
    codes_B *= begins_B.view(np.uint8)
    pairs_V = np.flatnonzero(begins_B.view(np.uint16) != 0)
    codes_V = codes_B.view(np.uint16).take(pairs_V)
    codes_V |= codes_V >> 8
    return Coarse(codes_V.astype(np.uint8), pairs_V)


def gram_hashes(codes_V: NDArray[np.uint8], n: int) -> Hashes:
    """uint64 of every n (LONG or SHORT) codes in a row: those n bytes, mixed. [max(0, V - n + 1)]"""
    packed: NDArray[np.unsignedinteger] = codes_V
    for width, dtype in ((1, np.uint16), (2, np.uint32), (4, np.uint64)):
        if width < n:
            wide = packed.astype(dtype)
            packed = wide[width:] << dtype(8 * width)
            packed |= wide[: max(0, len(wide) - width)]
    return _mixed(packed.astype(np.uint64))


def strided_hashes(codes_V: NDArray[np.uint8]) -> Hashes:
    """Of all that gram_hashes(codes_V, LONG) gives every STRIDE-th, without the others."""
    fours = codes_V[: len(codes_V) // STRIDE * STRIDE].view("<u4").astype(np.uint64)
    packed = fours[1:] << np.uint64(32)
    packed |= fours[:-1]
    return _mixed(packed)


def _mixed(packed: Hashes) -> Hashes:
    """A bijection of 64 bits, after which the leading ones depend on all; in place."""
    packed *= _MULTIPLIER
    packed ^= packed >> np.uint64(32)
    packed *= _MULTIPLIER
    return packed


# --- what is sieved for ------------------------------------------------------------------------------------------


class Sieve(NamedTuple):
    """long, short: n-grams of LONG and of SHORT coarse words. strided: of LONG ones, of each thing looked for STRIDE that begin
    one word after the other. is_open: something cannot be sieved for; every text passes."""

    long: Grams
    short: Grams
    strided: Grams
    is_open: bool


def make_sieve(words: Iterable[str], spans: Iterable[tuple[int, int, bool]]) -> Sieve:
    """words: normal forms of all entries, one after the other. spans: (first, end, any place will do) of what is looked for.
    Where any place will do, the rarest n-gram of the span is taken, the last of equals; elsewhere the first ones."""
    listed = list(words)
    is_plain_T = np.array([word.isascii() for word in listed], np.bool_)
    is_coarse_T = np.array([word[0] not in OPERATORS for word in listed], np.bool_)
    coarse = [word if plain and is_word else "x" for word, plain, is_word in zip(listed, is_plain_T, is_coarse_T, strict=True)]
    codes_T = coarse_words(" ".join(coarse).encode()).codes_V
    places = np.flatnonzero(is_coarse_T)  # of coarse words among all
    before = np.concatenate([[0], np.cumsum(is_coarse_T)])
    foreign = np.concatenate([[0], np.cumsum(~is_plain_T)])
    grams = {n: gram_hashes(codes_T[places], n) for n in (LONG, SHORT)}
    ascending = {n: np.sort(hashes) for n, hashes in grams.items()}
    chosen: dict[int, list[np.uint64]] = {LONG: [], SHORT: []}
    strided: list[int] = []
    is_open = False
    for first, end, anywhere in spans:
        if foreign[end] > foreign[first]:
            continue
        begin, stop = int(before[first]), int(before[end])
        n = LONG if stop - begin >= LONG else SHORT
        if stop - begin < n:
            is_open = True
        elif anywhere:
            own = grams[n][begin : stop - n + 1]
            count = np.searchsorted(ascending[n], own, side="right") - np.searchsorted(ascending[n], own)
            chosen[n].append(own[len(own) - 1 - int(np.argmin(count[::-1]))])
        elif stop - begin >= LONG + STRIDE - 1:
            strided += range(begin, begin + STRIDE)
        else:
            chosen[n].append(grams[n][begin])
    long, short = (make_grams(np.array(chosen[n], np.uint64)) for n in (LONG, SHORT))
    return Sieve(long, short, make_grams(grams[LONG][np.array(sorted(set(strided)), np.int64)]), is_open)


# --- sieving -----------------------------------------------------------------------------------------------------


def sieved(
    sieve: Sieve, texts: Sequence[str], most_words: int = 0, are_prompts: Sequence[bool] | None = None
) -> Iterator[Offsets]:
    """Ascending indices of the texts that may hold something, and of the prompts with at most most_words, a batch at a time."""
    for batch in batches(texts):
        if sieve.is_open:
            yield np.arange(batch.start, batch.stop)
        else:
            encoded = [texts[index].encode("utf-8", "surrogatepass") for index in batch]
            is_prompt_N = np.array([are_prompts is not None and are_prompts[index] for index in batch], np.bool_)
            yield batch.start + _sieved_batch(sieve, encoded, most_words, is_prompt_N)


def _sieved_batch(sieve: Sieve, encoded: Sequence[bytes], most_words: int, is_prompt_N: NDArray[np.bool_]) -> Offsets:
    coarse = coarse_words(b"\n".join(encoded))
    pairs_N1 = np.cumsum([0, *(len(text) + 1 for text in encoded)]) // 2  # at or before the text's first word, after all earlier
    passes_N = np.diff(np.searchsorted(coarse.pairs_V, pairs_N1)) <= most_words
    passes_N &= is_prompt_N
    for found in _places(sieve, coarse.codes_V):
        passes_N[np.searchsorted(pairs_N1, coarse.pairs_V[found], side="right") - 1] = True
    passes_N[_with_letters_beyond_ascii(encoded)] = True
    return np.flatnonzero(passes_N)


def _places(sieve: Sieve, codes_V: NDArray[np.uint8]) -> Iterator[Offsets]:
    """Coarse words at which something begins that is sieved for."""
    if len(sieve.strided.hashes):
        yield _found(sieve.strided, strided_hashes(codes_V)) * STRIDE
    for grams, n in ((sieve.short, SHORT), (sieve.long, LONG)):
        if len(grams.hashes):
            yield _found(grams, gram_hashes(codes_V, n))


def _found(grams: Grams, hashes_G: Hashes) -> Offsets:
    """Where an n-gram stands that is sieved for; n-grams over the end of a text are no harm."""
    likely = may_hold(grams.bits, hashes_G)
    likely = likely[may_hold(grams.second_bits, hashes_G[likely] * _MULTIPLIER)]
    return likely[is_member(hashes_G[likely], grams.hashes)] if len(likely) else likely


def _with_letters_beyond_ascii(encoded: Sequence[bytes]) -> Offsets:
    """Indices of the texts with such letters, some of them more than once. Dashes and quotes are no letters."""
    numbers = [number for number, text in enumerate(encoded) if not text.isascii()]
    leads_C, _, code_points_C = decode(b"".join(encoded[number] for number in numbers))
    classes_C = class_table().take(code_points_C, mode="clip") if numbers else leads_C
    letters = leads_C[(classes_C == WORD) | (classes_C == ALONE)]
    ends = np.cumsum([len(encoded[number]) for number in numbers], dtype=np.int64)
    return np.array(numbers, np.int64)[np.searchsorted(ends, letters, side="right")]
