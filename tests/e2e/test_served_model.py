"""A model behind a server, evaluated beside the run's own under one harness: `evaluate --compare`."""

import json
import shutil
from pathlib import Path

import pytest

from data.store import RunFolder
from student.folders import EMBEDDED
from student.serve_check import TRANSFORMERS, _program, serving
from tests.e2e.commands import tracestill

MODEL = "evaluate.models.served={server: {type: http, base_urls: ['%s'], model: '%s', timeout_s: 60}}"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_served_model_answers_the_same_items_and_stands_beside_the_others(finished: RunFolder, tmp_path: Path) -> None:
    """`transformers serve` with the base: its answers are the base's own, within the rounding of another dtype."""
    run, program = RunFolder(tmp_path / "run"), _program(TRANSFORMERS)
    shutil.copytree(finished.root, run.root)
    assert program is not None
    price = "evaluate.prices.served={input: 1.0, output: 2.0}"
    with serving(TRANSFORMERS, program, EMBEDDED, tmp_path / "serve.log") as url:
        ended = tracestill(
            "evaluate", "embedded", "base", "served", "--compare", "--json", "--run-dir", str(run.root), "-s",
            MODEL % (url, EMBEDDED), "-s", price, cwd=tmp_path, small=True, timeout_s=600,
        )  # fmt: skip
    assert ended.code == 0, ended.out + ended.err
    figures = json.loads(ended.out.splitlines()[-1])["models"]
    base, served = figures["base"], figures["served"]
    assert served["num_items"] == base["num_items"] and served["num_answerable"] == base["num_answerable"] > 20
    assert served["accuracy"] == pytest.approx(base["accuracy"], abs=0.1)
    assert served["cost_per_completed_task"] > 0 and base["cost_per_completed_task"] is None
    assert "| base | served |" in (run.evaluation / "comparison.md").read_text()


@pytest.mark.long
def test_a_server_that_is_not_there_is_named_by_the_setting_that_names_it(finished: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished.root, run.root)
    ended = tracestill(
        "evaluate", "embedded", "base", "served", "--compare", "--run-dir", str(run.root), "-s",
        MODEL % ("http://127.0.0.1:9/v1", EMBEDDED), cwd=tmp_path, small=True, timeout_s=300,
    )  # fmt: skip
    assert ended.code == 2 and "evaluate.models.served.server.base_urls" in ended.err, ended.err
    assert "teacher.engine" not in ended.err
