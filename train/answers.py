"""How many held-out prompts the student answers rightly, measured inside the training, by the prompts' own verifiers.

Which prompts: those of the dataset's validation split, looked up in the run's prompt set, since a row has the conversation but
not its verifier. They are answered in groups that do not depend on the number of ranks, so that the figure does not either.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from configs.progress import Count
from configs.schema import Recipe
from data.chat import dialect_of, encode_prompt
from data.prompt_set import PromptSet
from data.records import Prompt, digest
from data.store import RunFolder, read_rollup
from data.structure import split_reasoning
from data.verify import VERIFIERS, Verifier
from data.verify.exact import is_abstention
from data.verify.runner import TIMED_OUT, Item, Judgement, Pool
from student.grades import Grade, grade_answer
from train.greedy import answer_greedily, generating, in_lockstep

logger = logging.getLogger(__name__)

GROUP_PROMPTS = 8
"""Prompts that are answered together: decoding waits for the weights, so eight cost little more than one. Fewer where the rows
of training are short: the cache of a group has no more tokens than such a row."""
JUDGING_S = 60.0
"""For all answers of a rank together; what is not judged by then is unjudged, so that no verifier keeps other ranks waiting."""


Stopped = Callable[[], bool]


def never() -> bool:
    return False


class Question(NamedTuple):
    """ids: of the prompt as a server would feed it."""

    prompt: Prompt
    ids: tuple[int, ...]


class Answers(NamedTuple):
    """What one rank's share came to; shares add up. right: of `answered`, which leaves out the unjudged: those whose verifier
    crashed or took too long. truncated: cut at the limit, and wrong. tokens: generated."""

    right: int = 0
    answered: int = 0
    truncated: int = 0
    unjudged: int = 0
    tokens: int = 0

    @property
    def accuracy(self) -> float | None:
        """None where nothing was judged."""
        return self.right / self.answered if self.answered else None


@dataclass(frozen=True, slots=True)
class ValidationAnswers:
    """The questions in their groups, longest first, and what bounds the answers to them."""

    groups: tuple[tuple[Question, ...], ...]
    max_tokens: int
    verify_timeout_s: float
    judging_s: float = JUDGING_S

    @classmethod
    def of(cls, run_dir: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> "ValidationAnswers":
        """train.validation_answers prompts of the run's validation split, by hash, or all where there are fewer. Only those
        that have an answer, a verifier that is no model, and room for prompt and answer in the longest row.

        Raises:
            UnusableInput: where the dataset's prompts are not in the run's prompt set, or none of them can be asked.
        """
        config, questions = recipe.train, list[Question]()
        prompts = validation_prompts(RunFolder(run_dir))
        for prompt in sorted(prompts, key=lambda prompt: digest("validation answers", prompt.prompt_id)):
            if len(questions) == config.validation_answers:
                break
            if prompt.verifier not in VERIFIERS or prompt.known is False:
                continue
            ids = encode_prompt(tokenizer, prompt.messages, prompt.tools)  # type: ignore[arg-type]
            if len(ids) + config.validation_answer_tokens <= config.row_lengths[-1]:
                questions.append(Question(prompt, tuple(ids)))
        if not questions:
            raise UnusableInput(
                f"train.validation_answers: none of the {len(prompts)} validation prompts can be asked; expected one with an "
                f"answer, a verifier that is no model, and at most {config.row_lengths[-1]} tokens with its answer: lower "
                "train.validation_answer_tokens, or set train.validation_answers to 0"
            )
        groups = grouped(questions, config.validation_answer_tokens, config.max_tokens_per_row)
        return cls(groups, config.validation_answer_tokens, recipe.data.verify_timeout_s)

    def measure(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, *, rank: int, size: int, is_stopped: Stopped = never
    ) -> Answers:
        """This rank's share of the answers and of what they are worth. Every rank calls it: ZeRO-3's passes are collective.
        is_stopped: once it says yes, this rank comes back within a token, and what it gives is worth nothing.

        Leaves the training as it was: parameters, gradients, modes, attention, random numbers. Takes as long as the longest
        answers of len(groups) / size groups, and at most judging_s more.
        """
        outputs = self.outputs(model, tokenizer, rank=rank, size=size, is_stopped=is_stopped)
        if is_stopped():
            return Answers()
        stop_ids, prompts = dialect_of(tokenizer).stop_ids(tokenizer), [prompt for prompt, _ in outputs]
        grades = self._grades(prompts, [answer_in(tokenizer, ids) for _, ids in outputs])
        unjudged, cut = grades.count(Grade.UNGRADED), sum(ids[-1] not in stop_ids for _, ids in outputs)
        tokens = sum(len(ids) for _, ids in outputs)
        return Answers(grades.count(Grade.CORRECT), len(grades) - unjudged, cut, unjudged, tokens)

    def outputs(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, *, rank: int, size: int, is_stopped: Stopped = never
    ) -> list[tuple[Prompt, list[int]]]:
        """This rank's prompts and what the model says to them, the stop included. Every rank calls it."""
        stop_ids, any_busy = dialect_of(tokenizer).stop_ids(tokenizer), in_lockstep(model)
        outputs: list[tuple[Prompt, list[int]]] = []
        with generating(model):
            for first in range(0, len(self.groups), size):
                group = self.groups[first + rank] if first + rank < len(self.groups) and not is_stopped() else ()
                said = answer_greedily(
                    model, [question.ids for question in group], stop_ids=stop_ids, max_tokens=self.max_tokens,
                    pad_id=stop_ids[0], any_busy=any_busy, is_stopped=is_stopped,
                )  # fmt: skip
                outputs += zip((question.prompt for question in group), said, strict=True)
        return outputs

    def _grades(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Grade]:
        asked = [place for place, answer in enumerate(answers) if answer and not is_abstention(answer)]
        items = [Item(prompts[place], answers[place]) for place in asked]
        judgements = judge_in_time(items, timeout_s=self.verify_timeout_s, within_s=self.judging_s)
        scores = {place: one.score for place, one in zip(asked, judgements, strict=True) if one.verdict != "unjudged"}
        return [
            grade_answer(known=prompt.known, answer=answer, abstained=is_abstention(answer), score=scores.get(place))
            for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]


