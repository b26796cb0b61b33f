"""The repository is what it says: folders are packages, `data/` is ours, and nothing heavy loads before it is needed."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("configs", "data", "teacher", "student", "generate", "train", "slurm")


@pytest.mark.parametrize("name", PACKAGES)
def test_each_package_resolves_to_this_repository(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None and Path(module.__file__).parent == ROOT / name


HEAVY = ("torch", "transformers", "deepspeed", "wandb", "datasets")


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _loads(statement: str) -> set[str]:
    return set(_python(f"import sys; {statement}; print(' '.join(m for m in {HEAVY!r} if m in sys.modules))").split())


@pytest.mark.parametrize(
    "module",
    [
        "tracestill",
        "configs.load",
        "configs.launch",
        "data.store",
        "data.ledger",
        "data.stage",
        "slurm.chain",
        "slurm.attempt",
        "slurm.status",
        "teacher.plan",
        "student.plan",
    ],
)
def test_planning_and_status_need_no_torch(module: str) -> None:
    assert _loads(f"import {module}") == set()


def test_help_imports_nothing_heavy() -> None:
    lines = (
        "import sys",
        "sys.argv = ['tracestill', '--help']",
        "import tracestill",
        "try: tracestill.main()",
        "except SystemExit: pass",
    )
    shown = _python("\n".join([*lines, "print('torch' in sys.modules)"]))
    assert "Commands" in shown and shown.strip().endswith("False")


def test_no_generated_folder_hides_a_package() -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    assert not {"data", "data/", "/data", "/data/"} & set(ignored)
