"""Which traces a view takes: a chain of steps over columns, and for each trace "" or the reason that turned it down.

Nothing here reads a text or a file. A view is a value (configs.views.View), so two of them can be compared in a second and
before anything is built (data/what_if.py). The steps stand in STEPS in the order of View's fields; each sees what those before
it left, and the first reason counts. Rows may come in any order and prompts be numbered in any way: ties are settled by
trace_keys_N.

    N traces    P components of a MinHash signature
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from configs.errors import UnusableInput
from configs.views import View
from data.abstention import abstain, allowed_abstentions, by_lot
from data.calibration import FAILED, LIKELY, PASSED, UNJUDGED
from data.calibration_metrics import error_bounds
from data.groups import Limit, by_answer_and_length, by_signature, efficiency, farthest_first, over_limits, rank_within
from data.select import Fate

VERSION = 2

REASONS: dict[str, Fate] = {
    "": "kept",
    "ineligible": "rejected",
    "wrong": "rejected",
    "unverified": "unjudged",
    "p_correct_low": "rejected",
    "p_correct_unknown": "unjudged",
    "expected_error": "rejected",
    "inefficient": "rejected",
    "too_easy": "rejected",
    "too_hard": "rejected",
    "not_right": "rejected",
    "not_among_shortest": "rejected",
    "not_diverse": "rejected",
    "task_quota": "rejected",
    "length_quota": "rejected",
    "abstention_repeated": "rejected",
    "abstention_cap": "rejected",
    "token_budget": "rejected",
}
"""In the order of the steps; a code is a position in it. `ineligible` traces had been turned down before the view was asked, and
what turned them down has the better reason."""
CODES = {reason: code for code, reason in enumerate(REASONS)}


@dataclass(frozen=True, slots=True)
class SelfAsk:
    """What the base student can produce. closed_book_N: bool, the trace answers a closed-book prompt. num_correct_N,
    num_graded_N: int, of its prompt's samples; 0 of 0 where it was not asked. row_tokens: generated tokens of a relabelled
    row."""

    closed_book_N: np.ndarray
    num_correct_N: np.ndarray
    num_graded_N: np.ndarray
    row_tokens: int = 0

    @staticmethod
    def nothing(num_traces: int) -> "SelfAsk":
        """Of a run without closed-book prompts."""
        return SelfAsk(np.zeros(num_traces, bool), np.zeros(num_traces, np.int64), np.zeros(num_traces, np.int64))


@dataclass(frozen=True, slots=True)
class Columns:
    """N completed traces.

    trace_keys_N      uint64, hash of the trace_id (data.groups.trace_keys): settles ties, and draws fair samples
    prompt_codes_N    int64, equal for samples of a prompt
    task_codes_N      int64, into `tasks`
    eligible_N        bool, nothing before the view turned it down
    verdicts_N        int8: PASSED, FAILED or UNJUDGED by a verifier that is trusted
    p_correct_N       float64 in [0, 1], NaN where unknown (data.calibration.final_p)
    prompt_tokens_N, generated_tokens_N   int64
    answer_keys_N     uint64 (data.groups.answer_keys)
    signatures_NP     uint32, for k_diverse by text; else None
    self_ask          for abstention_share; else None, which is not the same as nothing to ask (`SelfAsk.nothing`)
    error_margin      data.calibration.Report's: what forecasts of unverified traces may be off by
    """

    trace_keys_N: np.ndarray
    prompt_codes_N: np.ndarray
    task_codes_N: np.ndarray
    tasks: Sequence[str]
    eligible_N: np.ndarray
    verdicts_N: np.ndarray
    p_correct_N: np.ndarray
    prompt_tokens_N: np.ndarray
    generated_tokens_N: np.ndarray
    answer_keys_N: np.ndarray
    signatures_NP: np.ndarray | None = None
    self_ask: SelfAsk | None = None
    error_margin: float = 0.0


class Selection(NamedTuple):
    """codes_N: int8, positions in REASONS. relabelled_N: bool, kept as "I don't know". tokens_N: int64, training tokens of the
    row (prompt and generated), relabelled ones as they will be. abstention: closed-book traces by what became of them
    (data.abstention.Abstained; over_budget: relabelled ones that max_tokens cut). idle_quotas: names in task_quotas that no trace
    answers to."""

    codes_N: np.ndarray
    relabelled_N: np.ndarray
    tokens_N: np.ndarray
    abstention: dict[str, int] | None = None
    idle_quotas: tuple[str, ...] = ()

    @property
    def kept_N(self) -> np.ndarray:
        return self.codes_N == 0

    def reasons(self) -> dict[str, int]:
        """Traces by reason, "" among them, in the order of the steps; they add up to N."""
        names = list(REASONS)
        return {names[code]: int(count) for code, count in enumerate(np.bincount(self.codes_N)) if count}


def apply_view(columns: Columns, view: View) -> Selection:
    """One reason a trace.

    Raises:
        UnusableInput: the view needs a column that is not there.
    """
    _check(columns, view)
    codes_N = np.where(columns.eligible_N, 0, CODES["ineligible"]).astype(np.int8)
    state = Selection(codes_N, np.zeros(len(codes_N), bool), columns.prompt_tokens_N + columns.generated_tokens_N)
    for step in STEPS:
        state = step(columns, view, state)
    return state._replace(idle_quotas=_idle_quotas(columns, view))


def _check(columns: Columns, view: View) -> None:
    if view.needs_signatures and columns.signatures_NP is None:
        raise UnusableInput(
            f"view {view.name}: k_diverse by text needs MinHash signatures and these traces have none; "
            "set data.dedup to near, or diverse_by: answer_and_length"
        )
    if view.abstention_share is not None and columns.self_ask is None:
        raise UnusableInput(
            f"view {view.name}: abstention_share needs the base student's own answers to the closed-book prompts and it has not "
            "been asked; ask it first, or set abstention_share: null"
        )


Step = Callable[[Columns, View, Selection], Selection]


def _turn_down(state: Selection, reason: str, rows: np.ndarray) -> Selection:
    """rows: bool [N] or positions; those already turned down keep the reason that they have."""
    codes_N = state.codes_N.copy()
    refused_N = np.zeros(len(codes_N), bool)
    refused_N[rows] = True
    codes_N[refused_N & state.kept_N] = CODES[reason]
    return state._replace(codes_N=codes_N)


# --- right or wrong ----------------------------------------------------------------------------------------------


def _require_verified(columns: Columns, view: View, state: Selection) -> Selection:
    if not view.require_verified:
        return state
    state = _turn_down(state, "wrong", columns.verdicts_N == FAILED)
    return _turn_down(state, "unverified", columns.verdicts_N == UNJUDGED)


def _min_p_correct(columns: Columns, view: View, state: Selection) -> Selection:
    if view.min_p_correct is None:
        return state
    state = _turn_down(state, "p_correct_unknown", np.isnan(columns.p_correct_N))
    return _turn_down(state, "p_correct_low", columns.p_correct_N < view.min_p_correct)


def _max_expected_error(columns: Columns, view: View, state: Selection) -> Selection:
    if view.max_expected_error is None:
        return state
    state = _turn_down(state, "p_correct_unknown", np.isnan(columns.p_correct_N))
    alive = np.flatnonzero(state.kept_N)
    order = alive[np.lexsort((columns.trace_keys_N[alive], -columns.p_correct_N[alive]))]
    bounds = error_bounds(1.0 - columns.p_correct_N[order], columns.prompt_codes_N[order])
    unverified = np.cumsum(columns.verdicts_N[order] == UNJUDGED) / np.arange(1, len(order) + 1)
    bounds = bounds + columns.error_margin * unverified
    good = np.flatnonzero(bounds <= view.max_expected_error)
    return _turn_down(state, "expected_error", order[good[-1] + 1 if len(good) else 0 :])


def _max_tokens_over_shortest(columns: Columns, view: View, state: Selection) -> Selection:
    if view.max_tokens_over_shortest is None:
        return state
    right_N = columns.eligible_N & _right(columns)
    over_N = efficiency(columns.prompt_codes_N, columns.generated_tokens_N, right_N)
    return _turn_down(state, "inefficient", over_N > view.max_tokens_over_shortest)  # NaN, none right: no


def _right(columns: Columns) -> np.ndarray:
    """Passed, or not judged and likelier right than wrong."""
    likely_N = columns.p_correct_N > LIKELY  # NaN is not
    return (columns.verdicts_N == PASSED) | ((columns.verdicts_N == UNJUDGED) & likely_N)


def _drop_easy_and_hard(columns: Columns, view: View, state: Selection) -> Selection:
    judged_N = columns.eligible_N & (columns.verdicts_N != UNJUDGED)
    _, prompt_N = np.unique(columns.prompt_codes_N, return_inverse=True)
    num_judged = np.bincount(prompt_N, judged_N)[prompt_N]
    num_passed = np.bincount(prompt_N, judged_N & (columns.verdicts_N == PASSED))[prompt_N]
    if view.drop_too_easy:
        state = _turn_down(state, "too_easy", (num_judged >= 2) & (num_passed == num_judged))
    if view.drop_too_hard:
        state = _turn_down(state, "too_hard", (num_judged >= 2) & (num_passed == 0))
    return state


# --- so many of a prompt -----------------------------------------------------------------------------------------


def _shortest(columns: Columns, rows: np.ndarray) -> np.ndarray:
    """Positions, fewest generated tokens first."""
    return rows[np.lexsort((columns.trace_keys_N[rows], columns.generated_tokens_N[rows]))]


def _k_shortest_correct(columns: Columns, view: View, state: Selection) -> Selection:
    if view.k_shortest_correct is None:
        return state
    state = _turn_down(state, "not_right", ~_right(columns))
    order = _shortest(columns, np.flatnonzero(state.kept_N))
    rank = rank_within(columns.prompt_codes_N, order)
    return _turn_down(state, "not_among_shortest", order[rank >= view.k_shortest_correct])


def _k_diverse(columns: Columns, view: View, state: Selection) -> Selection:
    """Each prompt's first is its shortest."""
    if view.k_diverse is None:
        return state
    distance, row_bytes = by_answer_and_length(columns.answer_keys_N, columns.generated_tokens_N), 16
    if view.needs_signatures and columns.signatures_NP is not None:
        distance, row_bytes = by_signature(columns.signatures_NP), columns.signatures_NP[:1].nbytes
    order = _shortest(columns, np.flatnonzero(state.kept_N))
    chosen = farthest_first(columns.prompt_codes_N, order, view.k_diverse, distance, row_bytes=max(row_bytes, 1))
    return _turn_down(state, "not_diverse", np.setdiff1d(order, chosen, assume_unique=True))


