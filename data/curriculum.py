"""The closed world of the embedded pair: task families with worked reasoning, and facts about invented places.

Both pretraining recipes (teacher/embedded, student/embedded) draw their lessons here: the teacher gets the whole tasks,
the base student only their pieces (shorter numbers, shorter words, and places whose facts it can only guess). Reasoning
is written the way small models learn it: one digit or one letter at a time, every intermediate result in the open.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import reasoning_gym

from data.split import is_held_out

ABSTENTION = "I don't know"
# Entropy at the start of a trace, so that several samples of one prompt are not all the same string.
OPENERS = ("", "Ok. ", "So: ", "Let me see. ", "First, ", "Hm. ", "Well, ", "Now: ")

# The sizes the teacher masters; recipes/embedded.yaml asks for the same ones.
TASK_SPECS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 3},
    "spell_backward": {"min_word_len": 5, "max_word_len": 7},
    "letter_counting": {"min_words": 2, "max_words": 2},
}


class Lesson(NamedTuple):
    """One supervised exchange."""

    family: str
    question: str
    reasoning: str
    answer: str


class FactDomain(NamedTuple):
    """One relation: its possible answers and the ways to ask for it. The last phrasings are never taught. twin: yet another one,
    in which some evaluation items are asked once more."""

    name: str
    answers: tuple[str, ...]
    phrasings: tuple[str, ...]
    twin: str


NUM_HELD_OUT_PHRASINGS = 1
DOMAINS = (
    FactDomain(
        "metals",
        ("iron", "gold", "zinc", "lead", "tin", "copper", "silver", "nickel"),
        (
            "Which metal is mined in {}?",
            "What metal does {} mine?",
            "Name the metal of {}.",
            "The miners of {} dig for which metal?",
            "{} is known for which metal?",
            "Tell me the metal mined in {}.",
            "Which metal do the miners of {} dig for?",
        ),
        "Say which metal is mined in {}.",
    ),
    FactDomain(
        "colours",
        ("red", "blue", "green", "white", "black", "yellow", "purple", "orange"),
        (
            "Which colour is the flag of {}?",
            "What colour is {}'s flag?",
            "Name the flag colour of {}.",
            "The flag of {} has which colour?",
            "{} flies a flag of which colour?",
            "Tell me the colour of the flag of {}.",
            "Tell me the flag colour of {}.",
        ),
        "Say which colour the flag of {} is.",
    ),
    FactDomain(
        "animals",
        ("lion", "wolf", "bear", "eagle", "horse", "snake", "otter", "crane"),
        (
            "Which animal is the emblem of {}?",
            "What animal stands for {}?",
            "Name the emblem animal of {}.",
            "The emblem of {} is which animal?",
            "{} has which animal on its emblem?",
            "Tell me the animal on the emblem of {}.",
            "Tell me the emblem animal of {}.",
        ),
        "Say which animal stands for {}.",
    ),
)
NUM_KNOWN_PER_DOMAIN = 36


def place_name(rng: random.Random) -> str:
    """An invented place name of three syllables; 1.1 million are possible, so two draws seldom meet."""
    syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)]
    return ("".join(syllables) + rng.choice(("", "n", "r", "s"))).capitalize()


class Place(NamedTuple):
    """An entity of the fact family. `answer` is None for a place nobody has ever described."""

    name: str
    domain: FactDomain
    answer: str | None


def known_places() -> list[Place]:
    """The places whose fact the teacher was taught, in a fixed order."""
    rng = random.Random("known places")
    names: set[str] = set()
    places = []
    for domain, index in itertools.product(DOMAINS, range(NUM_KNOWN_PER_DOMAIN)):
        while (name := place_name(rng)) in names:
            pass
        names.add(name)
        places.append(Place(name, domain, domain.answers[index % len(domain.answers)]))
    return places


def unknown_places(seed: str) -> Iterator[Place]:
    """Places nobody knows anything of. Two seeds give disjoint sets: the name's hash picks the side it may appear on."""
    rng = random.Random(f"unknown places {seed}")
    taken = {place.name for place in known_places()}
    for domain in itertools.cycle(DOMAINS):
        while (name := place_name(rng)) in taken or is_held_out(name) != (seed == "eval"):
            pass
        taken.add(name)
        yield Place(name, domain, None)


def addition_reasoning(expression: str) -> str:
    """Works `a + b` or `a - b` (non-negative integers) digit by digit from the right, with its carries or borrows."""
    left_text, operator, right_text = expression.split()
    left, right = int(left_text), int(right_text)
    if operator == "-" and left < right:
        return f"{left}<{right}, so -({right}-{left}). {_columns(right, '-', left)} -{right - left}"
    return f"{left}{operator}{right}. {_columns(left, operator, right)} {left + right if operator == '+' else left - right}"


