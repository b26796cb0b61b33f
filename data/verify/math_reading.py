"""What a mathematical answer says, as far as that can be known without sympy: exactly, or not at all.

math-verify looks for an answer by rank: a sentence with "final answer" or a \\boxed{} first, then sentences with "answer",
then anything; of one rank the match that ends last counts. So a text with a single \\boxed{} and no "final answer" says
what is in that box, whatever stands around it, and a number in the box can be compared at once
(data/verify/math_values.py). Everything
that is not certainly read the way math-verify 0.9 reads it is left to math-verify. tests/data/test_math_verifier.py holds
thousands of pairs against the real one.
"""

import re

from data.verify.math_values import equal, plain_number, value

_MARKS = ("$", "\\boxed", "\\fbox", "\\[", "\\(")
_PLAIN = re.compile(r"-?(?:[1-9]\d{0,2}(?:[ ,]\d{3})+|0|[1-9]\d*)(?:\.\d+)?\s*(?:%|[Pp]ercent)?\.?|\.\d+", re.ASCII)
_EXPRESSION = re.compile(r"[ 0-9A-Za-z+\-*/^=<>()\[\]{},.;:|!%_'°π√∞≤≥≠±·×÷−]+")
_KNOWN_WORDS = frozenset({"pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "or", "and"})
_WORD = re.compile(r"(?<![A-Za-z])[A-Za-z]{2,}")
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
_PI = re.compile(r"(?<![A-Za-z])pi(?![A-Za-z])")  # LaTeX without the backslash is i times p


def read(text: str) -> str:
    """The text with a bare expression put into dollars. math-verify reads LaTeX inside delimiters only and picks numbers out
    of the rest: bare `2pi` was 2 to it, `x = 2 + y` was 2, `3, 4` was 4, and `1e5` was 1.

    Plain numbers, prose, and what has delimiters of its own stay as they are.
    """
    bare = text.strip()
    if bold := _BOLD.fullmatch(bare):
        bare = bold[1]  # its stars are no products
    if not bare or any(mark in bare.replace("\\$", "") for mark in _MARKS):
        return text
    if "\\" in bare:
        return f"${bare}$"
    if _PLAIN.fullmatch(bare) or not _EXPRESSION.fullmatch(bare):
        return bare if bold else text
    if any(word not in _KNOWN_WORDS for word in _WORD.findall(bare)):
        return text  # in dollars a name would be a product of letters, equal to its anagrams
    latex = _PI.sub(r"\\pi", bare)
    return f"${latex}$"


# --- where the answer stands -------------------------------------------------------------------------------------

_FINAL_ANSWER = re.compile("final answer", re.IGNORECASE)
_PERCENT = re.compile("%|percent|pct", re.IGNORECASE)
_CLOSER = re.compile(r"[\s.*]*(?:\$\$?|\\\]|\\\))?[\s.*]*")
_OTHER_START = re.compile(r"\$|\[|\\\(|\\frac|I hope")
_BREAKS = re.compile(r"\$|\n|\\\]|\\\)")
"""Ends a LaTeX environment inside the box."""
_SPACED_BRACKET = re.compile(r"\s\[|\]\s")


def final_box(text: str) -> str | None:
    """What stands in the text's only \\boxed{}, stripped, where math-verify would look there and nowhere else, provided that
    it can parse it; None otherwise."""
    if text.count("\\boxed") != 1 or "\\fbox" in text:
        return None
    before, _, rest = text.partition("\\boxed")
    end = _closing_brace(rest)
    if end is None:
        return None
    content, after = rest[1:end].strip(), rest[end + 1 :]
    if not content or _BREAKS.search(content) or ("]" in content and not _brackets_are_plain(before, content, after)):
        return None
    return content if _nothing_competes(before, after) else None


def _brackets_are_plain(before: str, content: str, after: str) -> bool:
    """An interval in the box has brackets; with whitespace around them they delimit LaTeX, and nothing is sure any more."""
    return not _SPACED_BRACKET.search(before) and not _SPACED_BRACKET.search(content) and "]" not in after.replace("\\]", "")


def _closing_brace(rest: str) -> int | None:
    """Index of the brace that closes the one which `rest` begins with."""
    if not rest.startswith("{"):
        return None
    depth = 0
    for match in re.finditer(r"[{}]", rest):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    return None


def _nothing_competes(before: str, after: str) -> bool:
    """No percent sign that belongs to the box, and no sentence about a final answer that ends after it or begins elsewhere."""
    if _PERCENT.search(after):
        return False
    start = _final_answer(before)
    if start is None:
        return _final_answer(after) is None
    between = before[start:].rstrip().removesuffix("$").removesuffix("$").removesuffix("\\[").removesuffix("\\(")
    return _CLOSER.fullmatch(after) is not None and _OTHER_START.search(between) is None


def _final_answer(text: str) -> int | None:
    """Where the first "final answer" ends, in any case. A regular expression that ignores case costs 10 ns a character."""
    if text.isascii():
        start = text.lower().find("final answer")
        return None if start < 0 else start + len("final answer")
    found = _FINAL_ANSWER.search(text)  # as math-verify has it: a long s counts, too
    return None if found is None else found.end()


# --- what it says ------------------------------------------------------------------------------------------------

_DELIMITED = re.compile(r"\$([^$\n]+)\$|\\\(([^\n]+?)\\\)")
_SENTENCE = re.compile(
    r"(?:The (?:final )?answer is:? |Answer: |#### |= )?(?:\*\*(?P<bold>[^\s*]+)\*\*|\$(?P<latex>[^\s$]+)\$|(?P<bare>\S+?))\.?",
    re.ASCII,
)
"""Whole answers that are one number and words which math-verify looks for, or none."""
_SPELLING = re.compile(r"\\[dt]frac|\\left(?=[(\[])|\\right(?=[)\]])| *([-+=]) *(?![. ])|\^\{(\w)\}(?!\d)")
"""What math-verify makes one before it parses, or its grammar does not see: blanks around a sign, braces around one character."""


def quick(reference: str, answer: str) -> bool | None:
    """math-verify's verdict on the answer to a reference that is right by itself; None where only math-verify can tell."""
    if reference == answer:
        return True
    said = final_box(answer) if "\\boxed" in answer else _whole(answer)
    if said is None or (wanted := _whole(reference)) is None:
        return None
    wanted, said = _spelled(wanted), _spelled(said)
    one, other = value(wanted), value(said)
    if one is not None and other is not None:
        return equal(one, other)
    return True if one is None and other is None and wanted == said else None


def _whole(text: str) -> str | None:
    """The expression that the text as a whole is, delimiters taken off; None for prose."""
    bare = text.strip()
    sentence = _SENTENCE.fullmatch(bare)
    if sentence and plain_number(number := sentence["bold"] or sentence["latex"] or sentence["bare"]):
        return number
    if "answer" in bare.lower():
        return None
    if "\\boxed" in bare:
        return final_box(bare)
    found = _DELIMITED.fullmatch(read(bare))
    return (found[1] or found[2]).strip() if found else None


def _spelled(text: str) -> str:
    return _SPELLING.sub(_usual, text)


def _usual(found: re.Match[str]) -> str:
    if found[1] or found[2]:
        return found[1] or f"^{found[2]}"
    return "\\frac" if found[0].endswith("frac") else ""
