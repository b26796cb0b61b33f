"""The teacher's logits come to lie beside the positions they were made at, once, and nowhere else.

Legend: T generated tokens, N supervised positions, K kept logits, V vocabulary.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from configs.errors import UnusableInput
from data.chat import Encoded
from data.engine import TopLogits
from data.logits import commit_logits, to_row
from data.records import Trace, Turn
from data.schema import to_table
from data.store import RunFolder, commit_segment
from tests.data.make_run import make_prompt, make_trace
from train import teacher_targets
from train.batches import Example
from train.rendered import Rendered, read_or_render
from train.teacher_targets import TargetStore, load_teacher_targets

V, K, TEMPERATURES = 40, 4, (1.0, 2.0)
STOP, OTHER_STOP = 39, 38
PROMPT = (30, 31, 32)
SAID = {"a": (1, 2, 3, STOP), "b": (4, 5, STOP), "c": (6, 7, 8, 9, STOP), "d": (10, STOP)}
LOGITS_TV = {name: np.random.default_rng(len(ids)).normal(50, 3, (len(ids), V)) for name, ids in SAID.items()}


def log_softmax(logits_TV: np.ndarray, temperature: float) -> np.ndarray:
    scaled_TV = logits_TV / temperature - (logits_TV / temperature).max(-1, keepdims=True)
    return scaled_TV - np.log(np.exp(scaled_TV).sum(-1, keepdims=True))


def top_of(logits_TV: np.ndarray, k: int = K) -> TopLogits:
    ids_TK = np.argsort(-logits_TV, axis=-1)[:, :k].astype(np.int32)
    kept_TK = np.take_along_axis(logits_TV, ids_TK, -1)
    log_z = [kept_TK[:, 0] / t - np.take_along_axis(log_softmax(logits_TV, t), ids_TK, -1)[:, 0] for t in TEMPERATURES]
    return TopLogits(ids_TK, kept_TK.astype(np.float32), np.stack(log_z, -1))


def commit(
    run: RunFolder,
    names: Sequence[str] = tuple(SAID),
    *,
    worker: str = "w",
    k: int = K,
    temperatures: Sequence[float] = TEMPERATURES,
    with_logits: bool = True,
) -> None:
    """A segment of these traces, as a worker writes it: logits first."""
    if with_logits:
        commit_logits(run, [to_row(name, worker, top_of(LOGITS_TV[name], k), temperatures) for name in names], worker=worker)
    traces = []
    for name in names:
        turns = (Turn("user", PROMPT, "given"), Turn("assistant", SAID[name], "generated", (0.0,) * len(SAID[name])))
        traces.append(dataclasses.replace(make_trace(make_prompt(name)), trace_id=name, turns=turns, worker=worker))
    commit_segment(run.traces, to_table(traces, Trace), worker=worker, facts={})


def example(name: str, trained: Sequence[int] | None = None, *, before: Sequence[int] = PROMPT) -> Example:
    """A prompt that is masked, and what is trained after it."""
    trained = SAID[name] if trained is None else trained
    return Example(name, Encoded([*before, *trained], [False] * len(before) + [True] * len(trained)))


def render(run: RunFolder, examples: Sequence[Example]) -> Rendered:
    identity = {"examples": repr(examples)}
    return read_or_render(run.cache / "rendered", identity, {"train": examples}, is_writer=True)["train"]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """With every trace of SAID and its logits."""
    folder = RunFolder(tmp_path)
    commit(folder, "cab")
    commit(folder, "d")
    return folder


def check(store: TargetStore, rows: Sequence[int], expected: Sequence[tuple[str, int] | None], temperature: float) -> None:
    """expected: at each supervised position, which trace's which token was generated there; None where there are no logits."""
    ids_NK, log_probs_NK, has_N = store.of(rows)
    assert has_N.tolist() == [one is not None for one in expected]
    for ids_K, log_probs_K, one in zip(ids_NK.numpy(), log_probs_NK.numpy(), expected, strict=True):
        if one is None:
            continue
        exact_V = log_softmax(LOGITS_TV[one[0]], temperature)[one[1]]
        assert ids_K.tolist() == np.argsort(-exact_V)[:K].tolist()
        assert np.abs(log_probs_K - exact_V[ids_K]).max() < 5e-3  # logits 10 below the best, in half precision


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_targets_of_packed_traces_are_the_teachers_dense_distributions_in_order(run: RunFolder, temperature: float) -> None:
    store = load_teacher_targets(run, render(run, [example(name) for name in "abcd"]), temperature)
    assert store is not None
    check(store, [2, 0], [("c", t) for t in range(5)] + [("a", t) for t in range(4)], temperature)
    check(store, [3, 1], [("d", t) for t in range(2)] + [("b", t) for t in range(3)], temperature)
    ids_NK, log_probs_NK, _ = store.of([1])
    assert ids_NK.dtype.itemsize == 8 and log_probs_NK.dtype.itemsize == 4
    assert (log_probs_NK.exp().sum(-1) < 1).all(), "the tail is not in it"
    assert [column.shape[0] for column in store.of([])] == [0, 0, 0]