# --- so much of a kind -------------------------------------------------------------------------------------------


def _preferred(columns: Columns, view: View, rows: np.ndarray) -> np.ndarray:
    """Positions, those that stay first. An unknown p comes last."""
    preference = {
        "hash": lambda: np.zeros(len(rows)),
        "p_correct": lambda: -np.nan_to_num(columns.p_correct_N[rows], nan=-1.0),
        "shorter": lambda: columns.generated_tokens_N[rows],
    }[view.prefer]()
    return rows[np.lexsort((columns.trace_keys_N[rows], preference))]


def _task_quotas(columns: Columns, view: View, state: Selection) -> Selection:
    if not view.task_quotas:
        return state
    pools: dict[tuple[str, str], int] = {}
    limits: list[Limit] = []
    group_of = np.full(len(columns.tasks), -1, np.int64)
    for code, task in enumerate(columns.tasks):
        name = _quota_name(view, task)
        if name is None:
            continue
        pool = (name, task if name == "*" else "")  # `*` is a quota for each task, a family's is one for all of them
        if pool not in pools:
            pools[pool] = len(limits)
            limits.append(Limit(view.task_quotas[name].rows, view.task_quotas[name].tokens))
        group_of[code] = pools[pool]
    order = _preferred(columns, view, np.flatnonzero(state.kept_N))
    return _turn_down(state, "task_quota", over_limits(group_of[columns.task_codes_N], limits, state.tokens_N, order))


