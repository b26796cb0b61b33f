"""One wrong line in a source file: where it can go, and the file with it.

Every mutation edits a single line and leaves the number of lines alone, so that `path:line` names it. In Python the
tokenizer finds the places and the mutated file must still parse; elsewhere only conditions of `if`, `while` and `for` lines
without quotes or comments are touched, between spaces, where an operator cannot be anything else. A mutation is wrong by
its text; that the program then does something else is likely and not proved.
"""

import ast
import io
import keyword
import re
import tokenize
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data.records import digest

C_LIKE = (
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cs",
    ".java",
    ".js",
    ".jsx",
    ".ts",
    ".tsx",
    ".go",
    ".rs",
    ".kt",
    ".swift",
    ".php",
    ".scala",
)
PLANTABLE = (".py", *C_LIKE)
CODE = (*PLANTABLE, ".rb", ".sh", ".jl", ".lua", ".pl", ".r", ".hs", ".ml", ".ex", ".clj", ".sql")
"""Suffixes of files that questions are asked about."""


class Site(NamedTuple):
    """An edit: characters [start, end) of line `line` (from 1) become `text`. kind: a countable word."""

    line: int
    start: int
    end: int
    text: str
    kind: str


class Planted(NamedTuple):
    """A file's text after one mutation. before, after: the line, stripped."""

    text: str
    site: Site
    before: str
    after: str


def plant(path: str, text: str, seed: str, rank: int, max_line: int) -> Planted | None:
    """The file with its `rank`-th mutation in the seed's order, within the first `max_line` lines; None when it has no more.

    The order is that of hashes: the same text and seed give the same one.
    """
    lines = text.split("\n")
    sites = [site for site in find_sites(path, text) if site.line <= max_line]
    for site in sorted(sites, key=lambda site: digest(seed, path, *site))[rank:]:
        changed = apply(lines, site)
        if not path.endswith(".py") or parses(changed):
            return Planted(changed, site, lines[site.line - 1].strip(), changed.split("\n")[site.line - 1].strip())
    return None


def apply(lines: Sequence[str], site: Site) -> str:
    """The text with the edit made."""
    line = lines[site.line - 1]
    edited = line[: site.start] + site.text + line[site.end :]
    return "\n".join([*lines[: site.line - 1], edited, *lines[site.line :]])


def find_sites(path: str, text: str) -> list[Site]:
    """Places for a mutation, by position. None in a file with lone carriage returns or form feeds, whose lines an editor
    and a compiler count differently."""
    if re.search(r"\r(?!\n)|\f|\v", text):
        return []
    if path.endswith(".py"):
        return list(python_sites(text)) if parses(text) else []
    return list(c_like_sites(text)) if path.endswith(C_LIKE) else []


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


# --- Python ------------------------------------------------------------------------------------------------------

_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
_ARITHMETIC = {"+": "-", "-": "+", "*": "+"}
_LOGIC = {"and": "or", "or": "and"}
# Changes here alter what is checked or shown, not what the program does; and a TYPE_CHECKING block never runs.
_SPARED = re.compile(r"^\s*@|__name__|TYPE_CHECKING|version_info|\bassert\b|\braise\b|\bwarn|\blog(ger|ging)?\.")


def python_sites(text: str) -> Iterator[Site]:
    """Places in Python that parses: comparisons, arithmetic, and/or, negated conditions, constants off by one."""
    try:
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in _LAYOUT]
    except (tokenize.TokenError, SyntaxError):
        return
    brackets: list[str] = []
    for index in range(1, len(tokens) - 1):
        before, token, after = tokens[index - 1 : index + 2]
        if token.string in "([{":
            brackets.append(token.string)
        elif token.string in ")]}" and brackets:
            brackets.pop()
        site = _python_site(before, token, after, "".join(brackets[-1:]), tokens[index - 2].string if index > 1 else "")
        if site is not None and not _SPARED.search(token.line):
            yield site


_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
_Token = tokenize.TokenInfo


def _python_site(before: _Token, token: _Token, after: _Token, bracket: str, second_before: str) -> Site | None:
    line, start, end, word = token.start[0], token.start[1], token.end[1], token.string
    if token.type == tokenize.OP and word in _COMPARISONS:
        return Site(line, start, end, _COMPARISONS[word], "comparison")
    if token.type == tokenize.OP and word in _ARITHMETIC and _is_operand(before) and after.type != tokenize.STRING:
        return Site(line, start, end, _ARITHMETIC[word], "operator")
    if token.type == tokenize.NAME and word in _LOGIC:
        return Site(line, start, end, _LOGIC[word], "condition")
    if before.string in ("if", "elif", "while") and before.start[0] == line and after.start[0] == line:
        if word == "not":
            return Site(line, start, after.start[1], "", "negation")
        if token.type == tokenize.NAME and not keyword.iskeyword(word) and after.string == ":":
            return Site(line, start, start, "not ", "negation")
    if token.type == tokenize.NUMBER and word.isdecimal() and _is_bound(before.string, second_before, bracket, after.string):
        return Site(line, start, end, str(int(word) + 1), "off_by_one")
    return None


def _is_operand(token: _Token) -> bool:
    """What stands left of a binary operator. A string does not: `"a" - b` is no subtle bug."""
    if token.type == tokenize.NAME:
        return not keyword.iskeyword(token.string)
    return token.type == tokenize.NUMBER or token.string in (")", "]")


def _is_bound(before: str, second_before: str, bracket: str, after: str) -> bool:
    """A number after + or -, at an end of a slice, or first in range()."""
    in_slice = bracket == "[" and ":" in (before, after)
    return in_slice or before in ("+", "-") or (before == "(" and second_before == "range")


# --- languages with braces ---------------------------------------------------------------------------------------

_CONDITION = re.compile(r"\s*(}\s*)?(else\s+)?(if|while|for)\b")
_OPERATOR = re.compile(r"(?<= )(<=|>=|==|!=|<|>|&&|\|\|)(?= )")
_SWAPPED = {**_COMPARISONS, "&&": "||", "||": "&&"}
_UNSURE = re.compile(r"[\"'`]|//|/\*|\*/")


def c_like_sites(text: str) -> Iterator[Site]:
    """Places in the conditions of C-like code."""
    in_comment = False
    for number, line in enumerate(text.split("\n"), 1):
        was_in_comment, in_comment = in_comment, _comment_open(line, in_comment)
        if was_in_comment or not _CONDITION.match(line) or _UNSURE.search(line):
            continue
        for found in _OPERATOR.finditer(line):
            kind = "condition" if found.group() in ("&&", "||") else "comparison"
            yield Site(number, found.start(), found.end(), _SWAPPED[found.group()], kind)


def _comment_open(line: str, in_comment: bool) -> bool:
    """Whether a block comment is open after `line`."""
    opened, closed = line.rfind("/*"), line.rfind("*/")
    return opened > closed or (in_comment and closed < 0)
