"""The base student is asked every closed-book prompt of the traces, through its own engine, and graded by the prompts' own
verifiers. Replies are kept (data/asking.py); what they mean for the rows is data/abstention.py's and the view's to say."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from configs.errors import UnusableInput
from configs.progress import Report
from configs.sampling import Sampling
from configs.views import View
from data.abstention import ABSTENTION, Grades, Question, is_closed_book, questions, relabel, tally
from data.asking import Codec, Model, Reply, ReplyLog, all_answered, ask
from data.engine import Request, request_under
from data.prompt_set import PromptSet
from data.records import Message, Prompt, digest
from data.selection import SelfAsk
from data.store import RunFolder
from data.structure import split_reasoning
from data.verify.exact import is_abstention
from data.verify.runner import Item, Pool

VERSION = 1
"""Of the requests; the reading of replies may change without asking again."""
KEY_BYTES = 6
BATCH = 4096


class Asked(NamedTuple):
    """grades: by prompt_id. row_tokens: (reasoning, answer) of a relabelled row, in the student's tokens."""

    grades: dict[str, Grades]
    row_tokens: tuple[int, int]


def ask_student(
    run: RunFolder, prompt_ids: Sequence[str], view: View, model: Model | None, pool: Pool, tell: Report
) -> Asked | None:
    """What the base can produce of these prompts; None where none of them is closed-book, and then nothing is opened.

    Raises:
        UnusableInput: nobody can be asked here, or a request failed.
    """
    with PromptSet.open(run) as prompts:
        closed_book = list(_closed_book(prompts, prompt_ids))
    if not closed_book:
        return None
    if model is None:
        raise UnusableInput(
            f"view {view.name}: abstention_share needs the base student's own answers and it cannot be asked here; "
            "set abstention_share: null"
        )
    codec, sampling = model.codec(), sampling_of(view)
    log = ReplyLog(run, "student", digest(VERSION, model.identity(), sampling.model_dump(mode="json"), size=KEY_BYTES))
    asked = list(questions(closed_book, samples=view.abstention_samples))
    requests = (request_of(question, sampling, codec) for question in asked)
    all_answered(ask(log, requests, model, tell, total=len(asked), doing="asking the student"), "the base student")
    grades = tally(zip(asked, _scores(asked, log, codec, pool), strict=True))
    return Asked(grades, codec.row_tokens(relabelled_example(view)))


def sampling_of(view: View) -> Sampling:
    return Sampling(temperature=view.abstention_temperature, top_p=1.0, max_tokens=view.abstention_max_tokens)


def relabelled_example(view: View) -> tuple[Message, ...]:
    """What a relabelled row teaches does not depend on its prompt."""
    asked: Message = {"role": "user", "content": "?"}
    return relabel([asked, {"role": "assistant", "content": ABSTENTION}], reasoning=view.abstention_reasoning)


def _closed_book(prompts: PromptSet, prompt_ids: Sequence[str]) -> Iterator[Prompt]:
    """In the order of the prompt file, whatever the order of the traces."""
    positions = np.sort(prompts.positions_of(prompt_ids))
    for start in range(0, len(positions), BATCH):
        yield from (prompt for prompt in prompts.prompts(positions[start : start + BATCH]) if is_closed_book(prompt))


def request_of(question: Question, sampling: Sampling, codec: Codec) -> Request:
    return request_under(
        sampling,
        request_id=question.request_id,
        prompt_ids=codec.encode(question.prompt.messages),
        stop_ids=codec.stop_ids,
        seed=question.seed,
        messages=question.prompt.messages,
    )


def _scores(asked: Sequence[Question], log: ReplyLog, codec: Codec, pool: Pool) -> list[float | None]:
    """Of each question 1.0 where the base was right, 0.0 where it was wrong, declined, or did not come to an end, None where
    its verifier reached no verdict.

    Raises UnusableInput where a question has no reply: that is no wrong answer."""
    wanted = {question.request_id: number for number, question in enumerate(asked)}
    scores: dict[int, float | None] = {}
    replies = (reply for reply in log.read() if reply.request_id in wanted)
    while batch := list(itertools.islice(replies, BATCH)):  # a reply may be a page, and there may be millions
        numbers = [wanted[reply.request_id] for reply in batch]
        answers = [answer_of(reply, codec) for reply in batch]
        scores |= dict.fromkeys(numbers, 0.0)
        said = [place for place, answer in enumerate(answers) if answer and not is_abstention(answer)]
        judged = pool.judge([Item(asked[numbers[place]].prompt, answers[place]) for place in said])
        for place, judgement in zip(said, judged, strict=True):
            scores[numbers[place]] = None if judgement.verdict == "unjudged" else judgement.score
    all_answered({"unanswered": len(asked) - len(scores)} if len(scores) < len(asked) else {}, "the base student")
    return [scores[number] for number in range(len(asked))]


def answer_of(reply: Reply, codec: Codec) -> str:
    """What follows the reasoning of an output that ended by itself; "" for any other."""
    parsed = split_reasoning(reply.text, prompt_opens_think=codec.opens_think)
    return parsed.answer.strip() if reply.finish_reason == "stop" and not parsed.problem else ""


def as_columns(asked: Asked | None, prompt_ids: pa.ChunkedArray) -> SelfAsk:
    """By trace. prompt_ids: of the N traces."""
    encoded = prompt_ids.combine_chunks().dictionary_encode()
    if asked is None:
        return SelfAsk.nothing(len(encoded))
    grades = [asked.grades.get(prompt_id) for prompt_id in encoded.dictionary.to_pylist()]
    codes_N = encoded.indices.to_numpy()
    return SelfAsk(
        closed_book_N=np.array([grade is not None for grade in grades], bool)[codes_N],
        num_correct_N=np.array([grade.num_correct if grade else 0 for grade in grades], np.int64)[codes_N],
        num_graded_N=np.array([grade.num_graded if grade else 0 for grade in grades], np.int64)[codes_N],
        row_tokens=sum(asked.row_tokens),
    )
