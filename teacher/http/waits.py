"""How long to wait before a server is asked again."""

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST_WAIT_S = 60.0


def jittered_wait(failures: int, first_wait_s: float, draw: random.Random) -> float:
    """Seconds, uniform between 0 and the doubled-each-time wait ("full jitter"): clients that were refused at the same moment
    do not come back at the same moment. failures: asks that failed so far, at least 1."""
    return draw.uniform(0.0, min(LONGEST_WAIT_S, first_wait_s * 2.0 ** min(failures - 1, 30)))


def retry_after_s(header: str, now: float) -> float:
    """Seconds that a Retry-After header asks for: a number, or an HTTP date against `now` (Unix time). 0 when it says
    nothing that can be read, or a moment that has passed."""
    text = header.strip()
    try:
        return max(0.0, float(text)) if text.replace(".", "", 1).isdecimal() else _seconds_until(text, now)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _seconds_until(date: str, now: float) -> float:
    moment = parsedate_to_datetime(date)
    if moment.tzinfo is None:  # "-0000", or no zone at all: HTTP dates are UTC
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.fromtimestamp(now, UTC)).total_seconds())
