"""Verifiers that misbehave on command: the answer says how. Importable, because the workers that run them are spawned."""

import os
import time

from data.records import Prompt
from data.verify import Verifier


def score(prompt: Prompt, answer: str) -> float:
    match answer:
        case "sleep":
            time.sleep(3600)
        case "hold the GIL":
            b"x".join([b""] * 10).find(b"y" * 10)
            sum(range(10**13))
        case "die":
            os._exit(1)
        case "raise":
            raise RuntimeError("this scorer has a bug")
        case "exit":
            raise SystemExit(0)
        case "eat memory":
            bytearray(64 << 30)
        case "two":
            return 2.0
        case "not a number":
            return float("nan")
        case "print":
            os.write(1, b"noise on standard output\n")
            print("more noise", flush=True)
    return float(answer == prompt.answer) or 0.5


def fail_to_start() -> None:
    os._exit(3)


HOSTILE = {"hostile": Verifier(score, 1)}
STILLBORN = {"hostile": Verifier(score, 1, fail_to_start)}
