"""Pure metrics over graded attempts at items. Every denominator is written down, because they differ.

    answerable   items with an answer: reasoning families, and facts the teacher is meant to know
    closed book  facts, known and unknown: what one can only recall, invent, or decline
    unknown      facts nobody was taught: declining is the best a model can do, so no answer there is ever correct

Definitions follow AA-Omniscience (arXiv 2511.13029): C correct, I incorrect, P partial, NA not attempted, N attempts.
An `ungraded` one (its judge crashed, timed out or said nothing that parses) earns nothing and stays in every N; it is in no
numerator, and it is not in I + P + NA either. `Metrics.grades` says how many there are.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data import calibration_metrics as calibration
from student.curves import FIGURES, curve_draws
from student.grades import Grade, GradedItem
from student.resampling import Interval, interval_of, ratio_draws

# --- ratios: each metric is a sum over attempts divided by another ---------------------------------------------------


class Share(NamedTuple):
    """What one attempt adds to a metric's numerator and denominator."""

    sum: float
    count: float


NOTHING = Share(0, 0)


def _accuracy(one: GradedItem) -> Share:
    return Share(one.grade is Grade.CORRECT, 1) if one.is_answerable else NOTHING


def _hallucination(one: GradedItem) -> Share:
    missed = one.grade in (Grade.INCORRECT, Grade.PARTIAL, Grade.NOT_ATTEMPTED)
    return NOTHING if one.known is None else Share(one.grade is Grade.INCORRECT, missed)


def _abstention(one: GradedItem) -> Share:
    return NOTHING if one.known is None else Share(one.grade is Grade.NOT_ATTEMPTED, 1)


def _unknown_abstention(one: GradedItem) -> Share:
    return Share(one.grade is Grade.NOT_ATTEMPTED, 1) if one.known is False else NOTHING


def _over_refusal(one: GradedItem) -> Share:
    return Share(one.grade is Grade.NOT_ATTEMPTED, 1) if one.known is True else NOTHING


def _omniscience(one: GradedItem) -> Share:
    if one.known is None:
        return NOTHING
    return Share(100.0 * ((one.grade is Grade.CORRECT) - (one.grade is Grade.INCORRECT)), 1)


def _simpleqa(one: GradedItem) -> Share:
    """Harmonic mean of C/N and C/(C + I): 2 C / (N + C + I)."""
    if one.known is None:
        return NOTHING
    right, wrong = one.grade is Grade.CORRECT, one.grade is Grade.INCORRECT
    return Share(2 * right, 1 + right + wrong)


def _reasoning(one: GradedItem) -> Share:
    return Share(one.reasoning_tokens, one.grade is Grade.CORRECT) if one.is_answerable else NOTHING


def _truncation(one: GradedItem) -> Share:
    return Share(one.finish_reason == "length", 1)


def _cost(one: GradedItem) -> Share:
    return NOTHING if one.cost is None else Share(one.cost, one.is_answerable and one.grade is Grade.CORRECT)


def _brier(one: GradedItem) -> Share:
    if one.confidence is None or not one.is_attempted:
        return NOTHING
    return Share((one.confidence - (one.grade is Grade.CORRECT)) ** 2, 1)


RATIOS: Mapping[str, Callable[[GradedItem], Share]] = {
    "accuracy": _accuracy, "hallucination_rate": _hallucination, "abstention_rate": _abstention,
    "unknown_abstention_rate": _unknown_abstention, "over_refusal_rate": _over_refusal, "omniscience_index": _omniscience,
    "simpleqa_f": _simpleqa, "reasoning_tokens_per_correct": _reasoning, "truncation_rate": _truncation,
    "cost_per_completed_task": _cost, "brier": _brier,
}  # fmt: skip


