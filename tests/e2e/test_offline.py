"""Evaluation on a machine without any network but its own loopback: items, verifiers, the sharded teacher and lm-eval's tasks."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from configs.load import RECIPES, load_recipe
from data.store import RunFolder, read_rollup, sha256_file
from student.card import recipe_text
from tests.e2e.commands import SMALL, command, environment

ALONE = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "-"]
"""A network namespace of its own, with loopback alone: the teacher's ranks meet there."""
DATA = "dataset_path: json\ndataset_kwargs: {data_files: {test: sums.jsonl}}\ntest_split: test\n"
TASKS = {
    "sums": """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n"], do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "choices": """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["1", "{{a}}"]
doc_to_target: 1
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "texts": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
}
"""The last two ask the teacher's ranks for likelihoods."""


def is_permitted() -> bool:
    try:
        return subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def write_recipe(folder: Path) -> dict:
    """The small embedded recipe with a suite of lm-eval beside it, a task of each kind."""
    shutil.copytree(RECIPES / "embedded", folder / "embedded")
    tasks = folder / "tasks"
    tasks.mkdir()
    asked = "State the final answer to the following arithmetic problem: {} + {} ="
    rows = [{"q": asked.format(a, b), "a": str(a + b)} for a, b in ((19, 56), (3, 4), (20, 30))]
    (tasks / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(f"task: {name}\n{DATA}{text}")
    recipe = yaml.safe_load(recipe_text(load_recipe("embedded", SMALL).recipe))
    recipe["evaluate"]["suites"].append({"type": "lm_eval", "path": "tasks"})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return recipe


@pytest.mark.long
@pytest.mark.skipif(not is_permitted(), reason="unshare -rn is not permitted here, or ip is not installed (iproute2)")
def test_everything_is_evaluated_without_a_network(finished: RunFolder, tmp_path: Path) -> None:
    """The figures of the run that had one come out again, and those of lm-eval's tasks for each model, which the stage's roll-up
    hashes. A second time nothing is done."""
    write_recipe(tmp_path)
    run = RunFolder(tmp_path / "r")
    shutil.copytree(finished.root, run.root)
    before = {
        name: json.loads((run.evaluation / f"{name}.json").read_text())["metrics"] for name in ("teacher", "base", "student")
    }
    shutil.rmtree(run.evaluation)
    stored = yaml.safe_load((run.root / "config.yaml").read_text())
    suite = load_recipe(str(tmp_path / "recipe.yaml")).recipe.evaluate.lm_eval_suites[0]
    stored["recipe"]["evaluate"]["suites"].append(suite.model_dump(mode="json"))
    (run.root / "config.yaml").write_text(yaml.safe_dump(stored))

    def evaluated(*more: str) -> str:
        words = [*ALONE, *command("evaluate", str(tmp_path / "recipe.yaml"), *more, "--run-dir", "r")]
        ended = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=500)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    said = evaluated()
    sealed = read_rollup(run.evaluation)
    assert sealed is not None
    for name, figures in before.items():
        assert json.loads((run.evaluation / f"{name}.json").read_text())["metrics"]["grades"] == figures["grades"]
        [suite_figures] = json.loads((run.evaluation / f"{name}.lm_eval.json").read_text())["suites"]
        assert {task: figures["n"] for task, figures in suite_figures["tasks"].items()} == dict.fromkeys(TASKS, 3)
        assert all(math.isfinite(one["value"]) for task in suite_figures["tasks"].values() for one in task["metrics"])
        figures_file = run.evaluation / f"{name}.lm_eval.json"
        assert sealed.files[str(figures_file.relative_to(run.root))] == sha256_file(figures_file), sealed.files
    rows = [line.split(",")[0] for line in said.splitlines() if " of 3" in line]
    assert "lm-eval" in said and rows == sorted(TASKS), said
    made = {path: path.stat().st_mtime_ns for path in run.evaluation.rglob("*.lm_eval*")}
    evaluated()
    assert made == {path: path.stat().st_mtime_ns for path in run.evaluation.rglob("*.lm_eval*")}
    figures_before = {path: path.read_bytes() for path in run.evaluation.glob("*.lm_eval.json")}
    said = evaluated("base", "student", "--compare")
    assert [line.split(",")[0] for line in said.splitlines() if " of 3" in line] == sorted(TASKS), said
    assert "| choices, acc |" in (run.evaluation / "comparison.md").read_text()
    assert set(json.loads((run.evaluation / "comparison.json").read_text())["lm_eval"]) == {"base", "student"}
    assert figures_before == {path: path.read_bytes() for path in run.evaluation.glob("*.lm_eval.json")}