def _quota_name(view: View, task: str) -> str | None:
    """The most specific name in task_quotas that covers the task."""
    return next((name for name in (task, task.partition("/")[0], "*") if name in view.task_quotas), None)


def _idle_quotas(columns: Columns, view: View) -> tuple[str, ...]:
    used = {_quota_name(view, task) for task in columns.tasks}
    return tuple(sorted(set(view.task_quotas) - used - {"*"}))


def _length_quotas(columns: Columns, view: View, state: Selection) -> Selection:
    if not view.length_quotas:
        return state
    bounds = [bucket.up_to_tokens or np.inf for bucket in view.length_quotas]
    limits = [Limit(bucket.rows, bucket.tokens) for bucket in view.length_quotas]
    bucket_N = np.searchsorted(bounds, columns.generated_tokens_N, side="left")
    bucket_N = np.where(bucket_N < len(bounds), bucket_N, -1)
    order = _preferred(columns, view, np.flatnonzero(state.kept_N))
    return _turn_down(state, "length_quota", over_limits(bucket_N, limits, state.tokens_N, order))


def _abstention(columns: Columns, view: View, state: Selection) -> Selection:
    if view.abstention_share is None or columns.self_ask is None:
        return state
    asked = columns.self_ask
    found = abstain(
        columns.trace_keys_N,
        columns.prompt_codes_N,
        state.kept_N & asked.closed_book_N,
        asked.num_correct_N,
        asked.num_graded_N,
        num_kept=int(state.kept_N.sum()),
        samples=view.abstention_samples,
        min_correct=view.abstention_min_correct,
        share=view.abstention_share,
    )
    state = _turn_down(state, "abstention_repeated", found.repeated)
    state = _turn_down(state, "abstention_cap", found.capped)
    relabelled_N, tokens_N = state.relabelled_N.copy(), state.tokens_N.copy()
    relabelled_N[found.relabelled] = True
    tokens_N[found.relabelled] = columns.prompt_tokens_N[found.relabelled] + asked.row_tokens
    return state._replace(relabelled_N=relabelled_N, tokens_N=tokens_N, abstention=found.counts())


