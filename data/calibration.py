"""From what is known about a trace to p(correct): fitted where verifiers have judged, used where they have not.

Design. A strong verifier's verdict IS the answer to the question, so p of a verified trace is 1 or 0 and no model is asked.
The model is for the rest: prompts without a verifier, verdicts that timed out, and weak verifiers (a string match that misses
paraphrases, a judge that can be talked round). Three leaks would make it look good and be worthless; each is closed by form:

    verdict as feature   the label is the strong verdict, and no feature is. A weak verdict is a feature, never a label; it earns
                         a weight only from traces that a strong verifier has judged as well, so send the judge a sample of those.
    verdict by the back  `efficiency` divides by the shortest *correct* trace and tells the answer; `relative_length` (to the
                         median of the prompt) takes its place. Agreement counts answers and asks nobody which is right.
    siblings             the samples of a prompt share its difficulty, so the sides of the fit are prompts, by hash, never rows.

What no split can show is the step from verifiable tasks to others. So the report has a second table, `transfer`: each task
forecast by a model that has never seen that task. Where it is far off, p of an unverifiable task is no better.

Logistic regression on standardised features; a missing value stands at the mean, and a column of its own says that it was
missing, with a weight where some labelled trace lacks it and others do not. A feature that no labelled trace has, or that never
varies among them, is dropped and named in `dropped`. Optionally isotonic regression on top, fitted on prompts that the
coefficients have not seen.

    N traces    F features
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
from pydantic import TypeAdapter

from configs.errors import Refused, UnusableInput
from data.calibration_metrics import (
    RISK,
    Bin,
    Estimate,
    aurc,
    auroc,
    bootstrap_mean,
    brier,
    calibration_error,
    coverage_at_risk,
    equal_mass,
    log_loss,
    reliability,
)
from data.split import is_held_out

VERSION = 1
UNJUDGED, FAILED, PASSED = -1, 0, 1
REPORT_SHARE, ISOTONIC_SHARE = 0.3, 0.3
LABELS_PER_WEIGHT = 10
"""Of the rarer class, for each weight to be fitted (Peduzzi et al. 1996)."""
FEWEST_LABELS = 20
"""Of either class on every side: an ECE over fewer wrong traces is noise."""
MOST_TRANSFER_TASKS = 32
LIKELY = 0.5


class Evidence(NamedTuple):
    """What is known about N traces without asking whether they are right: float64 [N] each, NaN where it is not known.

    agreement, relative_length: data.groups. answer, reasoning, lowest logprobs: data.confidence. tokens: generated, reasoning
    included (length by itself is a signal of confidence, arXiv 2510.10409). judge: 1 or 0, the LLM judge's word. weak_score: in
    [0, 1], of a verifier that is not trusted to label.
    """

    agreement_N: np.ndarray
    answer_logprob_N: np.ndarray
    reasoning_logprob_N: np.ndarray
    lowest_logprob_N: np.ndarray
    tokens_N: np.ndarray
    relative_length_N: np.ndarray
    judge_N: np.ndarray
    weak_score_N: np.ndarray

    def take(self, rows: np.ndarray) -> "Evidence":
        return Evidence(*(column[rows] for column in self))


FEATURES = (
    "agreement", "answer_logprob", "reasoning_logprob", "lowest_logprob", "log_tokens", "relative_length", "judge", "weak_score",
)  # fmt: skip


def feature_columns(evidence: Evidence) -> dict[str, np.ndarray]:
    """By name, in the order of FEATURES: float64 [N] each, contiguous; lengths as logarithms."""
    columns = [np.ascontiguousarray(column, np.float64) for column in evidence]
    columns[FEATURES.index("log_tokens")] = np.log(np.maximum(evidence.tokens_N.astype(float), 1.0))
    return dict(zip(FEATURES, columns, strict=True))


# --- the model ---------------------------------------------------------------------------------------------------


class Weight(NamedTuple):
    """One feature's part in the logit: coefficient x (value - mean) / scale, or `missing` where there is no value."""

    name: str
    mean: float
    scale: float
    coefficient: float
    missing: float


