"""Exact match after normalisation, and what counts as saying "I don't know"."""

import functools
import json
import unicodedata

from data.records import Prompt

VERSION = 2
"""2: aliases."""
_TRAILING = " .!?,;:"
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "`": "'", "´": "'"})

# Whole answers, normalised. A list of exact forms and not a search for "know" in the text: "everyone knows it is iron"
# is an answer, and a student must not buy abstention with a phrase dropped into a guess.
_ABSTENTIONS = frozenset(
    {
        "i don't know",
        "i do not know",
        "i dont know",
        "don't know",
        "i don't know that",
        "i don't know the answer",
        "i do not know the answer",
        "sorry, i don't know",
        "not known",
    }
)


def normalise(text: str) -> str:
    """Case, runs of whitespace, trailing punctuation and Unicode look-alikes (NFKC, curly apostrophes) made one."""
    # casefold can undo NFKC (U+1E9E), so fold first; the order makes the function idempotent, which a property test asks
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_APOSTROPHES)
    return " ".join(folded.split()).rstrip(_TRAILING)


def is_abstention(answer: str) -> bool:
    """True when the answer as a whole declines. An empty answer is none: nothing was said."""
    return normalise(answer) in _ABSTENTIONS


def score(prompt: Prompt, answer: str) -> float:
    """1.0 when the normalised answer equals the normalised reference or one of its aliases (`details`: {"aliases": [...]}), else
    0.0.

    A reference that is itself an abstention (an entity nobody has described) is matched by any form of it.
    """
    if is_abstention(prompt.answer):
        return float(is_abstention(answer))
    reference, said = normalise(prompt.answer), normalise(answer)
    return float(bool(reference) and (said == reference or said in _aliases(prompt.details)))


@functools.lru_cache(maxsize=1024)
def _aliases(details: str) -> frozenset[str]:
    """Normalised, without empty ones. Of details of any other form, none: this verifier is total."""
    if '"aliases"' not in details:
        return frozenset()
    try:
        aliases = json.loads(details)["aliases"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return frozenset()
    texts = aliases if isinstance(aliases, list) else []
    return frozenset(filter(None, (normalise(alias) for alias in texts if isinstance(alias, str))))
