"""A model that grades answers no program can."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from configs.engines import HttpEngine
from configs.section import Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]

RUBRIC = (
    "correct: the answer as a whole says what the reference says, or, without a reference, is right and complete.\n"
    "partial: part of what was asked is right and nothing is wrong.\n"
    "incorrect: anything in the final answer contradicts the reference or is wrong.\n"
    "not_attempted: the answer declines, or gives no final answer, and claims nothing wrong."
)


class Judging(Section):
    """Prompts whose verifier is `llm_judge` are graded by a model. What it says is no proof: ask how often it changes its mind
    (resample_share), and use another model than the teacher."""

    engine: HttpEngine
    """The server that answers; `model` there is the judge's name, and `api` is `chat`: template and tokenizer stay with the
    server."""
    template: str = "grade"
    """A file of data/judge_templates, or a path that ends in .md, looked for beside the recipe and in the working directory. Its
    content is part of every verdict's version."""
    rubric: Annotated[str, Field(min_length=1)] = RUBRIC
    """What each of the four grades means for these tasks, in words for the judge."""
    show_reference: bool = True
    """The judge sees the reference answer of prompts that are its own, where there is one; never that of an answer which it is
    to be checked by. A grade given in sight of a reference is no evidence for p(correct)."""
    votes: PositiveInt = 1
    """Times that each answer is graded, each with its own seed. More than half of them must agree, or it is `ungraded`."""
    resample_share: Share = 0.05
    """Share of the answers (by hash) that are graded once more, with another seed and the parts in another order, to measure how
    often the grade flips. Decides nothing."""
    checked_share: Share = 0.0
    """Share of the traces (by hash) that another verifier judges and the judge grades as well: how often it is right is known by
    no other way, and p(correct) gives its word a weight only where there are some. They are graded without their reference.
    Decides nothing by itself."""
    max_failed: NonNegativeInt = 0
    """Requests that may fail (a server that breaks over one answer, time after time) without ending the build: their traces are
    `judge_failed`. They are asked again whenever the data stage runs again, which it does for other traces or settings, or once
    dataset/manifest.json is deleted; a dataset that stands is complete with them."""
    max_answer_characters: PositiveInt = 32768
    """Longer answers are `too_long` and not asked: a cut answer would be graded for what it does not say."""
    max_tokens: PositiveInt = 4096
    """Of a judgement, reasoning included. One that reaches it is `ungraded`."""
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    """0 is greedy: what servers promise least badly to repeat."""
    reasoning: Literal["none", "open", "opens_itself"] = "none"
    """The judge's think block: none, opened by its prompt (GLM), or opened by the judge itself. What is inside is no verdict."""
    seed: NonNegativeInt = 0

    @field_validator("engine")
    @classmethod
    def _a_judge_behind_chat(cls, engine: HttpEngine) -> HttpEngine:
        if not engine.model:
            raise ValueError("engine.model is empty; expected the name of the model that judges, another than the teacher")
        if engine.api != "chat":
            raise ValueError(f"engine.api {engine.api} sends token ids, and a judge's tokenizer is not known here; expected chat")
        return engine

    @field_validator("votes")
    @classmethod
    def _no_ties(cls, votes: int) -> int:
        if votes % 2 == 0:
            raise ValueError(f"votes {votes} can tie; expected an odd number")
        return votes
