import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from configs.errors import Refused, UnusableInput
from data.calibration import (
    FEATURES,
    PASSED,
    UNJUDGED,
    Evidence,
    Labelled,
    Model,
    Weight,
    final_p,
    fit,
    from_json,
    kept_error,
    sides,
    to_json,
)
from data.calibration_metrics import (
    ONE_SIDED_95,
    aurc,
    auroc,
    bootstrap_mean,
    brier,
    calibration_error,
    coverage_at_risk,
    equal_mass,
    error_bounds,
    log_loss,
    reliability,
)

Figure = TypeVar("Figure")
EXACT = 1e-9


def there(figure: Figure | None) -> Figure:
    """A figure that has rows to stand on."""
    assert figure is not None
    return figure


P = np.array([0.9, 0.9, 0.6, 0.6, 0.2])
CORRECT = np.array([True, True, True, False, False])

# --- metrics by hand ---------------------------------------------------------------------------------------------


def test_the_calibration_errors_are_those_computed_by_hand() -> None:
    wide = reliability(P, CORRECT, num_bins=5)
    assert [each.num_rows for each in wide] == [1, 0, 2, 0, 2]  # 0.2 and 0.6 are upper edges of their bins
    assert [each.accuracy for each in wide if each.num_rows] == [0.0, 0.5, 1.0]
    assert calibration_error(wide) == pytest.approx((0.2 + 2 * 0.1 + 2 * 0.1) / 5, abs=EXACT)
    adaptive = equal_mass(P, CORRECT, num_bins=2)  # ranks 0 | 1 1 | 3 3 of 5, so bins 0, 0, 1
    assert [(each.num_rows, each.low, each.high) for each in adaptive] == [(3, 0.2, 0.6), (2, 0.9, 0.9)]
    assert calibration_error(adaptive) == pytest.approx((3 * abs(1 / 3 - 1.4 / 3) + 2 * 0.1) / 5, abs=EXACT)


def test_the_scores_are_those_computed_by_hand() -> None:
    assert brier(P, CORRECT) == pytest.approx((0.01 + 0.01 + 0.16 + 0.36 + 0.04) / 5, abs=EXACT)
    expected = -(2 * math.log(0.9) + math.log(0.6) + math.log(0.4) + math.log(0.8)) / 5
    assert log_loss(P, CORRECT) == pytest.approx(expected, abs=EXACT)
    assert log_loss(np.array([0.0]), np.array([True])) == pytest.approx(15 * math.log(10), abs=1e-6)
    assert auroc(P, CORRECT) == pytest.approx((2 * 2 + 0.5 + 1) / 6, abs=EXACT)


def test_the_risk_figures_are_those_computed_by_hand() -> None:
    # risks 0, 0, 0.5/3 (the tie at 0.6 in random order), 1/4, 2/5
    assert aurc(P, CORRECT) == pytest.approx((0.5 / 3 + 0.25 + 0.4) / 5, abs=EXACT)
    assert coverage_at_risk(P, CORRECT, risk=0.05) == pytest.approx(0.4, abs=EXACT)
    assert coverage_at_risk(P, CORRECT, risk=0.2) == pytest.approx(0.4, abs=EXACT)  # no threshold stops inside a tie
    assert coverage_at_risk(P, CORRECT, risk=0.25) == pytest.approx(0.8, abs=EXACT)
    assert coverage_at_risk(P, ~CORRECT, risk=0.05) == 0.0


def test_a_figure_over_no_rows_is_none() -> None:
    empty, nothing = np.empty(0), np.empty(0, bool)
    figures = (brier, log_loss, auroc, aurc, coverage_at_risk)
    assert all(figure(empty, nothing) is None for figure in figures)
    assert auroc(np.array([0.3]), np.array([True])) is None
    assert calibration_error(reliability(empty, nothing)) is None and calibration_error(equal_mass(empty, nothing)) is None
    assert bootstrap_mean(empty, nothing) is None


forecasts = st.integers(1, 40).flatmap(
    lambda size: st.tuples(
        arrays.arrays(np.float64, size, elements=st.sampled_from([0.0, 0.05, 0.2, 1 / 3, 0.5, 0.8, 1.0]) | st.floats(0, 1)),
        arrays.arrays(np.bool_, size),
    )
)


