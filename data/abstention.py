"""Teaching only what the student can learn: facts that its base cannot produce become "I don't know".

Fine-tuning on facts that a model does not know raises its hallucinations in proportion to them (Gekhman et al., EMNLP 2024,
arXiv 2405.05904): what it learns from such a row is to sound sure. So its base is asked every closed-book training prompt
k times. Answers that it can produce stay; the other prompts are relabelled (R-Tuning, Zhang et al. 2024, arXiv 2311.09677),
and their share of the rows is capped, because a student that sees little else refuses what it knows. What is over the cap is
dropped: put back as the teacher wrote it, it would be the very row that does harm.

Only asking needs an engine, which the caller has. Here are the plan of what to ask, and what follows from the grades.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data.groups import rank_within
from data.records import Message, Prompt, digest, request_seed
from data.verify.exact import is_abstention
from data.verify.runner import LLM_JUDGE

VERSION = 2
ABSTENTION = "I don't know"


# --- asking ------------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    """One sample to be drawn from the base student. request_id: a hash of prompt and index, so that an answer is found again."""

    request_id: str
    prompt: Prompt
    sample_index: int
    seed: int


def is_closed_book(prompt: Prompt) -> bool:
    """A fact that one can only recall or make up, with a reference that a program can hold an answer against. A fact that nobody
    knows (its reference is an abstention) is none: the teacher has said "I don't know" already."""
    judged = bool(prompt.answer) and prompt.verifier not in ("", LLM_JUDGE)
    return prompt.known is not None and judged and not is_abstention(prompt.answer)


def questions(prompts: Iterable[Prompt], *, samples: int, run_seed: int = 0) -> Iterator[Question]:
    """`samples` of every closed-book training prompt, in the order of the prompts. Evaluation items are never asked: what the
    base knows of them must not decide what is trained."""
    for prompt in prompts:
        if prompt.split == "train" and is_closed_book(prompt):
            for index in range(samples):
                request_id = digest(prompt.prompt_id, "self-ask", index)
                yield Question(request_id, prompt, index, request_seed(request_id, run_seed))


class Grades(NamedTuple):
    """Of one prompt: how many of its samples were right, and how many have a grade. A sample that the verifier could not judge
    has none; it is neither right nor wrong."""

    num_correct: int
    num_graded: int


def tally(scores: Iterable[tuple[Question, float | None]]) -> dict[str, Grades]:
    """By prompt_id. score: the verifier's, None when it reached no verdict; only 1.0 is right."""
    grades: dict[str, Grades] = {}
    for question, score in scores:
        right, graded = grades.get(question.prompt.prompt_id, Grades(0, 0))
        grades[question.prompt.prompt_id] = Grades(right + (score == 1.0), graded + (score is not None))
    return grades


# --- deciding ----------------------------------------------------------------------------------------------------


class Abstained(NamedTuple):
    """Positions of traces, each ascending. relabelled: become "I don't know". repeated: another sample of a prompt that one row
    already says it for. capped: over the share. produced, not_asked (or not decided): stay as they are."""

    relabelled: np.ndarray
    repeated: np.ndarray
    capped: np.ndarray
    produced: np.ndarray
    not_asked: np.ndarray

    def counts(self) -> dict[str, int]:
        return {name: len(rows) for name, rows in self._asdict().items()}


def abstain(
    trace_keys_N: np.ndarray,
    prompt_codes_N: np.ndarray,
    candidates_N: np.ndarray,
    num_correct_N: np.ndarray,
    num_graded_N: np.ndarray,
    *,
    num_kept: int,
    samples: int,
    min_correct: int,
    share: float,
) -> Abstained:
    """What becomes of each closed-book trace that the view has kept so far.

    candidates_N: bool, those traces. num_graded_N: of its prompt's `samples`; one whose missing grades could make it min_correct
    is not decided, and counts as not asked. num_kept: rows of the view, candidates included. share: of relabelled rows in what
    is left, the largest number r with r <= share x (r + rows that stay). One row a prompt, as its other samples would now be
    copies of it; which prompts stay under the cap, and by which sample, is decided by trace_keys_N alone.
    """
    rows = np.flatnonzero(candidates_N)
    can_N = num_correct_N[rows] >= min_correct
    cannot_N = num_correct_N[rows] + (samples - num_graded_N[rows]) < min_correct
    unknown = by_lot(trace_keys_N, rows[cannot_N])
    first = unknown[rank_within(prompt_codes_N, unknown) == 0]
    allowed = allowed_abstentions(num_kept - len(unknown), share)
    return Abstained(
        relabelled=np.sort(first[:allowed]),
        repeated=np.setdiff1d(unknown, first),
        capped=np.sort(first[allowed:]),
        produced=rows[can_N],
        not_asked=rows[~can_N & ~cannot_N],
    )


def by_lot(trace_keys_N: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rows in an order that has nothing to do with that of their keys, by which a view's token budget is cut: else the rows
    that stay here would be those that stay there. (The finaliser of splitmix64, Steele et al. 2014.)"""
    mixed = trace_keys_N[rows].astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return rows[np.lexsort((trace_keys_N[rows], mixed ^ (mixed >> np.uint64(31))))]


def allowed_abstentions(num_others: int, share: float) -> int:
    """The largest r with r <= share x (num_others + r), for share < 1."""
    allowed = int(share * num_others / (1.0 - share))
    return allowed + (allowed + 1 <= share * (num_others + allowed + 1))  # the quotient may have been rounded below the integer


# --- relabelling -------------------------------------------------------------------------------------------------


def relabel(messages: Sequence[Message], *, reasoning: str = "") -> tuple[Message, ...]:
    """The conversation with "I don't know" as its last answer, and `reasoning` before it: empty, or a short honest sentence. The
    teacher's own reasoning recalls the fact and must go with the answer."""
    *before, last = messages
    said: Message = {"role": last.get("role", "assistant"), "content": ABSTENTION, "reasoning_content": reasoning}
    return (*before, said)


def provenance(grades: Grades, min_correct: int) -> str:
    """JSON text for the row's column: what it is that the trace is not, and why."""
    facts = {
        "relabelled": "abstention",
        "student_correct": grades.num_correct,
        "student_asked": grades.num_graded,
        "min_correct": min_correct,
        "version": VERSION,
    }
    return json.dumps(facts, sort_keys=True)