# --- the questions -----------------------------------------------------------------------------------------------


def validation_prompts(run: RunFolder) -> list[Prompt]:
    """Those that the rows of the dataset's validation split answer. Raises UnusableInput where they cannot be known."""
    import datasets

    from_elsewhere = "a dataset from elsewhere does not say how its answers are judged: set train.validation_answers to 0"
    if read_rollup(run.prompts) is None or read_rollup(run.dataset) is None:
        raise UnusableInput(f"train.validation_answers: {run.root} has no finished prompts and dataset; {from_elsewhere}")
    # Its bytes were held against the roll-up when the examples were read, a moment ago.
    split = datasets.Dataset.load_from_disk(str(run.dataset / "validation"))
    prompt_ids = sorted(set(split["prompt_id"]))
    with PromptSet.open(run) as prompt_set:
        positions = prompt_set.positions_of(prompt_ids)
        if unknown := [prompt_id for prompt_id, place in zip(prompt_ids, positions, strict=True) if place < 0]:
            raise UnusableInput(f"train.validation_answers: prompt {unknown[0]} is not in the run's prompt set; {from_elsewhere}")
        return prompt_set.prompts(positions)


def grouped(questions: Sequence[Question], max_tokens: int, row_tokens: int) -> tuple[tuple[Question, ...], ...]:
    """Longest first, at most GROUP_PROMPTS together; padded, with their answers, at most row_tokens unless it is one alone."""
    groups: list[list[Question]] = []
    for question in sorted(questions, key=lambda question: (-len(question.ids), question.prompt.prompt_id)):
        group = groups[-1] if groups else []
        widest = len(group[0].ids) + max_tokens if group else 0
        if not group or len(group) == GROUP_PROMPTS or (len(group) + 1) * widest > row_tokens:
            groups.append([question])
        else:
            group.append(question)
    return tuple(tuple(group) for group in groups)


# --- what the answers are worth ----------------------------------------------------------------------------------


def answer_in(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """What stands after the reasoning; "" in an output that did not end by itself, or whose think block is not closed."""
    dialect = dialect_of(tokenizer)
    if ids[-1] not in dialect.stop_ids(tokenizer):
        return ""
    text = tokenizer.decode(list(ids[:-1]), skip_special_tokens=False)
    assert isinstance(text, str)
    split = split_reasoning(text, prompt_opens_think=dialect.prompt_opens_think)
    return "" if split.problem else split.answer.strip()


def judge_in_time(
    items: Sequence[Item], *, timeout_s: float, within_s: float, verifiers: Mapping[str, Verifier] = VERIFIERS
) -> list[Judgement]:
    """One judgement an item, in order; TIMED_OUT for those that are not judged when within_s are over. Its worker is gone then.

    Raises TracestillError when this machine cannot judge at all.
    """
    judgements, over = [TIMED_OUT] * len(items), threading.Event()

    def judge_one_by_one() -> None:
        for place, item in enumerate(items):
            [judgements[place]] = pool.judge([item], report=stop_when_over)

    def stop_when_over(_: Count) -> None:
        if over.is_set():
            raise _Over

    with Pool(verifiers, timeout_s=timeout_s, num_workers=1) as pool, ThreadPoolExecutor(1) as thread:
        judging = thread.submit(judge_one_by_one)
        try:
            judging.result(within_s)
        except TimeoutError:
            over.set()
            for worker in list(pool.workers):
                worker.process.kill()  # wakes the thread, which then learns that it is over
            logger.warning(
                "validation answers: %d of %d judged in %g s", len(items) - judgements.count(TIMED_OUT), len(items), within_s
            )
    return judgements


class _Over(Exception):
    """The time for judging is over."""
