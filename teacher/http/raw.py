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


def pack(line: Line, body: bytes) -> bytes:
    return b"\n".join((ENCODER.encode(line._asdict()).encode(), body))


def unpack(raw: bytes) -> tuple[Line, bytes]:
    """Raises ValueError or TypeError when `raw` was not packed here."""
    head, newline, body = raw.partition(b"\n")
    if not newline:
        raise ValueError("no line before the body")
    fields = json.loads(head)
    line = Line(**fields)
    return line._replace(given=tuple(line.given), given_logprobs=tuple(line.given_logprobs)), body
