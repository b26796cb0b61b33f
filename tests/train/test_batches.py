import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chat import IGNORE_INDEX, MASKED, Encoded, Reason
from train.batches import (
    Balance,
    MicroStep,
    TokenCounts,
    TokenLedger,
    TrainingOrder,
    admit,
    deal_out,
    num_trained,
    split_for_sequence_parallel,
    to_batch,
)
from train.objectives.targets import TeacherTargets
from train.schedule import learning_rate

masks = st.lists(st.booleans(), min_size=1, max_size=40)


def counts_of(rows: list[list[int]], dropped: list[str] | None = None) -> TokenCounts:
    """rows: each token's Reason."""
    by_reason = [[[Reason.FIRST_TOKEN, *row[1:]].count(reason) for reason in Reason] for row in rows]
    return TokenCounts(np.array(by_reason, np.int64).reshape(-1, len(Reason)), np.array(dropped or [""] * len(rows), str))


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(list(Reason)), min_size=1, max_size=12), st.sampled_from(["", "unfinished"])),
        max_size=12,
    ),
    st.integers(1, 12),
)
def test_token_ledger_balances(traces: list[tuple[list[int], str]], max_tokens: int) -> None:
    rows, dropped = [row for row, _ in traces], [why for _, why in traces]
    kept_R, ledger = admit(counts_of(rows, dropped), max_tokens)
    assert ledger.balances and ledger.truncated == 0
    assert ledger.total == sum(map(len, rows)) and ledger.traces == len(rows)
    assert kept_R.tolist() == [place for place, (row, why) in enumerate(traces) if len(row) <= max_tokens and not why]
    kept = [[Reason.FIRST_TOKEN, *rows[place][1:]] for place in kept_R]
    assert ledger.trained == sum(row.count(Reason.TRAINED) for row in kept)
    assert ledger.masked == {reason.name.lower(): sum(row.count(reason) for row in kept) for reason in MASKED}
    assert sum(ledger.dropped.values()) == sum(map(len, rows)) - sum(map(len, kept))
    assert ledger.traces == len(kept_R) + sum(ledger.dropped_traces.values())
    assert not replace(ledger, truncated=1).balances, "a token that is cut would have to be taken from somewhere"


def test_over_length_trace_is_dropped_whole_and_counted() -> None:
    user, own = Reason.USER, Reason.TRAINED
    kept_R, ledger = admit(counts_of([[user, own, own], [own] * 9, [own] * 4], ["", "", "unfinished"]), max_tokens=8)
    assert kept_R.tolist() == [0]
    assert (ledger.trained, ledger.masked["first_token"], sum(ledger.masked.values()), ledger.truncated) == (2, 1, 1, 0)
    assert ledger.dropped == {"over_length": 9, "unfinished": 4}
    assert ledger.dropped_traces == {"over_length": 1, "unfinished": 1}


def test_a_trace_beyond_the_students_positions_is_dropped_for_that() -> None:
    own = Reason.TRAINED
    kept_R, ledger = admit(counts_of([[own] * 5, [own] * 7, [own] * 9], ["", "", ""]), max_tokens=8, max_positions=6)
    assert kept_R.tolist() == [0] and ledger.balances
    assert ledger.dropped == {"over_positions": 7, "over_length": 9}


# --- a packed row ------------------------------------------------------------------------------------------------


def document(*ids: int, trained: str) -> Encoded:
    """trained: one character a token, x where it is the model's own."""
    return Encoded(list(ids), [character == "x" for character in trained])


def targets_of(rows: int) -> TeacherTargets:
    """Teacher's rows that can be told apart."""
    return TeacherTargets(torch.arange(rows)[:, None], torch.full((rows, 1), -0.5), torch.ones(rows, dtype=torch.bool))