SHARE = Interval(0.0, 1.0)
ENDS: Mapping[str, Interval] = {
    "omniscience_index": Interval(-100.0, 100.0), "twin_gap": Interval(-1.0, 1.0),
    "reasoning_tokens_per_correct": Interval(0.0, math.inf), "cost_per_completed_task": Interval(0.0, math.inf),
}  # fmt: skip
"""The least and the most that a figure can be, where that is not 0 and 1."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """One model on one set of items. Rates are in [0, 1]; a figure without items to stand on is None, never 0.

    accuracy, by_family: C / N over the answerable items.
    hallucination_rate: I / (I + P + NA) over the closed book: of what was not answered right, the share that was made up.
    abstention_rate: NA / N over the closed book. omniscience_index: 100 (C - I) / N over the closed book, in [-100, 100].
    simpleqa_f: harmonic mean of C / N and C / (C + I) over the closed book.
    unknown_abstention_rate: NA / N over the unknown facts. over_refusal_rate: NA / N over the known facts.
    reasoning_tokens_per_correct: reasoning tokens of ALL answerable attempts over their C, so that wrong answers cost too.
    cost_per_completed_task: dollars of ALL attempts over C (arXiv 2504.13359); inf for no C, None without prices.
    ece, adaptive_ece, brier, aurc, coverage_at_5_risk: of the confidence in attempted answers (data/calibration_metrics.py).
    aurc_by_length: with the output's length as the only signal, shorter being surer (arXiv 2510.10409).
    truncation_rate: outputs cut at the token limit, over all attempts. output_tokens: over all attempts.
    twin_gap: accuracy on items that have rephrased twins, less that on the twins.
    intervals: 95 %, of drawing items again with all their attempts. slices: the same by family, domain, `unseen` and `twins`.
    """

    accuracy: float | None
    by_family: dict[str, float]
    hallucination_rate: float | None
    abstention_rate: float | None
    omniscience_index: float | None
    simpleqa_f: float | None
    unknown_abstention_rate: float | None
    over_refusal_rate: float | None
    reasoning_tokens_per_correct: float | None
    cost_per_completed_task: float | None
    ece: float | None
    adaptive_ece: float | None
    brier: float | None
    aurc: float | None
    aurc_by_length: float | None
    coverage_at_5_risk: float | None
    truncation_rate: float | None
    twin_gap: float | None
    output_tokens: int
    num_items: int
    num_attempts: int
    num_answerable: int
    num_known: int
    num_unknown: int
    grades: dict[str, int]
    intervals: dict[str, Interval]
    slices: "dict[str, Metrics]"

    def to_json(self) -> dict[str, Any]:
        """JSON values; an infinite figure is the string "inf", which JSON has no number for."""
        return _plain(dataclasses.asdict(self))

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Metrics":
        """Raises KeyError or TypeError for what is no evaluation of this version."""
        read = _unplain(dict(values))
        read["intervals"] = {name: Interval(*ends) for name, ends in read["intervals"].items()}
        read["slices"] = {name: Metrics.from_json(one) for name, one in read["slices"].items()}
        return Metrics(**read)


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(one) for key, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
        case float() if math.isinf(value):
            return "inf"
    return value


def _unplain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _unplain(one) for key, one in value.items()}
        case list():
            return [_unplain(one) for one in value]
        case "inf":
            return math.inf
    return value


def measure(items: Sequence[GradedItem], *, seed: int = 0) -> Metrics:
    """The figures of `items`, with those of every slice; equal items and seed give equal intervals."""
    members: dict[str, list[GradedItem]] = {}
    for one in items:
        for name in one.slices:
            members.setdefault(name, []).append(one)
    return dataclasses.replace(
        _measure(items, seed), slices={name: _measure(chosen, seed) for name, chosen in sorted(members.items())}
    )


def _measure(items: Sequence[GradedItem], seed: int) -> Metrics:
    answerable = [item for item in items if item.is_answerable]
    figures, intervals = _ratios(items, seed)
    sure, sure_intervals = _confidence(items, seed)
    gap, gap_interval = twin_gap(items, seed=seed)
    intervals |= sure_intervals | ({} if gap_interval is None else {"twin_gap": gap_interval})
    if figures["reasoning_tokens_per_correct"] == math.inf:
        figures["reasoning_tokens_per_correct"] = None
    return Metrics(
        **figures,
        **sure,
        by_family=accuracy_by_family(answerable),
        twin_gap=gap,
        output_tokens=sum(item.output_tokens for item in items),
        num_items=len({item_key(item, index) for index, item in enumerate(items)}),
        num_attempts=len(items),
        num_answerable=len(answerable),
        num_known=sum(item.known is True for item in items),
        num_unknown=sum(item.known is False for item in items),
        grades={grade.value: count for grade, count in sorted(Counter(item.grade for item in items).items())},
        intervals=intervals,
        slices={},
    )


def item_key(item: GradedItem, index: int) -> str:
    return item.item or f"#{index}"


def groups_of(items: Sequence[GradedItem]) -> np.ndarray:
    """int64 [N]: attempts with equal numbers are at one item, numbered as they first appear."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(item_key(item, index), len(numbers)) for index, item in enumerate(items)], np.int64)


