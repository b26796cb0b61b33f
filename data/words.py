"""Every word of many texts as 64 bits: one pass of numpy over their joined bytes, no Python object a word.

What a word is says data/characters.py; `words` finds the same words in the same places (tests/data/test_words.py).

Bytes are read in little-endian order whatever the machine, and nothing depends on PYTHONHASHSEED: the same texts give the same
hashes everywhere, as long as Python's Unicode tables are the same (characters.UNICODE).

Collisions: words of up to 8 bytes never collide with one another (the mixing is a bijection), others do with
2**-64 a pair; among ten million different words some pair does with probability 3e-6. Who decides on equal hashes alone can bear
that (deduplication compares sets of hundreds); who accuses (decontamination) compares the words themselves.

Suffixes of arrays: B bytes of the joined texts, N texts, N1 one more, W words, C non-ASCII characters.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.characters import (
    ALONE,
    FIRST_OF_WORDS,
    FOLD,
    NUM_CODE_POINTS,
    OPERATOR,
    SEPARATOR,
    class_table,
    normal_bytes,
)

VERSION = 1

Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]
_NOWHERE = np.zeros(0, np.int64)


class Words(NamedTuple):
    """hashes_W: uint64, of the normal form. starts_W, ends_W: int64 byte offsets into `joined`, the texts' UTF-8 with a line feed
    between them. text_offsets_N1: words of text i are those from [i] up to [i + 1]. text_starts_N1: byte offset of text i; the
    last entry is where one more text would start, len(joined) + 1."""

    hashes_W: Hashes
    starts_W: Offsets
    ends_W: Offsets
    text_offsets_N1: Offsets
    text_starts_N1: Offsets
    joined: bytes

    def raw(self, word: int) -> str:
        """The word as the text has it."""
        return self.joined[self.starts_W[word] : self.ends_W[word]].decode("utf-8", "surrogatepass")


class Ngrams(NamedTuple):
    """hashes_G: uint64. first_G: int64 index of the first of the n words. text_G: int64 index of the text all n stand in."""

    hashes_G: Hashes
    first_G: Offsets
    text_G: Offsets


# --- words -------------------------------------------------------------------------------------------------------


def words(texts: Sequence[str]) -> Words:
    """Every word of every text, in order: some 6 times the bytes of the texts, and 1 MB while it works."""
    found = [_words_of_batch([texts[index] for index in batch]) for batch in batches(texts)]
    if len(found) == 1:
        return found[0]
    return _joined(found) if found else _words_of_batch([])


def _joined(found: Sequence[Words]) -> Words:
    """One Words of several: bytes and words are counted on."""
    byte_shifts = np.cumsum([0, *(part.text_starts_N1[-1] for part in found)])
    word_shifts = np.cumsum([0, *(len(part.hashes_W) for part in found)])
    return Words(
        np.concatenate([part.hashes_W for part in found]),
        np.concatenate([part.starts_W + shift for part, shift in zip(found, byte_shifts, strict=False)]),
        np.concatenate([part.ends_W + shift for part, shift in zip(found, byte_shifts, strict=False)]),
        np.append(
            np.concatenate([part.text_offsets_N1[:-1] + shift for part, shift in zip(found, word_shifts, strict=False)]),
            word_shifts[-1],
        ),
        np.append(
            np.concatenate([part.text_starts_N1[:-1] + shift for part, shift in zip(found, byte_shifts, strict=False)]),
            byte_shifts[-1],
        ),
        b"\n".join(part.joined for part in found),
    )


def _words_of_batch(texts: Sequence[str]) -> Words:
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    joined = b"\n".join(encoded)
    text_starts_N1 = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) + 1 for text in encoded], out=text_starts_N1[1:])
    folded = joined.translate(FOLD) + bytes(8)
    classified = _classify(np.frombuffer(folded, np.uint8), joined)
    starts_W, ends_W = run_spans(classified.is_word_B)
    starts_W, ends_W = _cut(starts_W, ends_W, classified)
    starts_W, ends_W = _with_operators(starts_W, ends_W, classified.is_operator_B, joined, text_starts_N1)
    hashes_W = _hash_spans(folded, starts_W, ends_W - starts_W)
    if len(classified.foreign_C):
        hashes_W, starts_W, ends_W = _rehash(joined, hashes_W, starts_W, ends_W, classified.foreign_C)
    return Words(hashes_W, starts_W, ends_W, np.searchsorted(starts_W, text_starts_N1), text_starts_N1, joined)


BATCH_BYTES = 1 << 18
"""Small enough for the arrays of one pass to stay in the processor's cache (2 MB in one piece take half as long again on an idle
machine), large enough for the calls not to count (a busy machine, on which each finds the caches cold, is fastest at 1 MB)."""


def batches(texts: Sequence[str], batch_bytes: int = BATCH_BYTES) -> Iterator[range]:
    """Ranges of indices that cover `texts` in order, each with at least one text and at most about batch_bytes characters."""
    first = size = 0
    for index, text in enumerate(texts):
        if size and size + len(text) + 1 > batch_bytes:
            yield range(first, index)
            first, size = index, 0
        size += len(text) + 1
    if first < len(texts):
        yield range(first, len(texts))


class _Classified(NamedTuple):
    """is_word_B, is_operator_B: bool, by byte, False on the padding. alone_C, alone_ends_C: where characters that are a word
    each begin and end. foreign_C: where characters beyond ASCII begin that are part of a word or an operator."""

    is_word_B: NDArray[np.bool_]
    is_operator_B: NDArray[np.bool_]
    alone_C: Offsets
    alone_ends_C: Offsets
    foreign_C: Offsets


def _classify(folded_B: NDArray[np.uint8], joined: bytes) -> _Classified:
    is_word_B = folded_B >= FIRST_OF_WORDS
    is_operator_B = folded_B.view(np.int8) > 0
    is_operator_B ^= is_word_B & is_operator_B
    if joined.isascii():
        return _Classified(is_word_B, is_operator_B, _NOWHERE, _NOWHERE, _NOWHERE)
    leads_C, lengths_C, code_points_C = decode(joined)
    classes_C = class_table().take(np.minimum(code_points_C, NUM_CODE_POINTS))
    separates_C, operates_C, alone_C = (classes_C == kind for kind in (SEPARATOR, OPERATOR, ALONE))
    is_word_B[_bytes_of(leads_C, lengths_C, separates_C | operates_C)] = False
    is_operator_B[_bytes_of(leads_C, lengths_C, operates_C)] = True
    return _Classified(is_word_B, is_operator_B, leads_C[alone_C], (leads_C + lengths_C)[alone_C], leads_C[~separates_C])


def decode(joined: bytes) -> tuple[Offsets, Offsets, Offsets]:
    """First byte, number of bytes and code point of every character beyond ASCII."""
    bytes_B = np.frombuffer(joined + bytes(3), np.uint8)
    leads_C = np.flatnonzero(bytes_B >= 0xC0)
    lengths_C = _LENGTHS.take(bytes_B[leads_C])
    first, second, third, fourth = (bytes_B[leads_C + place].astype(np.int64) & 0x3F for place in range(4))
    four_bytes_C = (first & _PAYLOAD.take(lengths_C)) << 18 | second << 12 | third << 6 | fourth
    return leads_C, lengths_C, four_bytes_C >> 6 * (4 - lengths_C)


_LENGTHS = np.array([1] * 0xC0 + [2] * 0x20 + [3] * 0x10 + [4] * 0x10)
_PAYLOAD = np.array([0, 0, 0x1F, 0x0F, 0x07])
"""Bits of the first byte that are part of the code point, by the character's number of bytes."""