@settings(max_examples=25, deadline=None)
@given(forecasts)
def test_metrics_equal_scikit_learn_and_a_walk_over_the_rows(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    from sklearn.metrics import brier_score_loss, roc_auc_score

    p, correct = drawn
    assert brier(p, correct) == pytest.approx(brier_score_loss(correct, p, labels=[False, True]), abs=EXACT)
    if 0 < correct.sum() < len(correct):
        assert auroc(p, correct) == pytest.approx(roc_auc_score(correct, p), abs=EXACT)
    for table in (reliability(p, correct), equal_mass(p, correct)):
        assert sum(each.num_rows for each in table) == len(p)
        assert 0.0 <= there(calibration_error(table)) <= 1.0
    covered = [0.0]
    for threshold in p:
        kept = p >= threshold
        if np.mean(~correct[kept]) <= 0.05:
            covered.append(float(np.mean(kept)))
    assert coverage_at_risk(p, correct) == max(covered)


@settings(max_examples=15, deadline=None)
@given(forecasts, st.randoms(use_true_random=False))
def test_no_metric_depends_on_the_order_of_the_rows(drawn: tuple[np.ndarray, np.ndarray], random: object) -> None:
    p, correct = drawn
    order = np.random.default_rng(len(p)).permutation(len(p))
    for metric in (brier, log_loss, aurc, coverage_at_risk, auroc):
        assert metric(p, correct) == metric(p[order], correct[order])
    assert reliability(p, correct) == reliability(p[order], correct[order])
    groups = np.arange(len(p)) // 3
    assert bootstrap_mean(p, groups, num_resamples=20) == bootstrap_mean(p[order], 90 - groups[order], num_resamples=20)


# --- intervals ---------------------------------------------------------------------------------------------------


def test_the_bootstrap_draws_prompts_and_not_traces() -> None:
    random = np.random.default_rng(1)
    wrong = np.repeat(random.random(400) < 0.3, 8).astype(float)  # eight samples of a prompt, all right or all wrong
    by_prompt = there(bootstrap_mean(wrong, np.repeat(np.arange(400), 8)))
    by_trace = there(bootstrap_mean(wrong, np.arange(3200)))
    width = 2 * 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert by_prompt.high - by_prompt.low == pytest.approx(width, rel=0.15)
    assert (by_prompt.high - by_prompt.low) / (by_trace.high - by_trace.low) == pytest.approx(math.sqrt(8), rel=0.15)


def slow_bound(errors: list[float], groups: list[int]) -> float:
    """Of one set, from the definition."""
    mean, names = sum(errors) / len(errors), sorted(set(groups))
    if len(names) < 2:
        return math.inf
    residuals = [sum(error - mean for error, group in zip(errors, groups, strict=True) if group == name) for name in names]
    variance = sum(each**2 for each in residuals) * len(names) / (len(names) - 1) / len(errors) ** 2
    return mean + ONE_SIDED_95 * math.sqrt(variance)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), max_size=20))
def test_the_bounds_of_all_prefixes_equal_the_definition_on_each(rows: list[tuple[float, int]]) -> None:
    errors, groups = [row[0] for row in rows], [row[1] for row in rows]
    expected = [slow_bound(errors[:size], groups[:size]) for size in range(1, len(rows) + 1)]
    # sqrt of a difference of sums near 0: 1e-8 is the square root of float64's resolution there
    assert error_bounds(np.array(errors), np.array(groups, np.int64)) == pytest.approx(expected, abs=1e-7)


def test_the_bound_is_what_the_bootstrap_over_prompts_comes_to() -> None:
    random = np.random.default_rng(2)
    groups = random.integers(0, 300, 1500)
    errors = np.clip(random.beta(1, 9, 300)[groups] + random.normal(0, 0.02, 1500), 0, 1)
    found = there(bootstrap_mean(errors, groups, num_resamples=4000))
    spread = (found.high - found.low) / (2 * 1.959964)
    assert error_bounds(errors, groups)[-1] - found.value == pytest.approx(ONE_SIDED_95 * spread, rel=0.08)


# --- the model ---------------------------------------------------------------------------------------------------


