"""Ranks: how they report, how they end, and that none outlives whoever started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.errors import Interrupted, Refused, UnusableInput
from configs.launch import Nodes, StageFailed, _failure, _meeting, _run, rank_environment, rank_error_line, read_nodes


def run(code: str, tmp_path: Path) -> None:
    _run([sys.executable, "-c", code], dict(os.environ), tmp_path / "log", lambda: None)


@pytest.mark.parametrize("kind", [UnusableInput, Refused])
def test_a_rank_that_knows_what_is_wrong_keeps_its_kind_through_torchrun(tmp_path: Path, kind: type) -> None:
    line = rank_error_line(kind("weights/none: no such folder"))
    with pytest.raises(kind, match="weights/none: no such folder"):
        run(f"import sys; print({line!r}); sys.exit(1)", tmp_path)  # torchrun turns every exit code into 1


def test_a_killed_rank_is_not_mistaken_for_an_interruption(tmp_path: Path) -> None:
    """torchrun ends the others with SIGTERM, and they report 75; requeueing on that would loop for ever."""
    lines = [
        "error[75]: stopped by SIGTERM; the same command continues",
        "  rank      : 3 (local_rank: 1)",
        "  exitcode  : -9 (pid: 7)",
        "  error_file: x",
        "  traceback : Signal 9 (SIGKILL) received by PID 7",
    ]
    with pytest.raises(StageFailed, match="rank 3 was ended by") as raised:
        run(f"import sys; print({chr(10).join(lines)!r}); sys.exit(1)", tmp_path)
    assert raised.value.exit_code == 1


def test_an_unexpected_exception_is_quoted_with_the_log(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="RuntimeError: gloo went away") as raised:
        run("raise RuntimeError('gloo went away')", tmp_path)
    assert str(tmp_path / "log") in str(raised.value)


def test_only_this_start_of_the_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error[2]: of an earlier run\n")
    start = log.stat().st_size
    assert "earlier" not in str(_failure(log, start, 1))


def test_a_rank_dies_with_its_parent(tmp_path: Path) -> None:
    child = tmp_path / "pid"
    code = (
        "from pathlib import Path; from configs.launch import _run; import os, sys;"
        f"_run([sys.executable, '-c', \"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(60)\"],"
        f" dict(os.environ), Path({str(tmp_path / 'log')!r}), lambda: None)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    while not (child.exists() and child.read_text()):
        time.sleep(0.02)
    pid = int(child.read_text())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while alive(pid):
        assert time.monotonic() < deadline, "the rank outlived its parent"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Zombies wait for whoever adopted them; they are not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_interrupted_launcher_ends_its_ranks(tmp_path: Path) -> None:
    child = tmp_path / "pid"

    def poll() -> None:
        if child.exists() and child.read_text():
            raise Interrupted("asked to stop")

    code = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(Interrupted):
        _run([sys.executable, "-c", code], dict(os.environ), tmp_path / "log", poll)
    assert not alive(int(child.read_text()))
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


def test_cpu_ranks_get_one_thread_and_a_private_extension_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = rank_environment(tmp_path / "ext")
    assert environment["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "ext")
    if environment["DS_ACCELERATOR"] == "cpu":
        assert environment["OMP_NUM_THREADS"] == "1" and environment["GLOO_SOCKET_IFNAME"] == "lo"


def test_what_a_rank_says_of_another_comes_before_torchruns_summary(tmp_path: Path) -> None:
    """The rank that was killed says nothing; the one that waited for it names it, and torchrun's SIGTERM is not the news."""
    lines = [
        "error[75]: stopped by SIGTERM; the same command continues",
        "error[1]: rank 0, step 58 (forward pass): Connection closed by peer; rank 1 has been silent for 4 s, last in step 57",
        "  rank      : 1 (local_rank: 1)",
        "  traceback : Signal 9 (SIGKILL) received by PID 7",
    ]
    with pytest.raises(StageFailed, match="code 1: rank 0, step 58 .* rank 1 has been silent for 4 s, last in step 57; see"):
        run(f"import sys; print({chr(10).join(lines)!r}); sys.exit(1)", tmp_path)


