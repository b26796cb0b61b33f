"""Scanning traces for evaluation items against the plain scan with a set of tuples, in MB/s.

    python -m tests.bench.ngram_scan --json docs/bench/ngram_scan.json

Both sides get the same texts of about 2 KB (Zipf-distributed words, sentences, numbers; one text in five has curly quotes and
dashes) and the same items of 26 to 80 words, of which one text in a hundred holds one. Theirs is what one writes first: lower,
split, and every 8 words as a tuple looked up in a dictionary of the items' 8-grams. Ours is `data.decontaminate.scan` whole:
normal forms, 13-grams, comparison word by word, coverage, character places, excerpts. Items are random enough to share no
8-gram, and nothing is edited or re-wrapped, so that the plain scan has nothing to miss and nothing to accuse wrongly: both must
find the same pairs of text and item, or there is no figure. One process, one thread, interleaved.

`ratio`: median over the rounds of ours over theirs in MB/s of UTF-8. `ratio_short`: the same with items of 8 to 25 words.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data.benchmarks import Item
from data.decontaminate import scan
from data.ngram_index import Index, build_index
from tests.bench.frame import machine

Pairs = set[tuple[int, str]]
"""(index of a text, item)."""


class Writer:
    """Endless sentences over an invented vocabulary of 20,000 words, frequent ones short, as in a language."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        syllables = [first + second for first in "bdfgklmnprstvw" for second in ("a", "e", "i", "o", "u", "an", "er", "is")]
        parts = random.Random("vocabulary")
        # A running word has 4.5 letters, and one in ten has more than 8: about what English has.
        self.vocabulary = [
            "".join(parts.choices(syllables, k=1 + (rank > 80) + (rank > 3000) + (parts.random() < 0.3)))
            for rank in range(20_000)
        ]
        self.weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(20_000)))

    def words(self, count: int) -> list[str]:
        return self.rng.choices(self.vocabulary, cum_weights=self.weights, k=count)

    def sentence(self) -> str:
        words = self.words(self.rng.randint(6, 22))
        if self.rng.random() < 0.25:
            words[self.rng.randrange(len(words))] = str(self.rng.randrange(1000))
        if len(words) > 12:
            words[self.rng.randrange(4, 10)] += ","
        return " ".join(words).capitalize() + self.rng.choice("..?")

    def text(self, num_characters: int) -> str:
        sentences: list[str] = []
        size = 0
        while size < num_characters:
            sentences.append(self.sentence())
            size += len(sentences[-1]) + 1
        return " ".join(sentences)

    def item(self, shortest: int, longest: int) -> str:
        return " ".join(self.words(self.rng.randint(shortest, longest)))


class Corpus(NamedTuple):
    texts: list[str]
    items: list[Item]
    num_bytes: int


def make_corpus(num_texts: int, num_items: int, shortest: int, longest: int) -> Corpus:
    writer = Writer(1)
    items = [Item("bench.jsonl", str(number), "question", writer.item(shortest, longest)) for number in range(num_items)]
    texts = []
    for number in range(num_texts):
        text = writer.text(1950)
        if number % 5 == 0:
            text = text.replace(", ", " – ").replace(". ", ".’ ")
        if number % 100 == 7:
            text = f"{text[:800]} {items[number * 31 % num_items].text} {text[800:]}"
        texts.append(text)
    return Corpus(texts, items, sum(len(text.encode()) for text in texts))


def eight_grams(text: str) -> Iterator[tuple[str, ...]]:
    words = text.lower().split()
    return (tuple(words[first : first + 8]) for first in range(len(words) - 7))


def plain_index(items: Sequence[Item]) -> dict[tuple[str, ...], str]:
    return {gram: item.item for item in items for gram in eight_grams(item.text)}


def plain_scan(table: dict[tuple[str, ...], str], texts: Sequence[str]) -> Pairs:
    found = set()
    for number, text in enumerate(texts):
        for gram in eight_grams(text):
            if gram in table:
                found.add((number, table[gram]))
    return found


def our_scan(index: Index, texts: Sequence[str]) -> Pairs:
    return {(hit.text, hit.source.item) for hit in scan(index, texts)}


def timed(side: Callable[[], Pairs]) -> tuple[float, Pairs]:
    """Seconds of this process on the processor: the sides run one after the other, and neighbours' load falls on neither."""
    started = time.process_time()
    found = side()
    return time.process_time() - started, found


def compare(corpus: Corpus, repeats: int) -> dict[str, object]:
    started = time.process_time()
    index = build_index(corpus.items)
    build_s = time.process_time() - started
    table = plain_index(corpus.items)
    ours, theirs = [], []
    for round_ in range(repeats + 1):
        seconds, found = timed(lambda: our_scan(index, corpus.texts))
        their_seconds, their_found = timed(lambda: plain_scan(table, corpus.texts))
        assert found == their_found, "the two sides do not find the same"
        if round_:
            ours.append(corpus.num_bytes / seconds / 1e6)
            theirs.append(corpus.num_bytes / their_seconds / 1e6)
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {
        "ratio": statistics.median(ratios), "ratios": ratios, "ours_mb_per_s": statistics.median(ours),
        "theirs_mb_per_s": statistics.median(theirs),
        "ms_per_text": corpus.num_bytes / len(corpus.texts) / statistics.median(ours) / 1e3,
        "texts": len(corpus.texts), "megabytes": corpus.num_bytes / 1e6, "items": len(corpus.items),
        "eight_grams_of_items": len(table), "pairs_found": len(found), "build_s": build_s,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    long = compare(make_corpus(arguments.texts, arguments.items, 26, 80), arguments.repeats)
    short = compare(make_corpus(arguments.texts, arguments.items, 8, 25), arguments.repeats)
    found = {
        "benchmark": "ngram_scan", "ratio": long["ratio"], "ratio_short": short["ratio"], "machine": machine(),
        "long": long, "short": short,
    }  # fmt: skip
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
