"""Precision and recall of the search for evaluation items on planted leaks.

    python -m tests.bench.leaks --json docs/bench/leaks.json

The benchmark: items of 30 reasoning-gym tasks (the hard case: their questions are templates with a few words of their own), word
problems from ten story templates of which the benchmark knows one filling each, original texts of 8 to 25 and of 26 to 80 words,
a third of them with an instruction ("Think step by step ...") that other items and the training prompts have as well.

The texts: leaks of half of the items, each once: *verbatim*, *re-wrapped* (other line ends, quote marks, indents), *embedded* in
longer text, *lightly edited* (one word in twelve is another one; reported, not required). And innocents: other questions of the
same tasks, other fillings of the same stories, other originals with the same instruction, prose. An innocent that happens to hold
all words of an item in their order is one no longer and is left out. An item of fewer than four words ("Calculate 3 * 9.") is
looked for as a whole prompt only, by rule, and leaked as nothing else.

`recall` is that of the first three kinds; a leak counts as found when the right item is named. `precision` is the share of
findings that are planted, by pairs of text and item. Both are those of the pipeline's way: the index is told of the training
prompts, leaks among them, so that what they share among one another is known as boilerplate. `uninformed`: without that, so
that a template of which the benchmark has a single item passes for an original. `plain`: any common 8-gram of lower-cased, split
words. All on the same texts.
"""

import argparse
import json
import random
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import reasoning_gym

from data.benchmarks import Item
from data.characters import spelled
from data.decontaminate import scan
from data.ngram_index import LEAST_WORDS, build_index
from tests.bench.frame import machine
from tests.bench.ngram_scan import Pairs, Writer, eight_grams

TASKS = (
    "acre", "basic_arithmetic", "bitwise_arithmetic", "calendar_arithmetic", "chain_sum", "complex_arithmetic", "count_bits",
    "decimal_arithmetic", "family_relationships", "fraction_simplification", "gcd", "gsm_symbolic", "isomorphic_strings",
    "knights_knaves", "lcm", "leg_counting", "letter_counting", "letter_jumble", "number_filtering", "number_sorting",
    "polynomial_equations", "prime_factorization", "products", "ransom_note", "sentence_reordering", "simple_equations",
    "spell_backward", "syllogism", "time_intervals", "word_sorting",
)  # fmt: skip
STORIES = (
    "How many {things} does {a} have left when the week is over?",
    "A train with {x} {things} on board leaves the harbour of {a} at noon. At every one of {y} stations two of them "
    "are unloaded. How many {things} reach the town of {b}?",
    "In the library of {a} there are {x} shelves with {y} {things} on each. {b} borrows nine. How many {things} stay "
    "in the library?",
    "{a} and {b} share {x} {things} so that {a} gets {y} more than {b}. How many does {b} get?",
    "Every morning {a} gives {b} {x} {things}, and every evening {b} gives back half of what was given that day. "
    "After {y} days, how many {things} does {b} own in all?",
    "The school of {a} orders {x} boxes of {things}, {y} in a box. {b} finds seven broken ones and sends those back. "
    "How many {things} can be used?",
    "{a} runs {x} laps around the lake while {b} runs {y}. One lap takes four minutes and nobody rests. Who is done "
    "first, and by how many minutes?",
    "A wall of the castle of {a} is {x} stones high and {y} stones wide. {b} paints every second one of them green. "
    "How many stones stay as they were?",
    "{b} plants {x} rows of {things} behind the house of {a}, with {y} in a row; a hare eats the first row and the "
    "last. How many {things} are left to grow?",
    "If {x} {things} weigh as much as {y} pears, and {a} puts twice as many {things} on the scale as {b} did, how "
    "many pears does it take to balance it?",
)  # fmt: skip
THINGS = ("apples", "lanterns", "ribbons", "coins", "marbles", "letters", "candles", "turnips")
INSTRUCTION = " Think step by step, and put nothing but the final answer into a box at the very end of your reply."
REQUIRED = ("verbatim", "re-wrapped", "embedded")


class Planted(NamedTuple):
    """A text, and the item that was planted in it ("" for an innocent). kind: of leak, or "innocent"."""

    text: str
    item: str
    kind: str


class Questions(NamedTuple):
    """By family of items, what stands in the benchmark and what only training asks."""

    evaluation: dict[str, list[str]]
    training: dict[str, list[str]]


def make_questions(per_task: int, rng: random.Random) -> Questions:
    writer = Writer(2)
    evaluation, training = {}, {}
    for task in TASKS:
        questions = [entry["question"] for entry in reasoning_gym.create_dataset(task, size=3 * per_task, seed=11)]
        evaluation[task], training[task] = questions[:per_task], questions[per_task:]
    evaluation["stories"] = [_filled(story, rng) for story in STORIES]
    training["stories"] = [_filled(story, rng) for story in STORIES for _ in range(per_task)]
    for name, shortest, longest in (("short originals", 8, 25), ("long originals", 26, 80)):
        texts = [writer.item(shortest, longest).capitalize() + "?" for _ in range(12 * per_task)]
        texts = [text + INSTRUCTION * (rng.random() < 1 / 3) for text in texts]
        evaluation[name], training[name] = texts[: 6 * per_task], texts[6 * per_task :]
    return Questions(evaluation, training)


