"""Who can say that an answer is right.

A verifier is a pure function (prompt, answer) -> score in [0, 1], and only 1.0 counts as right. It may be wrong about
nothing, but it may hang, crash or eat the memory, so answers are judged in killable worker processes
(data/verify/runner.py), and "timed out" or "crashed" is never "wrong". Every reference answer is held against itself
when a prompt set is made; items that fail are dropped there, and counted.
"""

from collections.abc import Callable
from typing import NamedTuple

from data.records import Prompt
from data.verify import exact, math, reasoning_gym


class Verifier(NamedTuple):
    """version goes into the verdict file's name: raise it when a change of the code may change a verdict.

    prepare: run once in a worker before the first deadline starts. inline: total and quick on any input, needs no worker.
    """

    score: Callable[[Prompt, str], float]
    version: int
    prepare: Callable[[], None] | None = None
    inline: bool = False


VERIFIERS: dict[str, Verifier] = {
    "exact": Verifier(exact.score, 1, inline=True),
    "math": Verifier(math.score, 1, math.prepare),
    "reasoning_gym": Verifier(reasoning_gym.score, 1, reasoning_gym.prepare),
}


def self_check(prompt: Prompt) -> bool:
    """True when the reference answer scores 1.0 by the prompt's own verifier, or when there is nothing to check.

    A verifier that raises on its own reference fails the check. Runs here, without a deadline, and takes no short cut.
    """
    if not prompt.verifier:
        return True
    try:
        return bool(prompt.answer) and VERIFIERS[prompt.verifier].score(prompt, prompt.answer) == 1.0
    except Exception:  # any failure of third-party scorers means the same here: the item cannot be judged
        return False