def world(num_prompts: int = 600, samples: int = 4, *, seed: int = 0, shift: float = 0.0) -> Labelled:
    """Traces whose chance to be right is a known logistic function of two features; a third is mostly missing and says nothing,
    the judge was never asked. shift: of the second task's logit."""
    random = np.random.default_rng(seed)
    number = num_prompts * samples
    prompts = np.repeat(np.arange(num_prompts), samples)
    tasks = prompts % 2
    agree, sure = random.uniform(0.25, 1, num_prompts)[prompts], random.normal(-0.5, 0.3, number)
    logit = 6.0 * (agree - 0.5) + 3.0 * (sure + 0.5) + shift * tasks
    verdicts = (random.random(number) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    verdicts[random.random(number) < 0.2] = UNJUDGED
    nothing = np.full(number, np.nan)
    noise = np.where(random.random(number) < 0.7, np.nan, random.normal(size=number))
    return Labelled(
        evidence=Evidence(agree, sure, nothing, nothing, random.integers(50, 900, number), noise, nothing, nothing),
        verdicts_N=verdicts,
        eligible_N=random.random(number) < 0.95,
        prompt_codes_N=prompts,
        prompt_ids=[f"prompt {index} of {seed}" for index in range(num_prompts)],
        task_codes_N=tasks,
        tasks=["sums", "words"],
        trace_keys_N=random.permutation(number).astype(np.uint64),
    )


def shuffled(labelled: Labelled) -> Labelled:
    """The same traces in another order, the prompts numbered from the other end."""
    order = np.random.default_rng(9).permutation(len(labelled.verdicts_N))
    return dataclasses.replace(
        labelled,
        evidence=labelled.evidence.take(order),
        verdicts_N=labelled.verdicts_N[order],
        eligible_N=labelled.eligible_N[order],
        prompt_codes_N=len(labelled.prompt_ids) - 1 - labelled.prompt_codes_N[order],
        prompt_ids=labelled.prompt_ids[::-1],
        task_codes_N=labelled.task_codes_N[order],
        trace_keys_N=labelled.trace_keys_N[order],
    )


@pytest.mark.parametrize("isotonic", [False, True])
def test_a_fitted_model_is_calibrated_on_prompts_that_it_has_not_seen(isotonic: bool) -> None:
    model, report = fit(world(), isotonic=isotonic)
    assert there(report.ece) < 0.06 and there(report.adaptive_ece) < 0.06
    assert there(report.brier) < 0.8 * there(report.base_brier) and there(report.auroc) > 0.75
    assert 0.0 <= report.error_margin < 0.09
    assert set(model.dropped) == {"reasoning_logprob", "lowest_logprob", "judge", "weak_score"}
    assert bool(model.knots_p) == isotonic == bool(report.num_isotonic)
    assert sum(each.num_rows for each in report.reliability) == report.num_report


def test_the_fit_is_the_ridge_solution_that_newton_finds_by_hand() -> None:
    labelled = world(200)
    model, _ = fit(labelled)
    rows = sides(labelled, isotonic=False).fit
    correct = (labelled.verdicts_N[rows] == PASSED).astype(float)
    logs = labelled.evidence._replace(tokens_N=np.log(labelled.evidence.tokens_N)).take(rows)
    parts = [np.ones(len(rows))]
    for weight in model.weights:
        column = logs[FEATURES.index(weight.name)]
        parts.append(np.where(np.isnan(column), 0.0, (column - np.nanmean(column)) / np.nanstd(column)))
        if np.isnan(column).any():
            parts.append(np.isnan(column).astype(float))
    design, ridge = np.column_stack(parts), np.diag([0.0] + [1.0] * (len(parts) - 1))
    beta = np.zeros(len(parts))
    for _ in range(30):
        p = 1 / (1 + np.exp(-design @ beta))
        beta += np.linalg.solve(design.T @ (design * (p * (1 - p))[:, None]) + ridge, design.T @ (correct - p) - ridge @ beta)
    found = [model.intercept]
    for weight in model.weights:
        found += [weight.coefficient] + ([weight.missing] if weight.name == "relative_length" else [])
    assert found == pytest.approx(beta, abs=1e-7)


def test_the_same_traces_in_another_order_give_the_same_bytes() -> None:
    for isotonic in (False, True):
        (model, report), (other, its_report) = fit(world(), isotonic=isotonic), fit(shuffled(world()), isotonic=isotonic)
        assert to_json(model) == to_json(other) and report == its_report


@pytest.mark.long  # two interpreters that import scikit-learn: 3 s, 40 s on a busy machine
def test_neither_threads_nor_the_hash_seed_change_the_model(tmp_path: Path) -> None:
    program = "from tests.data.test_calibration import fit, to_json, world; print(to_json(fit(world(300))[0]))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"))
    }
    assert len(texts) == 1


def test_a_model_read_back_gives_the_same_numbers() -> None:
    labelled = world()
    for isotonic in (False, True):
        model, _ = fit(labelled, isotonic=isotonic)
        again = from_json(to_json(model), "calibration.json")
        assert again == model
        assert np.array_equal(again.p_correct(labelled.evidence), model.p_correct(labelled.evidence))


def test_a_forecast_does_not_depend_on_its_neighbours_to_the_last_bit() -> None:
    labelled = world(60)
    model, _ = fit(world())
    together = model.p_correct(labelled.evidence)
    alone = [model.p_correct(labelled.evidence.take(np.array([row])))[0] for row in range(len(together))]
    assert together.tolist() == [float(p) for p in alone]