@dataclass(frozen=True, slots=True)
class Model:
    """p = sigmoid(intercept + sum of weights), through the isotonic knots (linear between them, flat outside) when there are any.

    dropped: features that no label could teach. scikit_learn: the version that fitted it; none is needed to use it.
    """

    intercept: float
    weights: tuple[Weight, ...]
    knots_p: tuple[float, ...]
    knots_correct: tuple[float, ...]
    dropped: tuple[str, ...]
    num_labels: int
    scikit_learn: str
    version: int = VERSION

    def p_correct(self, evidence: Evidence) -> np.ndarray:
        """float64 [N] in [0, 1]. A row's figure does not depend on its neighbours, to the last bit: features are added up one
        after the other, where a matrix product would sum in the order that suits the batch."""
        columns = feature_columns(evidence)
        logit_N = np.full(len(evidence.tokens_N), self.intercept)
        for name, mean, scale, coefficient, missing in self.weights:
            value_N = columns[name]
            logit_N += np.where(np.isnan(value_N), missing, coefficient * ((value_N - mean) / scale))
        p_N = 1.0 / (1.0 + np.exp(-np.clip(logit_N, -500.0, 500.0)))
        return np.interp(p_N, self.knots_p, self.knots_correct) if self.knots_p else p_N


def to_json(model: Model) -> str:
    """One JSON object. Python writes the shortest digits that read back as the same float, so nothing is lost."""
    return json.dumps(asdict(model) | {"weights": [weight._asdict() for weight in model.weights]}, indent=1, allow_nan=False)


def from_json(text: str, where: str) -> Model:
    """Raises UnusableInput, naming `where`, for text that is no model of this version."""
    try:
        model = TypeAdapter(Model).validate_python(json.loads(text))
    except ValueError as error:  # pydantic's and json's
        raise UnusableInput(
            f"{where}: not a calibration model, expected what a build wrote; build the data stage again"
        ) from error
    if model.version != VERSION or not {weight.name for weight in model.weights} <= set(FEATURES):
        raise UnusableInput(f"{where}: calibration version {model.version}, expected {VERSION}; build the data stage again")
    return model


def final_p(model: Model | None, evidence: Evidence, verdicts_N: np.ndarray) -> np.ndarray:
    """p(correct) of N traces: the strong verdict where there is one, else the model's word; NaN where there is neither."""
    guessed_N = np.full(len(verdicts_N), np.nan) if model is None else model.p_correct(evidence)
    return np.where(verdicts_N == UNJUDGED, guessed_N, (verdicts_N == PASSED).astype(float))


# --- fitting -----------------------------------------------------------------------------------------------------


class Sides(NamedTuple):
    """Rows of strongly judged traces by the side of their prompt; each int64, in the order of their trace keys."""

    fit: np.ndarray
    isotonic: np.ndarray
    report: np.ndarray


@dataclass(frozen=True, slots=True)
class Labelled:
    """N completed traces and what strong verifiers say of them. A trace that is not eligible (a filter's no) teaches nothing:
    it will not be forecast either. trace_keys_N: uint64, hash of the trace_id; the fit goes in their order, so that rows may
    come in any. prompt_codes_N index prompt_ids."""

    evidence: Evidence
    verdicts_N: np.ndarray
    eligible_N: np.ndarray
    prompt_codes_N: np.ndarray
    prompt_ids: list[str]
    task_codes_N: np.ndarray
    tasks: list[str]
    trace_keys_N: np.ndarray


def sides(labelled: Labelled, *, isotonic: bool) -> Sides:
    """Every judged, eligible trace stands on one side, and all traces of a prompt on the same. Salted, so that no side
    is the validation split of the dataset, which the same hash decides."""
    rows = np.flatnonzero(labelled.eligible_N & (labelled.verdicts_N != UNJUDGED))
    rows = rows[np.argsort(labelled.trace_keys_N[rows], kind="stable")]
    codes = np.unique(labelled.prompt_codes_N[rows])
    report, knots = (np.zeros(len(labelled.prompt_ids), bool) for _ in range(2))
    report[codes] = [is_held_out(f"calibration report {labelled.prompt_ids[code]}", share=REPORT_SHARE) for code in codes]
    if isotonic:
        knots[codes] = [is_held_out(f"calibration knots {labelled.prompt_ids[code]}", share=ISOTONIC_SHARE) for code in codes]
    in_report, in_knots = report[labelled.prompt_codes_N[rows]], knots[labelled.prompt_codes_N[rows]]
    return Sides(rows[~in_report & ~in_knots], rows[~in_report & in_knots], rows[in_report])


def fit(labelled: Labelled, *, isotonic: bool = False) -> "tuple[Model, Report]":
    """The model and what the prompts that it has not seen say of it; equal traces give equal bytes of JSON, in any order.

    Raises:
        Refused: too few labels of either class on some side; the line says how many are needed.
    """
    parts = sides(labelled, isotonic=isotonic)
    model = _fit_rows(labelled, parts)
    return model, report_on(model, labelled, parts)