def test_targets_are_the_next_tokens_of_the_same_document_and_positions_start_again() -> None:
    batch = to_batch([document(5, 6, 7, 8, trained=".xx."), document(9, 10, trained="xx"), document(11, trained="x")])
    assert batch.ids_1T.tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert batch.targets_1T.tolist() == [[6, 7, IGNORE_INDEX, IGNORE_INDEX, 10, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch.position_ids_1T.tolist() == [[0, 1, 2, 3, 0, 1, 0]]
    assert {tensor.dtype for tensor in batch[:3]} == {torch.int64}


@settings(max_examples=40)
@given(st.lists(masks, max_size=8))
def test_a_row_has_as_many_targets_as_its_documents_have_supervised_positions(rows: list[list[bool]]) -> None:
    documents = [Encoded(list(range(len(mask))), mask) for mask in rows]
    batch = to_batch(documents)
    assert int((batch.targets_1T != IGNORE_INDEX).sum()) == sum(map(num_trained, documents))
    alone = [to_batch([one]) for one in documents] or [to_batch([])]
    for packed, parts in zip(batch[:3], zip(*(one[:3] for one in alone), strict=True), strict=True):
        assert torch.equal(packed, torch.cat(parts, dim=1))


def test_a_rank_without_work_gets_one_token_without_a_target() -> None:
    batch = to_batch([], targets_of(0), pad_id=3)
    assert (batch.ids_1T.tolist(), batch.targets_1T.tolist(), batch.position_ids_1T.tolist()) == ([[3]], [[IGNORE_INDEX]], [[0]])


def test_teacher_rows_that_are_not_those_of_the_supervised_positions_are_refused() -> None:
    with pytest.raises(AssertionError, match="teacher's rows 3, positions 1"):
        to_batch([document(5, 6, trained=".x")], targets_of(3))


@settings(max_examples=40)
@given(st.lists(masks, max_size=5), st.integers(1, 5))
def test_slices_of_a_row_add_up_to_it_and_padding_is_a_document_without_targets(rows: list[list[bool]], sp_size: int) -> None:
    documents = [Encoded(list(range(1, 1 + len(mask))), mask) for mask in rows]
    whole = to_batch(documents, targets_of(sum(map(num_trained, documents))))
    parts = [split_for_sequence_parallel(whole, rank, sp_size) for rank in range(sp_size)]
    ids_1T, targets_1T, position_ids_1T = (torch.cat(slices, dim=1) for slices in zip(*(part[:3] for part in parts), strict=True))
    length = whole.ids_1T.shape[1]
    assert len({part.ids_1T.shape for part in parts}) == 1 and 0 <= ids_1T.shape[1] - length < sp_size
    assert torch.equal(ids_1T[:, :length], whole.ids_1T) and torch.equal(targets_1T[:, :length], whole.targets_1T)
    assert (targets_1T[:, length:] == IGNORE_INDEX).all()
    assert position_ids_1T.tolist() == [whole.position_ids_1T[0].tolist() + list(range(ids_1T.shape[1] - length))]
    for part in parts:
        assert part.teacher is not None and len(part.teacher.has_N) == int((part.targets_1T != IGNORE_INDEX).sum())
    found = torch.cat([part.teacher.ids_NK for part in parts if part.teacher is not None])
    assert found[:, 0].tolist() == list(range(len(found)))


# --- the order of rows -------------------------------------------------------------------------------------------


def order_of(
    lengths_N: np.ndarray, *, epochs: float = 1.0, seed: int = 0, group: int = 2, ranks: int = 2, rows_per_step: int = 4
) -> TrainingOrder:  # fmt: skip
    return TrainingOrder(
        lengths_N, (64, 100), rows_per_step=rows_per_step, epochs=epochs, seed=seed, group=group, ranks=ranks
    )  # fmt: skip


def documents_of(micro_steps: list[MicroStep]) -> list[int]:
    return [document for rows in micro_steps for row in rows for document in row]


lengths = st.lists(st.integers(1, 100), min_size=1, max_size=60).map(lambda values: np.array(values, dtype=np.int64))


@settings(max_examples=40)
@given(lengths, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
def test_every_trace_is_trained_once_an_epoch(
    lengths_N: np.ndarray, epochs: int, group: int, groups_per_step: int, ranks: int
) -> None:
    order = order_of(lengths_N, epochs=epochs, group=group, ranks=ranks, rows_per_step=group * groups_per_step)
    for epoch in range(epochs):
        steps = [order.step(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]
        assert sorted(itertools.chain.from_iterable(map(documents_of, steps))) == list(range(len(lengths_N)))
    assert order.num_steps == epochs * order.steps_per_epoch


@settings(max_examples=40)
@given(lengths, st.integers(1, 4), st.integers(1, 6))
def test_all_ranks_of_a_micro_step_have_a_row_but_in_a_step_s_last(lengths_N: np.ndarray, group: int, ranks: int) -> None:
    """Equal numbers of micro-steps on every rank: each is a collective."""
    order = order_of(lengths_N, group=group, ranks=ranks, rows_per_step=2 * group)
    for step in range(order.num_steps):
        micro_steps = order.step(step)
        assert all(len(rows) == ranks for rows in micro_steps)
        assert all(row for rows in micro_steps[:-1] for row in rows) and any(micro_steps[-1])
        assert sum(bool(row) for rows in micro_steps for row in rows) <= 2 * group


@settings(max_examples=40)
@given(lengths, st.integers(1, 6), st.integers(1, 6))
def test_a_step_trains_the_same_rows_on_any_number_of_ranks(lengths_N: np.ndarray, ranks: int, others: int) -> None:
    one, other = order_of(lengths_N, ranks=ranks, epochs=2.0), order_of(lengths_N, ranks=others, epochs=2.0)
    for step in range(one.num_steps):
        rows = [sorted(row for rows in order.step(step) for row in rows if row) for order in (one, other)]
        assert rows[0] == rows[1]
        assert one.capacity_of(step) == other.capacity_of(step)


def test_a_resume_finds_the_step_without_those_before_it() -> None:
    lengths_N = np.random.default_rng(0).integers(1, 100, 300)
    whole = order_of(lengths_N, epochs=3.0)
    steps = [whole.step(step) for step in range(whole.num_steps)]
    for step in (whole.num_steps - 1, 40, 0, whole.steps_per_epoch):
        assert order_of(lengths_N, epochs=3.0).step(step) == steps[step]
    assert order_of(lengths_N, epochs=3.0, seed=1).step(0) != steps[0]


def test_epochs_differ_and_a_fraction_of_one_is_a_share_of_its_steps() -> None:
    lengths_N = np.random.default_rng(0).integers(1, 100, 300)
    order = order_of(lengths_N, epochs=1.5)
    per_epoch = order.steps_per_epoch
    assert order.num_steps == round(1.5 * per_epoch)
    assert [order.step(step) for step in range(5)] != [order.step(per_epoch + step) for step in range(5)]
    assert len(documents_of([rows for step in range(per_epoch, order.num_steps) for rows in order.step(step)])) < 300
    assert order_of(lengths_N, epochs=0.001).num_steps == 1


def test_capacity_of_a_step_is_that_of_its_rows() -> None:
    order = order_of(np.array([100, 64, 60, 90]), group=1, ranks=1, rows_per_step=4)
    assert order.num_steps == 1 and order.capacity_of(0) == 100 + 64 + 64 + 100
    assert order.balance() == pytest.approx(Balance(rows=4, waste=1 - 314 / 328, skew=1.0))


@pytest.mark.parametrize("ranks", [8, 2])
def test_ten_thousand_log_normal_traces_waste_little_and_cost_ranks_the_same(ranks: int) -> None:
    lengths_N = np.random.default_rng(0).lognormal(np.log(4000), np.log(8) / 2.326, 10_000).astype(np.int64).clip(1, 65_536)
    order = TrainingOrder(lengths_N, (65_536,), rows_per_step=16, epochs=2.0, seed=0, group=8, ranks=ranks)
    rows, waste, skew = order.balance()
    assert (rows, order.num_steps) == (912, 2 * 57)
    assert skew <= 1.01
    assert waste <= 0.005  # 909 rows waste 0.0008; the last 5 of them were spread over 8 ranks


def test_dealing_out_gives_every_trace_to_one_rank_once() -> None:
    lengths_N = np.array([64, 60, 3, 100, 2])
    micro_steps = deal_out(lengths_N, (64, 100), ranks=3)
    assert sorted(documents_of(micro_steps)) == [0, 1, 2, 3, 4]
    assert all(len(rows) == 3 for rows in micro_steps)
    assert deal_out(np.zeros(0, dtype=np.int64), (64,), ranks=3) == []


def test_learning_rate_warms_up_then_falls_as_half_a_cosine() -> None:
    rates = [learning_rate(step, 10, 1.0, 0.2) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[6] == pytest.approx(0.5)  # half-way through the eight steps after warm-up
    assert rates[-1] > 0.0 and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert learning_rate(0, 1, 1.0, 0.0) == 1.0


def test_ledger_is_a_sentence_with_everything_that_took_tokens() -> None:
    ledger = TokenLedger(3, 1200, 400, {"user": 90, "tool": 0, "first_token": 10}, 0, {"over_length": 700}, {"over_length": 1})
    assert ledger.balances and ledger.sentence() == (
        "1,200 tokens = 400 trained + 100 masked (90 user, 10 first_token) + 0 truncated + 700 dropped (700 over_length)"
    )