def test_the_forecast_of_a_small_model_is_the_one_computed_by_hand() -> None:
    model = Model(0.5, (Weight("agreement", 0.6, 0.2, 2.0, -1.0),), (), (), (), 10, "none")
    nothing = np.full(2, np.nan)
    evidence = Evidence(np.array([0.8, np.nan]), nothing, nothing, nothing, np.array([9, 9]), nothing, nothing, nothing)
    assert model.p_correct(evidence) == pytest.approx([1 / (1 + math.exp(-2.5)), 1 / (1 + math.exp(0.5))], abs=EXACT)
    stepped = dataclasses.replace(model, knots_p=(0.2, 0.9), knots_correct=(0.1, 0.8))
    low, high = 1 / (1 + math.exp(0.5)), 0.8
    assert stepped.p_correct(evidence) == pytest.approx([high, 0.1 + (low - 0.2)], abs=EXACT)


def test_a_verified_trace_is_as_right_as_its_verdict_and_asks_no_model() -> None:
    labelled = world()
    model, _ = fit(labelled)
    p = final_p(model, labelled.evidence, labelled.verdicts_N)
    judged = labelled.verdicts_N != UNJUDGED
    assert np.array_equal(p[judged], labelled.verdicts_N[judged])
    assert ((p[~judged] > 0) & (p[~judged] < 1)).all()
    assert np.isnan(final_p(None, labelled.evidence, labelled.verdicts_N)[~judged]).all()


def test_no_prompt_stands_on_two_sides_and_every_label_on_one() -> None:
    labelled = world()
    parts = sides(labelled, isotonic=True)
    prompts = [set(labelled.prompt_codes_N[rows].tolist()) for rows in parts]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    usable = np.flatnonzero(labelled.eligible_N & (labelled.verdicts_N != UNJUDGED))
    assert sorted(np.concatenate(parts).tolist()) == usable.tolist()


def test_the_labels_of_the_report_side_do_not_reach_the_model() -> None:
    labelled = world()
    verdicts = labelled.verdicts_N.copy()
    rows = sides(labelled, isotonic=False).report
    verdicts[rows] = 1 - verdicts[rows]
    assert to_json(fit(dataclasses.replace(labelled, verdicts_N=verdicts))[0]) == to_json(fit(labelled)[0])


def test_transfer_shows_a_task_that_the_others_mislead_about() -> None:
    _, same = fit(world(800))
    _, shifted = fit(world(800, shift=-2.0))
    gaps = [max(abs(each.expected_error - each.measured_error) for each in report.transfer) for report in (same, shifted)]
    assert [each.task for each in same.transfer] in (["sums", "words"], ["words", "sums"])
    assert gaps[0] < 0.06 < 0.15 < gaps[1]


def test_the_kept_sets_error_stands_beside_the_measured_one() -> None:
    labelled = world(1500)
    model, _ = fit(labelled)
    p = final_p(model, labelled.evidence, labelled.verdicts_N)
    kept = labelled.eligible_N & (labelled.verdicts_N == UNJUDGED) & (p > 0.8)
    found = kept_error(model, labelled, p, kept)
    expected, measured = there(found.expected), there(found.measured)
    assert expected.value == pytest.approx(float(np.mean(1 - p[kept])), abs=EXACT)
    assert measured.low - 0.03 < expected.value < measured.high + 0.03
    assert found.num_rows == kept.sum() and found.num_measured > 100
    nobody = kept_error(model, labelled, p, kept & False)
    assert nobody.expected is None and nobody.measured is None and nobody.num_measured == 0


def test_too_few_labels_are_refused_with_the_number_that_is_needed() -> None:
    labelled = world()
    verdicts = labelled.verdicts_N.copy()
    verdicts[np.flatnonzero(verdicts == 0)[30:]] = UNJUDGED
    with pytest.raises(Refused, match=r"right and \d+ wrong verified traces to fit on, expected at least \d+ of each") as raised:
        fit(dataclasses.replace(labelled, verdicts_N=verdicts))
    assert "\n" not in str(raised.value)
    with pytest.raises(Refused, match="0 right and 0 wrong"):
        fit(dataclasses.replace(labelled, eligible_N=labelled.eligible_N & False))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"version": 1, "weights": 3}'])
def test_what_is_no_model_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UnusableInput, match="calibration.json: not a calibration model") as raised:
        from_json(text, "calibration.json")
    assert "\n" not in str(raised.value)


def test_a_model_of_another_version_or_other_features_is_refused() -> None:
    model = Model(0.0, (), (), (), (), 1, "1")
    for changed in (dataclasses.replace(model, version=99), dataclasses.replace(model, weights=(Weight("luck", 0, 1, 1, 0),))):
        with pytest.raises(UnusableInput, match="build the data stage again"):
            from_json(to_json(changed), "x")


def test_a_separable_sample_still_gives_finite_weights() -> None:
    labelled = world()
    agree = np.where(labelled.verdicts_N == PASSED, 0.9, 0.1)
    model, report = fit(dataclasses.replace(labelled, evidence=labelled.evidence._replace(agreement_N=agree)))
    assert all(math.isfinite(weight.coefficient) for weight in model.weights) and report.auroc == 1.0