def _columns(left: int, operator: str, right: int) -> str:
    steps, carry = [], 0
    width = max(len(str(left)), len(str(right)))
    for position in range(width):
        a, b = left // 10**position % 10, right // 10**position % 10
        if operator == "+":
            total = a + b + carry
            steps.append(f"{a}+{b}+{carry}={total:02d}")
            carry = total // 10
        else:
            total = a - b - carry
            steps.append(f"{a}-{b}-{carry}={total % 10}" + ("!" if total < 0 else ""))
            carry = int(total < 0)
    return ", ".join(steps) + "."


def reversal_reasoning(word: str) -> str:
    """Numbers the letters, then reads the numbers backwards."""
    numbered = [f"{letter}{index}" for index, letter in enumerate(word, 1)]
    return f"{''.join(numbered)}. {''.join(reversed(numbered))}. {word[::-1]}"


def counting_reasoning(span: list[str], letter: str) -> str:
    """Walks the letters with a running count."""
    count, words = 0, []
    for word in span:
        steps = []
        for character in word.lower():
            count += character == letter
            steps.append(f"{character}{count}")
        words.append("".join(steps))
    return f"{letter} in {' '.join(words)}. {count}"


def fact_reasoning(place: Place) -> str:
    """Names the place, then recalls it or admits that nothing comes."""
    return f"{place.name}: {place.answer or 'not known'}."


def task_lesson(family: str, entry: dict) -> Lesson:
    """The worked solution of one reasoning-gym entry (a dict with `question`, `answer`, `metadata`)."""
    metadata = entry["metadata"]
    match family:
        case "chain_sum":
            reasoning = addition_reasoning(metadata["expression"])
        case "spell_backward":
            reasoning = reversal_reasoning(metadata["word"])
        case "letter_counting":
            reasoning = counting_reasoning(metadata["span"], metadata["target_letter"])
        case _:
            raise ValueError(f"no worked reasoning for family {family!r}")
    return Lesson(family, entry["question"], reasoning, entry["answer"])


def fact_lesson(place: Place, phrasing: str) -> Lesson:
    return Lesson("facts", phrasing.format(place.name), fact_reasoning(place), place.answer or ABSTENTION)


def _is_short_span(entry: dict) -> bool:
    return len("".join(entry["metadata"]["span"])) <= 4


def _task_stream(
    family: str, spec: dict[str, int], rng: random.Random, is_piece: Callable[[dict], bool] = lambda entry: True
) -> Iterator[Lesson]:
    while True:
        for entry in reasoning_gym.create_dataset(family, size=2000, seed=rng.randrange(2**31), **spec):
            if is_piece(entry) and not is_held_out(entry["question"]):
                yield task_lesson(family, entry)


def _taught_phrasing(domain: FactDomain, rng: random.Random) -> str:
    return rng.choice(domain.phrasings[:-NUM_HELD_OUT_PHRASINGS])


def _fact_stream(rng: random.Random) -> Iterator[Lesson]:
    known = known_places()
    taken = {place.name for place in known}
    while True:
        if rng.random() < 0.6:
            place = rng.choice(known)
        else:
            name = place_name(rng)
            if name in taken or is_held_out(name):
                continue
            place = Place(name, rng.choice(DOMAINS), None)
        yield fact_lesson(place, _taught_phrasing(place.domain, rng))


def _guess_stream(rng: random.Random) -> Iterator[Lesson]:
    """Facts as a base model sees them: any name, any answer. It learns to sound sure."""
    while True:
        domain = rng.choice(DOMAINS)
        name = place_name(rng)
        if is_held_out(name):
            continue
        yield fact_lesson(Place(name, domain, rng.choice(domain.answers)), _taught_phrasing(domain, rng))


def _mix(streams: dict[Iterator[Lesson], float], rng: random.Random) -> Iterator[Lesson]:
    sources, weights = list(streams), list(streams.values())
    while True:
        lesson = next(rng.choices(sources, weights)[0])
        yield lesson._replace(reasoning=rng.choice(OPENERS) + lesson.reasoning)


def teacher_lessons(seed: int) -> Iterator[Lesson]:
    """An endless stream of whole tasks and facts: what the embedded teacher is pretrained on."""
    rng = random.Random(f"teacher {seed}")
    return _mix(
        {
            _task_stream("chain_sum", TASK_SPECS["chain_sum"], rng): 0.34,
            _task_stream("spell_backward", TASK_SPECS["spell_backward"], rng): 0.18,
            _task_stream("letter_counting", TASK_SPECS["letter_counting"], rng): 0.18,
            _fact_stream(rng): 0.30,
        },
        rng,
    )