def _fit_rows(labelled: Labelled, parts: Sides) -> Model:
    import sklearn
    from threadpoolctl import threadpool_limits

    evidence, correct_N = labelled.evidence.take(parts.fit), labelled.verdicts_N[parts.fit] == PASSED
    _enough("to fit on", correct_N, FEWEST_LABELS)
    columns = {name: _standardised(column) for name, column in feature_columns(evidence).items()}
    used = {name: column for name, column in columns.items() if column is not None}
    design_NF = np.column_stack([np.empty((len(correct_N), 0)), *(part for column in used.values() for part in column.parts)])
    _enough("to fit on", correct_N, LABELS_PER_WEIGHT * design_NF.shape[1])
    for name, rows in (("for isotonic", parts.isotonic), ("to report on", parts.report)):
        if name == "to report on" or len(rows):
            _enough(name, labelled.verdicts_N[rows] == PASSED, FEWEST_LABELS)
    with threadpool_limits(1):  # more threads add up in another order
        intercept, coefficients = _logistic(design_NF, correct_N)
    model = Model(
        intercept=intercept,
        weights=tuple(_weights(used, coefficients)),
        knots_p=(),
        knots_correct=(),
        dropped=tuple(name for name, column in columns.items() if column is None),
        num_labels=len(correct_N),
        scikit_learn=sklearn.__version__,
    )
    return _with_knots(model, labelled, parts.isotonic) if len(parts.isotonic) else model


def _enough(purpose: str, correct_N: np.ndarray, needed: int) -> None:
    num_correct, num_wrong = int(np.sum(correct_N)), int(np.sum(~correct_N))
    if min(num_correct, num_wrong) < needed:
        raise Refused(
            f"calibration: {num_correct} right and {num_wrong} wrong verified traces {purpose}, expected at least {needed} of "
            "each; add prompts with a verifier that the teacher sometimes fails, or take the view `verified`"
        )


class _Standardised(NamedTuple):
    """parts: the standardised values (0 where missing), and the indicator of missing ones where some are."""

    mean: float
    scale: float
    parts: tuple[np.ndarray, ...]


def _standardised(column_N: np.ndarray) -> _Standardised | None:
    """None when nothing can be learned from the column: no value, or always the same one."""
    missing_N = np.isnan(column_N)
    present = column_N[~missing_N]
    if not len(present) or present.max() == present.min():
        return None
    mean, scale = float(np.mean(present)), float(np.std(present))
    values_N = np.where(missing_N, 0.0, (column_N - mean) / scale)
    return _Standardised(mean, scale, (values_N, missing_N.astype(float)) if missing_N.any() else (values_N,))


def _logistic(design_NF: np.ndarray, correct_N: np.ndarray) -> tuple[float, np.ndarray]:
    """Intercept and coefficients under scikit-learn's default ridge (C = 1): one prior observation's worth of doubt, which keeps
    a separable sample from running off to infinity. Newton with Cholesky: exact to 1e-10, whatever the starting point."""
    from sklearn.linear_model import LogisticRegression

    if not design_NF.shape[1]:
        share = float(np.mean(correct_N))
        return float(np.log(share / (1.0 - share))), np.empty(0)
    fitted = LogisticRegression(solver="newton-cholesky", C=1.0, tol=1e-10, max_iter=200).fit(design_NF, correct_N)
    return float(fitted.intercept_[0]), fitted.coef_[0]


def _weights(used: dict[str, _Standardised], coefficients: np.ndarray) -> Iterator[Weight]:
    values = iter(float(value) for value in coefficients)
    for name, column in used.items():
        coefficient = next(values)
        yield Weight(name, column.mean, column.scale, coefficient, next(values) if len(column.parts) > 1 else 0.0)


def _with_knots(model: Model, labelled: Labelled, rows: np.ndarray) -> Model:
    """Isotonic regression from the model's p to the share of right ones. Held one prior trace off 0 and 1: a step at exactly 1
    would promise that nothing there is ever wrong."""
    from sklearn.isotonic import IsotonicRegression

    bound = 1.0 / (len(rows) + 2)
    step = IsotonicRegression(y_min=bound, y_max=1.0 - bound, increasing=True, out_of_bounds="clip")
    step.fit(model.p_correct(labelled.evidence.take(rows)), labelled.verdicts_N[rows] == PASSED)
    return replace(model, knots_p=tuple(map(float, step.X_thresholds_)), knots_correct=tuple(map(float, step.y_thresholds_)))


# --- the report --------------------------------------------------------------------------------------------------


class Transfer(NamedTuple):
    """A task forecast by a model fitted without it, on its report side: mean forecast error, and the share that was wrong."""

    task: str
    num_rows: int
    expected_error: float
    measured_error: float


