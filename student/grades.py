"""What became of an attempt at an evaluation item."""

import re
from dataclasses import dataclass
from enum import StrEnum

from data.depth import is_middle
from data.records import FinishReason
from student.unseen import family_of

TWINS, UNSEEN, MIDDLE, ENDS = "twins", "unseen", "middle", "ends"
"""Slices beside families, domains and context lengths."""


class Grade(StrEnum):
    """What became of one attempt. `partial` comes only from judges of answers with several parts."""

    CORRECT = "correct"
    INCORRECT = "incorrect"
    PARTIAL = "partial"
    NOT_ATTEMPTED = "not_attempted"
    UNGRADED = "ungraded"


@dataclass(frozen=True, slots=True)
class GradedItem:
    """One attempt at an evaluation item. known: None outside the closed book. output_tokens: generated ids, stop included.

    item: which one; attempts at one share it, and one without a name stands alone. confidence: forecast probability that the
    answer is right, in [0, 1], or None. cost: dollars, None where nobody named a price. is_unseen: no training trace came from
    its family. twin_of: the item that it rephrases, or "". depths: in [0, 1], of the places in a long prompt that the answer
    needs. context_tokens: of that prompt by the teacher's tokenizer, so that a slice holds the same items whoever answers; or 0.
    """

    task: str
    known: bool | None
    grade: Grade
    reasoning_tokens: int
    output_tokens: int
    finish_reason: FinishReason
    item: str = ""
    sample: int = 0
    confidence: float | None = None
    cost: float | None = None
    is_unseen: bool = False
    twin_of: str = ""
    depths: tuple[float, ...] = ()
    context_tokens: int = 0

    @property
    def family(self) -> str:
        """`facts/metals` and `facts/colours` are one family."""
        return family_of(self.task)

    @property
    def slices(self) -> tuple[str, ...]:
        """Names under which its figures are also told: family, domain, what it is there for, and of a prompt with known places
        whether one is in the middle, and its length."""
        named = (
            _own(self.family),
            _own(self.task.partition("/")[2]),
            UNSEEN if self.is_unseen else "",
            TWINS if self.twin_of else "",
        )
        placed = (MIDDLE if is_middle(self.depths) else ENDS, length_name(self.context_tokens)) if self.depths else ()
        return tuple(dict.fromkeys(filter(None, (*named, *placed))))

    @property
    def is_answerable(self) -> bool:
        return self.known is not False

    @property
    def is_attempted(self) -> bool:
        """An answer was given and graded: what a confidence speaks of."""
        return self.grade in (Grade.CORRECT, Grade.INCORRECT, Grade.PARTIAL)


def _own(name: str) -> str:
    """A family or domain whose name is one of the slices beside them is another slice: a file `unseen.jsonl` is a family, and may
    have been taught."""
    return f"task {name}" if name in (TWINS, UNSEEN, MIDDLE, ENDS) or is_length(name) else name


def length_name(tokens: int) -> str:
    """`32k`: at most 32,768 tokens, and more than half of that. `1k` is the least, `1M` is 1,048,576."""
    thousands = 1 << ((tokens - 1) // 1024).bit_length() if tokens > 1024 else 1
    return f"{thousands}k" if thousands < 1024 else f"{thousands // 1024}M"


def is_length(name: str) -> bool:
    """Whether a slice is one of `length_name`'s."""
    return re.fullmatch(r"[1-9]\d*[kM]", name) is not None


def grade_answer(*, known: bool | None, answer: str, abstained: bool, score: float | None) -> Grade:
    """The grade of one parsed answer. score: the verifier's, or None when it reached no verdict.

    An empty answer (a think block that never closed, an output cut at its limit) is not an abstention: nobody reading it
    learns that the model does not know, and counting it as one would let a model buy a low hallucination rate by
    rambling. It is incorrect, in the closed book as well.
    """
    if not answer:
        return Grade.INCORRECT
    if abstained:
        return Grade.NOT_ATTEMPTED
    if known is False:
        return Grade.INCORRECT
    if score is None:
        return Grade.UNGRADED
    # Only a full score counts. reasoning-gym pays 0.01 to 0.5 for a well-formed wrong answer; that is no partial credit.
    return Grade.CORRECT if score == 1.0 else Grade.INCORRECT


def judged_grade(outcome: str) -> Grade:
    """Of what a judge said (data.grading.OUTCOMES): whatever is no grade of its own is `ungraded`."""
    return Grade(outcome) if outcome in set(Grade) else Grade.UNGRADED
