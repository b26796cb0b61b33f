"""What is kept of a reply that was paid for: one JSON line of ours, then the server's body, byte for byte.

The line says what the bytes alone do not: which ids the server was asked to continue, and whether the body ended by itself.
"""

import json
from typing import Literal, NamedTuple

ENCODER = json.JSONEncoder(separators=(",", ":"))  # json.dumps makes a new one each time


class Line(NamedTuple):
    """url: as asked, without credentials. started_at: Unix time; seconds: from sending to the last byte. attempt: 1 is the
    first ask for this request. streamed: the body is server-sent events. torn: the connection ended before the body did.

    given, given_logprobs: the output that the ask continued, the request's prefix included; written down here, so that these
    bytes give the whole output whatever prefix the request has by the time they are read. phase `reasoning`: asked for no
    more than was left of the reasoning budget, so that `length` does not end the output.
    """

    url: str
    status: int
    started_at: float
    seconds: float
    attempt: int
    streamed: bool = False
    torn: bool = False
    given: tuple[int, ...] = ()
    given_logprobs: tuple[float, ...] = ()
    phase: Literal["whole", "reasoning"] = "whole"


class Packed(NamedTuple):
    """One reply and what follows it in the same bytes: a trace's `raw` holds all replies that it took, one after the other."""

    line: Line
    body: bytes
    rest: bytes


def pack(line: Line, body: bytes) -> bytes:
    return b"\n".join((ENCODER.encode(line._asdict() | {"bytes": len(body)}).encode(), body))


def unpack(raw: bytes) -> Packed:
    """Raises ValueError or TypeError when `raw` was not packed here."""
    head, newline, body = raw.partition(b"\n")
    if not newline:
        raise ValueError("no line before the body")
    fields = json.loads(head)
    size = fields.pop("bytes")
    line = Line(**fields)
    line = line._replace(given=tuple(line.given), given_logprobs=tuple(line.given_logprobs))
    if len(body) < size:
        raise ValueError(f"{len(body)} bytes of a body of {size}")
    return Packed(line, body[:size], body[size:])


def last_reply(raw: bytes) -> bytes:
    """The one that the answer was read from. Bytes that nobody packed come back as they are."""
    try:
        while rest := unpack(raw).rest:
            raw = rest
    except (ValueError, TypeError, KeyError):
        pass
    return raw


def url_of(raw: bytes) -> str:
    """Where the reply came from; "" of bytes that nobody packed."""
    try:
        return unpack(raw).line.url
    except (ValueError, TypeError, KeyError):
        return ""
