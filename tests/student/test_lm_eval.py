"""Tasks of lm-evaluation-harness from a folder, through our engines: the same figures as its own Hugging Face model gives, each
answer asked once, nothing fetched."""

import importlib.util
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UnusableInput
from configs.evaluation import Evaluate, LmEvalSuite
from data.engine import Engine
from data.store import RunFolder
from student.evaluate import harness_of
from student.folders import EMBEDDED
from student.item_store import ItemStore
from student.lm_eval_model import EngineModel
from student.lm_eval_store import Continuation, ScoreStore
from student.lm_eval_suite import check_lm_suites, evaluate_lm_suites, load_tasks, suite_hashes
from student.model import load_base, load_tokenizer
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The base answers sums of two digits right, most of them, and only in chat."""
    rows = [
        {"q": ASK.format(a, b), "a": str(a + b), "options": [f" {a + b + 1}", f" {a + b}", f" {a}"], "gold": 1} for a, b in SUMS
    ]
    found = tmp_path / "tasks"
    found.mkdir()
    (found / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        (found / f"{name}.yaml").write_text(f"task: {name}\n{DATA}{text}")
    return found


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_base("embedded", "fp32")


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


# --- figures -----------------------------------------------------------------------------------------------------


def test_plain_text_tasks_have_the_figures_of_lm_evals_own_model(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    found = measured(Counted(), tokenizer, folder, RunFolder(tmp_path / "run"), chat_template=False)
    own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, backend="causal", add_bos_token=False)  # type: ignore[arg-type]
    theirs: Any = lm_evaluate(own, {"tasks": load_tasks(LmEvalSuite(path="tasks"), folder)}, log_samples=False, bootstrap_iters=0)
    for name in TASKS:
        for metric, value in values(found[name]).items():
            assert value == pytest.approx(theirs["results"][name][f"{metric},none"], abs=1e-5), (name, metric)
    assert found["tiny_choice"]["n"] == len(SUMS) and found["tiny_choice"]["version"] == 2.0


def test_in_chat_what_follows_the_reasoning_is_the_answer(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Counted by hand: the base's answers to the six sums, of which `exact_match` takes those that are the sum alone."""
    run = RunFolder(tmp_path / "run")
    found = measured(Counted(), tokenizer, folder, run, tasks=["tiny_generate"])
    assert list(found) == ["tiny_generate"]
    outputs = ItemStore(run.evaluation / "base.lm_eval.items", _harness(tokenizer).key, segment_rows=8).outputs()
    said = {
        str(tokenizer.decode(list(output.token_ids))).split("</think>")[-1].removesuffix("<|im_end|>")
        for output in outputs.values()
    }
    right = sum(str(a + b) in said for a, b in SUMS)
    assert len(outputs) == len(SUMS) and right >= 4
    assert values(found["tiny_generate"])["exact_match"] == pytest.approx(right / len(SUMS), abs=1e-9)


def _harness(tokenizer: PreTrainedTokenizerBase) -> Any:
    return harness_of(Counted(), tokenizer, Evaluate.model_validate({"sampling": {"max_tokens": 64, "temperature": 0.0}}), "w")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("context", "continuation"), [("1 + 2 =", " 3"), ("", "word"), ("two blanks  ", "x"), ("a", "b" * 40), ("c" * 90, "dd")]
)
def test_a_likelihood_is_the_sum_of_one_forward_pass(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, context: str, continuation: str
) -> None:
    engine: Any = Counted()
    engine.load()
    settings = Evaluate.model_validate({"sampling": {"max_tokens": 64, "temperature": 0.0}})
    stores = ItemStore(tmp_path / "i", "k", segment_rows=8), ScoreStore(tmp_path / "s", "k", segment_rows=8)
    asks = EngineModel(
        engine,
        tokenizer,
        _harness(tokenizer),
        settings.sampling,
        0,
        *stores,
        chat=False,
        context_tokens=64,  # type: ignore[arg-type]
    )
    asked = asks.continuation(context, continuation)
    ids = torch.tensor([asked.ids])
    with torch.no_grad():
        logprobs_TV = model(ids).logits[0].log_softmax(-1)
    expected, greedy = 0.0, True
    for place in range(len(asked.ids) - asked.scored, len(asked.ids)):
        expected += float(logprobs_TV[place - 1, asked.ids[place]])
        greedy &= int(logprobs_TV[place - 1].argmax()) == asked.ids[place]
    [found] = asks.scores.likelihoods(engine, [asked])  # type: ignore[arg-type]
    assert len(asked.ids) <= 64 and str(tokenizer.decode(list(asked.ids[-asked.scored :]))).endswith(continuation)
    assert found.logprob == pytest.approx(expected, abs=1e-4) and found.is_greedy is greedy


# --- once each ---------------------------------------------------------------------------------------------------


