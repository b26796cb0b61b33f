"""What the samples of one prompt say about each other: how many agree, who was brief, who is unlike the rest.

Everything is arithmetic over columns of N traces; a prompt is a number in prompt_codes_N, and which number is of no
account. Rows may come in any order: where order matters the caller gives it (order_N, a permutation, best first).

    N traces    P components of a signature    G prompts with the same number of candidates    M those candidates
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from data.records import Prompt
from data.verify.exact import is_abstention, normalise

VERSION = 1
NO_ANSWER = 0
DIVERSITY_BYTES = 1 << 25
"""Of signatures looked at in one go: 200,000 traces of 128 components would be 100 MB."""

_LIMITLESS = 1 << 62

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(rows_GM, picked_G) -> distance_GM, float64: of each row to the one picked in its prompt."""


class Limit(NamedTuple):
    """Of one group; None is no bound."""

    rows: int | None
    tokens: int | None


def trace_keys(trace_ids: Sequence[str]) -> np.ndarray:
    """uint64 [N]: the first 16 of the 32 hex digits, which are a hash already. Two of a million agree with odds of 1 to 37
    million, and then only their tie is open."""
    return np.fromiter((int(trace_id[:16], 16) for trace_id in trace_ids), np.uint64, len(trace_ids))


# --- answers -----------------------------------------------------------------------------------------------------


