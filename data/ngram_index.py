"""Everything that scanning for evaluation items needs, as arrays that pickle, hash and map into memory.

Words are those of data/words.py: case, wrapping, punctuation and typography make no difference. Identical texts are one entry,
whatever number of items they belong to. How an entry is found follows from its words alone:

- **equal**: fewer than LEAST_WORDS words, or packed from shared files: a prompt that is the question from beginning to end.
  Short answers ("42", "yes") are not looked for at all, and counted.
- **core**: the words from the first that is the item's own to the last, in order and without a gap.
- **share**: MIN_SHARE of the item's own words, as far as they stand in 13-grams.

A word is the item's *own* unless it stands in boilerplate: an 8-gram that a second entry has too, or that two of the
`boilerplate` texts have. Boilerplate never accuses anybody: of the 114 sources that an 8-gram scan of prompts flagged, 88 were
innocent (tests/bench/leaks.py has both sides on planted leaks). An entry that is nothing else is found in full only.

`share` is for originals: 26 words or more (so that one changed word leaves a 13-gram whole), at least half of them own. There
half of the own words, 13 and more of them in a row, are no accident (Tülu 3, arXiv 2411.15124, asks for half of the tokens in
8-grams; Llama 2, arXiv 2307.09288, for 80 % in 10-grams). All others are short, or one instance of a template, and there one
changed word makes another question: "the capital of France", "of Spain". So all of the core has to be there, looked up by one
8-gram of it (a 4-gram below 8 words). An instruction that a benchmark puts around its questions may be missing.

A core is at least 8 words long where the item is, if need be with boilerplate beside it, so that "3 + 4" alone is none.

Suffixes of arrays: E entries, E1 one more, T words of all entries, A anchors (a hash under which a core is looked up), F the own
13-grams of originals, Q texts to be equal to.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data import words as word_hashes
from data.benchmarks import Item
from data.characters import OPERATORS, UNICODE, normal_form
from data.coarse import Grams, Sieve, bit_table, is_member, make_sieve
from data.words import Hashes, Offsets, Words, ngram_hashes, words

VERSION = 1
LONG, SHORT = 13, 8
ANCHOR, SHORT_ANCHOR = 8, 4
LEAST_WORDS = 4
"""Of an item that is looked for inside of texts. "What is it?" stands anywhere; four words in this order are a question, and
"yes" never is. Operators are not counted: "1 + 2 + 3" is a sum among many."""
LONG_WORDS = 2 * LONG
MIN_SHARE = 0.5


class Source(NamedTuple):
    """Where an evaluation text stands: the file as it was named, the item's id in it, the field."""

    file: str
    item: str
    field: str


@dataclass(frozen=True)
class Index:
    """Built by build_index; read by data/decontaminate.py. Arrays only: may be pickled, or written and mapped.

    key: hex, of items, boilerplate, rules and versions: equal keys find the same. num_unsearched: answers too short to look for.
    labels: JSON [[file, item, field], ...] of each entry, then of each text to be equal to; text: the entries' normal words,
    joined by blanks; both UTF-8. hashes_T, is_own_T: by word. core_first_E, core_end_E: word offsets in the entry.
    is_original_E: found by share. anchor_*_A, anchor4_*_A: sorted hashes of 8- and 4-grams with their entry and word offset in
    it; gram_*_F: the same for 13-grams. bits (anchors, and how the 13-grams begin), bits4, bits13: one bit by a
    hash's leading digits, set where a look-up may succeed: it spares 49 of 50 look-ups, each some ten cache misses.
    is_open, sieve_*: see data/coarse.py. equal_words_Q: number of words; equal_digest_Q16: uint8, of the words' hashes.
    """

    key: str
    num_unsearched: int
    labels: NDArray[np.uint8]
    label_offsets: Offsets
    text: NDArray[np.uint8]
    text_offsets_E1: Offsets
    word_offsets_E1: Offsets
    hashes_T: Hashes
    is_own_T: NDArray[np.bool_]
    core_first_E: Offsets
    core_end_E: Offsets
    is_original_E: NDArray[np.bool_]
    anchor_hash_A: Hashes
    anchor_entry_A: Offsets
    anchor_place_A: Offsets
    anchor4_hash_A: Hashes
    anchor4_entry_A: Offsets
    anchor4_place_A: Offsets
    gram_hash_F: Hashes
    gram_entry_F: Offsets
    gram_place_F: Offsets
    bits: NDArray[np.uint8]
    bits4: NDArray[np.uint8]
    bits13: NDArray[np.uint8]
    is_open: bool
    sieve_long: Hashes
    sieve_long_bits: NDArray[np.uint8]
    sieve_long_second_bits: NDArray[np.uint8]
    sieve_strided: Hashes
    sieve_strided_bits: NDArray[np.uint8]
    sieve_strided_second_bits: NDArray[np.uint8]
    sieve_short: Hashes
    sieve_short_bits: NDArray[np.uint8]
    sieve_short_second_bits: NDArray[np.uint8]
    equal_words_Q: Offsets
    equal_digest_Q16: NDArray[np.uint8]

    @property
    def sieve(self) -> Sieve:
        return Sieve(
            Grams(self.sieve_long, self.sieve_long_bits, self.sieve_long_second_bits),
            Grams(self.sieve_short, self.sieve_short_bits, self.sieve_short_second_bits),
            Grams(self.sieve_strided, self.sieve_strided_bits, self.sieve_strided_second_bits),
            self.is_open,
        )

    @property
    def num_entries(self) -> int:
        return len(self.is_original_E)

    def sources(self, label: int) -> list[Source]:
        """All items of the entry's words, sorted. Texts to be equal to follow the entries."""
        part = self.labels[self.label_offsets[label] : self.label_offsets[label + 1]]
        return [Source(*source) for source in json.loads(part.tobytes())]

    def entry_words(self, entry: int) -> list[str]:
        """The normal forms of its words."""
        return self.text[self.text_offsets_E1[entry] : self.text_offsets_E1[entry + 1]].tobytes().decode().split(" ")

    def write(self, folder: Path) -> None:
        """An .npy file for each array, in a folder of its own, for open_index."""
        folder.mkdir(parents=True, exist_ok=True)
        for field in dataclasses.fields(self):
            np.save(folder / f"{field.name}.npy", np.asarray(getattr(self, field.name)), allow_pickle=False)