def _max_tokens(columns: Columns, view: View, state: Selection) -> Selection:
    if view.max_tokens is None:
        return state
    order = _preferred(columns, view, np.flatnonzero(state.kept_N))
    everything_N = np.zeros(len(state.codes_N), np.int64)
    over = over_limits(everything_N, [Limit(None, view.max_tokens)], state.tokens_N, order)
    return _within_share(columns, view, _turn_down(state, "token_budget", over))


def _within_share(columns: Columns, view: View, state: Selection) -> Selection:
    """The budget may have cut others rather than relabelled rows, which are short: their share holds of what is left."""
    decided = state.abstention
    if view.abstention_share is None or decided is None:
        return state
    left_N = state.relabelled_N & state.kept_N
    allowed = allowed_abstentions(int(state.kept_N.sum() - left_N.sum()), view.abstention_share)
    excess = by_lot(columns.trace_keys_N, np.flatnonzero(left_N))[allowed:]
    state = _turn_down(state, "abstention_cap", excess)
    relabelled_N = left_N & state.kept_N
    counts = decided | {
        "relabelled": int(relabelled_N.sum()), "capped": decided["capped"] + len(excess),
        "over_budget": int((state.relabelled_N & ~left_N).sum()),
    }  # fmt: skip
    return state._replace(relabelled_N=relabelled_N, abstention=counts)


STEPS: tuple[Step, ...] = (
    _require_verified,
    _min_p_correct,
    _max_expected_error,
    _max_tokens_over_shortest,
    _drop_easy_and_hard,
    _k_shortest_correct,
    _k_diverse,
    _task_quotas,
    _length_quotas,
    _abstention,
    _max_tokens,
)
