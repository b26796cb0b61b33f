"""Who can say that an answer is right.

A verifier is a pure function (prompt, answer) -> score in [0, 1], and only 1.0 counts as right. It reads the prompt's
`answer` and `details` and nothing else of it, so that equal work is known by these. It may be wrong about nothing, but it
may hang, crash or eat the memory, so answers are judged in killable worker processes (data/verify/runner.py), and "timed
out" or "crashed" is never "wrong". Every reference answer is held against itself when a prompt set is made; items that
fail are dropped there, and counted.

A verifier raises TimeoutError when a limit of its own ends an answer, a TracestillError when this machine cannot judge at
all (no sandbox): that ends the build with its one line. Whatever else it raises is `crashed`.
"""

from collections.abc import Callable
from typing import NamedTuple

from configs.errors import TracestillError
from data.records import Prompt
from data.verify import code, exact, json_schema, math, reasoning_gym, sandbox


class Verifier(NamedTuple):
    """version goes into the verdict file's name: raise it when a change of the code may change a verdict.

    prepare: run once in a worker before the first deadline starts. inline: total and quick on any input, needs no worker.
    quick: what score would say, or None where that takes more than microseconds; runs in the caller's process, never hangs,
    and may take for granted that the reference passed its self-check. timeout_s: seconds that one answer may take, when that
    is more than what the caller allows. check: says of a prompt without a reference whether answers to it can be judged;
    without it every prompt needs a reference. require: asked once before a build judges such prompts; raises the
    TracestillError that a worker would raise in the middle of it. sweep: ends what a worker that was killed may have left.
    """

    score: Callable[[Prompt, str], float]
    version: int
    prepare: Callable[[], None] | None = None
    inline: bool = False
    quick: Callable[[Prompt, str], float | None] | None = None
    timeout_s: float = 0.0
    check: Callable[[Prompt], bool] | None = None
    require: Callable[[], None] | None = None
    sweep: Callable[[], object] | None = None


def is_reference(prompt: Prompt, answer: str) -> float | None:
    """1.0 for the reference itself, word for word: it passed its self-check. None for everything else."""
    return 1.0 if answer == prompt.answer else None


VERIFIERS: dict[str, Verifier] = {
    "exact": Verifier(exact.score, exact.VERSION, inline=True),
    "math": Verifier(math.score, math.VERSION, math.prepare, quick=math.quick),
    "reasoning_gym": Verifier(reasoning_gym.score, 1, reasoning_gym.prepare, quick=is_reference),
    "json_schema": Verifier(
        json_schema.score, json_schema.VERSION, json_schema.prepare, quick=json_schema.quick, check=json_schema.check
    ),
    "code": Verifier(
        code.score,
        code.VERSION,
        code.prepare,
        timeout_s=2.5 * code.TIMEOUT_S,
        check=code.check,
        require=code.prepare,
        sweep=sandbox.sweep,
    ),
}


def self_check(prompt: Prompt) -> bool:
    """True when the reference answer scores 1.0 by the prompt's own verifier, or when there is nothing to check.

    A verifier that raises on its own reference fails the check. Runs here, without a deadline, and takes no short cut.
    Raises TracestillError where this machine cannot judge at all: that says nothing about the item.
    """
    if not prompt.verifier:
        return True
    verifier = VERIFIERS[prompt.verifier]
    try:
        if not prompt.answer:
            return verifier.check is not None and verifier.check(prompt)
        return verifier.score(prompt, prompt.answer) == 1.0
    except TracestillError:
        raise
    except Exception:  # any failure of third-party scorers means the same here: the item cannot be judged
        return False