def open_index(folder: Path) -> Index:
    """What `write` wrote, its arrays mapped: processes share the pages, and pay for those they touch."""
    arrays = {field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r") for field in dataclasses.fields(Index)}
    scalars = {"key": str(arrays["key"]), "num_unsearched": int(arrays["num_unsearched"]), "is_open": bool(arrays["is_open"])}
    return Index(**(arrays | scalars))


# --- building ----------------------------------------------------------------------------------------------------


def build_index(items: Iterable[Item], boilerplate: Sequence[str] = ()) -> Index:
    """The index of `items`, whatever their order. boilerplate: texts (templates, or prompts of the training side); n-grams that
    stand in two different ones of them count as boilerplate. What an item shares with one alone is a leak to be found.

    20,000 items of 50 words take 6 s and 420 MB on a busy machine, and leave an index of 57 MB [measured]: build it once, in one
    process, write it, and let the workers map it.
    """
    ordered = sorted(set(items))
    texts = list(dict.fromkeys(boilerplate))
    searched, equal, num_unsearched = _sorted_out(ordered)
    entries = _Entries.of(searched)
    is_own_T = _own_words(entries, words(texts))
    cores = [_core(*span, is_own_T) for span in entries.spans()]
    is_original_E = np.array([_is_original(is_own_T[first:end]) for first, end in entries.spans()], np.bool_)
    anchors, anchors4 = _anchors(entries, cores, ~is_original_E)
    grams = _own_grams(entries, is_own_T, is_original_E)
    prefixes = word_hashes.rolling(entries.hashes_T, ANCHOR)[entries.word_offsets_E1[grams.entry] + grams.place]
    sieve = make_sieve(itertools.chain(*entries.words), _looked_for(entries, cores, is_original_E, grams))
    text, text_offsets_E1 = _concatenated(" ".join(found) for found in entries.words)
    labels, label_offsets = _concatenated(
        json.dumps(sources, ensure_ascii=False) for sources in (*entries.sources, *(one.sources for one in equal))
    )
    return Index(
        key=_key(ordered, texts), num_unsearched=num_unsearched, labels=labels, label_offsets=label_offsets, text=text,
        text_offsets_E1=text_offsets_E1, word_offsets_E1=entries.word_offsets_E1, hashes_T=entries.hashes_T, is_own_T=is_own_T,
        core_first_E=np.array([first for first, _ in cores], np.int64), core_end_E=np.array([end for _, end in cores], np.int64),
        is_original_E=is_original_E, anchor_hash_A=anchors.hash, anchor_entry_A=anchors.entry, anchor_place_A=anchors.place,
        anchor4_hash_A=anchors4.hash, anchor4_entry_A=anchors4.entry, anchor4_place_A=anchors4.place, gram_hash_F=grams.hash,
        gram_entry_F=grams.entry, gram_place_F=grams.place, bits=bit_table(np.concatenate([anchors.hash, prefixes])),
        bits4=bit_table(anchors4.hash), bits13=bit_table(grams.hash),
        equal_words_Q=np.array([one.num_words for one in equal], np.int64), is_open=sieve.is_open,
        sieve_long=sieve.long.hashes, sieve_long_bits=sieve.long.bits, sieve_long_second_bits=sieve.long.second_bits,
        sieve_strided=sieve.strided.hashes, sieve_strided_bits=sieve.strided.bits,
        sieve_strided_second_bits=sieve.strided.second_bits, sieve_short=sieve.short.hashes,
        sieve_short_bits=sieve.short.bits, sieve_short_second_bits=sieve.short.second_bits,
        equal_digest_Q16=np.array([list(one.digest) for one in equal], np.uint8).reshape(-1, 16),
    )  # fmt: skip


def _key(ordered: Sequence[Item], boilerplate: Sequence[str]) -> str:
    rules = (VERSION, word_hashes.VERSION, UNICODE, LONG, SHORT, LEAST_WORDS, LONG_WORDS, MIN_SHARE)
    whole = hashlib.blake2b(repr(rules).encode(), digest_size=16)
    for row in (*ordered, *sorted(boilerplate)):
        whole.update(json.dumps(row).encode() + b"\n")
    return whole.hexdigest()


class Equal(NamedTuple):
    sources: list[Source]
    num_words: int
    digest: bytes


def _sorted_out(ordered: Sequence[Item]) -> tuple[dict[str, list[Item]], list[Equal], int]:
    """Items to look for inside of texts by their normal words, questions to be equal to, and how many answers are neither."""
    found = words([item.text for item in ordered])
    searched: dict[str, list[Item]] = {}
    equal: dict[bytes, Equal] = {}
    num_unsearched = 0
    for number, item in enumerate(ordered):
        first, end = found.text_offsets_N1[number : number + 2].tolist()
        normal = [] if item.is_packed else normal_words(found, first, end)
        if sum(word[0] not in OPERATORS for word in normal) >= LEAST_WORDS:
            searched.setdefault(" ".join(normal), []).append(item)
        elif item.is_question and end > first:
            digest = digest_of(found.hashes_W[first:end])
            equal.setdefault(digest, Equal([], end - first, digest)).sources.append(Source(*item[:3]))
        else:
            num_unsearched += 1
    return searched, list(equal.values()), num_unsearched


def normal_words(found: Words, first: int, end: int) -> list[str]:
    """The normal forms of words first to end."""
    starts, ends = found.starts_W[first:end].tolist(), found.ends_W[first:end].tolist()
    if not starts:
        return []
    passage = found.joined[starts[0] : ends[-1]]
    if passage.isascii():  # decoded at once: a third of the time
        normal = normal_form(passage.decode())
        return [normal[start - starts[0] : stop - starts[0]] for start, stop in zip(starts, ends, strict=True)]
    spans = zip(starts, ends, strict=True)
    return [normal_form(found.joined[start:stop].decode("utf-8", "surrogatepass")) for start, stop in spans]


def digest_of(hashes_W: Hashes) -> bytes:
    """16 bytes of a whole text's words."""
    return hashlib.blake2b(hashes_W.astype("<u8").tobytes(), digest_size=16).digest()


class _Entries(NamedTuple):
    """Distinct texts in the order of their first item. sources, words: by entry."""

    sources: list[list[Source]]
    words: list[list[str]]
    hashes_T: Hashes
    word_offsets_E1: Offsets
    found: Words

    @classmethod
    def of(cls, searched: dict[str, list[Item]]) -> "_Entries":
        found = words([items[0].text for items in searched.values()])
        sources = [[Source(*item[:3]) for item in items] for items in searched.values()]
        return cls(sources, [text.split(" ") for text in searched], found.hashes_W, found.text_offsets_N1, found)

    def spans(self) -> Iterator[tuple[int, int]]:
        """First and end of each entry's words."""
        return zip(self.word_offsets_E1[:-1].tolist(), self.word_offsets_E1[1:].tolist(), strict=True)


def _own_words(entries: _Entries, boilerplate: Words) -> NDArray[np.bool_]:
    """bool by word: no 8-gram with it stands in two entries, or in two of the boilerplate texts."""
    grams = ngram_hashes(entries.found, SHORT)
    is_common_G = is_member(grams.hashes_G, _repeated(grams))
    is_common_G |= is_member(grams.hashes_G, _repeated(ngram_hashes(boilerplate, SHORT)))
    steps = np.zeros(len(entries.hashes_T) + 1, np.int64)
    np.add.at(steps, grams.first_G[is_common_G], 1)
    np.add.at(steps, grams.first_G[is_common_G] + SHORT, -1)
    return np.cumsum(steps)[:-1] == 0


def _repeated(grams: word_hashes.Ngrams) -> Hashes:
    """Sorted hashes that stand in two texts or more."""
    order = np.argsort(grams.hashes_G, kind="stable")  # within equal hashes the texts ascend
    hashes, texts = grams.hashes_G[order], grams.text_G[order]
    return hashes[1:][(hashes[1:] == hashes[:-1]) & (texts[1:] != texts[:-1])]


def _is_original(is_own: NDArray[np.bool_]) -> bool:
    return len(is_own) >= LONG_WORDS and 2 * int(is_own.sum()) >= len(is_own)


def _core(first: int, end: int, is_own_T: NDArray[np.bool_]) -> tuple[int, int]:
    """From the first own word to the last, widened to 8 words, to the left before to the right; all words without an own one."""
    num_words, own = end - first, np.flatnonzero(is_own_T[first:end])
    if not len(own):
        return 0, num_words
    least = min(num_words, SHORT)
    begin, stop = int(own[0]), int(own[-1]) + 1
    begin = max(0, min(begin, stop - least))
    return begin, max(stop, begin + least)


class _Table(NamedTuple):
    """Sorted by hash, then entry, then place."""

    hash: Hashes
    entry: Offsets
    place: Offsets

    @classmethod
    def of(cls, hashes: Hashes, entry: Offsets, place: Offsets) -> "_Table":
        order = np.lexsort((place, entry, hashes))
        return cls(hashes[order], entry[order], place[order])


def _anchors(entries: _Entries, cores: Sequence[tuple[int, int]], wanted_E: NDArray[np.bool_]) -> tuple[_Table, _Table]:
    """The rarest 8-gram of each wanted core, and the rarest 4-gram of those with fewer words; of equals the last, because what
    is particular about a question comes late."""
    tables = []
    for n, is_its in ((ANCHOR, lambda size: size >= ANCHOR), (SHORT_ANCHOR, lambda size: size < ANCHOR)):
        hashes = word_hashes.rolling(entries.hashes_T, n)
        ascending = np.sort(hashes)
        chosen = []
        for entry in np.flatnonzero(wanted_E).tolist():
            begin, stop = cores[entry]
            if is_its(stop - begin):
                first = int(entries.word_offsets_E1[entry])
                own = hashes[first + begin : first + stop - n + 1]
                count = np.searchsorted(ascending, own, side="right") - np.searchsorted(ascending, own)
                chosen.append((entry, begin + len(own) - 1 - int(np.argmin(count[::-1]))))
        entry, place = np.array(chosen, np.int64).reshape(-1, 2).T
        tables.append(_Table.of(hashes[entries.word_offsets_E1[entry] + place], entry, place))
    return tables[0], tables[1]


def _own_grams(entries: _Entries, is_own_T: NDArray[np.bool_], is_original_E: NDArray[np.bool_]) -> _Table:
    """Every 13-gram of an original with a word of its own in it."""
    grams = ngram_hashes(entries.found, LONG)
    own_before = np.concatenate([[0], np.cumsum(is_own_T)])
    has_own = own_before[grams.first_G + LONG] > own_before[grams.first_G]
    chosen = np.flatnonzero(has_own & is_original_E[grams.text_G])
    entry = grams.text_G[chosen]
    return _Table.of(grams.hashes_G[chosen], entry, grams.first_G[chosen] - entries.word_offsets_E1[entry])


def _looked_for(
    entries: _Entries, cores: Sequence[tuple[int, int]], is_original_E: NDArray[np.bool_], grams: _Table
) -> Iterator[tuple[int, int, bool]]:
    """First and end among all words of every core and of every 13-gram, and whether only all of it is ever a finding."""
    for entry in np.flatnonzero(~is_original_E).tolist():
        offset = int(entries.word_offsets_E1[entry])
        yield offset + cores[entry][0], offset + cores[entry][1], True
    for first in (entries.word_offsets_E1[grams.entry] + grams.place).tolist():
        yield first, first + LONG, False


def _concatenated(texts: Iterable[str]) -> tuple[NDArray[np.uint8], Offsets]:
    encoded = [text.encode() for text in texts]
    return np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)])