def _bytes_of(leads_C: Offsets, lengths_C: Offsets, wanted_C: NDArray[np.bool_]) -> Offsets:
    """Offsets of all bytes of the wanted characters."""
    places_C4 = leads_C[wanted_C][:, None] + np.arange(4)
    return places_C4[np.arange(4) < lengths_C[wanted_C][:, None]]


def run_spans(mask_B: NDArray[np.bool_]) -> tuple[Offsets, Offsets]:
    """Start and end of every run of True. The last entry must be False."""
    changes = np.flatnonzero(mask_B[1:] != mask_B[:-1])
    changes += 1
    if mask_B[0]:
        changes = np.concatenate([[0], changes])
    return changes[::2], changes[1::2]  # they alternate


def _cut(starts_W: Offsets, ends_W: Offsets, classified: _Classified) -> tuple[Offsets, Offsets]:
    """Spans parted before and after every character that is a word of its own."""
    if not len(classified.alone_C):
        return starts_W, ends_W
    # Not np.union1d: NumPy 2.4 finds unique integers by a hash table that took 250 ms for 65,000 offsets at a stride of 3.
    cuts = _without_repeats(_merged(classified.alone_C, classified.alone_ends_C))
    cuts = cuts[classified.is_word_B[cuts] & (cuts > 0) & classified.is_word_B[cuts - 1]]
    return _merged(starts_W, cuts), _merged(ends_W, cuts)


