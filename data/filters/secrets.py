"""Does a credential stand in a text?

Only formats whose vendors document a fixed beginning, and only values that could be real: tokens with a checksum must satisfy it,
placeholders and documented examples pass. A bare AWS secret key (40 characters of base64) has no such mark and is not looked for.

Sources: docs.aws.amazon.com/IAM (reference_identifiers), github.blog "Behind GitHub's new authentication token formats" (CRC-32
in base 62), api.slack.com/authentication/token-types, docs.stripe.com/keys, docs.gitlab.com/security/tokens, RFC 7519, RFC 7468.
"""

import base64
import binascii
import re
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from configs.filters import SecretKind, SecretsFilter
from data.filters.texts import Filtered, asked, said


class Format(NamedTuple):
    """marks: what every value of the kind contains, at the offset where the pattern matches. real: a look at the value found."""

    marks: tuple[str, ...]
    pattern: re.Pattern[str]
    real: Callable[[str], bool]


def secrets(trace: Filtered, settings: SecretsFilter) -> str:
    """`secret:KIND` of the first kind, in the order of configs.filters.SecretKind, of which a text holds one."""
    texts = (*said(trace), *(asked(trace) if settings.prompts else ()))
    marked: set[SecretKind] = {
        kind for text in texts for mark, kind in _marks(settings.kinds) if mark in text
    }  # none, nearly always
    return next((f"secret:{kind}" for kind in sorted(marked) if any(_holds(text, _FORMATS[kind]) for text in texts)), "")


@lru_cache(maxsize=16)
def _marks(kinds: tuple[SecretKind, ...]) -> list[tuple[str, SecretKind]]:
    return [(mark, kind) for kind in kinds for mark in _FORMATS[kind].marks]


def _holds(text: str, form: Format) -> bool:
    for mark in form.marks:
        at = text.find(mark)
        while at >= 0:
            found = form.pattern.match(text, at)
            if found is not None and form.real(found[0]):
                return True
            at = text.find(mark, at + len(mark))
    return False


# --- is it real? -------------------------------------------------------------------------------------------------

_BASE62 = {digit: value for value, digit in enumerate("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")}
_PLACEHOLDERS = ("example", "xxxx", "your", "dummy", "placeholder", "redacted", "12345678", "abcdefgh", "....", "0000")


def _random(value: str) -> bool:
    """Not a placeholder: no word of one inside, and at least 10 different characters."""
    lowered = value.lower()
    return len(set(value)) >= 10 and not any(word in lowered for word in _PLACEHOLDERS)


def _checked(value: str) -> bool:
    """The last six characters are the CRC-32 of the thirty before them, in base 62, high digit first. A token that somebody
    made up satisfies it once in 4 billion times."""
    body, check = value[-36:-6], value[-6:]
    number = 0
    for digit in check:
        number = number * 62 + _BASE62[digit]
    return zlib.crc32(body.encode()) == number


def _github(value: str) -> bool:
    return _random(value) if value.startswith("github_pat_") else _checked(value)


def _jwt(value: str) -> bool:
    """The header is JSON with an algorithm, and the payload is not jwt.io's John Doe."""
    header, payload, _ = value.split(".")
    return b'"alg"' in _decoded(header) and b"John Doe" not in _decoded(payload) and _random(value)


def _decoded(part: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(part[: len(part) // 4 * 4])
    except (binascii.Error, ValueError):
        return b""


_BODY = re.compile(r"[A-Za-z0-9+/]{16,}")


def _key_block(value: str) -> bool:
    """At least 100 characters of base64 follow, escaped newlines or not: a header alone is an explanation."""
    body = value.partition("-----END")[0].split("-----", 2)[-1].replace("\\n", "\n")
    runs = "".join(_BODY.findall(body))
    return len(runs) >= 100 and _random(runs) and len(set(runs)) >= 30


_WORD_BEFORE = r"(?<![A-Za-z0-9_-])"


def _format(pattern: str, *marks: str, real: Callable[[str], bool] = _random) -> Format:
    """The pattern begins at a mark, no token's character before it; so a run of such characters is entered once, and the whole
    search stays linear. Quantifiers are possessive or bounded."""
    return Format(marks, re.compile(_WORD_BEFORE + pattern), real)


_FORMATS: dict[SecretKind, Format] = {
    "anthropic_key": _format(r"sk-ant-[a-z]{3,8}[0-9]{2}-[A-Za-z0-9_-]{80,120}+", "sk-ant-"),
    "aws_key": _format(r"A(?:KI|SI)A[A-Z2-7]{16}(?![A-Za-z0-9])", "AKIA", "ASIA"),
    "github_token": _format(
        r"(?:gh[pousr]_[A-Za-z0-9]{36}(?![A-Za-z0-9_])|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59})",
        "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", real=_github,
    ),
    "gitlab_token": _format(r"glpat-[A-Za-z0-9_-]{20,60}+", "glpat-"),
    "google_key": _format(r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])", "AIza"),
    "huggingface_token": _format(r"hf_[A-Za-z]{34}(?![A-Za-z0-9])", "hf_"),
    "jwt": _format(r"eyJ[A-Za-z0-9_-]{10,4000}+\.eyJ[A-Za-z0-9_-]{10,16000}+\.[A-Za-z0-9_-]{20,2000}+", "eyJ", real=_jwt),
    "npm_token": _format(r"npm_[A-Za-z0-9]{36}(?![A-Za-z0-9_])", "npm_", real=_checked),
    "openai_key": _format(r"sk-(?:proj-|svcacct-|admin-)?[A-Za-z0-9_-]{16,80}T3BlbkFJ[A-Za-z0-9_-]{16,80}+", "sk-"),
    "private_key": Format(
        ("-----BEGIN ",),
        re.compile(r"-----BEGIN (?:[A-Z0-9]{2,9} ){0,2}PRIVATE KEY(?: BLOCK)?-----.{100,600}", re.DOTALL),
        _key_block,
    ),
    "pypi_token": _format(r"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,400}+", "pypi-AgEIcHlwaS5vcmc"),
    "sendgrid_key": _format(r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])", "SG."),
    "slack_token": _format(
        r"xox[abeoprs]-(?:[0-9]{1,4}-)?[0-9]{10,13}-[A-Za-z0-9-]{16,240}+",
        "xoxa-", "xoxb-", "xoxe-", "xoxo-", "xoxp-", "xoxr-", "xoxs-",
    ),
    "slack_webhook": Format(
        ("hooks.slack.com/services/",),
        re.compile(r"hooks\.slack\.com/services/T[A-Z0-9]{8,12}/B[A-Z0-9]{8,12}/[A-Za-z0-9]{24}"),
        _random,
    ),
    "stripe_key": _format(r"(?:sk|rk)_live_[A-Za-z0-9]{24,240}+", "sk_live_", "rk_live_"),
}  # fmt: skip