def test_what_was_answered_is_not_asked_again(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    run, first, again = RunFolder(tmp_path / "run"), Counted(), Counted()
    found = measured(first, tokenizer, folder, run)
    # two of the three options of 2 + 2 are " 4" and " 5", " 2": all differ, so every continuation is one of its own
    assert (first.generated, first.scored) == (len(SUMS), 4 * len(SUMS))
    assert measured(again, tokenizer, folder, run) == found and (again.generated, again.scored) == (0, 0)


def test_a_death_costs_what_was_not_committed(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    class Dying(Counted):
        def score(self, sequences: Sequence[Sequence[int]], **more: Any) -> Any:
            if self.scored:
                raise RuntimeError("the engine died")
            return super().score(sequences, **more)

    run, dying, again = RunFolder(tmp_path / "run"), Dying(), Counted()
    with pytest.raises(RuntimeError, match="died"):
        measured(dying, tokenizer, folder, run, tasks=["tiny_choice"])
    assert read_lm_eval(run, "base") is None
    whole = measured(again, tokenizer, folder, run, tasks=["tiny_choice"])
    assert again.scored == 3 * len(SUMS) - dying.scored > 0
    assert whole == measured(Counted(), tokenizer, folder, RunFolder(tmp_path / "other"), tasks=["tiny_choice"])


# --- refused -----------------------------------------------------------------------------------------------------


def test_servers_have_no_likelihoods_and_say_so(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = Counted()
    engine.name = "http"
    found = measured(engine, tokenizer, folder, RunFolder(tmp_path / "run"), tasks=["tiny_choice", "tiny_generate"])
    assert found["tiny_choice"] == {"unmeasured": "servers do not score given tokens"}
    assert not math.isnan(values(found["tiny_generate"])["exact_match"]) and engine.scored == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": "nowhere"}, "lm_eval nowhere: no such folder"),
        ({"tasks": ["other"]}, "lm_eval tasks: no task 'other' in the folder; expected one of"),
        ({"tasks": ["remote"]}, "lm_eval tasks: "),
        ({"tasks": ["odd"]}, "generation_kwargs has 'num_beams'"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, change: dict[str, Any], said: str
) -> None:
    remote = DATA.replace("dataset_path: json", "dataset_path: some/dataset").replace("{data_files: {test: sums.jsonl}}", "{}")
    (folder / "remote.yaml").write_text(f"task: remote\n{remote}{TASKS['tiny_choice']}")
    odd = TASKS["tiny_generate"].replace("do_sample: false", "num_beams: 4")
    (folder / "odd.yaml").write_text(f"task: odd\n{DATA}{odd}")
    with pytest.raises(UnusableInput) as raised:
        measured(Counted(), tokenizer, folder, RunFolder(tmp_path / "run"), **change)
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "evaluation" / "base.lm_eval.json").exists()


def test_a_task_that_cannot_be_loaded_is_known_before_any_model_is_asked(folder: Path, tmp_path: Path) -> None:
    check_lm_suites(settings_of(folder), RunFolder(tmp_path / "run"), [tmp_path])
    (folder / "functions.yaml").write_text(f"task: own\n{DATA}{TASKS['tiny_generate']}process_docs: !function own.process\n")
    (folder / "own.py").write_text("def process(docs):\n    return docs\n")
    check_lm_suites(settings_of(folder, tasks=["own"]), RunFolder(tmp_path / "run"), [tmp_path])
    for change, said in (({"path": "nowhere"}, "no such folder"), ({"tasks": ["other"]}, "no task 'other'")):
        with pytest.raises(UnusableInput, match=said):
            check_lm_suites(settings_of(folder, **change), RunFolder(tmp_path / "run"), [tmp_path])
    (folder / "broken.yaml").write_text("task: [")
    with pytest.raises(UnusableInput, match="lm_eval tasks: broken.yaml: not valid YAML"):
        check_lm_suites(settings_of(folder), RunFolder(tmp_path / "run"), [tmp_path])


def test_without_lm_eval_the_remedy_is_named(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest))
    with pytest.raises(UnusableInput, match=r"pip install 'tracestill\[lm-eval\]'"):
        measured(Counted(), tokenizer, folder, RunFolder(tmp_path / "run"))


def test_another_file_in_the_folder_is_another_suite(folder: Path) -> None:
    settings = settings_of(folder)
    before = suite_hashes(settings, [folder.parent])
    assert before == suite_hashes(settings, [folder.parent])
    (folder / "sums.jsonl").write_text((folder / "sums.jsonl").read_text().replace("75", "76"))
    assert suite_hashes(settings, [folder.parent]) != before


def test_a_file_that_changed_in_place_is_read_anew(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """As many bytes, and a copy that keeps the time of the file: `datasets` would hand out what it read before."""
    run, data = RunFolder(tmp_path / "run"), folder / "sums.jsonl"
    before, times = data.read_text(), data.stat()
    right = values(measured(Counted(), tokenizer, folder, run, tasks=["tiny_generate"])["tiny_generate"])["exact_match"]
    data.write_text(re.sub(r'"a": "\d', '"a": "x', before))
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    wrong = values(measured(Counted(), tokenizer, folder, run, tasks=["tiny_generate"])["tiny_generate"])["exact_match"]
    assert right > 0.5 and wrong == 0.0


def test_the_first_token_of_all_is_never_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="the first one has no likelihood"):
        ScoreStore(tmp_path, "k", segment_rows=1).likelihoods(_scoring_nothing(), [Continuation((1, 2), 2)])


def _scoring_nothing() -> Any:
    engine = Counted()
    engine.load()
    return engine