def test_ranks_silenced_by_a_full_disk_are_no_riddle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(room: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=room))

    free(4096)
    with pytest.raises(UnusableInput, match="the disk is full .4096 bytes left.*make room, then give the same command"):
        run("raise SystemExit(1)", tmp_path)
    with pytest.raises(StageFailed, match="RuntimeError: gloo went away"):
        run("raise RuntimeError('gloo went away')", tmp_path)
    free(1 << 30)
    with pytest.raises(StageFailed, match="no message"):
        run("raise SystemExit(1)", tmp_path)


# --- the end of a rank ---------------------------------------------------------------------------------------------

ENDING = """
import atexit, sys, threading, time
from configs.launch import end_rank
print("buffered")
atexit.register(print, "handler")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
class Late:
    def __del__(self): print("finalised")
late = Late()
try: end_rank(7)
finally: print("not reached")
"""


def test_a_rank_ends_after_its_threads_and_handlers_and_without_the_interpreters_end(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", ENDING], env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout.split(), ended.stderr) == (7, ["buffered", "thread", "handler"], "")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "Commands"),
        (["generate", "nosuch.yaml"], 2, "error[2]: "),
        (["generate"], 2, "Missing argument"),
        (["plan", "embedded"], 1, "AttributeError: planned\nexit handler: planned"),
    ],
)
def test_the_command_line_ends_a_rank_that_way(words: list[str], code: int, said: str, tmp_path: Path) -> None:
    """However it ends; what is no error of ours keeps its traceback, and exit handlers see it."""
    script = (
        f"import atexit, sys, tracestill; sys.argv = ['tracestill', *{words!r}]\n"
        "def broken(*_, **__): raise AttributeError('planned')\n"
        "tracestill.plan_teacher = broken\n"
        "atexit.register(lambda: print('exit handler:', getattr(sys, 'last_value', None), file=sys.stderr))\n"
        "class Late:\n    def __del__(self): print('finalised')\n"
        "late = Late()\n"
        "tracestill.main()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "RANK": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, said in ended.stdout + ended.stderr, "finalised" in ended.stdout) == (code, True, False), ended


# --- several nodes -----------------------------------------------------------------------------------------------

MEETING = {"TRACESTILL_NODES": "2", "TRACESTILL_RENDEZVOUS": "node-07:29500", "SLURM_JOB_ID": "41"}


def test_a_node_learns_its_place_from_the_environment() -> None:
    assert read_nodes(1, {}) is None
    assert read_nodes(2, MEETING | {"SLURM_NODEID": "1"}) == Nodes(2, 1, "node-07:29500", "41")
    assert read_nodes(2, MEETING | {"SLURM_NODEID": "1", "TRACESTILL_NODE_RANK": "0"}) == Nodes(2, 0, "node-07:29500", "41")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"TRACESTILL_RENDEZVOUS": ""}, "no rendezvous in the environment; .* TRACESTILL_NODE_RANK \\(0..1\\)"),
        ({"TRACESTILL_RENDEZVOUS": "node-07"}, "no rendezvous in the environment"),
        ({"TRACESTILL_NODES": "3"}, "says TRACESTILL_NODES=3; expected 2"),
        ({"SLURM_NODEID": "2"}, "which node this is; expected 0..1"),
        ({"SLURM_NODEID": ""}, "which node this is; expected 0..1"),
    ],
)
def test_an_environment_that_does_not_fit_the_recipe_is_refused(changes: dict[str, str], said: str) -> None:
    with pytest.raises(UnusableInput, match=f"teacher.hardware.nodes 2: .*{said}"):
        read_nodes(2, MEETING | {"SLURM_NODEID": "0"} | changes)


def test_the_first_node_serves_the_store_where_all_meet() -> None:
    first, second = (_meeting(Nodes(2, rank, "node-07:29500", "41")) for rank in (0, 1))
    assert "--rdzv-endpoint=node-07:29500" in first and "--nnodes=2" in first and "--rdzv-id=41" in first
    assert [any("is_host=1" in word for word in words) for words in (first, second)] == [True, False]
    assert "--standalone" in _meeting(None)


def test_ranks_of_several_nodes_do_not_talk_over_the_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert rank_environment(tmp_path)["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in rank_environment(tmp_path, Nodes(2, 0, "node-07:29500", "41"))
    assert rank_environment(tmp_path, Nodes(2, 0, "127.0.0.1:29500", "41"))["GLOO_SOCKET_IFNAME"] == "lo"
