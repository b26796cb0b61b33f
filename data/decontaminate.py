"""No evaluation item in what a student is trained on: prompt, reasoning and answer of every trace against data/ngram_index.py.

A sieve (data/coarse.py) passes over all texts and leaves few. Of those all 4- and 8-grams are hashed and looked up, and what
looks like an item is compared with it word by word: a hit is never a collision of hashes. It names its item and the place.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from data.coarse import may_hold, sieved
from data.ngram_index import (
    ANCHOR,
    LONG,
    MIN_SHARE,
    SHORT_ANCHOR,
    Index,
    Source,
    digest_of,
    normal_words,
)
from data.records import Message
from data.words import Hashes, Offsets, Words, appended, batches, rolled_on, rolling, words

VERSION = 2
LONGEST_EXCERPT = 200

Rule = Literal["share", "core", "equal"]


class Hit(NamedTuple):
    """One evaluation text found in one scanned text.

    text: index of the scanned text. source: the first item with these words; twins: how many more items have them.
    rule: how it was found (data/ngram_index.py). coverage: share of the item's words that stand in the text; own_coverage: of
    those that are no boilerplate. first, end: characters of the longest stretch of matched words; excerpt: how it begins.
    """

    text: int
    source: Source
    twins: int
    rule: Rule
    coverage: float
    own_coverage: float
    first: int
    end: int
    excerpt: str


class Part(NamedTuple):
    """A text of a conversation. place: `messages.2.reasoning_content`. is_prompt: it is all that a user said."""

    place: str
    text: str
    is_prompt: bool


def parts(messages: Sequence[Message]) -> list[Part]:
    """Everything of a conversation that a student would see, a text each: n-grams do not reach from one into another."""
    found = []
    for number, message in enumerate(messages):
        for field, text in (("content", message.get("content")), ("reasoning_content", message.get("reasoning_content"))):
            if text:
                found.append(Part(f"messages.{number}.{field}", text, field == "content" and message.get("role") == "user"))
    return found


def scan(index: Index, texts: Sequence[str], are_prompts: Sequence[bool] | None = None) -> list[Hit]:
    """Every evaluation text in every text, by text and then by source. are_prompts: which of the texts are all that a user said;
    these alone are held against questions too short to look for inside of texts.

    Pure: what is found in a text depends on that text and the index. A few MB of memory, whatever the number of texts.
    """
    most_words = int(index.equal_words_Q.max(initial=0)) if are_prompts is not None else 0
    chosen: list[int] = [number for found in sieved(index.sieve, texts, most_words, are_prompts) for number in found.tolist()]
    hits = []
    for batch in batches([texts[number] for number in chosen]):
        numbers = chosen[batch.start : batch.stop]
        asked = [place for place, number in enumerate(numbers) if are_prompts is not None and are_prompts[number]]
        found = words([texts[number] for number in numbers])
        hits += [hit._replace(text=numbers[hit.text]) for hit in _scan_batch(index, found, asked)]
    return sorted(hits)


def _scan_batch(index: Index, found: Words, asked: Sequence[int]) -> Iterator[Hit]:
    fours = rolling(found.hashes_W, SHORT_ANCHOR)
    eights = rolled_on(fours, SHORT_ANCHOR)
    candidates = may_hold(index.bits, eights)
    if len(candidates):
        if len(index.anchor_hash_A):
            yield from _cores(index, found, _aligned(index, found, candidates, eights, ANCHOR))
        yield from _shares(index, found, candidates, fours, eights)
    if len(index.bits4):
        candidates = may_hold(index.bits4, fours)
        yield from _cores(index, found, _aligned(index, found, candidates, fours, SHORT_ANCHOR))
    if asked and len(index.equal_words_Q):
        yield from _equals(index, found, asked)


class _Pairs(NamedTuple):
    """Candidates: an entry, the text's word where the entry's first word would stand, and the text."""

    entry: Offsets
    start: Offsets
    text: Offsets


def _matches(ascending: Hashes, hashes: Hashes) -> tuple[Offsets, Offsets]:
    """All (i, j) with hashes[i] == ascending[j], of which there is one at least."""
    first = np.searchsorted(ascending, hashes)
    present = np.flatnonzero(ascending[np.minimum(first, len(ascending) - 1)] == hashes)
    first = first[present]
    count = np.searchsorted(ascending, hashes[present], side="right") - first
    ours = np.repeat(present, count)
    return ours, np.arange(len(ours)) + np.repeat(first - np.cumsum(count) + count, count)


# --- cores -------------------------------------------------------------------------------------------------------


def _aligned(index: Index, found: Words, candidates: Offsets, hashes: Hashes, n: int) -> _Pairs:
    """Where an anchor stands and the core around it lies within one text and begins and ends with the right word."""
    if n == ANCHOR:
        table, entry_A, place_A = index.anchor_hash_A, index.anchor_entry_A, index.anchor_place_A
    else:
        table, entry_A, place_A = index.anchor4_hash_A, index.anchor4_entry_A, index.anchor4_place_A
    ours, theirs = _matches(table, hashes[candidates])
    entry, start = entry_A[theirs], candidates[ours] - place_A[theirs]
    text = np.searchsorted(found.text_offsets_N1, candidates[ours], side="right") - 1
    first, end = start + index.core_first_E[entry], start + index.core_end_E[entry]
    within = np.flatnonzero((first >= found.text_offsets_N1[text]) & (end <= found.text_offsets_N1[text + 1]))
    entry, start, text, first, end = entry[within], start[within], text[within], first[within], end[within]
    offset = index.word_offsets_E1[entry]
    right = found.hashes_W[first] == index.hashes_T[offset + index.core_first_E[entry]]
    right &= found.hashes_W[end - 1] == index.hashes_T[offset + index.core_end_E[entry] - 1]
    return _Pairs(entry[right], start[right], text[right])


def _cores(index: Index, found: Words, pairs: _Pairs) -> Iterator[Hit]:
    """A hit for each text and entry whose core stands there, the first place of it."""
    done = set()
    for entry, start, text in zip(*(column.tolist() for column in pairs), strict=True):
        if (text, entry) in done:
            continue
        begin, stop = int(index.core_first_E[entry]), int(index.core_end_E[entry])
        offset = int(index.word_offsets_E1[entry])
        if not np.array_equal(found.hashes_W[start + begin : start + stop], index.hashes_T[offset + begin : offset + stop]):
            continue
        theirs = index.entry_words(entry)
        begin, stop = _stretch(found, text, start, theirs, begin, stop)
        if stop > begin:
            done.add((text, entry))
            covered = np.zeros(len(theirs), np.bool_)
            covered[begin:stop] = True
            yield _hit(index, found, text, entry, "core", covered, start + begin, start + stop)


def _stretch(found: Words, text: int, start: int, theirs: Sequence[str], begin: int, stop: int) -> tuple[int, int]:
    """The words around theirs[begin:stop] that are really the same here, or (0, 0) if those themselves are not."""
    first, end = found.text_offsets_N1[text : text + 2].tolist()
    lowest, highest = max(0, first - start), min(len(theirs), end - start)
    mine = [*[""] * lowest, *normal_words(found, start + lowest, start + highest)]  # "" is no word
    if mine[begin:stop] != theirs[begin:stop]:
        return 0, 0
    while begin > lowest and mine[begin - 1] == theirs[begin - 1]:
        begin -= 1
    while stop < highest and mine[stop] == theirs[stop]:
        stop += 1
    return begin, stop


# --- shares ------------------------------------------------------------------------------------------------------


def _shares(index: Index, found: Words, candidates: Offsets, fours: Hashes, eights: Hashes) -> Iterator[Hit]:
    """A hit for each text and original with MIN_SHARE of its own words in 13-grams that stand in the text."""
    candidates = candidates[candidates + LONG <= len(found.hashes_W)]
    twelves = appended(eights[candidates], fours[candidates + ANCHOR], SHORT_ANCHOR)
    hashes = appended(twelves, found.hashes_W[candidates + LONG - 1], 1)
    likely = may_hold(index.bits13, hashes)
    if not len(likely):
        return
    candidates, hashes = candidates[likely], hashes[likely]
    text = np.searchsorted(found.text_offsets_N1, candidates, side="right") - 1
    fits = candidates + LONG <= found.text_offsets_N1[text + 1]
    candidates, text, hashes = candidates[fits], text[fits], hashes[fits]
    ours, theirs = _matches(index.gram_hash_F, hashes)
    order = np.lexsort((candidates[ours], index.gram_entry_F[theirs], text[ours]))
    ours, theirs = ours[order], theirs[order]
    pair = text[ours] * index.num_entries + index.gram_entry_F[theirs]
    edges = np.flatnonzero(np.diff(pair, prepend=-1, append=-1)).tolist()
    for first, end in itertools.pairwise(edges):
        matched = zip(candidates[ours[first:end]].tolist(), index.gram_place_F[theirs[first:end]].tolist(), strict=True)
        yield from _share(index, found, int(text[ours[first]]), int(index.gram_entry_F[theirs[first]]), list(matched))


def _share(index: Index, found: Words, text: int, entry: int, matched: list[tuple[int, int]]) -> Iterator[Hit]:
    """matched: (word of the text, word of the entry) where a 13-gram of both begins, by the text."""
    first, end = index.word_offsets_E1[entry : entry + 2].tolist()
    is_own = index.is_own_T[first:end]
    if _covered(matched, end - first)[is_own].sum() < MIN_SHARE * is_own.sum():
        return
    theirs = index.entry_words(entry)
    really = _really(found, matched, theirs)
    covered = _covered(really, end - first)
    if covered[is_own].sum() >= MIN_SHARE * is_own.sum():
        longest = max(_runs(really), key=lambda run: (run[1] - run[0], -run[0]))
        yield _hit(index, found, text, entry, "share", covered, *longest)


def _runs(matched: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """First and end of every run of the text's words that these 13-grams, ascending, cover."""
    runs: list[tuple[int, int]] = []
    for here, _ in matched:
        if runs and here <= runs[-1][1]:
            runs[-1] = runs[-1][0], here + LONG
        else:
            runs.append((here, here + LONG))
    return runs


