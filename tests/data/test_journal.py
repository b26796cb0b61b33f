"""The journal: what was appended comes back after any death, and files go when nobody needs them."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.journal import Entry, Estate, Journal, pack, read_journal
from tests.e2e.commands import ROOT


def tokens(trace_id: str, start: int, *ids: int, kind: str = "partial") -> Entry:
    arrays = {"ids": np.array(ids, dtype=np.int32), "logprobs": -np.ones(len(ids), dtype=np.float32)}
    return Entry(kind, trace_id, {"start": start}, arrays)  # type: ignore[arg-type]


def entries(path: Path) -> list[Entry]:
    return [entry for _, entry in read_journal(path)]


def newest(folder: Path) -> Path:
    return max(folder.glob("*.log"))


def test_a_record_comes_back_as_it_went_in(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "w")
    arrays = {"ids": np.arange(6, dtype=np.int32).reshape(2, 3), "none": np.empty((0, 2), dtype=np.float64)}
    journal.append(Entry("reply", "t", {"a": [1, "b"]}, arrays, b"\n{raw\x00}"), is_whole=True)
    (found,) = entries(newest(tmp_path))
    assert (found.kind, found.trace_id, found.header, found.raw) == ("reply", "t", {"a": [1, "b"]}, b"\n{raw\x00}")
    assert all(
        np.array_equal(found.arrays[name], array) and found.arrays[name].dtype == array.dtype for name, array in arrays.items()
    )
    journal.close()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 400), st.one_of(st.none(), st.integers(0, 10_000)))
def test_a_torn_tail_or_a_flipped_bit_costs_the_records_it_hits(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int | None
) -> None:
    """A flipped bit in what a record holds costs that record alone; in its length, what follows too."""
    path = tmp_path_factory.mktemp("journal") / "w.000000.log"
    frames = [pack(tokens("t", start, start)) for start in range(5)]
    content = bytearray(b"".join(frames))
    ends = [sum(map(len, frames[: number + 1])) for number in range(5)]
    whole = [number for number in range(5) if ends[number] <= len(content) - cut]
    least = whole
    if flip is not None:
        flip %= len(content)
        content[flip] ^= 4
        hit = next(number for number in range(5) if flip < ends[number])
        is_length = flip - (ends[hit] - len(frames[hit])) < 4
        whole = [number for number in whole if number != hit]
        least = [number for number in whole if number < hit or not is_length]
    path.write_bytes(bytes(content[: max(0, len(content) - cut)]))
    found = [entry.header["start"] for entry in entries(path)]
    assert set(least) <= set(found) <= set(whole) and found == sorted(found)  # type: ignore[type-var]


def test_a_page_that_was_never_written_ends_a_journal(tmp_path: Path) -> None:
    """After a power cut a file may be longer than what reached the disk: zeros, which have the checksum of nothing."""
    path = tmp_path / "w.000000.log"
    path.write_bytes(pack(tokens("t", 0, 1)) + bytes(4096))
    assert [entry.trace_id for entry in entries(path)] == ["t"]


def test_an_abort_that_was_not_committed_takes_nothing_from_what_was_said_before_it(tmp_path: Path) -> None:
    """Its server was gone for a while; the request is asked again, and goes on where it was."""
    journal = Journal(tmp_path, "w")
    journal.append(tokens("t", 0, 1, 2, 3), is_whole=True)
    journal.append(Entry("finished", "t", {"start": 0, "finish_reason": "abort"}, tokens("t", 0).arrays), is_whole=True)
    estate = Estate(tmp_path)
    estate.look(living=set())
    left = estate.take("t")
    assert left is not None and left.ending is None and left.token_ids == (1, 2, 3)


def test_what_is_left_of_a_trace_is_its_longest_chain(tmp_path: Path) -> None:
    """Two workers had it, one after the other; a gap ends a chain; what is finished wins over what is longer."""
    first, second = Journal(tmp_path, "first"), Journal(tmp_path, "second")
    for entry in (tokens("t", 0, 1, 2), tokens("u", 0, 7), tokens("t", 2, 3), tokens("u", 5, 9), tokens("v", 0, 1, 1, 1, 1)):
        first.append(entry, is_whole=entry.header["start"] == 0)
    second.append(tokens("t", 0, 1, 2, 3, 4), is_whole=True)
    ended = Entry("finished", "v", {"start": 0, "finish_reason": "stop"}, tokens("v", 0, 5, 6).arrays)
    second.append(ended, is_whole=True)
    estate = Estate(tmp_path)
    estate.look(living={"second"})
    assert set(estate.trace_ids) == {"t", "u", "v"}
    estate.look(living=set())
    left = {name: estate.take(name) for name in ("t", "u", "v", "nobody")}
    assert [left[name].token_ids for name in ("t", "u", "v")] == [(1, 2, 3, 4), (7,), (5, 6)]  # type: ignore[union-attr]
    assert left["nobody"] is None and estate.take("t") is None
    assert left["t"].ending is None and left["v"].ending.header["finish_reason"] == "stop"  # type: ignore[union-attr]
    assert len(left["t"].arrays["logprobs"]) == 4  # type: ignore[union-attr]


def reply(trace_id: str, raw: bytes) -> Entry:
    return Entry("reply", trace_id, {"sizes": [len(raw)]}, {}, raw)


def test_tokens_that_came_after_a_reply_go_on_from_it_and_the_reply_is_kept(tmp_path: Path) -> None:
    """A stream tore, its bytes were kept, and the rest was being said when the worker was killed."""
    journal = Journal(tmp_path, "w")
    for entry in (tokens("t", 0, 1, 2), reply("t", b"torn"), tokens("t", 0, 1, 2, 3), tokens("t", 3, 4), reply("u", b"whole")):
        journal.append(entry, is_whole=entry.header.get("start", 0) == 0)
    estate = Estate(tmp_path)
    estate.look(living=set())
    begun, whole = estate.take("t"), estate.take("u")
    assert begun is not None and begun.ending is None and begun.token_ids == (1, 2, 3, 4)
    assert begun.reply is not None and begun.reply.raw == b"torn"
    assert whole is not None and whole.token_ids == () and whole.reply is not None and whole.reply.raw == b"whole"


def test_a_reply_of_one_worker_and_the_tokens_that_the_next_one_added_are_both_kept(tmp_path: Path) -> None:
    """The first kept a torn reply and died; the second went on from it, said more, and died before a reply of its own."""
    first, second = Journal(tmp_path, "first"), Journal(tmp_path, "second")
    first.append(reply("t", b"torn"), is_whole=True)
    second.append(tokens("t", 0, 1, 2, 3), is_whole=True)
    two = Entry("reply", "u", {"sizes": [4, 4]}, {}, b"tornrest")
    second.append(two, is_whole=True)
    first.append(reply("u", b"torn"), is_whole=True)
    for order in (("first", "second"), ("second", "first")):
        estate = Estate(tmp_path)
        for name in order:
            estate.look(living={"first", "second"} - {name})
        left, answered = estate.take("t"), estate.take("u")
        assert left is not None and left.token_ids == (1, 2, 3) and left.reply is not None and left.reply.raw == b"torn"
        assert answered is not None and answered.reply is not None and answered.reply.raw == b"tornrest"


def test_a_worker_that_was_only_stopped_and_went_on_is_read_again(tmp_path: Path) -> None:
    journal, estate = Journal(tmp_path, "w"), Estate(tmp_path)
    journal.append(tokens("t", 0, 1), is_whole=True)
    estate.look(living=set())
    journal.append(tokens("t", 1, 2, 3), is_whole=False)
    journal.append(tokens("u", 0, 9), is_whole=True)
    estate.look(living=set())
    left = estate.take("t")
    assert left is not None and left.token_ids == (1, 2, 3) and "u" in estate


def test_a_full_file_is_followed_by_one_that_stands_alone(tmp_path: Path) -> None:
    """The long trace is written whole into the new file, then the old one goes; a committed trace pins nothing."""
    first, second = tokens("long", 0, *range(100)), tokens("short", 0, 1)
    journal = Journal(tmp_path, "w", rotate_bytes=len(pack(first)) + len(pack(second)) + 1)
    journal.append(first, is_whole=True)
    journal.append(second, is_whole=True)
    assert not journal.wants_whole
    journal.append(tokens("long", 100, 5), is_whole=False)
    assert journal.wants_whole and len(list(tmp_path.iterdir())) == 1
    journal.append(tokens("long", 0, *range(100), 5, 6), is_whole=True)
    journal.sync()
    assert len(list(tmp_path.iterdir())) == 2
    journal.forget("short")
    journal.sync()
    assert [path.name for path in tmp_path.iterdir()] == ["w.000001.log"]
    journal.forget("long")
    journal.close()
    assert not list(tmp_path.iterdir())


def test_an_old_file_goes_only_when_what_replaces_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that loses power between the two would else lose every token of a long trace."""
    journal = Journal(tmp_path, "w", rotate_bytes=1, sync_seconds=3600.0)
    journal.append(tokens("t", 0, 1), is_whole=True)
    time.sleep(0.1)  # the thread has had its first sync, and sleeps
    journal.append(tokens("t", 0, 1, 2), is_whole=True)
    assert len(list(tmp_path.glob("*.log"))) == 2
    there = list[int]()
    real_fsync = os.fsync
    with monkeypatch.context() as patch:
        patch.setattr("data.journal.os.fsync", lambda number: (there.append(len(list(tmp_path.iterdir()))), real_fsync(number)))
        journal.sync()
    assert there == [2] and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_ends_the_file_with_a_whole_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, "w")
    journal.append(tokens("t", 0, 1), is_whole=True)
    real_write = os.write
    with monkeypatch.context() as patch:
        patch.setattr("data.journal.os.write", lambda descriptor, frame: real_write(descriptor, frame[:11]))
        with pytest.raises(OSError) as caught:
            journal.append(tokens("t", 1, 2), is_whole=False)
    assert caught.value.errno == errno.ENOSPC
    journal.append(tokens("t", 1, 3), is_whole=False)
    assert [entry.arrays["ids"].tolist() for entry in entries(newest(tmp_path))] == [[1], [3]]
    journal.close()


WRITER = """
import sys, numpy as np
from pathlib import Path
from data.journal import Entry, Journal
journal = Journal(Path(sys.argv[1]), "w", rotate_bytes=20_000)
for number in range(10**9):
    journal.append(Entry("partial", "t", {"start": number}, {"ids": np.array([number], dtype=np.int32)}), is_whole=number == 0)
    print(number, flush=True)
"""


def test_a_killed_process_loses_no_record_that_it_had_appended(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "0\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    said = process.stdout.read().splitlines()
    process.wait()
    estate = Estate(tmp_path)
    estate.look(living=set())
    left = estate.take("t")
    assert left is not None and len(left.token_ids) >= int(said[-1]) + 1
    assert left.token_ids == tuple(range(len(left.token_ids)))