def answer_keys(prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
    """uint64 [N], equal exactly when two answers say the same; NO_ANSWER where nothing was said. 64 bits of blake2b: among the
    samples of one prompt no two different answers will meet."""
    return np.fromiter((answer_key(*pair) for pair in zip(prompts, answers, strict=True)), np.uint64, len(answers))


def answer_key(prompt: Prompt, answer: str) -> int:
    """Numbers are equal by value (4 = 4.0 = 8/2 = \\boxed{4}), abstentions are all one answer, JSON is equal as a value, code
    up to whitespace at line ends, and other text up to case, whitespace and trailing punctuation."""
    if not answer.strip():
        return NO_ANSWER
    said = _CANONICAL.get(prompt.verifier, _value)(answer)
    return int.from_bytes(hashlib.blake2b(said.encode(errors="surrogatepass"), digest_size=8).digest(), "little") or 1


def _value(answer: str) -> str:
    text = normalise(_boxed(answer)).strip("$").strip()
    number = _number(text)
    if number is not None:
        return f"number {number}"
    return "abstention" if is_abstention(text) else f"text {text}"


def _boxed(answer: str) -> str:
    """The content of the last \\boxed{...} whose braces close, or the answer as it is."""
    start = answer.rfind("\\boxed{")
    if start < 0:
        return answer
    begin, depth = start + len("\\boxed{"), 1
    for brace in _BRACE.finditer(answer, begin):
        depth += 1 if brace.group() == "{" else -1
        if not depth:
            return answer[begin : brace.start()]
    return answer


def _number(text: str) -> Fraction | None:
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
        return None
    text = text.replace(",", "").replace(" ", "")
    try:
        return Fraction(text)
    except ZeroDivisionError:
        return None


def _json(answer: str) -> str:
    text = _last_block(answer)
    try:
        return "json " + json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        return f"text {normalise(text)}"


def _code(answer: str) -> str:
    """Case counts and so does indentation."""
    return "code " + "\n".join(line.rstrip() for line in _last_block(answer).strip("\n").splitlines() if line.strip())


def _last_block(answer: str) -> str:
    blocks = _FENCED.findall(answer)
    return blocks[-1] if blocks else answer


_CANONICAL: dict[str, Callable[[str], str]] = {"json_schema": _json, "code": _code}
_BRACE = re.compile(r"[{}]")
_FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Three digits of exponent at most: Fraction("1e999999999") is a gigabyte of zeros.
_NUMBER = re.compile(r"[+-]? ?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d*)?(?:e[+-]?\d{1,3}|/\d+)?")
_LONGEST_NUMBER = 64


# --- agreement and length ----------------------------------------------------------------------------------------


def agreement(prompt_codes_N: np.ndarray, answer_keys_N: np.ndarray, eligible_N: np.ndarray) -> np.ndarray:
    """Share of the prompt's eligible samples that give this trace's answer, itself included: float64 [N], in (0, 1].

    NaN for a trace that is not eligible, has no answer, or is its prompt's only eligible one: it has nobody to agree with.
    An eligible sample without an answer counts as one that says something else. Self-consistency: arXiv 2203.11171.
    """
    rows = np.flatnonzero(eligible_N)
    shares_N = np.full(len(prompt_codes_N), np.nan)
    num_samples = _run_sizes(prompt_codes_N[rows])
    num_same = _run_sizes(prompt_codes_N[rows], answer_keys_N[rows])
    shares_N[rows] = np.where(num_samples > 1, num_same / np.maximum(num_samples, 1), np.nan)
    shares_N[answer_keys_N == NO_ANSWER] = np.nan
    return shares_N


def _run_sizes(*keys: np.ndarray) -> np.ndarray:
    """For each row, how many rows have equal keys: int64."""
    order = np.lexsort(keys)
    new = _starts(*(key[order] for key in keys))
    sizes = np.diff(np.append(np.flatnonzero(new), len(order)))
    counts = np.empty(len(order), np.int64)
    counts[order] = np.repeat(sizes, sizes)
    return counts


def _starts(*sorted_keys: np.ndarray) -> np.ndarray:
    """True where a run of equal rows begins."""
    new = np.zeros(len(sorted_keys[0]), bool)
    new[:1] = True
    for key in sorted_keys:
        new[1:] |= key[1:] != key[:-1]
    return new


def shortest_correct(prompt_codes_N: np.ndarray, tokens_N: np.ndarray, correct_N: np.ndarray) -> np.ndarray:
    """Tokens of the shortest correct trace of each trace's prompt: float64 [N], NaN where none is correct."""
    return _extreme(prompt_codes_N, tokens_N, correct_N, np.minimum)


def efficiency(prompt_codes_N: np.ndarray, tokens_N: np.ndarray, correct_N: np.ndarray) -> np.ndarray:
    """Tokens over those of the prompt's shortest correct trace: float64 [N], at least 1 for correct ones; NaN where none is."""
    return tokens_N / np.maximum(shortest_correct(prompt_codes_N, tokens_N, correct_N), 1.0)


def wide_spread(prompt_codes_N: np.ndarray, tokens_N: np.ndarray, correct_N: np.ndarray, *, ratio: float) -> np.ndarray:
    """True for every trace of a prompt whose longest correct trace has more than `ratio` times the tokens of its shortest:
    the calibration red flag, a teacher that does not know how hard the prompt is."""
    longest_N = _extreme(prompt_codes_N, tokens_N, correct_N, np.maximum)
    return longest_N > ratio * np.maximum(shortest_correct(prompt_codes_N, tokens_N, correct_N), 1.0)  # NaN compares false


def _extreme(prompt_codes_N: np.ndarray, values_N: np.ndarray, counted_N: np.ndarray, pick: np.ufunc) -> np.ndarray:
    """np.minimum or np.maximum of the counted rows of each row's prompt; NaN where none is counted."""
    _, prompt_N = np.unique(prompt_codes_N, return_inverse=True)
    best = np.full(prompt_N.max(initial=-1) + 1, np.nan)
    order = np.flatnonzero(counted_N)[np.argsort(prompt_N[counted_N], kind="stable")]
    first = np.flatnonzero(_starts(prompt_N[order]))
    if len(order):
        best[prompt_N[order[first]]] = pick.reduceat(values_N[order].astype(float), first)
    return best[prompt_N]


def relative_length(prompt_codes_N: np.ndarray, tokens_N: np.ndarray, eligible_N: np.ndarray) -> np.ndarray:
    """log(tokens / median tokens of the prompt's eligible traces): float64 [N], NaN where fewer than two are eligible.

    Asks no verdict, which `efficiency` does: the shortest *correct* trace tells who is correct.
    """
    rows = np.flatnonzero(eligible_N)
    order = rows[np.lexsort((tokens_N[rows], prompt_codes_N[rows]))]
    sizes = _run_sizes(prompt_codes_N[order])
    first = np.flatnonzero(_starts(prompt_codes_N[order]))
    count = sizes[first]
    logs = np.log(np.maximum(tokens_N[order], 1))
    middle = (logs[first + (count - 1) // 2] + logs[first + count // 2]) / 2
    relative_N = np.full(len(tokens_N), np.nan)
    relative_N[order] = np.where(sizes > 1, logs - np.repeat(middle, count), np.nan)
    return relative_N


# --- places in a group -------------------------------------------------------------------------------------------


def rank_within(groups_N: np.ndarray, order_N: np.ndarray) -> np.ndarray:
    """How many rows of the same group come before each row of order_N, which may name some of the rows only: int64, in the
    order of order_N."""
    return running_total(groups_N, np.ones(len(groups_N), np.int64), order_N) - 1


def running_total(groups_N: np.ndarray, values_N: np.ndarray, order_N: np.ndarray) -> np.ndarray:
    """Sum of the integers values_N over the rows of the group up to and including each row of order_N: int64, in its order.
    Integers, because their sums do not depend on which group was numbered first."""
    by_group = np.argsort(groups_N[order_N], kind="stable")
    rows = order_N[by_group]
    totals = np.cumsum(values_N[rows], dtype=np.int64)
    first = np.flatnonzero(_starts(groups_N[rows]))
    before = totals[first] - values_N[rows[first]] if len(rows) else totals
    running = np.empty(len(rows), np.int64)
    running[by_group] = totals - np.repeat(before, np.diff(np.append(first, len(rows))))
    return running


def over_limits(groups_N: np.ndarray, limits: Sequence[Limit], tokens_N: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The rows of `order` (best first) from which on their group is full. groups_N index `limits`; -1 is no group.

    The first row that does not fit closes its group. Filling the gap with smaller ones would favour short traces; and so a
    larger limit keeps all that a smaller one keeps.
    """
    order = order[groups_N[order] >= 0]
    if not len(order):
        return order
    most_rows, most_tokens = (
        np.array([_LIMITLESS if bound is None else min(bound, _LIMITLESS) for bound in bounds], np.int64)
        for bounds in zip(*limits, strict=True)
    )
    group = groups_N[order]
    full = running_total(groups_N, tokens_N, order) > most_tokens[group]
    return order[full | (rank_within(groups_N, order) >= most_rows[group])]


# --- diversity ---------------------------------------------------------------------------------------------------


def by_signature(signatures_NP: np.ndarray) -> Distance:
    """1 - share of MinHash components that are equal, which estimates 1 - Jaccard similarity of the texts' shingles."""

    def distance(rows_GM: np.ndarray, picked_G: np.ndarray) -> np.ndarray:
        return np.mean(signatures_NP[rows_GM] != signatures_NP[picked_G][:, None, :], axis=-1)

    return distance


def by_answer_and_length(answer_keys_N: np.ndarray, tokens_N: np.ndarray) -> Distance:
    """1 for another answer, plus |log of the ratio of the lengths|."""
    log_tokens_N = np.log(np.maximum(tokens_N, 1))

    def distance(rows_GM: np.ndarray, picked_G: np.ndarray) -> np.ndarray:
        apart = np.abs(log_tokens_N[rows_GM] - log_tokens_N[picked_G][:, None])
        return apart + (answer_keys_N[rows_GM] != answer_keys_N[picked_G][:, None])

    return distance


def farthest_first(
    prompt_codes_N: np.ndarray, order_N: np.ndarray, k: int, distance: Distance, *, row_bytes: int = 8
) -> np.ndarray:
    """The rows of order_N that are chosen: of each prompt its first row, then k - 1 times the row whose nearest chosen one is
    farthest (Gonzalez 1985; within a factor 2 of the best max-min set). Ties go to the row that comes first.

    All prompts with the same number of candidates go at once. row_bytes: memory of what `distance` looks at in a row.
    """
    by_prompt = order_N[np.argsort(prompt_codes_N[order_N], kind="stable")]
    first = np.flatnonzero(_starts(prompt_codes_N[by_prompt]))
    sizes = np.diff(np.append(first, len(by_prompt)))
    chosen = [by_prompt[np.repeat(sizes <= k, sizes)]]
    for size in np.unique(sizes[sizes > k]):
        rows_GM = by_prompt[first[sizes == size][:, None] + np.arange(size)]
        at_once = max(1, DIVERSITY_BYTES // int(size * row_bytes))
        for start in range(0, len(rows_GM), at_once):
            chosen.append(_spread_out(rows_GM[start : start + at_once], k, distance))
    return np.concatenate(chosen)


def _spread_out(rows_GM: np.ndarray, k: int, distance: Distance) -> np.ndarray:
    prompts, picked_G = np.arange(len(rows_GM)), np.zeros(len(rows_GM), np.int64)
    nearest_GM, chosen_GM = np.full(rows_GM.shape, np.inf), np.zeros(rows_GM.shape, bool)
    for _ in range(k):
        chosen_GM[prompts, picked_G] = True
        nearest_GM = np.minimum(nearest_GM, distance(rows_GM, rows_GM[prompts, picked_G]))
        nearest_GM[chosen_GM] = -1.0
        picked_G = np.argmax(nearest_GM, axis=1)
    return rows_GM[chosen_GM]
