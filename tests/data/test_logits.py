"""Kept logits come back as they were, up to half precision, and carry the exact tail."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from configs.schema import KeptLogits
from data.engine import TopLogits
from data.logits import bytes_per_token, commit_logits, read_logits, to_row
from data.records import Trace
from data.schema import to_table
from data.store import RunFolder, commit_segment
from tests.data.make_run import make_prompt, make_trace

TEMPERATURES = (1.0, 2.0)
SUM = make_prompt("What is 2 + 2?")


def log_softmax(logits_TV: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits_TV / temperature
    return scaled - np.log(np.exp(scaled - scaled.max(-1, keepdims=True)).sum(-1, keepdims=True)) - scaled.max(-1, keepdims=True)


def best_of(logits_TV: np.ndarray, count: int) -> TopLogits:
    ids = np.argsort(-logits_TV, axis=-1)[:, :count]
    kept = np.take_along_axis(logits_TV, ids, -1)
    log_z = [kept[:, 0] / t - np.take_along_axis(log_softmax(logits_TV, t), ids, -1)[:, 0] for t in TEMPERATURES]
    return TopLogits(ids.astype(np.int32), kept.astype(np.float32), np.stack(log_z, -1))


def commit_traces(run: RunFolder, names: str, *, worker: str) -> None:
    traces = [dataclasses.replace(make_trace(SUM), trace_id=name, worker=worker) for name in names]
    commit_segment(run.traces, to_table(traces, Trace), worker=worker, facts={})


@pytest.mark.parametrize("column", [0, 1])
def test_log_probabilities_come_back_at_each_temperature(tmp_path: Path, column: int) -> None:
    run = RunFolder(tmp_path)
    logits = np.random.default_rng(0).normal(100, 4, (30, 500))  # a constant offset, as trained heads have
    top = best_of(logits, 16)
    commit_logits(run, [to_row(name, "w", top, TEMPERATURES) for name in "ab"], worker="w")
    commit_traces(run, "ab", worker="w")
    first, second = read_logits(run)
    assert (first.trace_id, second.trace_id) == ("a", "b") and first.temperatures == TEMPERATURES
    assert np.array_equal(first.top.ids_TK, top.ids_TK)
    temperature = TEMPERATURES[column]
    found = first.top.logits_TK / temperature - first.top.log_z_TC[:, column : column + 1]
    exact = np.take_along_axis(log_softmax(logits, temperature), top.ids_TK, -1)
    assert np.abs(found - exact).max() < 0.005  # half precision of a logit 10 below the best one
    assert np.abs((1 - np.exp(found).sum(-1)) - (1 - np.exp(exact).sum(-1))).max() < 1e-3


def test_logits_are_those_of_the_worker_whose_trace_counts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    tops = {worker: best_of(np.random.default_rng(seed).normal(size=(3, 20)), 4) for seed, worker in enumerate("vw")}
    for worker, names in (("v", "a"), ("w", "ab")):  # v was killed before its trace was committed
        commit_logits(run, [to_row(name, worker, tops[worker], TEMPERATURES) for name in names], worker=worker)
    commit_traces(run, "ab", worker="w")
    commit_traces(run, "a", worker="v")  # a late copy, superseded
    found = list(read_logits(run))
    assert [stored.trace_id for stored in found] == ["a", "b"]
    assert all(np.array_equal(stored.top.ids_TK, tops["w"].ids_TK) for stored in found)


def test_a_run_without_logits_has_none(tmp_path: Path) -> None:
    commit_traces(RunFolder(tmp_path), "a", worker="w")
    assert list(read_logits(RunFolder(tmp_path))) == []


def test_the_price_of_128_logits_on_a_whole_trace_is_100_megabytes() -> None:
    assert 131_072 * bytes_per_token(KeptLogits(top_k=128, temperatures=(1.0, 2.0))) == pytest.approx(101.7e6, rel=0.01)
