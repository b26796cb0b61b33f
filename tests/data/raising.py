"""Verifiers that give up, take their time, or look where they should not. Importable and light, for spawned workers."""

import os
import time
from pathlib import Path

from configs.errors import Refused, UnusableInput
from data.records import Prompt
from data.verify import Verifier

_ERRORS: dict[str, type[Exception]] = {"late": TimeoutError, "refused": Refused, "unable": UnusableInput}


def give_up(prompt: Prompt, answer: str) -> float:
    raise _ERRORS[answer]("sandbox: no bubblewrap; apt-get install it")


def sleep_a_second(prompt: Prompt, answer: str) -> float:
    time.sleep(1.0)
    return 1.0


def look_at_the_question(prompt: Prompt, answer: str) -> float:
    """1.0 when there is none to be seen."""
    return float(not prompt.messages)


def wait_to_be_spared(prompt: Prompt, answer: str) -> float:
    """1.0 once the folder `answer` holds `spared`; who waits there has a file by the number of its process."""
    (Path(answer) / str(os.getpid())).touch()
    while not (Path(answer) / "spared").exists():
        time.sleep(0.01)
    return 1.0


def refuse_to_start() -> None:
    raise UnusableInput("sandbox: no bubblewrap; apt-get install it")


RAISING = {
    "hostile": Verifier(give_up, 1),
    "slow": Verifier(sleep_a_second, 1, timeout_s=30.0),
    "hasty": Verifier(sleep_a_second, 1),
    "curious": Verifier(look_at_the_question, 1),
    "mortal": Verifier(wait_to_be_spared, 1, timeout_s=120.0),
    "confined": Verifier(sleep_a_second, 1, refuse_to_start),
}