class KeptError(NamedTuple):
    """Of the traces that a view keeps. expected: mean of 1 - p over all of them. measured: share of wrong ones among the traces
    of the report side that stand as high by the model's word alone. None where there are none."""

    expected: Estimate | None
    measured: Estimate | None
    num_rows: int
    num_measured: int


@dataclass(frozen=True, slots=True)
class Report:
    """What the report side says: prompts whose verdicts the fit has not seen, forecast without them.

    base_brier: of forecasting the report side's share of right ones for every trace; a Brier score above it is worse than
    nothing. error_margin: by how much the share of wrong ones may exceed what is forecast (upper end of the 95 % interval,
    over the traces that stand at 0.5 or above; at least 0); selection adds it to what it expects of unverified traces.
    """

    num_fit: int
    num_isotonic: int
    num_report: int
    num_report_prompts: int
    accuracy: Estimate | None
    ece: float | None
    adaptive_ece: float | None
    brier: float | None
    base_brier: float | None
    log_loss: float | None
    auroc: float | None
    aurc: float | None
    coverage_at_5_percent_risk: float | None
    error_margin: float
    reliability: tuple[Bin, ...]
    transfer: tuple[Transfer, ...]


def report_on(model: Model, labelled: Labelled, parts: Sides) -> Report:
    rows = parts.report
    p_N, correct_N = model.p_correct(labelled.evidence.take(rows)), labelled.verdicts_N[rows] == PASSED
    prompts_N, likely_N = labelled.prompt_codes_N[rows], p_N >= LIKELY
    table = reliability(p_N, correct_N)
    excess = bootstrap_mean((p_N - correct_N)[likely_N], prompts_N[likely_N])
    return Report(
        num_fit=len(parts.fit),
        num_isotonic=len(parts.isotonic),
        num_report=len(rows),
        num_report_prompts=len(np.unique(prompts_N)),
        accuracy=bootstrap_mean(correct_N.astype(float), prompts_N),
        ece=calibration_error(table),
        adaptive_ece=calibration_error(equal_mass(p_N, correct_N)),
        brier=brier(p_N, correct_N),
        base_brier=brier(np.full(len(rows), np.mean(correct_N)), correct_N),
        log_loss=log_loss(p_N, correct_N),
        auroc=auroc(p_N, correct_N),
        aurc=aurc(p_N, correct_N),
        coverage_at_5_percent_risk=coverage_at_risk(p_N, correct_N, risk=RISK),
        error_margin=1.0 if excess is None else max(0.0, excess.high),
        reliability=table,
        transfer=tuple(_transfers(labelled, parts)),
    )


def _transfers(labelled: Labelled, parts: Sides) -> Iterator[Transfer]:
    """The largest tasks of the report side, each by a model of all others; a task that is needed to fit at all is left out."""
    tasks, counts = np.unique(labelled.task_codes_N[parts.report], return_counts=True)
    largest = sorted(tasks[counts >= FEWEST_LABELS], key=lambda code: (-counts[tasks == code][0], labelled.tasks[code]))
    for code in largest[:MOST_TRANSFER_TASKS]:
        others = Sides(*(rows[labelled.task_codes_N[rows] != code] for rows in parts))
        rows = parts.report[labelled.task_codes_N[parts.report] == code]
        try:
            model = _fit_rows(labelled, others)
        except Refused:
            continue
        forecast = float(np.mean(1.0 - model.p_correct(labelled.evidence.take(rows))))
        wrong = float(np.mean(labelled.verdicts_N[rows] != PASSED))
        yield Transfer(task=labelled.tasks[code], num_rows=len(rows), expected_error=forecast, measured_error=wrong)


def kept_error(
    model: Model | None, labelled: Labelled, p_correct_N: np.ndarray, kept_N: np.ndarray, *, isotonic: bool = False, seed: int = 0
) -> KeptError:
    """What the traces of kept_N are expected to get wrong, beside what the report side got wrong at the same height."""
    kept = np.flatnonzero(kept_N & ~np.isnan(p_correct_N))
    expected = bootstrap_mean(1.0 - p_correct_N[kept], labelled.prompt_codes_N[kept], seed=seed)
    unverified = kept[labelled.verdicts_N[kept] == UNJUDGED]
    rows = sides(labelled, isotonic=isotonic).report
    if model is None or not len(unverified) or not len(rows):
        return KeptError(expected, None, len(kept), 0)
    as_high = rows[model.p_correct(labelled.evidence.take(rows)) >= p_correct_N[unverified].min()]
    wrong_N = (labelled.verdicts_N[as_high] != PASSED).astype(float)
    return KeptError(expected, bootstrap_mean(wrong_N, labelled.prompt_codes_N[as_high], seed=seed), len(kept), len(as_high))
