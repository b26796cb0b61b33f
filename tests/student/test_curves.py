"""Figures of resampled confidences against the same figures of rows written out as often as they were drawn."""

import numpy as np
import pytest

from data import calibration_metrics as calibration
from student import curves
from student.curves import FIGURES, curve_draws

OF_ROWS = {
    "ece": lambda p_N, correct_N: calibration.calibration_error(calibration.reliability(p_N, correct_N)),
    "adaptive_ece": lambda p_N, correct_N: calibration.calibration_error(calibration.equal_mass(p_N, correct_N)),
    "aurc": calibration.aurc,
    "coverage_at_5_risk": calibration.coverage_at_risk,
}


def made_up(rows: int, groups: int, forecasts: int, right: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """forecasts: how many different ones there are, 0 and 1 among them."""
    random = np.random.default_rng(rows * forecasts)
    p_N = random.choice(np.linspace(0, 1, forecasts), rows)
    groups_N = np.unique(np.concatenate([np.arange(groups), random.integers(0, groups, rows - groups)]), return_inverse=True)[1]
    return p_N, random.random(rows) < right, random.permutation(groups_N)


@pytest.mark.parametrize("right", [0.0, 0.5, 0.97, 1.0])
@pytest.mark.parametrize(("rows", "groups", "forecasts"), [(1, 1, 2), (40, 40, 1000), (60, 12, 5), (90, 30, 2), (200, 7, 300)])
def test_a_draw_has_the_figures_of_its_rows_written_out(rows: int, groups: int, forecasts: int, right: float) -> None:
    p_N, correct_N, groups_N = made_up(rows, groups, forecasts, right)
    found = curve_draws(p_N, correct_N, groups_N, tuple(FIGURES), seed=5, num_resamples=20)
    drawn_RG = np.random.default_rng(5).integers(0, groups, (20, groups))
    for draw, drawn_G in enumerate(drawn_RG):
        written_out = np.concatenate([np.flatnonzero(groups_N == group) for group in drawn_G])
        for name, figure in OF_ROWS.items():
            assert found[name][draw] == pytest.approx(figure(p_N[written_out], correct_N[written_out]), abs=1e-12), name


def test_highest_forecasts_that_no_draw_holds_are_in_no_bin() -> None:
    """Two items of one row each, drawn once each way: the first draw may leave out the higher forecast."""
    p_N, correct_N, groups_N = np.array([0.9, 0.1]), np.array([True, False]), np.array([0, 1])
    for seed in range(8):
        found = curve_draws(p_N, correct_N, groups_N, ("adaptive_ece",), seed=seed, num_resamples=1)
        assert found["adaptive_ece"].tolist() == pytest.approx([0.1], abs=1e-12)


def test_how_many_draws_are_made_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one = made_up(50, 20, 9, 0.7)
    whole = curve_draws(*one, tuple(FIGURES), seed=1, num_resamples=30)
    monkeypatch.setattr(curves, "_CELLS", 50 * 7)
    for name, draws_R in curve_draws(*one, tuple(FIGURES), seed=1, num_resamples=30).items():
        assert draws_R.tolist() == whole[name].tolist(), name
