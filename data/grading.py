"""A judge is asked about the answers that no program can grade, and about a sample of those that one has: once filters have
spoken, each different answer once, and only in the build that meets it first.

What is asked costs money, so it is asked last: of traces that filters and decontamination let through, that end in an answer, and
of a prompt's exact copies only the one that stays; what answers a prompt in the same words shares the grade. Which answers those
are stands in the columns of the panel's question `shown`; trace segments are read again only where a reply is missing. Replies
are on disk before anything is made of them (data/asking.py), and grades are read off replies and columns alone.

What a judge says is no proof. For a view that wants a verifier's pass it is one, because the prompt names no other verifier;
p(correct) takes it as evidence, with a weight that it earns on answers which a verifier has judged too (data/calibration.py).
Those are graded without their reference: with it the judge would repeat what the verifier knows, and the weight of a judge that
has the label before it would pass to one that has not. A grade given in sight of a reference is no evidence for p(correct).

    N traces    Q different answers to be graded    V votes
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import UnusableInput
from configs.judging import Judging
from configs.progress import Report
from data.asking import REFUSALS, Model, Reply, ReplyLog, ask
from data.calibration import PASSED, UNJUDGED
from data.calibration_metrics import wilson_interval
from data.engine import Request
from data.look import Look, completed
from data.prompt_set import PromptSet
from data.records import Prompt, digest
from data.store import RunFolder, Segment, read_segment
from data.verify import llm_judge
from data.verify.llm_judge import GRADES
from data.verify.runner import LLM_JUDGE, NOT_ASKED, RIGHT, Judgement

SHOWN = pa.schema([("shown", pa.string()), ("characters", pa.int32()), ("has_reference", pa.bool_())])
"""shown: data.verify.llm_judge.shown_key of what a judge may be shown of the trace, "" where that is nothing. characters: of the
answer. has_reference: a reference is among what it may be shown."""
VERSION = 2
KEY = np.dtype("S32")
_BATCH = 4096

OUTCOMES: dict[str, Judgement] = {
    "not_asked": NOT_ASKED,
    "correct": RIGHT,
    "partial": Judgement("fail", "partial", 0.5),
    "incorrect": Judgement("fail", "wrong", 0.0),
    "not_attempted": Judgement("fail", "not_attempted", 0.0),
    "ungraded": Judgement("unjudged", "ungraded", 0.0),
    "too_long": Judgement("unjudged", "too_long", 0.0),
    "judge_refused": Judgement("unjudged", "judge_refused", 0.0),
    "judge_failed": Judgement("unjudged", "judge_failed", 0.0),
}
"""What may become of an answer. not_asked: a filter had turned its trace down. ungraded: replies without a grade, or votes that
do not agree. judge_refused: the judge does not answer to it (too long for its context, against its rules); judge_failed: its
requests failed, as many as data.judging.max_failed allows."""
_CODES = {name: code for code, name in enumerate(OUTCOMES)}
assert tuple(OUTCOMES)[1:5] == GRADES


class Traces(NamedTuple):
    """N completed traces, in log order.

    shown_N         S32, the panel's column
    characters_N    int32, of the answer
    has_reference_N bool, the panel's column
    same_as_N       int64, row of the trace whose grade is this one's: its original if it is a copy, else itself
    eligible_N      bool, no filter and no benchmark item turned it down
    own_N           bool, its prompt's verifier is the judge
    verdicts_N      int8, of verifiers that are trusted (data.calibration)
    per_segment     a value a completed row of each segment (data.judge.Judged.per_segment)
    """

    segments: Sequence[Segment]
    shown_N: np.ndarray
    characters_N: np.ndarray
    has_reference_N: np.ndarray
    same_as_N: np.ndarray
    eligible_N: np.ndarray
    own_N: np.ndarray
    verdicts_N: np.ndarray
    per_segment: Callable[[np.ndarray], Sequence[np.ndarray]]


class GradingCounts(TypedDict):
    """For the dataset's manifest. answers: different ones that were to be graded, by what became of them. pairs, flips,
    pairs_ungraded, flip_rate, flip_interval: data.verify.llm_judge.FlipRate. checked: answers that a verifier has judged too, the
    judge without the reference; agreed: those of them where both say the same. replies: all that these grades are read off.
    tokens, dollars: of those and of what could not be read, paid for in this build or in an earlier one; tokens as the server
    bills them."""

    model: str
    answers: dict[str, int]
    pairs: int
    flips: int
    pairs_ungraded: int
    flip_rate: float | None
    flip_interval: tuple[float, float] | None
    checked: int
    agreed: int
    replies: int
    prompt_tokens: int
    output_tokens: int
    cost: float


class Graded(NamedTuple):
    """version: names the verdict file. outcomes_N: uint8 positions in OUTCOMES. saw_reference_N: bool, the grade was given in
    sight of one."""

    version: str
    outcomes_N: np.ndarray
    saw_reference_N: np.ndarray
    counts: GradingCounts

    @property
    def judge_N(self) -> np.ndarray:
        """float64 as data.calibration.Evidence has it: 1 or 0, NaN where the judge gave no grade, or not in the same situation
        as those that it is weighed by: none of them was shown a reference."""
        values = [np.nan, 1.0, *[0.0] * (len(GRADES) - 1)] + [np.nan] * (len(OUTCOMES) - len(GRADES) - 1)
        return np.where(self.saw_reference_N, np.nan, np.array(values)[self.outcomes_N])


# --- who is asked ------------------------------------------------------------------------------------------------


def require_judge(run: RunFolder, settings: Judging | None, model: Model | None) -> None:
    """Raises UnusableInput where training prompts name the judge and none can be asked."""
    with PromptSet.open(run) as prompts:
        if LLM_JUDGE not in prompts.verifiers("train"):
            return
    if settings is None:
        raise UnusableInput(
            "data.judging: prompts name the verifier llm_judge and nobody is named to judge; expected "
            "data.judging: {engine: {base_urls: http://HOST:8000/v1, model: NAME}}"
        )
    if model is None:
        raise UnusableInput("data.judging: the judge cannot be asked here; build with tracestill data build")


def shown(look: Look, checked_share: float) -> pa.Table:
    """A row a trace under SHOWN: prompts whose verifier is the judge, and the share of the others that it grades as well."""
    keys = [
        llm_judge.shown_key(prompt, answer) if answer.strip() and _is_shown(prompt, trace.trace_id, checked_share) else ""
        for trace, prompt, answer in zip(look.traces, look.prompts, look.answers, strict=True)
    ]
    has_reference = [bool(llm_judge.reference_of(prompt)) for prompt in look.prompts]
    return pa.table([keys, list(map(len, look.answers)), has_reference], schema=SHOWN)


def _is_shown(prompt: Prompt, trace_id: str, checked_share: float) -> bool:
    if prompt.verifier == LLM_JUDGE or not prompt.verifier:
        return bool(prompt.verifier)
    return checked_share > 0 and int(digest("checked", trace_id, size=8), 16) < checked_share * 2**64


def grade(run: RunFolder, settings: Judging, traces: Traces, model: Model, tell: Report, folders: Sequence[Path] = ()) -> Graded:
    """The judge has been asked what it had not been asked before. folders: where the template is looked for.

    Raises:
        UnusableInput: no such template, nobody answers, or more requests failed than data.judging.max_failed; what was answered
            is kept.
        RuntimeError: a request came to nothing, neither answered, refused nor failed: it would stay ungraded for ever.
    """
    template, identity = llm_judge.template_of(settings, folders), model.identity()
    key = llm_judge.asked_under(settings, template, identity)
    log, refusals = ReplyLog(run, "judge", key), ReplyLog(run, "judge_refused", key)
    is_own_N = traces.same_as_N == np.arange(len(traces.shown_N))
    rows = np.flatnonzero(traces.eligible_N & is_own_N & (traces.shown_N != b""))
    askable = rows[traces.characters_N[rows] <= settings.max_answer_characters]
    keys_Q, first_Q, answer_of = np.unique(traces.shown_N[askable], return_index=True, return_inverse=True)
    missing_Q = _misses(keys_Q, settings, log, refusals)
    requests = _requests(run, traces, np.sort(askable[first_Q[missing_Q > 0]]), settings, template, model)
    failed = ask_judge(log, refusals, requests, settings, model, tell, total=int(missing_Q.sum()))
    if (left := int(_misses(keys_Q[missing_Q > 0], settings, log, refusals).sum())) != failed:
        raise RuntimeError(f"judge: {left} requests are still to be answered and {failed} failed: some came to nothing")
    replies = read_replies(log, refusals, keys_Q, settings)
    outcomes_Q = outcomes(replies, settings.votes)
    outcomes_N = np.zeros(len(traces.shown_N), np.uint8)
    outcomes_N[rows] = _CODES["too_long"]
    outcomes_N[askable] = outcomes_Q[answer_of]
    outcomes_N = outcomes_N[traces.same_as_N]
    counts = _counts(settings.engine.model, replies, outcomes_Q, len(np.unique(traces.shown_N[rows])) - len(keys_Q))
    checked, agreed = _agreement(traces, outcomes_N)
    version = llm_judge.version_of(settings, template, identity)
    saw_reference_N = traces.has_reference_N & settings.show_reference
    return Graded(version, outcomes_N, saw_reference_N, {**counts, "checked": checked, "agreed": agreed})


def _misses(keys_Q: np.ndarray, settings: Judging, log: ReplyLog, refusals: ReplyLog) -> np.ndarray:
    """int64 [Q]: requests about each answer that nobody has replied to."""
    wanted_Q = ([each.request_id for each in llm_judge.questions(key.decode(), settings)] for key in keys_Q.tolist())
    return np.array([sum(each not in log and each not in refusals for each in wanted) for wanted in wanted_Q], np.int64)


def _requests(
    run: RunFolder, traces: Traces, rows: np.ndarray, settings: Judging, template: str, model: Model
) -> Iterator[Request]:
    """All that is asked about the answers in these rows, as somebody takes them; a segment without one stays closed."""
    codec, wanted_N = model.codec(), np.zeros(len(traces.shown_N), bool)
    wanted_N[rows] = True
    with PromptSet.open(run) as prompts:
        for segment, wanted in zip(traces.segments, traces.per_segment(wanted_N), strict=True):
            if wanted.any():
                look = Look(completed(read_segment(segment)).filter(pa.array(wanted)), prompts)
                for prompt, answer in zip(look.prompts, look.answers, strict=True):
                    yield from llm_judge.requests_of(prompt, answer, settings, template, codec)


def ask_judge(
    log: ReplyLog, refusals: ReplyLog, requests: Iterator[Request], settings: Judging, model: Model, tell: Report, total: int
) -> int:
    """Requests that failed, at most as many as may."""
    try:
        failed = ask(log, requests, model, tell, total=total, doing="asking the judge", refusals=refusals)
    except UnusableInput as error:  # the engine speaks of the section that it was written for
        raise UnusableInput(str(error).replace("teacher.engine", "data.judging.engine")) from error
    if (number := sum(failed.values())) > settings.max_failed:
        reasons = ", ".join(f"{count} {error}" for error, count in sorted(failed.items()))
        raise UnusableInput(
            f"data.judging: {number} requests to {settings.engine.model} failed ({reasons}); what was answered is kept: mend the "
            f"cause and give the same command, or let them go ungraded with data.judging.max_failed={number}"
        )
    return number


# --- what it said ------------------------------------------------------------------------------------------------


class Replies(NamedTuple):
    """Of Q answers. grades_QV: uint8 [Q, V + 1], positions in OUTCOMES of each vote, and last of the repetition that is none; 0
    where there is no reply. refused_Q: bool, some request was refused for good. number: of replies. The rest: of these and of
    what could not be read together."""

    grades_QV: np.ndarray
    refused_Q: np.ndarray
    number: int
    prompt_tokens: int
    output_tokens: int
    cost: float


def read_replies(log: ReplyLog, refusals: ReplyLog, keys_Q: np.ndarray, settings: Judging) -> Replies:
    """Replies to what these settings would not ask (other answers, more votes, a repetition) are as if they were not there."""
    again_Q = np.array([llm_judge.is_asked_again(key.decode(), settings) for key in keys_Q.tolist()], bool)
    grades_QV, refused_Q = np.zeros((len(keys_Q), settings.votes + 1), np.uint8), np.zeros(len(keys_Q), bool)
    number, prompt_tokens, output_tokens, cost = 0, 0, 0, 0.0
    for reply, row in _with_rows(itertools.chain(log.read(), refusals.read(), log.paid_in_vain()), keys_Q):
        vote = reply.request_id.partition("-")[2]
        slot = settings.votes if vote == "again" else int(vote)
        if not again_Q[row] if vote == "again" else slot >= settings.votes:
            continue
        cost, prompt_tokens = cost + reply.cost, prompt_tokens + reply.prompt_tokens
        output_tokens += reply.output_tokens
        if reply.error and reply.error not in REFUSALS:
            continue
        number += 1
        if reply.error:
            refused_Q[row] = True
        else:
            grades_QV[row, slot] = _CODES[llm_judge.grade_of(reply, settings) or "ungraded"]
    return Replies(grades_QV, refused_Q, number, prompt_tokens, output_tokens, cost)


def _with_rows(replies: Iterator[Reply], keys_Q: np.ndarray) -> Iterator[tuple[Reply, int]]:
    """Every reply to one of these answers, with the answer's place among them."""
    while len(keys_Q) and (batch := list(itertools.islice(replies, _BATCH))):
        keys = np.array([reply.request_id.partition("-")[0] for reply in batch], KEY)
        rows = np.minimum(np.searchsorted(keys_Q, keys), len(keys_Q) - 1)
        found = keys_Q[rows] == keys
        yield from zip(itertools.compress(batch, found), rows[found].tolist(), strict=True)