def ratio_sums(items: Sequence[GradedItem], metrics: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """float64 [G, M] twice: numerators and denominators of each metric, summed over an item's attempts."""
    groups_N, chosen = groups_of(items), list(metrics)
    sums_GM, counts_GM = (np.zeros((int(groups_N.max(initial=-1)) + 1, len(chosen))) for _ in range(2))
    for column, metric in enumerate(chosen):
        shares = np.array([RATIOS[metric](item) for item in items], np.float64).reshape(-1, 2)
        np.add.at(sums_GM[:, column], groups_N, shares[:, 0])
        np.add.at(counts_GM[:, column], groups_N, shares[:, 1])
    return sums_GM, counts_GM


def ratio_of(metric: str, items: Sequence[GradedItem]) -> float | None:
    """The figure. None where there is nothing to measure; a hallucination rate over a closed book without a miss is 0: nothing
    was made up; tokens and dollars for nothing completed are inf."""
    shares = [RATIOS[metric](item) for item in items]
    total, count = math.fsum(share.sum for share in shares), math.fsum(share.count for share in shares)
    if count:
        return total / count
    if metric == "hallucination_rate":
        return 0.0 if any(item.known is not None and item.grade is not Grade.UNGRADED for item in items) else None
    spends = metric == "cost_per_completed_task" and any(item.cost is not None for item in items)
    return math.inf if total > 0 or spends else None


def _ratios(items: Sequence[GradedItem], seed: int) -> tuple[dict[str, float | None], dict[str, Interval]]:
    figures = {metric: ratio_of(metric, items) for metric in RATIOS}
    if not items:
        return figures, {}
    sums_GM, counts_GM = ratio_sums(items, RATIOS)
    draws_RM = ratio_draws(sums_GM, counts_GM, seed=seed)
    intervals = {}
    for column, metric in enumerate(RATIOS):
        draws_R = draws_RM[:, column]
        if metric == "hallucination_rate":
            draws_R = missed_nothing(draws_R, items)
        num_items = standing_on(metric, items, counts_GM[:, column])
        if figures[metric] is not None and (interval := interval_of(draws_R, num_items, ENDS.get(metric, SHARE))) is not None:
            intervals[metric] = interval
    return figures, intervals


def standing_on(metric: str, items: Sequence[GradedItem], counts_G: np.ndarray) -> int:
    """How many items a figure stands on. counts_G: its denominators. A hallucination rate without a miss stands on the closed
    book: nothing in it was made up."""
    found = int(np.count_nonzero(counts_G))
    if found or metric != "hallucination_rate":
        return found
    return len({item_key(item, index) for index, item in enumerate(items) if item.known is not None})


def missed_nothing(draws: np.ndarray, items: Sequence[GradedItem]) -> np.ndarray:
    """Draws of a hallucination rate in which nothing was missed are 0, where all of the closed book is graded; otherwise nobody
    knows which of them only drew what is ungraded, and they stay NaN."""
    is_graded = all(item.grade is not Grade.UNGRADED for item in items if item.known is not None)
    return np.nan_to_num(draws, nan=0.0) if is_graded else draws


def _confidence(items: Sequence[GradedItem], seed: int) -> tuple[dict[str, float | None], dict[str, Interval]]:
    """Figures of how well confidence, or brevity, tells right from wrong among the attempted answers."""
    tried = [item for item in items if item.is_attempted]
    sure = [item for item in tried if item.confidence is not None]
    correct_N, groups_N = np.array([item.grade is Grade.CORRECT for item in sure], bool), groups_of(sure)
    p_N = np.array([item.confidence for item in sure], np.float64)
    brevity_N = np.array([-item.output_tokens for item in tried], np.float64)
    right_N = np.array([item.grade is Grade.CORRECT for item in tried], bool)
    bins, masses = calibration.reliability(p_N, correct_N), calibration.equal_mass(p_N, correct_N)
    figures = {
        "ece": calibration.calibration_error(bins),
        "adaptive_ece": calibration.calibration_error(masses),
        "aurc": calibration.aurc(p_N, correct_N),
        "coverage_at_5_risk": calibration.coverage_at_risk(p_N, correct_N),
        "aurc_by_length": calibration.aurc(brevity_N, right_N),
    }
    draws = dict[str, np.ndarray]()
    if sure:
        draws |= curve_draws(p_N, correct_N, groups_N, tuple(FIGURES), seed=seed)
    if tried:
        draws["aurc_by_length"] = curve_draws(brevity_N, right_N, groups_of(tried), ("aurc",), seed=seed)["aurc"]
    standing = {name: int(groups_of(tried if name == "aurc_by_length" else sure).max()) + 1 for name in draws}
    intervals = {
        name: interval for name in figures
        if name in draws and (interval := interval_of(draws[name], standing[name], SHARE)) is not None
    }  # fmt: skip
    return figures, intervals


def twin_gap(items: Sequence[GradedItem], *, seed: int = 0) -> tuple[float | None, Interval | None]:
    """Mean over items that have twins of (share right of the item - share right of its twins), and its interval over items."""
    twins, originals = dict[str, list[bool]](), dict[str, list[bool]]()
    for item in items:
        if item.is_answerable:
            kept = twins.setdefault(item.twin_of, []) if item.twin_of else originals.setdefault(item.item, [])
            kept.append(item.grade is Grade.CORRECT)
    gaps_G = np.array([np.mean(originals[name]) - np.mean(right) for name, right in twins.items() if name in originals])
    if not len(gaps_G):
        return None, None
    draws_RM = ratio_draws(gaps_G[:, None], np.ones((len(gaps_G), 1)), seed=seed)
    return float(gaps_G.mean()), interval_of(draws_RM[:, 0], len(gaps_G), ENDS["twin_gap"])


def accuracy_by_family(items: Sequence[GradedItem]) -> dict[str, float]:
    """C / N of each family, in alphabetical order."""
    families: dict[str, list[bool]] = {}
    for item in items:
        families.setdefault(item.family, []).append(item.grade is Grade.CORRECT)
    return {family: sum(hits) / len(hits) for family, hits in sorted(families.items())}
