"""A folder of lm-eval tasks, one of each kind, the engine that is asked them, counted, and what comes out."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from configs.evaluation import Evaluate
from data.engine import Engine
from data.store import RunFolder
from student.folders import EMBEDDED
from student.lm_eval_suite import evaluate_lm_suites
from student.model import load_tokenizer
from student.results import read_lm_eval
from teacher.engines import open_local_engine

SUMS = [(19, 56), (3, 4), (20, 30), (7, 8), (64, 17), (2, 2)]
ASK = "State the final answer to the following arithmetic problem: {} + {} ="
DATA = "dataset_path: json\ndataset_kwargs: {data_files: {test: sums.jsonl}}\ntest_split: test\nmetadata: {version: 2.0}\n"
TASKS = {
    "tiny_generate": """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["!"], do_sample: false, max_gen_toks: 24}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "tiny_choice": """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{gold}}"
metric_list:
- {metric: acc, aggregation: mean, higher_is_better: true}
- {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "tiny_text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
}


def write_tasks(parent: Path) -> Path:
    """parent/tasks. The base answers sums of two digits right, most of them, and only in chat. Which option counts as
    gold has nothing to do with the sum, so that some guesses are right and some are wrong."""
    rows = []
    for place, (a, b) in enumerate(SUMS):
        options = [f" {a + b + 1}", f" {a + b}", f" {a}"]
        rows.append({"q": ASK.format(a, b), "a": str(a + b), "options": options, "gold": place % 3})
    found = parent / "tasks"
    found.mkdir()
    (found / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        (found / f"{name}.yaml").write_text(f"task: {name}\n{DATA}{text}")
    return found


class Counted:
    """The local engine, and how much it was asked."""

    def __init__(self) -> None:
        self.engine: Engine = open_local_engine(EMBEDDED, dtype="fp32", batch_size=8)
        self.name, self.version, self.generated, self.scored = self.engine.name, self.engine.version, 0, 0

    def load(self) -> None:
        self.engine.load()

    def generate(self, requests: Any, handout: Any = None) -> Any:
        for completion in self.engine.generate(requests, handout):
            self.generated += 1
            yield completion

    def score(self, sequences: Sequence[Sequence[int]], **more: Any) -> Any:
        self.scored += len(sequences)
        return self.engine.score(sequences, **more)

    def expert_stats(self) -> None:
        return None

    def close(self) -> None:
        self.engine.close()


def measured(engine: Any, tokens: PreTrainedTokenizerBase, folder: Path, run: RunFolder, **suite: object) -> dict[str, Any]:
    settings = settings_of(folder, **suite)
    evaluate_lm_suites("base", engine, tokens, settings, run, [folder.parent], model_fingerprint="w")
    found = read_lm_eval(run, "base")
    assert found is not None
    return found["suites"][0]["tasks"]


def settings_of(folder: Path, **suite: object) -> Evaluate:
    chosen = {"type": "lm_eval", "path": folder.name} | suite
    return Evaluate.model_validate({"suites": [chosen], "sampling": {"max_tokens": 64, "temperature": 0.0}, "batch_size": 8})


def values(task: dict[str, Any]) -> dict[str, float]:
    return {one["metric"]: one["value"] for one in task["metrics"]}


class Killed(Counted):
    """Ends this process by SIGKILL when it is asked again after `answers`, in the middle of whatever it does."""

    def __init__(self, answers: int) -> None:
        super().__init__()
        self.answers = answers

    def generate(self, requests: Any, handout: Any = None) -> Any:
        for completion in super().generate(requests, handout):
            if self.generated > self.answers:
                os.kill(os.getpid(), signal.SIGKILL)
            yield completion

    def score(self, sequences: Sequence[Sequence[int]], **more: Any) -> Any:
        if self.scored >= self.answers:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(sequences, **more)


if __name__ == "__main__":
    folder, run, answers, task = sys.argv[1:]
    measured(Killed(int(answers)), load_tokenizer("embedded"), Path(folder), RunFolder(Path(run)), tasks=[task])