def outcomes(replies: Replies, votes: int) -> np.ndarray:
    """uint8 [Q], positions in OUTCOMES: the grade that more than half of all votes give. Votes that are missing or gave no grade
    agree with nothing."""
    cast_QV = replies.grades_QV[:, :votes]
    found_Q = np.full(len(cast_QV), _CODES["ungraded"], np.uint8)
    found_Q[(cast_QV == 0).any(axis=1)] = _CODES["judge_failed"]
    found_Q[replies.refused_Q] = _CODES["judge_refused"]
    for name in GRADES:
        found_Q[2 * (cast_QV == _CODES[name]).sum(axis=1) > votes] = _CODES[name]
    return found_Q


def flips_of(grades_QV: np.ndarray) -> llm_judge.FlipRate:
    """First votes held against repetitions, where there is one."""
    first, again = (column[grades_QV[:, -1] > 0] for column in (grades_QV[:, 0], grades_QV[:, -1]))
    graded = (first > 0) & (first <= len(GRADES)) & (again <= len(GRADES))
    return llm_judge.flip_rate(int(graded.sum()), int((first != again)[graded].sum()), int((~graded).sum()))


def _agreement(traces: Traces, outcomes_N: np.ndarray) -> tuple[int, int]:
    """Different answers that a trusted verifier judged and the judge graded, and those of them where both say the same. What is
    not the judge's own was graded without a reference, all of it."""
    is_graded_N = (outcomes_N > 0) & (outcomes_N <= len(GRADES)) & (traces.same_as_N == np.arange(len(outcomes_N)))
    both = np.flatnonzero(is_graded_N & (traces.verdicts_N != UNJUDGED) & ~traces.own_N)
    both = both[np.unique(traces.shown_N[both], return_index=True)[1]]
    same = (traces.verdicts_N[both] == PASSED) == (outcomes_N[both] == _CODES["correct"])
    return len(both), int(same.sum())