def _merged(one: Offsets, other: Offsets) -> Offsets:
    return np.sort(np.concatenate([one, other]), kind="stable")  # timsort: two runs are merged in linear time


def _without_repeats(ascending: Offsets) -> Offsets:
    return ascending[np.flatnonzero(np.diff(ascending, prepend=-1))]


def _with_operators(
    starts_W: Offsets, ends_W: Offsets, is_operator_B: NDArray[np.bool_], joined: bytes, text_starts_N1: Offsets
) -> tuple[Offsets, Offsets]:
    """The spans, and those of operators whose nearest word before ends, or after begins, with a digit (in the same text)."""
    if not len(starts_W) or not is_operator_B.any():
        return starts_W, ends_W
    places = np.flatnonzero(is_operator_B)
    signs = places[np.diff(places, prepend=-2) > 1]
    bytes_B = np.frombuffer(joined, np.uint8)
    after = np.searchsorted(starts_W, signs)
    before = after - 1  # -1 before the first word: the last one, which the comparison with the text's end turns down
    after_digit = _is_digit(bytes_B[ends_W[before] - 1])
    before_digit = _is_digit(bytes_B[starts_W[np.minimum(after, len(starts_W) - 1)]])
    if not (after_digit | before_digit).any():
        return starts_W, ends_W
    text = np.searchsorted(text_starts_N1, signs, side="right")
    after_digit &= (starts_W[before] >= text_starts_N1[text - 1]) & (starts_W[before] < signs)
    before_digit &= (after < len(starts_W)) & (starts_W[np.minimum(after, len(starts_W) - 1)] < text_starts_N1[text])
    counts = after_digit | before_digit
    sign_ends = places[np.diff(places, append=len(is_operator_B) + 1) > 1] + 1
    return _merged(starts_W, signs[counts]), _merged(ends_W, sign_ends[counts])


def _is_digit(bytes_: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return (bytes_ >= ord("0")) & (bytes_ <= ord("9"))


def _rehash(
    joined: bytes, hashes_W: Hashes, starts_W: Offsets, ends_W: Offsets, foreign_C: Offsets
) -> tuple[Hashes, Offsets, Offsets]:
    """Words with a character beyond ASCII have the hash of their normal form; those without any (invisible ones) are gone.

    Python sees each different one of them once a call, and remembers it: of 100,000 Chinese characters some 3,000.
    """
    word_C = np.searchsorted(starts_W, foreign_C, side="right") - 1
    word_C, foreign_C = word_C[word_C >= 0], foreign_C[word_C >= 0]
    foreign = _without_repeats(word_C[ends_W[word_C] > foreign_C])  # what is in no word is an operator that does not count
    _, once, which = np.unique(hashes_W[foreign], return_index=True, return_inverse=True)
    normal = [
        normal_bytes(joined[start:end])
        for start, end in zip(starts_W[foreign[once]].tolist(), ends_W[foreign[once]].tolist(), strict=True)
    ]
    hashes_W[foreign] = _hash_words(normal)[which]
    if all(normal):
        return hashes_W, starts_W, ends_W
    stays = np.delete(np.arange(len(starts_W)), foreign[np.array([not found for found in normal])[which]])
    return hashes_W[stays], starts_W[stays], ends_W[stays]


# --- hashes ------------------------------------------------------------------------------------------------------

_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # odd; splitmix64's
_BASE = 0x9E3779B97F4A7C15
_LOW_BYTES = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)


