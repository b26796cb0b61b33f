"""A run of closed-book facts, and a student that knows some of them: the seam of data/asking.py without a real model."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from configs.load import load_recipe
from configs.schema import Data
from data.asking import Codec, Model, Models
from data.engine import Completion, ExpertStats, Handout, Request, Scores
from data.records import Prompt
from data.store import RunFolder
from tests.data.make_run import make_prompt, make_run, make_trace

NUM_FACTS = 6
ANSWERS = ("iron", "tin", "zinc", "lead", "gold", "silver")


def fact(number: int) -> Prompt:
    return replace(make_prompt(f"Which metal is mined in town {number}?", ANSWERS[number], task="facts/metals"), known=True)


def asked_run(root: Path, num_facts: int = NUM_FACTS, *, num_segments: int = 3) -> RunFolder:
    """Two different right traces of each fact, and forty sums; a build of three segments starts no process."""
    facts = [fact(number) for number in range(num_facts)]
    sums = [make_prompt(f"What is {number} + 1?", str(number + 1)) for number in range(40)]
    traces = [make_trace(prompt, prompt.answer, reasoning=f"so {prompt.answer}") for prompt in sums]
    for sample in range(2):
        traces += [make_trace(prompt, prompt.answer, sample=sample, reasoning=f"I recall, {sample}") for prompt in facts]
    return make_run(root, [*sums, *facts], [traces[start::num_segments] for start in range(num_segments)])


class Student:
    """Knows the metals of even towns, now and then that of town 1, and is sure of tin everywhere else. Speaks text as ids of
    characters. die_after: replies after which this process is killed. fail: requests whose number in order fails."""

    name, version = "scripted", "1"

    def __init__(self, *, die_after: int | None = None, fail: frozenset[int] = frozenset()) -> None:
        self.die_after, self.fail = die_after, fail
        self.asked: list[Request] = []
        self.loads = self.closes = 0

    def load(self) -> None:
        self.loads += 1

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        for number, request in enumerate(requests):
            if number == self.die_after:
                os.kill(os.getpid(), 9)
            self.asked.append(request)
            failed = number in self.fail
            ids = () if failed else tuple(map(ord, self._says(request)))
            yield Completion(request.request_id, ids, (), "abort" if failed else "stop", 0.0, 0.1, error="busy" if failed else "")

    def _says(self, request: Request) -> str:
        town = int(re.findall(r"\d+", request.messages[-1].get("content", ""))[0])
        knows = town % 2 == 0 or (town == 1 and request.seed % 3 == 0)
        return f"<think>hm</think>{ANSWERS[town] if knows else 'mud'}"

    def score(
        self, sequences: Sequence[Sequence[int]], top_logits: int = 0, log_z_temperatures: Sequence[float] = (1.0,)
    ) -> list[Scores]:
        raise NotImplementedError

    def expert_stats(self) -> ExpertStats | None:
        return None

    def close(self) -> None:
        self.closes += 1


def models_with(student: Student, identity: str = "base") -> Models:
    codec = Codec(lambda messages: (), lambda ids: "".join(map(chr, ids)), row_tokens=lambda messages: (3, 5))
    return Models(student=Model(lambda: identity, lambda: codec, lambda: student))


def settings(**view: object) -> Data:
    chosen = {"abstention_share": 0.5, "abstention_samples": 8, "abstention_min_correct": 7} | view
    return load_recipe("embedded", ["data.filters=[]", "data.validation_share=0.0"]).recipe.data.model_copy(
        update={"view": Data.model_validate({"view": chosen}).view}
    )
