"""One uninterrupted run of the small pipeline, shared by everything that looks at a finished run."""

import pytest

from data.store import RunFolder
from tests.e2e.commands import tracestill


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("finished")
    ended = tracestill("run", "embedded", "--run-dir", "r", cwd=folder, small=True)
    assert ended.code == 0, ended.out + ended.err
    return RunFolder(folder / "r")
