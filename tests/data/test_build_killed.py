"""The build is ended at every single change it makes to the file system, and each wreck is built again.

A child process counts those changes through an audit hook and dies inside the n-th one, as a SIGKILL there would leave
things: what was done stays, nothing after it happens, no `finally` runs.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.data.make_run import make_prompt, make_run, make_trace

PARENT = """
import os, shutil, sys
from pathlib import Path
import datasets
from configs.schema import Data
from data.build import build
from data.dataset import load_dataset
from data.store import RunFolder, seal
from tests.data.make_run import build_and_seal, snapshot

CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}
template, work = Path(sys.argv[1]), Path(sys.argv[2])


def is_change(event, arguments):
    return event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))


def die_at(moment):
    left = [moment]

    def hook(event, arguments):
        if is_change(event, arguments):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)

    sys.addaudithook(hook)


def in_child(act):
    child = os.fork()
    if child == 0:
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_build(run, moment):
    die_at(moment)
    build_and_seal(run)


def fresh(name, source):
    shutil.rmtree(work / name, ignore_errors=True)
    shutil.copytree(source, work / name)
    return RunFolder(work / name)


whole = fresh("whole", template)
wanted = build_and_seal(whole).counts
bytes_wanted = {path: content for path, content in snapshot(whole).items() if path != "dataset/manifest.json"}
for start, step in (("new", 5), ("sealed", 1)):  # a build over a sealed one passes every point of a first one, and more
    moment = 0
    while True:
        run = fresh("killed", template if start == "new" else whole.root)
        code = in_child(lambda: killed_build(run, moment))
        if code == 0:
            break
        assert code == 9, (start, moment, code)
        assert build_and_seal(run).counts == wanted, (start, moment)
        found = {path: content for path, content in snapshot(run).items() if path != "dataset/manifest.json"}
        assert found == bytes_wanted, (start, moment, found.keys() ^ bytes_wanted.keys())
        assert not list(run.root.glob(".dataset.*")), (start, moment)
        moment += step
    assert moment > 40, moment
    load_dataset(run)
    print(start, moment)
"""


def test_a_build_killed_at_any_moment_is_rebuilt_to_the_same_bytes(tmp_path: Path) -> None:
    prompt = make_prompt("What is 2 + 2?")
    traces = [make_trace(prompt, str(4 + sample % 2), sample=sample, reasoning=str(sample)) for sample in range(6)]
    template = make_run(tmp_path / "template", [prompt], [traces[:3], traces[3:]])
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PARENT, template.root, tmp_path], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