def _mix(x: Hashes) -> Hashes:
    """A bijection of 64 bits in which every bit of the input reaches the high ones, and the high ones the low; in place."""
    x *= _MULTIPLIER_1
    x ^= x >> np.uint64(32)
    x *= _MULTIPLIER_2
    x ^= x >> np.uint64(29)
    return x


def _hash_spans(folded: bytes, starts_W: Offsets, lengths_W: Offsets) -> Hashes:
    """uint64 of each span: mixed 8 bytes at a time, little-endian, the last ones padded with zeros (no word holds one).
    Of English words one in twenty needs a second look.
    """
    hashes_W = _mix(read_at(folded, starts_W, lengths_W))
    longer = np.flatnonzero(lengths_W > 8)
    places, left = starts_W.take(longer), lengths_W.take(longer)
    while len(longer):
        places, left = places + 8, left - 8
        block = hashes_W.take(longer)
        block ^= read_at(folded, places, left)
        hashes_W[longer] = _mix(block)
        still = np.flatnonzero(left > 8)
        longer, places, left = longer.take(still), places.take(still), left.take(still)
    return hashes_W


def read_at(folded: bytes, starts_W: Offsets, lengths_W: Offsets) -> Hashes:
    """uint64: up to 8 bytes of each span, little-endian. Read where they stand, unaligned; `folded` must go on for 8 bytes."""
    window_B = np.ndarray((len(folded) - 7,), "<u8", buffer=folded, strides=(1,))
    found_W = window_B[starts_W].astype(np.uint64, copy=False)
    found_W &= _LOW_BYTES.take(lengths_W, mode="clip")  # all 8 from 8 on
    return found_W


def _hash_words(normal: Sequence[bytes]) -> Hashes:
    lengths = np.array([len(word) for word in normal], np.int64)
    return _hash_spans(b"".join(normal).translate(FOLD) + bytes(8), np.cumsum(lengths) - lengths, lengths)


def hash_word(normal: bytes) -> int:
    """The hash of one word in its normal form: what `words` gives for it."""
    return int(_hash_words([normal])[0])


def ngram_hashes(found: Words, n: int) -> Ngrams:
    """Every n consecutive words of one text, in order; none reaches over the end of a text.

    A polynomial in the words' hashes mod 2**64 with an odd base. Equal n-grams have equal hashes; the words' own mixing makes
    different ones collide with 2**-64 a pair. Raises ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"n-grams of {n} words")
    hashes_G = rolling(found.hashes_W, n)
    num_grams_N = np.maximum(np.diff(found.text_offsets_N1) - (n - 1), 0)
    text_G = np.repeat(np.arange(len(num_grams_N)), num_grams_N)
    first_G = (found.text_offsets_N1[:-1] - np.cumsum(num_grams_N) + num_grams_N).take(text_G)
    first_G += np.arange(len(text_G))
    return Ngrams(hashes_G.take(first_G), first_G, text_G)


def rolling(hashes_W: Hashes, n: int) -> Hashes:
    """uint64 [max(0, W - n + 1)]: sum of hashes[i + j] * base**(n - 1 - j), over whatever stands next to each other.

    By doubling: 13 = 8 + 4 + 1 takes five passes over the words instead of thirteen.
    """
    num_ngrams = max(0, len(hashes_W) - n + 1)
    power, width, taken = hashes_W, 1, 0
    total = np.zeros(num_ngrams, np.uint64)
    while True:
        if n & width:
            chosen = power[taken : taken + num_ngrams]
            total = appended(total, chosen, width) if taken else chosen
            taken += width
        if taken == n:
            return total
        power = rolled_on(power, width)
        width *= 2


def rolled_on(hashes_G: Hashes, width: int) -> Hashes:
    """From rolling(words, width) to rolling(words, 2 * width)."""
    return appended(hashes_G[: max(0, len(hashes_G) - width)], hashes_G[width:], width)


def appended(hashes: Hashes, following: Hashes, width: int) -> Hashes:
    """Hashes of n-grams, each with the `width` words of its hash in `following` after it."""
    hashes = hashes * _power(width)
    hashes += following
    return hashes


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(_BASE, exponent, 1 << 64))
