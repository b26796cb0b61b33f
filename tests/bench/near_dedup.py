"""Near deduplication, from texts to the list of duplicates: ours against rensa and datasketch.

    python -m tests.bench.setup
    python -m tests.bench.near_dedup --json docs/bench/near_dedup.json

20,000 texts of 2.5 KB, in blocks of 2,000 that stand for themselves: 1,400 random texts over a Zipf vocabulary, 300 copies of
them (verbatim, re-wrapped, other case and punctuation, words changed at 0.5, 1, 2, 3 and 5 %, a paragraph before or after), 300
texts from five templates that share half of their sentences. The truth is exact: a text is a duplicate when an earlier one of
its family has a Jaccard similarity of 0.8 or more over their sets of five-word shingles. So of the copies changed at 2 % some
count and some do not, and nobody's estimate gets all of those right.

Every side has one threshold (0.8), 128 slots or permutations, one thread, and keeps the first of two. The peers run in an
environment of their own, in one process that each round asks again, with shingles made in Python and the calls of their
READMEs (near_dedup_peers): rensa over the whole corpus, datasketch over the first block. Seconds are those of the processor, from
texts to duplicates: what a machine with other work on it leaves comparable. Starting Python, importing and reading the
corpus are outside. `ratio`: rensa's seconds over ours. `ratio_split`: rensa with the cheapest shingling there is, lower() and
split(), which takes "sum," and "sum" for two words. `ratio_datasketch`: over the first block, ours timed on the same.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.copies import keys_of
from data.minhash import signatures
from data.near_dedup import near_duplicates
from tests.bench.frame import machine
from tests.bench.near_dedup_peers import shingles
from tests.bench.setup import FOLDER

REPOSITORY = Path(__file__).parents[2]
PYTHON = FOLDER / "dedup" / "bin" / "python"
THRESHOLD = 0.8
BLOCK, ORIGINALS, COPIES, TEMPLATES = 2_000, 1_400, 300, 5
WORDS = 330
PAIRS = {"rensa": "ours", "rensa_split": "ours", "datasketch": "ours_first_block"}
ON_FIRST_BLOCK = ("datasketch", "ours_first_block")
EDIT_SHARES = (0.005, 0.01, 0.02, 0.03, 0.05)


class Row(NamedTuple):
    """family: texts that may resemble each other. kind: how it was made, for the figures by kind."""

    text: str
    family: str
    kind: str


class Run(NamedTuple):
    seconds: float
    dropped: list[int]


# --- the corpus --------------------------------------------------------------------------------------------------


class Writer:
    """Texts of sentences over a Zipf vocabulary, with numbers, paragraphs and a little Markdown."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        syllables = ["ka", "to", "mi", "re", "sol", "an", "er", "ti", "on", "es", "ing", "qu", "pro", "de", "al", "un"]
        self.vocabulary = ["".join(self.rng.choices(syllables, k=1 + number % 4)) + str(number)[:1] for number in range(8_000)]
        self.cumulative = list(accumulate(1 / (rank + 5) for rank in range(8_000)))

    def sentence(self, num_words: int = 11) -> list[str]:
        chosen = self.rng.choices(self.vocabulary, cum_weights=self.cumulative, k=num_words)
        return [str(self.rng.randrange(1000)) if self.rng.random() < 0.08 else word for word in chosen]

    def words(self, count: int = WORDS) -> list[str]:
        return [word for _ in range(count // 11) for word in self.sentence()]

    def edited(self, words: Sequence[str], share: float) -> list[str]:
        return [self.rng.choice(self.vocabulary) if self.rng.random() < share else word for word in words]

    def templated(self, skeleton: Sequence[Sequence[str]]) -> list[str]:
        """About half of the skeleton's sentences, the others of its own."""
        return [word for line in skeleton for word in (line if self.rng.random() < 0.55 else self.sentence())]


def dressed(words: Sequence[str]) -> str:
    """A sentence every eleven words, a paragraph every five sentences, one bold word in each."""
    sentences = [list(words[first : first + 11]) for first in range(0, len(words), 11)]
    for sentence in sentences:
        sentence[0] = sentence[0].capitalize()
        sentence[-1] += "."
        sentence[len(sentence) // 2] = f"**{sentence[len(sentence) // 2]}**"
    paragraphs = [sentences[first : first + 5] for first in range(0, len(sentences), 5)]
    return "\n\n".join(" ".join(" ".join(sentence) for sentence in paragraph) for paragraph in paragraphs)


def make_block(seed: int) -> list[Row]:
    """Originals and templated texts, then the copies, each part shuffled with its own kind only: a copy never comes first."""
    writer, rows, copies = Writer(seed), list[Row](), list[Row]()
    originals = [writer.words() for _ in range(ORIGINALS)]
    rows += [Row(dressed(words), f"{seed}/{number}", "original") for number, words in enumerate(originals)]
    for template in range(TEMPLATES):
        skeleton = [writer.sentence() for _ in range(WORDS // 11)]
        count = (BLOCK - ORIGINALS - COPIES) // TEMPLATES
        rows += [Row(dressed(writer.templated(skeleton)), f"{seed}/t{template}", "template") for _ in range(count)]
    for number, words in enumerate(originals[:COPIES]):
        copies.append(copy_of(writer, words, f"{seed}/{number}", number))
    writer.rng.shuffle(rows)
    writer.rng.shuffle(copies)
    return rows + copies


def copy_of(writer: Writer, words: list[str], family: str, number: int) -> Row:
    kinds: list[tuple[str, Callable[[], str]]] = [
        ("verbatim", lambda: dressed(words)),
        ("re-wrapped", lambda: textwrap.fill(dressed(words), writer.rng.randrange(30, 100))),
        ("case and punctuation", lambda: ", ".join(words).upper()),
        ("paragraph before", lambda: dressed(writer.words(11 * writer.rng.randrange(1, 4)) + words)),
        ("paragraph after", lambda: dressed(words + writer.words(11 * writer.rng.randrange(1, 4)))),
    ]
    for share in EDIT_SHARES:
        kinds.append((f"{share:.1%} of words changed", lambda share=share: dressed(writer.edited(words, share))))
    kind, make = kinds[number % len(kinds)]
    return Row(make(), family, kind)


def duplicates(rows: Sequence[Row]) -> set[int]:
    """The truth: rows with an earlier one of their family at the threshold or above, by exact Jaccard similarity."""
    families: dict[str, list[set[str]]] = {}
    found = set()
    for index, row in enumerate(rows):
        mine = set(shingles(row.text))
        for other in families.setdefault(row.family, []):
            if len(mine & other) / len(mine | other) >= THRESHOLD:
                found.add(index)
                break
        families[row.family].append(mine)
    return found


# --- both sides --------------------------------------------------------------------------------------------------


def ours(texts: Sequence[str]) -> Run:
    """As the build does it: signatures, then one decision; the first row is the preferred one."""
    started = time.process_time()
    keys_N2 = keys_of([f"{row:032x}" for row in range(len(texts))])
    found = near_duplicates(signatures(texts), np.ones(len(texts), np.bool_), [], keys_N2, THRESHOLD)
    return Run(time.process_time() - started, np.flatnonzero(found.original_N >= 0).tolist())


class Peers:
    """The other environment's process; it has read the corpus when this returns."""

    def __init__(self, corpus: Path) -> None:
        command = [str(PYTHON), "-P", str(REPOSITORY / "tests/bench/near_dedup_peers.py"), str(corpus)]
        one_thread = os.environ | {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=one_thread, text=True)
        self.versions: dict[str, str] = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, peer: str, count: int) -> Run:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{peer} {count}\n")
        self.process.stdin.flush()
        return Run(**self._answer())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def accuracy(dropped: Sequence[int], truth: set[int]) -> dict[str, float]:
    right = len(truth.intersection(dropped))
    return {"precision": right / len(dropped), "recall": right / len(truth), "dropped": len(dropped), "true": len(truth)}


def by_kind(rows: Sequence[Row], truth: set[int], sides: dict[str, list[int]]) -> dict[str, dict[str, int]]:
    """How many texts of a kind there are, are duplicates, and were dropped by each side."""
    table: dict[str, dict[str, int]] = {}
    for index, row in enumerate(rows):
        counts = table.setdefault(row.kind, {"texts": 0, "true": 0} | dict.fromkeys(sides, 0))
        counts["texts"] += 1
        counts["true"] += index in truth
    for side, dropped in sides.items():
        for index in dropped:
            table[rows[index].kind][side] += 1
    return table


def measure(num_texts: int, repeats: int) -> dict[str, Any]:
    rows = [row for block in range(num_texts // BLOCK) for row in make_block(block)]
    texts = [row.text for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.json"
        corpus.write_text(json.dumps(texts))
        peers = Peers(corpus)
        ours(texts[:BLOCK])  # warm: tables, allocator
        rounds = [
            {
                "ours": ours(texts),
                "rensa": peers.ask("rensa", len(texts)),
                "rensa_split": peers.ask("rensa_split", len(texts)),
                "ours_first_block": ours(texts[:BLOCK]),
                "datasketch": peers.ask("datasketch", BLOCK),
            }
            for _ in range(repeats)
        ]
        peers.close()
    return figures(rows, rounds) | {"peers": peers.versions}


def figures(rows: Sequence[Row], rounds: Sequence[dict[str, Run]]) -> dict[str, Any]:
    truth, sides = duplicates(rows), {side: run.dropped for side, run in rounds[0].items()}
    counts = {side: BLOCK if side in ON_FIRST_BLOCK else len(rows) for side in sides}
    found = {side: accuracy(dropped, {row for row in truth if row < counts[side]}) for side, dropped in sides.items()}
    seconds = {side: statistics.median(one[side].seconds for one in rounds) for side in sides}
    ratios = {peer: [one[peer].seconds / one[mine].seconds for one in rounds] for peer, mine in PAIRS.items()}
    return {
        "benchmark": "near_dedup",
        "ratio": statistics.median(ratios["rensa"]),
        "ratio_split": statistics.median(ratios["rensa_split"]),
        "ratio_datasketch": statistics.median(ratios["datasketch"]),
        "gains": {
            peer: {name: found[mine][name] - found[peer][name] for name in ("precision", "recall")}
            for peer, mine in PAIRS.items()
        },
        "accuracy": found,
        "ratios": ratios,
        "us_a_text": {side: 1e6 * seconds[side] / counts[side] for side in sides},
        "texts": counts,
        "bytes_a_text": statistics.mean(len(row.text.encode()) for row in rows),
        "by_kind": by_kind(rows, truth, {side: sides[side] for side in ("ours", "rensa", "rensa_split")}),
        "same_every_round": all(one[side].dropped == sides[side] for one in rounds for side in sides),
        "repeats": len(rounds),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--texts", type=int, default=20_000, help=f"a multiple of {BLOCK}")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments.texts, arguments.repeats), indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
