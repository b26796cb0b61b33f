"""What looks like a secret, an address or a person is out of a text before it leaves for W&B.

Two nets: patterns of what secrets look like anywhere, and the very words of this machine (its home and working folders, its name,
the values of environment variables that are named like secrets). Too much is taken rather than too little: nobody
trains on these texts.
"""

import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Pattern(NamedTuple):
    """What matches becomes `[name]`; of a pattern with a group `kept`, that part stays in front of it."""

    name: str
    regex: re.Pattern[str]


def _pattern(name: str, regex: str) -> Pattern:
    return Pattern(name, re.compile(regex))


PATTERNS: tuple[Pattern, ...] = (
    # A block that was cut before its end is a key all the same.
    _pattern("private key", r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)"),
    _pattern("credentials", r"(?P<kept>\b[A-Za-z][A-Za-z0-9+.-]{1,30}://)[^\s/@:'\"<>]{0,256}:[^\s/@'\"<>]{0,512}(?=@)"),
    _pattern("credentials", r"(?P<kept>\bhttps?://)[^\s/@:'\"<>]{8,512}(?=@)"),
    _pattern("header", r"(?P<kept>(?i:\b(?:proxy-)?authorization|\bx-api-key|\b(?:set-)?cookie)['\"]?\s{0,4}[:=]\s{0,4})"
                       r"[^\r\n]{4,2000}"),
    _pattern("token", r"(?P<kept>\b(?i:bearer|basic)\s{1,4})[A-Za-z0-9._~+/=-]{8,}"),
    _pattern("token", r"\beyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*){0,2}"),
    _pattern("key", r"\b(?:sk|pk|rk)[-_](?:[A-Za-z0-9]{1,12}[-_]){0,3}[A-Za-z0-9_-]{16,}"),
    _pattern("key", r"\b(?:gh[pousr]_|github_pat_|glpat-|hf_|npm_|pypi-|dop_v1_|xox[abeoprs]-|nvapi-|wandb_v1_|gsk_|r8_|shpat_)"
                    r"[A-Za-z0-9_-]{10,}"),
    _pattern("key", r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{30,}|\bya29\.[A-Za-z0-9_-]{20,}"),
    _pattern("web hook", r"\bhttps://hooks\.[^\s'\"<>]{8,300}"),
    _pattern("secret", r"(?P<kept>(?i:(?:api[_-]?key|access[_-]?key|account[_-]?key|secret(?:[_-]?key)?|token|passw(?:or)?d"
                       r"|passphrase|private[_-]?key|credentials?))['\"]?\s{0,4}[:=]\s{0,4})(?:'[^'\n]{4,}'|\"[^\"\n]{4,}\"|[^\s'\",;&]{6,})"),
    # A netrc line, where no sign stands between the word and its value; where prose says "password", the next word has no digit.
    _pattern("secret", r"(?P<kept>(?i:\bpassword|\bpasswd)\s{1,4})(?=\S{0,64}\d)\S{6,}"),
    _pattern("e-mail", r"\b[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,5}\b"),
    _pattern("home", r"(?:/home|/Users)/[A-Za-z0-9._-]+|(?<![\w/.])/root\b|(?i:\b[a-z]:\\+users\\+[\w.-]+)"),
    _pattern("address", r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.]|\.\d)"),
    _pattern("address", r"(?i:(?<![\w:])(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}(?![\w:])"
                        r"|(?<![\w:])(?=[0-9a-f:]{0,40}\d)(?:[0-9a-f]{1,4}:){1,6}(?::[0-9a-f]{1,4}){1,6}(?![\w:]))"),
)  # fmt: skip
"""Tried in this order, each on what the ones before it left. Every quantifier that another one follows has a limit: no text takes
more than linear time."""

TEXT_PATTERNS: tuple[Pattern, ...] = (
    _pattern("key", r"\b[0-9a-f]{40}\b"),
    _pattern(
        "random word", r"\b(?=[A-Za-z0-9_-]{0,200}\d)(?=[A-Za-z0-9_-]{0,200}[a-z])(?=[A-Za-z0-9_-]{0,200}[A-Z])[A-Za-z0-9_-]{32,}"
    ),
)
"""Of texts only: in a configuration 40 hexadecimal digits are a git revision, which is wanted."""

SECRET_NAME = re.compile(r"(?i)(?:^|[_.\s-])(?:api_?key|key|token|secret|password|passwd|passphrase|credentials?|auth)$")
"""Of a setting or an environment variable whose value is nobody's business."""

LEAST_LITERAL = 6
"""Characters of a machine's own word; a shorter one would be found inside ordinary ones."""
WINDOW, CELL, FRINGE = 6_000, 3_000, 2_000
"""Characters of a long text that are looked at, that are kept, and that are given up at the window's end: a secret cut there may
no longer look like one. A full window takes 8 ms: 0.4 s for 16 samples, 5 s for 200."""


def machine_words(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """What would name this machine, its user or their secrets, longest first."""
    words = {value for name, value in environment.items() if SECRET_NAME.search(name)}
    words |= {str(Path.home()), str(Path.cwd()), socket.gethostname()}
    return tuple(sorted((word for word in words if len(word) >= LEAST_LITERAL), key=lambda word: (-len(word), word)))


def redact(text: str, words: Sequence[str] = (), patterns: Sequence[Pattern] = PATTERNS + TEXT_PATTERNS) -> str:
    """`text` with each of `words` and whatever a pattern finds replaced by what it was, in brackets."""
    for word in words:
        text = text.replace(word, "[private]")
    for pattern in patterns:
        text = pattern.regex.sub(lambda match, name=pattern.name: f"{match.groupdict().get('kept') or ''}[{name}]", text)
    return text


def redact_cell(text: str, words: Sequence[str] = ()) -> str:
    """The beginning of `text`, redacted: at most CELL characters and a mark of the cut."""
    redacted = redact(text[:WINDOW], words)
    if len(text) > WINDOW:
        redacted = redacted[:-FRINGE]
    return redacted if len(redacted) <= CELL and len(text) <= WINDOW else redacted[:CELL] + " [cut]"


def redact_config(value: object, words: Sequence[str] = ()) -> object:
    """The same nested value with its strings redacted, keys too; a string under a name like `api_key` goes whole."""
    if isinstance(value, str):
        return redact(value, words, PATTERNS)
    if isinstance(value, Mapping):
        return {redact(str(name), words, PATTERNS): _setting(str(name), item, words) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_config(item, words) for item in value]
    return value if isinstance(value, int | float | None) else redact(str(value), words, PATTERNS)


def _setting(name: str, value: object, words: Sequence[str]) -> object:
    return "[secret]" if isinstance(value, str) and value and SECRET_NAME.search(name) else redact_config(value, words)
