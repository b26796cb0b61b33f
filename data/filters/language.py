"""In which language is the prose of a text?

Code, formulas and numbers are in none, so that they are taken out first; what is left is judged by its script where one
language owns it, and by CLD2 otherwise. Chosen by measurement on the same texts: CLD2 (pycld2 0.42) needs 0.12 ms of a core for
2 KB and 3 MB of memory, and says "unknown" of code and sums; py3langid 0.4 needs 2 ms and 78 MB; fastText's lid.176.ftz 0.4 ms
and 4 MB, and calls sums Spanish or Polish.
"""

import re
from functools import cache

from configs.errors import UnusableInput
from configs.filters import LanguageFilter
from data.filters.texts import Filtered, said

_PIECES, _PIECE_CHARACTERS = 5, 4_000
"""Of a longer text so many pieces, evenly spread: a language is plain after a page, and 500 KB would take 30 ms."""

_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)"  # a fenced block, closed or not
    r"|`[^`\n]{1,300}`"
    r"|\$\$.{1,2000}?\$\$|\$[^$\n]{1,300}\$|\\\[.{1,2000}?\\\]|\\\(.{1,300}?\\\)"  # mathematics between its marks
    r"|\\[A-Za-z]{1,30}"  # a command outside of them
    r"|https?://[!-~]{1,2000}|[!-~]{41,}",  # addresses, and what no language has in ASCII: words of more than 40 characters
    re.DOTALL,
)
_LETTER_RUNS = re.compile(r"[^\W\d_]+")
# Scripts by the language that has most of their text. Kana before Han: Japanese has both.
_SCRIPTS = (
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("zh", re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")),
    ("ko", re.compile(r"[\u1100-\u11ff\uac00-\ud7af]")),
    ("el", re.compile(r"[\u0370-\u03ff]")),
    ("he", re.compile(r"[\u0590-\u05ff]")),
    ("th", re.compile(r"[\u0e00-\u0e7f]")),
    ("ru", re.compile(r"[\u0400-\u04ff]")),
    ("ar", re.compile(r"[\u0600-\u06ff]")),
    ("hi", re.compile(r"[\u0900-\u097f]")),
)
_SHARED = {
    "ru": frozenset(("ru", "uk", "be", "bg", "sr", "mk", "kk", "ky", "mn", "tg", "tt", "ba", "uz")),
    "ar": frozenset(("ar", "fa", "ur", "ps", "sd", "ug", "ku")),
    "hi": frozenset(("hi", "mr", "ne", "sa", "bh")),
}
"""The other languages of a script: where one of them is allowed, or to tell which it is, the detector decides."""
_KANA_SHARE = 0.1
"""Of the Japanese and Han characters together: half of a Japanese text is kana, and a Chinese one quotes a word at most."""
_SCRIPT_SHARE = 0.7
"""Of all letters, weighted as words (a Han character says as much as two letters), for a script to decide alone."""
_SAME_LANGUAGE = {"iw": "he", "zh-Hant": "zh", "jw": "jv", "nb": "no", "nn": "no"}


def language(trace: Filtered, settings: LanguageFilter) -> str:
    """`reasoning_language:zh` or `answer_language:de`: the first text in a language not listed for it, and its language.

    Raises UnusableInput for a listed language that the detector does not know.
    """
    for part, text, allowed in zip(("reasoning", "answer"), said(trace), (settings.reasoning, settings.answer), strict=True):
        foreign = _foreign(text, allowed, settings) if allowed else ""
        if foreign:
            return f"{part}_language:{foreign}"
    return ""


def _foreign(text: str, allowed: tuple[str, ...], settings: LanguageFilter) -> str:
    _check(allowed)
    prose = prose_of(text)
    if len(prose) < settings.min_letters // 2:
        return ""
    letters = sum(map(len, _LETTER_RUNS.findall(prose)))
    counts = {} if prose.isascii() else {code: len(pattern.findall(prose)) for code, pattern in _SCRIPTS}
    if letters + counts.get("ja", 0) + counts.get("zh", 0) < settings.min_letters:
        return ""
    by_script = _by_script(counts, letters) if counts else ""
    if by_script and by_script not in _SHARED:
        return "" if by_script in allowed else by_script
    shares = shares_of(prose)
    foreign = {code: share for code, share in shares.items() if code not in allowed}
    if sum(foreign.values()) > settings.max_foreign_share * sum(shares.values()):
        return max(foreign, key=lambda code: (foreign[code], code))
    # The detector is not sure which language it is, and the script says that it is none of the allowed ones.
    return by_script if by_script and not shares and _SHARED[by_script].isdisjoint(allowed) else ""


def prose_of(text: str) -> str:
    """The lines that read like sentences, of at most 20,000 characters of the text."""
    prose = _NOT_PROSE.sub(" ", _sample(text))
    return "\n".join(line for line in prose.split("\n") if _reads_like_prose(line))


def _sample(text: str) -> str:
    if len(text) <= _PIECES * _PIECE_CHARACTERS:
        return text
    stride = (len(text) - _PIECE_CHARACTERS) // (_PIECES - 1)
    return "\n".join(text[start : start + _PIECE_CHARACTERS] for start in range(0, _PIECES * stride, stride))


def _reads_like_prose(line: str) -> bool:
    """Two thirds of what is not blank are letters, in four words at least (`mov eax, ebx` is no Danish) or in a script that may
    have no blanks: `x = f(y)`, `8+3+0=11` and table rows are not."""
    words = line.split()
    letters = sum(map(len, _LETTER_RUNS.findall(line)))
    return 3 * letters >= 2 * sum(map(len, words)) and (len(words) >= 4 or not line.isascii())


def _by_script(counts: dict[str, int], letters: int) -> str:
    """The language whose script most letters are in; "" when scripts do not tell. counts: letters by language, as in _SCRIPTS."""
    if counts["ja"] >= _KANA_SHARE * (counts["ja"] + counts["zh"]):
        counts = counts | {"ja": counts["ja"] + counts["zh"], "zh": 0}
    best = max(counts, key=lambda code: counts[code])
    others = letters - counts[best]
    weight = 2 * counts[best] if best in ("ja", "zh") else counts[best]
    return best if weight > 0 and weight >= _SCRIPT_SHARE * (weight + others) else ""


def shares_of(prose: str) -> dict[str, float]:
    """ISO 639 code -> share of the bytes, of at most three languages; {} where the detector is not sure of itself."""
    import pycld2  # 10 MB of tables, mapped; only where a recipe asks

    # Control characters and unassigned code points make it raise.
    printable = "".join(character if character.isprintable() else " " for character in prose)
    reliable, _, found = pycld2.detect(printable.encode("utf-8", "ignore"), isPlainText=True)
    if not reliable:
        return {}
    return {_SAME_LANGUAGE.get(str(code), str(code)): percent / 100 for _, code, percent, _ in found if code != "un" and percent}


@cache
def _check(allowed: tuple[str, ...]) -> None:
    import pycld2

    known = {_SAME_LANGUAGE.get(code, code) for _, code in pycld2.LANGUAGES}
    if unknown := sorted(set(allowed) - known):
        raise UnusableInput(
            f"data.filters: language {unknown[0]!r} is not one that the detector knows; expected ISO 639 codes such as en, zh, de"
        )
