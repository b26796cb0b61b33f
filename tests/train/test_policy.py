import math

from hypothesis import given
from hypothesis import strategies as st

from train.policy import HISTORY, LEAST_HISTORY, is_better, norm_limit, remember


def test_no_step_is_a_spike_before_there_is_a_history() -> None:
    assert norm_limit([1.0] * (LEAST_HISTORY - 1), 10.0) == math.inf
    assert norm_limit([1.0] * LEAST_HISTORY, 10.0) == 10.0
    assert norm_limit([1.0] * LEAST_HISTORY, None) == math.inf


def test_the_limit_follows_the_median_and_one_large_norm_does_not_move_it() -> None:
    norms = [0.5] * 9 + [2.0] * 10 + [1e9]
    assert norm_limit(norms, 3.0) == 6.0


@given(st.lists(st.floats(0, 1e6), max_size=200))
def test_only_the_last_norms_are_remembered(norms: list[float]) -> None:
    kept: tuple[float, ...] = ()
    for norm in norms:
        kept = remember(kept, norm)
    assert kept == tuple(norms[-HISTORY:])


def test_better_is_less_loss_or_more_accuracy_and_never_a_tie_or_no_number() -> None:
    assert is_better("loss", 1.0, None) and is_better("loss", 0.9, 1.0) and not is_better("loss", 1.0, 1.0)
    assert is_better("accuracy", 0.6, 0.5) and not is_better("accuracy", 0.5, 0.5) and not is_better("accuracy", 0.4, 0.5)
    assert not is_better("loss", math.nan, None)
