"""Which side of the train/evaluation line a prompt stands on, decided by its text alone."""

import hashlib

HELD_OUT_SHARE = 0.10


def is_held_out(text: str, *, share: float = HELD_OUT_SHARE) -> bool:
    """True when the prompt belongs to evaluation.

    The verdict is a function of the whitespace-normalised text and of nothing else, so a re-generated, re-ordered or
    re-wrapped prompt can never cross from evaluation into training. `share` is the expected held-out fraction.
    """
    normalised = " ".join(text.split())
    bucket = int.from_bytes(hashlib.sha256(normalised.encode()).digest()[:8], "big")
    return bucket < share * 2**64
