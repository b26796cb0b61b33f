"""JSON that notices its own damage: manifests vouch for every other file, and nothing else vouches for them.

The last key of the object is `checksum`, a hash of every byte before it; what reads the file as plain JSON is not disturbed.
"""

import hashlib
import json
from pathlib import Path

from configs.errors import UnusableInput

_KEY = b'"checksum": "'
_HEX_DIGITS = 32


def checked_json(value: dict, *, indent: int | None = None) -> bytes:
    """The object with its checksum, as a file's content."""
    body = json.dumps(value, indent=indent, ensure_ascii=False).encode()
    head = body.removesuffix(b"\n}" if indent else b"}") + (b",\n " if indent else b", ")
    return head + _KEY + _hash(head) + (b'"\n}\n' if indent else b'"}\n')


def parse_checked(path: Path, content: bytes) -> dict:
    """The object without its checksum. Raises UnusableInput when any byte is not the one that was written."""
    head, _, tail = content.rpartition(_KEY)
    if not head or tail[:_HEX_DIGITS] != _hash(head) or tail[_HEX_DIGITS:] not in (b'"\n}\n', b'"}\n'):
        raise UnusableInput(
            f"{path}: not the bytes that were written (its checksum does not hold); restore it from a backup, "
            "or use the release that wrote it if it has none"
        )
    value = json.loads(content)
    value.pop("checksum")
    return value


_COMMENT = b"# checksum: "


def checked_text(text: str) -> bytes:
    """Text of a format in which `#` begins a comment, with its checksum as the last line."""
    head = text.encode()
    return head + _COMMENT + _hash(head) + b"\n"


def check_text(path: Path, content: bytes) -> None:
    """Raises UnusableInput when any byte is not the one that was written."""
    head, _, tail = content.rpartition(_COMMENT)
    if tail != _hash(head) + b"\n":
        raise UnusableInput(f"{path}: not the bytes that were written (its checksum does not hold); restore it from a backup")


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:_HEX_DIGITS].encode()