def _counts(model: str, replies: Replies, outcomes_Q: np.ndarray, too_long: int) -> GradingCounts:
    numbers = np.bincount(outcomes_Q, minlength=len(OUTCOMES))
    numbers[_CODES["too_long"]] = too_long
    flips = flips_of(replies.grades_QV)
    return {
        "model": model,
        "answers": {name: number for name, number in zip(OUTCOMES, numbers.tolist(), strict=True) if number},
        "pairs": flips.pairs,
        "flips": flips.flips,
        "pairs_ungraded": flips.ungraded,
        "flip_rate": flips.rate,
        "flip_interval": flips.interval,
        "checked": 0,
        "agreed": 0,
        "replies": replies.number,
        "prompt_tokens": replies.prompt_tokens,
        "output_tokens": replies.output_tokens,
        "cost": replies.cost,
    }


# --- what becomes of it ------------------------------------------------------------------------------------------


def overlaid(verified: pa.Table, graded: Graded) -> pa.Table:
    """The verifiers' rows, with the judge's word where it had been left open."""
    mine = pc.call_function("equal", [verified["reason"].combine_chunks(), pa.scalar(NOT_ASKED.reason)])
    codes = pa.array(graded.outcomes_N)
    for name, values in zip(Judgement._fields, zip(*OUTCOMES.values(), strict=True), strict=True):
        said = pa.array(list(values)).take(codes)
        column = pc.call_function("if_else", [mine, said, verified[name].combine_chunks()])
        verified = verified.set_column(verified.column_names.index(name), name, column)
    return verified


def lines_of(counts: GradingCounts) -> list[str]:
    """For a person, of a manifest's `judge`: what was graded and at what price, and how far it can be trusted."""
    answers = counts["answers"]
    fates = ", ".join(f"{number:,} {name}" for name, number in answers.items()) or "none"
    spent = f"{counts['prompt_tokens']:,} prompt and {counts['output_tokens']:,} output tokens, ${counts['cost']:,.2f}"
    lines = [
        f"judge {counts['model']}: {sum(answers.values()):,} answers ({fates}); {counts['replies']:,} replies, {spent}",
        f"judge asked twice: {_share(counts['flips'], counts['pairs'], 'changed its grade')}",
    ]
    if counts["checked"]:
        said = _share(counts["agreed"], counts["checked"], "agree with the verifier")
        lines.append(f"judge checked, without references: {said}")
    return lines


def _share(number: int, total: int, what: str) -> str:
    if not total:
        return f"no answer; how often it {what} is not known"
    low, high = wilson_interval(number, total)
    return f"{number:,} of {total:,} {what} ({number / total:.1%}; 95 %: {low:.1%} to {high:.1%})"