def test_only_the_positions_that_the_teacher_generated_have_logits(run: RunFolder) -> None:
    """An earlier assistant turn of the prompt is trained, and the teacher was not asked there."""
    early = Example("a", Encoded([30, 20, 21, 31, *SAID["a"]], [False, True, True, False, True, True, True, True]))
    store = load_teacher_targets(run, render(run, [early, example("b")]), 2.0)
    assert store is not None
    check(store, [0, 1], [None, None] + [("a", t) for t in range(4)] + [("b", t) for t in range(3)], 2.0)


def test_another_stop_loses_the_last_position_alone(run: RunFolder) -> None:
    store = load_teacher_targets(run, render(run, [example("a", [1, 2, 3, OTHER_STOP])]), 2.0)
    assert store is not None
    check(store, [0], [("a", 0), ("a", 1), ("a", 2), None], 2.0)


@pytest.mark.parametrize("trained", [[1, 9, 3, STOP], [1, 2, 3, 3, STOP], [2, 3, STOP], [1, 2, 3], [STOP]])
def test_a_trace_with_other_ids_is_trained_by_cross_entropy(
    run: RunFolder, trained: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        store = load_teacher_targets(run, render(run, [example("a", trained), example("b")]), 2.0)
    assert store is not None
    check(store, [0, 1], [None] * len(trained) + [("b", t) for t in range(3)], 2.0)
    tokens = len(trained) + 3
    assert (
        f"fit 1 of 2 traces, 3 of {tokens} supervised tokens; the others are trained by cross-entropy (1 other ids, 0 without"
        in caplog.text
    )


def test_a_first_token_is_predicted_by_nothing_and_has_no_target(run: RunFolder) -> None:
    store = load_teacher_targets(run, render(run, [example("a", before=()), example("b")]), 2.0)
    assert store is not None
    check(store, [0], [None] * 3, 2.0)


def test_a_student_of_another_tokenizer_falls_back_to_cross_entropy_and_says_so_once(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    shifted = [example(name, [token + 100 for token in ids]) for name, ids in SAID.items()]
    with caplog.at_level(logging.INFO, "train.teacher_targets"):
        assert load_teacher_targets(run, render(run, shifted), 2.0) is None
        assert load_teacher_targets(run, render(run, shifted), 2.0, is_writer=False) is None
    [record] = [one for one in caplog.records if one.name == "train.teacher_targets"]
    assert (
        record.levelname == "WARNING"
        and "the student's tokenizer is not the teacher's: of 4 traces with logits none" in record.message
    )
    assert record.message.endswith("trained by cross-entropy")


def test_a_one_token_trace_does_not_fit_by_its_length(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAID, "e", (STOP,))
    monkeypatch.setitem(LOGITS_TV, "e", LOGITS_TV["a"][:1])
    commit(run, "e")
    assert load_teacher_targets(run, render(run, [example("e", [OTHER_STOP])]), 2.0) is None


def test_a_run_without_logits_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    commit(run, with_logits=False)
    with pytest.raises(UnusableInput, match=r"logits: no logits of the dataset's 1 traces; generate them with generate\.logits"):
        load_teacher_targets(run, render(run, [example("a")]), 2.0)


def test_a_temperature_without_log_z_is_refused(run: RunFolder) -> None:
    with pytest.raises(UnusableInput, match=r"no log Z at temperature 3; expected it among generate\.logits\.temperatures"):
        load_teacher_targets(run, render(run, [example("a")]), 3.0)


def test_logits_of_a_superseded_copy_are_not_used(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGITS_TV, "a", LOGITS_TV["a"][:, ::-1])
    commit(run, "a", worker="late")
    monkeypatch.undo()
    store = load_teacher_targets(run, render(run, [example("a")]), 2.0)
    assert store is not None
    check(store, [0], [("a", t) for t in range(4)], 2.0)


def test_traces_with_fewer_kept_logits_leave_slots_unused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    commit(run, "a", k=2)
    commit(run, "b")
    store = load_teacher_targets(run, render(run, [example("a"), example("b")]), 2.0)
    assert store is not None and store.top_k == K
    log_probs_NK = store.of([0, 1]).log_probs_NK
    assert log_probs_NK.isfinite().sum(-1).tolist() == [2] * 4 + [K] * 3


# --- once --------------------------------------------------------------------------------------------------------


def never(run: RunFolder) -> object:
    raise AssertionError("aligned again")


def test_what_was_aligned_is_read_by_everybody_until_examples_logits_or_temperature_change(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = render(run, [example(name) for name in "abcd"])
    first = load_teacher_targets(run, train, 2.0)
    assert first is not None
    with monkeypatch.context() as patched:
        patched.setattr(teacher_targets, "read_logits", never)
        for is_writer in (True, False):
            again = load_teacher_targets(run, train, 2.0, is_writer=is_writer)
            assert again is not None and again.sha256 == first.sha256
            check(again, [0], [("a", t) for t in range(4)], 2.0)
        for changed, temperature in ((train, 1.0), (render(run, [example("a")]), 2.0)):
            with pytest.raises(AssertionError, match="aligned again"):
                load_teacher_targets(run, changed, temperature)
        commit(run, "d", worker="late")
        with pytest.raises(AssertionError, match="aligned again"):
            load_teacher_targets(run, train, 2.0)


def test_targets_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tokens = RunFolder(tmp_path), 2_000
    names = [f"t{number}" for number in range(20)]
    logits_TV = np.random.default_rng(0).normal(50, 3, (tokens, V))
    for number, name in enumerate(names):
        monkeypatch.setitem(SAID, name, (number, *range(tokens - 2), STOP))
        monkeypatch.setitem(LOGITS_TV, name, logits_TV)
    commit(run, names, k=32)
    monkeypatch.setattr(teacher_targets, "BATCH_BYTES", 1 << 20)
    train = render(run, [example(name) for name in names])
    store = load_teacher_targets(run, train, 2.0)
    assert store is not None
    before = pa.total_allocated_bytes()  # 9 MB are in the file
    assert store.of([7]).has_N.all() and store.of(range(20)).ids_NK.shape == (20 * tokens, 32)
    assert pa.total_allocated_bytes() - before < 100_000


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "a bit in the logits": lambda data, commit: flip(data, data.stat().st_size // 2),
    "cut short": lambda data, commit: os.truncate(data, data.stat().st_size - 64),
    "gone": lambda data, commit: data.unlink(),
    "a bit in the commit": lambda data, commit: flip(commit, 20),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_aligned_again_with_a_warning(run: RunFolder, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    train = render(run, [example(name) for name in "abcd"])
    load_teacher_targets(run, train, 2.0)
    [data], [commit_file] = ((run.cache / "teacher_targets").glob(f"*.{kind}") for kind in ("arrow", "json"))
    whole = data.read_bytes(), commit_file.read_bytes()
    DAMAGES[damage](data, commit_file)
    with caplog.at_level(logging.WARNING):
        store = load_teacher_targets(run, train, 2.0)
    assert store is not None
    check(store, [2], [("c", t) for t in range(5)], 2.0)
    assert [record.message for record in caplog.records if record.message.endswith("; the teacher's logits are aligned again")]
    assert (data.read_bytes(), commit_file.read_bytes()) == whole


def align_and_die_at(moment: int, run: RunFolder, train: Rendered) -> int:
    """In a child, as a SIGKILL at the moment-th change of the file system leaves things; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [moment]

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes or event in ("os.rename", "os.remove", "os.mkdir"):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)

    sys.addaudithook(hook)
    load_teacher_targets(run, train, 2.0)
    os._exit(0)


def test_a_writer_killed_at_any_change_loses_nothing(tmp_path: Path) -> None:
    moment = 0
    while True:
        run = RunFolder(tmp_path / str(moment))
        commit(run)
        train = render(run, [example(name) for name in "abcd"])
        code = align_and_die_at(moment, run, train)
        store = load_teacher_targets(run, train, 2.0)
        assert store is not None
        check(store, [0, 3], [("a", t) for t in range(4)] + [("d", t) for t in range(2)], 2.0)
        assert sorted(path.suffix for path in (run.cache / "teacher_targets").iterdir()) == [".arrow", ".json"], moment
        if code == 0:
            break
        assert code == 9
        moment += 1
    assert moment >= 5
