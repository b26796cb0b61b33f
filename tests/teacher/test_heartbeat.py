"""Who is late, and how those who wait find out. Ranks are threads here, with one real store between them."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from configs.errors import Interrupted
from teacher.heartbeat import DONE, Beat, Heartbeat, RankLost, Seen, culprit, is_of_others

BEAT_S = 0.1
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:394. This is typically"


def seen(step: int, at: float, doing: str = "forward pass", ended: str = "") -> Seen:
    return Seen(Beat(1, step, doing, ended), at)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({1: seen(7, at=99.0), 2: seen(7, at=99.5)}, ""),
        ({1: seen(7, at=92.0), 2: seen(3, at=99.5)}, "rank 1 has been silent for 8 s, last in step 7 (forward pass)"),
        ({1: seen(7, at=92.0, ended=DONE), 2: seen(7, at=99.5)}, "rank 1 ended in step 7: done"),
        (
            {1: seen(7, at=98.0, ended="MemoryError: x"), 2: seen(6, at=99.0, ended="rank 2, step 6: closed")},
            "rank 1 ended in step 7: MemoryError: x",
        ),
        ({1: seen(6, at=99.0, doing="between steps"), 2: seen(7, at=99.5)}, "rank 1 is still in step 6 (between steps)"),
    ],
    ids=["all-well", "silence-before-lag", "ended-is-not-silent", "the-first-to-end-is-the-cause", "behind"],
)
def test_the_rank_that_keeps_the_others_waiting(others: dict[int, Seen], said: str) -> None:
    assert culprit(7, others, now=100.0, silent_s=5.0) == said


def test_a_beat_survives_the_store() -> None:
    beat = Beat(3, 41, "agreeing on the next step", "RuntimeError: no")
    assert Beat.decode(beat.encode()) == beat


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(GLOO), True),
        (RuntimeError("Timed out waiting 10000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL error in: ..."), True),
        (Interrupted("stopped by SIGTERM"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("Timed out waiting"), False),
    ],
)
def test_only_what_may_be_another_ranks_doing_is_laid_at_its_door(error: BaseException, expected: bool) -> None:
    assert is_of_others(error) is expected


class Ranks:
    """Heartbeats that share a store; what each gave up with."""

    def __init__(self, world: int, timeout_s: float) -> None:
        store = dist.HashStore()  # type: ignore[attr-defined]
        self.lost: dict[int, RankLost] = {}
        self.hearts = [
            Heartbeat(
                store, rank, world, timeout_s, beat_s=BEAT_S,
                give_up=lambda lost, rank=rank: self.lost.setdefault(rank, lost),
            )
            for rank in range(world)
        ]  # fmt: skip
        for heart in self.hearts:
            heart.start()
        self.wait_until(lambda: all(len(heart.seen) == world - 1 for heart in self.hearts))

    def wait_until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(BEAT_S / 5)

    def fall_silent(self, rank: int) -> None:
        """As a killed process does: no last word."""
        heart = self.hearts[rank]
        heart._beat = lambda: None  # type: ignore[method-assign]


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    found = Ranks(3, timeout_s=getattr(request, "param", 60.0))
    yield found
    for heart in found.hearts:
        heart.end(DONE)


@pytest.mark.parametrize("ranks", [1.0], indirect=True)
def test_a_silent_rank_ends_the_others_after_the_timeout(ranks: Ranks) -> None:
    for heart in ranks.hearts:
        heart.enter("forward pass", step=4)
    ranks.fall_silent(2)
    started = time.monotonic()
    for heart in ranks.hearts[:2]:  # they go on from step to step, as far as the watcher knows
        heart.leave()
    ranks.wait_until(lambda: {0, 1} <= ranks.lost.keys())
    assert 0.8 <= time.monotonic() - started <= 5
    assert str(ranks.lost[0]).startswith("rank 0, step 4 (between steps): waited 1 s; rank 2 has been silent for")
    assert "rank 1 has" not in str(ranks.lost[0])


@pytest.mark.parametrize("ranks", [1.2], indirect=True)
def test_a_rank_that_stands_still_is_named_by_those_that_wait(ranks: Ranks) -> None:
    ranks.hearts[1].enter("forward pass", step=8)
    ranks.hearts[1].leave()  # its caller has it, and never comes back
    ranks.hearts[0].enter("agreeing on the next step", step=9)
    ranks.hearts[2].enter("agreeing on the next step", step=9)
    ranks.wait_until(lambda: {0, 2} <= ranks.lost.keys())
    expected = "rank 0, step 9 (agreeing on the next step): not done after 1.2 s; rank 1 is still in step 8 (between steps)"
    assert str(ranks.lost[0]) == expected and 1 not in ranks.lost


@pytest.mark.parametrize("ranks", [0.8], indirect=True)
def test_loading_and_the_callers_time_have_no_bound(ranks: Ranks) -> None:
    ranks.hearts[0].enter("forward pass", step=1)
    ranks.hearts[0].leave()
    time.sleep(1.6)
    assert not ranks.lost


def test_a_failed_collective_becomes_the_loss_of_a_rank(ranks: Ranks) -> None:
    ranks.fall_silent(1)
    ranks.hearts[0].enter("forward pass", step=5)
    with pytest.raises(RankLost) as raised, ranks.hearts[0].answerable():
        raise RuntimeError(GLOO)
    said = str(raised.value)
    assert said.startswith("rank 0, step 5 (forward pass): Connection closed by peer [127.0.0.1]:394; rank 1 has been silent")
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_a_ranks_own_error_keeps_its_traceback_and_the_others_learn_of_it(ranks: Ranks) -> None:
    ranks.hearts[1].enter("forward pass", step=5)
    with pytest.raises(MemoryError, match="no room"), ranks.hearts[1].answerable():
        raise MemoryError("no room")
    ranks.hearts[0].enter("forward pass", step=6)
    expected = "Connection closed.*; rank 1 ended in step 5: MemoryError: no room"
    with pytest.raises(RankLost, match=expected), ranks.hearts[0].answerable():
        raise RuntimeError(GLOO)


def test_a_process_that_fails_between_steps_says_so_at_its_exit(tmp_path: Path) -> None:
    store = tmp_path / "store"
    code = (
        "import sys, torch.distributed as dist; from teacher.heartbeat import Heartbeat;"
        f"heart = Heartbeat(dist.FileStore({str(store)!r}, 2), 1, 2, 60.0); heart.start(); heart.enter('forward pass', step=3);"
        f"heart.leave(); raise OSError('no space left')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, check=False)
    beat = Beat.decode(dist.FileStore(str(store), 2).get("1").decode())  # type: ignore[attr-defined]
    assert (beat.step, beat.ended) == (3, "OSError: no space left")


def test_a_request_to_end_is_heard_again_after_the_explanation(ranks: Ranks) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted), ranks.hearts[0].answerable():
        raise Interrupted("stopped by SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_request_to_end_stays_one_when_no_rank_is_lost(ranks: Ranks) -> None:
    """It reaches all ranks: the second finds the first gone."""
    for heart in ranks.hearts:
        with pytest.raises(Interrupted, match="^stopped by SIGTERM$"), heart.answerable():
            raise Interrupted("stopped by SIGTERM")