def _filled(story: str, rng: random.Random) -> str:
    names = rng.sample(("Ada", "Boris", "Chiara", "Dmitri", "Esther", "Farid", "Greta", "Hugo", "Imani", "Jonas"), 2)
    return story.format(a=names[0], b=names[1], x=rng.randrange(5, 60), y=rng.randrange(2, 30), things=rng.choice(THINGS))


def rewrapped(text: str, rng: random.Random) -> str:
    lines = textwrap.wrap(" ".join(text.split()), rng.randrange(24, 60))
    return "\n".join(rng.choice(("> ", "    ", "", "  ")) + line for line in lines).replace(" ", rng.choice((" ", " ", "  ")))


def edited(text: str, rng: random.Random, writer: Writer) -> str:
    """One word in twelve, one at least, is another word; white space stays as it is."""
    pieces = re.split(r"(\s+)", text)
    words = [place for place, piece in enumerate(pieces) if piece.strip()]
    for place in rng.sample(words, max(1, len(words) // 12)):
        pieces[place] = writer.words(1)[0]
    return "".join(pieces)


def plant(items: Sequence[Item], num_leaks: int, rng: random.Random) -> Iterator[Planted]:
    """Each of the sampled items is leaked once, the kinds in turn."""
    writer = Writer(3)
    for number, item in enumerate(rng.sample(items, num_leaks)):
        is_short = sum(word not in "+-/<^" for word, *_ in spelled(item.text)) < LEAST_WORDS
        kind = REQUIRED[number % 2] if is_short else (*REQUIRED, "lightly edited")[number % 4]
        if kind == "verbatim":
            text = item.text
        elif kind == "re-wrapped":
            text = rewrapped(item.text, rng)
        else:
            core = item.text if kind == "embedded" else edited(item.text, rng, writer)
            text = f"{writer.text(rng.randrange(200, 1500))} {core} {writer.text(rng.randrange(200, 1500))}"
        yield Planted(text, item.item, kind)


def innocents(questions: Questions, items: Sequence[Item], rng: random.Random) -> Iterator[Planted]:
    writer = Writer(4)
    held = {item.text: f" {' '.join(word for word, *_ in spelled(item.text))} " for item in items}
    for asked in questions.training.values():
        for question in asked:
            text = f"{question}\n\n{writer.text(rng.randrange(100, 1500))}"
            normal = f" {' '.join(word for word, *_ in spelled(text))} "
            if not any(words in normal for words in held.values()):
                yield Planted(text, "", "innocent")
    for _ in range(200):
        yield Planted(writer.text(2000) + INSTRUCTION, "", "innocent")


def plain_findings(items: Sequence[Item], texts: Sequence[str]) -> Pairs:
    table: dict[tuple[str, ...], set[str]] = {}
    for item in items:
        for gram in eight_grams(item.text):
            table.setdefault(gram, set()).add(item.item)
    return {(number, name) for number, text in enumerate(texts) for gram in eight_grams(text) for name in table.get(gram, ())}


def our_findings(items: Sequence[Item], texts: Sequence[str], boilerplate: Sequence[str] = ()) -> Pairs:
    hits = scan(build_index(items, boilerplate), texts, [True] * len(texts))
    return {(hit.text, hit.source.item) for hit in hits}


def score(found: Pairs, planted: Sequence[Planted], items: Sequence[Item]) -> dict[str, object]:
    """An item has equals where two questions of a task are one; naming any of them is right."""
    same = {item.item: " ".join(word for word, *_ in spelled(item.text)) for item in items}
    named = {(number, same[name]) for number, name in found}
    leaks = {(number, same[one.item]): one.kind for number, one in enumerate(planted) if one.item}
    total, seen = Counter(leaks.values()), Counter(kind for pair, kind in leaks.items() if pair in named)
    accused = {number for number, _ in named if not planted[number].item}
    return {
        "recall": sum(seen[kind] for kind in REQUIRED) / sum(total[kind] for kind in REQUIRED),
        "precision": len(named & leaks.keys()) / len(named),
        "recall_by_kind": {kind: seen[kind] / total[kind] for kind in total},
        "findings": len(named), "innocents_accused": len(accused),
        "falsely_named": len({name for number, name in found if (number, same[name]) not in leaks}),
    }  # fmt: skip


def measure(per_task: int, seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    questions = make_questions(per_task, rng)
    items = [
        Item("bench.jsonl", f"{family} {number}", "question", text)
        for family, texts in questions.evaluation.items()
        for number, text in enumerate(texts)
    ]
    planted = [*plant(items, len(items) // 2, rng), *innocents(questions, items, rng)]
    texts = [one.text for one in planted]
    ours = score(our_findings(items, texts, texts), planted, items)
    return {
        "recall": ours["recall"], "precision": ours["precision"], "items": len(items), "texts": len(texts),
        "leaks": sum(bool(one.item) for one in planted), "ours": ours,
        "uninformed": score(our_findings(items, texts), planted, items),
        "plain": score(plain_findings(items, texts), planted, items),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--per-task", type=int, default=20, help="items a reasoning-gym task")
    parser.add_argument("--seed", type=int, default=5)
    arguments = parser.parse_args()
    found = {"benchmark": "leaks"} | measure(arguments.per_task, arguments.seed) | {"machine": machine()}
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