def _really(found: Words, matched: Sequence[tuple[int, int]], theirs: Sequence[str]) -> list[tuple[int, int]]:
    """Those whose 13 words are the same, spelled out; every word of the text once."""
    mine = {first: normal_words(found, first, end) for first, end in _runs(matched)}
    really, run = [], 0
    for here, there in matched:
        run = here if here in mine else run
        if mine[run][here - run : here - run + LONG] == theirs[there : there + LONG]:
            really.append((here, there))
    return really


def _covered(matched: Iterable[tuple[int, int]], num_words: int) -> np.ndarray:
    covered = np.zeros(num_words, np.bool_)
    places = np.array([there for _, there in matched], np.int64)
    covered[places[:, None] + np.arange(LONG)] = True
    return covered


# --- equals, and what all have in common -------------------------------------------------------------------------


def _equals(index: Index, found: Words, asked: Sequence[int]) -> Iterator[Hit]:
    """Decided on 64 bits a word and 128 for the whole: too long or too short to be worth spelling out."""
    num_words_N = np.diff(found.text_offsets_N1)
    for text in asked:
        rows = np.flatnonzero(index.equal_words_Q == num_words_N[text])
        if not len(rows):
            continue
        first, end = found.text_offsets_N1[text : text + 2].tolist()
        digest = np.frombuffer(digest_of(found.hashes_W[first:end]), np.uint8)
        for row in rows[(index.equal_digest_Q16[rows] == digest).all(axis=1)].tolist():
            yield _placed(found, text, index.sources(index.num_entries + row), "equal", 1.0, 1.0, first, end)


def _hit(index: Index, found: Words, text: int, entry: int, rule: Rule, covered: np.ndarray, first: int, end: int) -> Hit:
    is_own = index.is_own_T[index.word_offsets_E1[entry] : index.word_offsets_E1[entry + 1]]
    own_coverage = float(covered[is_own].mean()) if is_own.any() else 1.0
    return _placed(found, text, index.sources(entry), rule, float(covered.mean()), own_coverage, first, end)


def _placed(
    found: Words, text: int, sources: Sequence[Source], rule: Rule, coverage: float, own_coverage: float, first: int, end: int
) -> Hit:
    """first, end: words."""
    begins, start, stop = int(found.text_starts_N1[text]), int(found.starts_W[first]), int(found.ends_W[end - 1])
    before, excerpt = (found.joined[a:b].decode("utf-8", "surrogatepass") for a, b in ((begins, start), (start, stop)))
    place = len(before), len(before) + len(excerpt)
    return Hit(text, sources[0], len(sources) - 1, rule, coverage, own_coverage, *place, excerpt[:LONGEST_EXCERPT])