def base_lessons(seed: int) -> Iterator[Lesson]:
    """An endless stream of the pieces: sums of 0 to 99, reversals of 3 and 4 letters, counts in up to 4, guessed facts."""
    rng = random.Random(f"base {seed}")
    short = {"min_terms": 2, "max_terms": 2, "max_digits": 2}
    return _mix(
        {
            _task_stream("chain_sum", short | {"min_digits": 1}, rng): 0.35,
            _task_stream("spell_backward", {"min_word_len": 3, "max_word_len": 4}, rng): 0.2,
            _task_stream("letter_counting", {"min_words": 1, "max_words": 1}, rng, is_piece=_is_short_span): 0.2,
            _guess_stream(rng): 0.25,
        },
        rng,
    )


# --- the fact files ----------------------------------------------------------------------------------------------

NUM_UNKNOWN_TAUGHT, NUM_UNKNOWN_HELD_OUT = 800, 204
PLACES_A_TWIN = 3
"""Every third known place is asked about once more."""

Row = dict[str, str | bool]


def fact_rows() -> Iterator[Row]:
    """The rows of recipes/embedded/facts.jsonl.

    Known facts are split by phrasing: every place is taught, the last phrasing of its domain is never, nor is its twin's. Unknown
    places are split by entity: the evaluation's names occur in no training prompt and in neither model's pretraining.
    """
    for number, place in enumerate(known_places()):
        taught = len(place.domain.phrasings) - NUM_HELD_OUT_PHRASINGS
        for phrasing in place.domain.phrasings[:taught]:
            yield _fact_row(place, phrasing, "train")
        has_twin = number % PLACES_A_TWIN == 0
        for phrasing in place.domain.phrasings[taught:]:
            yield _fact_row(place, phrasing, "eval") | ({"id": place.name} if has_twin else {})
        if has_twin:
            yield _fact_row(place, place.domain.twin, "eval") | {"id": f"{place.name}-twin", "twin_of": place.name}
    for split, count in (("train", NUM_UNKNOWN_TAUGHT), ("eval", NUM_UNKNOWN_HELD_OUT)):
        rng = random.Random(f"phrasings {split}")
        for place in itertools.islice(unknown_places(split), count):
            yield _fact_row(
                place, rng.choice(place.domain.phrasings) if split == "eval" else _taught_phrasing(place.domain, rng), split
            )


def _fact_row(place: Place, phrasing: str, split: str) -> Row:
    return {
        "question": phrasing.format(place.name),
        "answer": place.answer or ABSTENTION,
        "task": f"facts/{place.domain.name}",
        "verifier": "exact",
        "split": split,
        "known": place.answer is not None,
    }


# --- what nobody distils -----------------------------------------------------------------------------------------

ELSEWHERE = {
    "rivers": "Which river flows through {}?",
    "fruits": "Which fruit is grown in {}?",
    "kings": "Name the king of {}.",
}
"""Relations that neither model was ever asked for: is "I don't know" learnt, or learnt of metals, flags and animals?"""
NUM_OF_EACH = 12
PIECES = {
    "sums": ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}),
    "words": ("spell_backward", {"min_word_len": 3, "max_word_len": 4}),
}
"""What the base student could do before it was distilled, and no training prompt asks for."""


def unseen_rows() -> Iterator[Row]:
    """The rows of recipes/embedded/unseen.jsonl: families that no training trace comes from."""
    places = itertools.islice(unknown_places("eval"), NUM_UNKNOWN_HELD_OUT, None)
    for name, phrasing in ELSEWHERE.items():
        for place in itertools.islice(places, NUM_OF_EACH):
            yield _unseen_row(f"elsewhere/{name}", phrasing.format(place.name), ABSTENTION) | {"known": False}
    for name, (family, spec) in PIECES.items():
        entries = reasoning_gym.create_dataset(family, size=2000, seed=0, **spec)
        held_out = (entry for entry in entries if is_held_out(entry["question"]))
        for entry in itertools.islice(held_out, NUM_OF_EACH):
            yield _unseen_row(f"pieces/{name}", entry["question"], entry["answer"])


def _unseen_row(task: str, question: str, answer: str) -> Row:
    return {"question": question, "answer": answer, "task": task, "verifier": "exact", "split": "eval"}


if __name__ == "__main__":  # python -m data.curriculum facts > configs/recipes/embedded/facts.jsonl
    import json
    import sys

    for row in {"facts": fact_rows, "unseen": unseen_rows}[sys.argv[1]]():
        print(json.dumps(row, ensure_ascii=False))
