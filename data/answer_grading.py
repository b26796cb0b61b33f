"""Graded by the judge: answers that stand in no trace log, such as those of an evaluation.

As in a build (data/grading.py): each different answer is asked about once, replies are on disk before anything is made of them,
and grades are read off replies alone.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs.judging import Judging
from configs.progress import Report
from data.asking import Model, ReplyLog
from data.engine import Request
from data.grading import KEY, OUTCOMES, ask_judge, outcomes, read_replies
from data.records import Prompt
from data.store import RunFolder
from data.verify import llm_judge


def judge_version(settings: Judging, folders: Sequence[Path] = ()) -> str:
    """Names all that a grade depends on besides question and answer. Raises UnusableInput: no such template."""
    return llm_judge.version_of(settings, llm_judge.template_of(settings, folders), llm_judge.identity_of(settings))


def grade_answers(
    run: RunFolder, settings: Judging, answered: Sequence[tuple[Prompt, str]], model: Model, tell: Report,
    folders: Sequence[Path] = (),
) -> list[str]:  # fmt: skip
    """One of data.grading.OUTCOMES for each answer. Replies lie in verdicts/replies/judge_of_items-KEY; what is there is not
    asked again. folders: where the template is looked for.

    Raises:
        UnusableInput: no such template, nobody answers, or more requests failed than data.judging.max_failed.
    """
    template = llm_judge.template_of(settings, folders)
    key = llm_judge.asked_under(settings, template, model.identity())
    log, refusals = ReplyLog(run, "judge_of_items", key), ReplyLog(run, "judge_of_items_refused", key)
    names = [llm_judge.shown_key(prompt, answer) for prompt, answer in answered]
    short = {name: one for name, one in zip(names, answered, strict=True) if len(one[1]) <= settings.max_answer_characters}
    keys_Q = np.array(sorted(short), KEY)
    asked: list[Request] = list(
        itertools.chain.from_iterable(
            llm_judge.requests_of(*short[name], settings, template, model.codec()) for name in sorted(short)
        )
    )
    total = sum(each.request_id not in log and each.request_id not in refusals for each in asked)
    ask_judge(log, refusals, iter(asked), settings, model, tell, total)
    codes_Q = outcomes(read_replies(log, refusals, keys_Q, settings), settings.votes)
    found = dict(zip(sorted(short), codes_Q.tolist(), strict=True))
    words = list(OUTCOMES)
    return [words[found[name]] if name in found else "too_long" for name in names]
