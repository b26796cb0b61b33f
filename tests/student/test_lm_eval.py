"""Tasks of lm-evaluation-harness from a folder, through our engines: the same figures as its own Hugging Face model gives, each
answer asked once."""

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UnusableInput
from configs.evaluation import Evaluate, LmEvalSuite
from configs.progress import Count
from data.store import RunFolder, read_segment, segments
from student.evaluate import harness_of
from student.figures import lm_eval_rows
from student.item_store import ItemStore
from student.lm_eval_model import EngineModel
from student.lm_eval_store import Continuation, ScoreStore
from student.lm_eval_suite import evaluate_lm_suites, load_tasks, offline
from student.model import load_base, load_tokenizer
from student.results import evaluation_files, read_lm_eval
from tests.e2e.commands import ROOT, environment
from tests.student.lm_eval_tasks import SUMS, TASKS, Counted, measured, settings_of, values, write_tasks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tasks(tmp_path)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_base("embedded", "fp32")


@pytest.fixture(scope="module")
def with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer as Llama's is: a BOS before every text that it is given."""
    found = copy.deepcopy(tokenizer)
    found.bos_token = "<|endoftext|>"
    special = [(found.bos_token, found.convert_tokens_to_ids(found.bos_token))]
    found.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[attr-defined]
        single=f"{found.bos_token} $A", special_tokens=special
    )
    assert found("a")["input_ids"][0] == found.bos_token_id
    return found


# --- figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", ["tokenizer", "with_bos"])
def test_plain_text_tasks_have_the_figures_of_lm_evals_own_model(
    folder: Path, tmp_path: Path, model: PreTrainedModel, chosen: str, request: pytest.FixtureRequest
) -> None:
    """As that model is by default. Without the BOS of `with_bos` acc_norm here is 0.50 instead of 0.17."""
    tokens = request.getfixturevalue(chosen)
    found = measured(Counted(), tokens, folder, RunFolder(tmp_path / "run"), chat_template=False)
    own = HFLM(pretrained=model, tokenizer=tokens, batch_size=1, backend="causal")  # type: ignore[arg-type]
    with offline(tmp_path / "cache"):
        tasks = load_tasks(LmEvalSuite(path="tasks", chat_template=False), folder)
        theirs: Any = lm_evaluate(own, {"tasks": tasks}, log_samples=False, bootstrap_iters=0)
    for name in TASKS:
        for metric, value in values(found[name]).items():
            assert value == pytest.approx(theirs["results"][name][f"{metric},none"], abs=1e-5), (name, metric)
    assert found["tiny_choice"]["n"] == len(SUMS) and found["tiny_choice"]["version"] == 2.0


def _summed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, before: list[int], text: str) -> float:
    """log p(text | before), a token after the other, from one forward pass of transformers."""
    ids = before + tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    total = 0.0
    for place in range(len(before), len(ids)):
        total += float(logprobs_TV[place - 1, ids[place]])
    return total


def test_metrics_are_what_a_loop_over_forward_passes_makes_them(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    found = measured(Counted(), tokenizer, folder, RunFolder(tmp_path / "run"), tasks=["tiny_choice", "tiny_text"])
    right = {"acc": 0, "acc_norm": 0}
    nats = num_bytes = 0.0
    for row in map(json.loads, (folder / "sums.jsonl").read_text().splitlines()):
        ids: list[int] = tokenizer(row["q"])["input_ids"]  # type: ignore[assignment]
        likelihoods = [_summed(model, tokenizer, ids, f" {option}") for option in row["options"]]
        by_length = [one / len(option) for one, option in zip(likelihoods, row["options"], strict=True)]
        right["acc"] += likelihoods.index(max(likelihoods)) == row["gold"]
        right["acc_norm"] += by_length.index(max(by_length)) == row["gold"]
        nats += _summed(model, tokenizer, [tokenizer.eos_token_id], row["q"])  # type: ignore[list-item]
        num_bytes += len(row["q"].encode())
    assert 0 < right["acc"] < len(SUMS)
    for one in found["tiny_choice"]["metrics"]:
        share, n = right[one["metric"]] / len(SUMS), len(SUMS)
        assert one["value"] == pytest.approx(share, abs=1e-12)
        assert one["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)), abs=1e-12)
    # float32 sums over about 70 tokens of a text, in another order
    assert values(found["tiny_text"])["bits_per_byte"] == pytest.approx(-nats / num_bytes / math.log(2), abs=1e-5)


def test_a_limit_takes_the_first_documents_of_each_task(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = Counted()
    found = measured(engine, tokenizer, folder, RunFolder(tmp_path / "run"), limit=2)
    assert {task["n"] for task in found.values()} == {2} and (engine.generated, engine.scored) == (2, 2 * 3 + 2)


def test_a_configuration_has_the_same_hash_wherever_its_folder_lies(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "moved").mkdir()
    moved, hashes = write_tasks(tmp_path / "moved"), []
    for number, where in enumerate((folder, moved)):
        found = measured(Counted(), tokenizer, where, RunFolder(tmp_path / str(number)), tasks=["tiny_text"], limit=1)
        hashes.append(found["tiny_text"]["config_sha256"])
    text = (moved / "tiny_text.yaml").read_text()
    (moved / "tiny_text.yaml").write_text(text.replace("{{q}}", "{{q}}!"))
    other = measured(Counted(), tokenizer, moved, RunFolder(tmp_path / "2"), tasks=["tiny_text"], limit=1)
    assert hashes[0] == hashes[1] != other["tiny_text"]["config_sha256"]


def test_a_task_of_two_suites_has_a_row_for_each() -> None:
    def suite(path: str, n: int) -> dict[str, Any]:
        metric = {"metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.25, "higher_is_better": True}
        return {"path": path, "tasks": {"sums": {"metrics": [metric], "n": n}}}

    down = {"path": "b", "tasks": {"sums": {"unmeasured": "nobody is there"}}}
    rows = lm_eval_rows(
        {"base": {"suites": [suite("a", 8), suite("b", 4)]}, "far": {"suites": [suite("a", 8), down]}, "new": None}
    )
    assert rows == [
        ["lm-eval", "base", "far", "new"],
        ["a: sums, acc", "0.500 (standard error 0.250) of 8", "0.500 (standard error 0.250) of 8", "-"],
        ["b: sums, acc", "0.500 (standard error 0.250) of 4", "-", "-"],
        ["b: sums", "-", "not measured: nobody is there", "-"],
    ]
    assert lm_eval_rows({"base": {"suites": [suite("a", 8)]}})[1][0] == "sums, acc" and lm_eval_rows({"base": None}) == []


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


def test_what_the_model_would_have_said_itself_is_greedy(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    ids: list[int] = tokenizer("1 + 2 =")["input_ids"]  # type: ignore[assignment]
    for _ in range(3):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    engine: Any = Counted()
    other = (ids[-1] + 1) % 256
    asked = [Continuation(tuple(ids), 3), Continuation((*ids[:-1], other), 3), Continuation((*ids[:-1], other), 1)]
    asked.append(Continuation((*ids[:-3], (ids[-3] + 1) % 256, *ids[-2:]), 3))
    found = ScoreStore(tmp_path, "k", segment_rows=8).likelihoods(engine, asked)
    assert [one.is_greedy for one in found] == [True, False, False, False]


# --- once each ---------------------------------------------------------------------------------------------------


def test_what_was_answered_is_not_asked_again(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    run, first, again = RunFolder(tmp_path / "run"), Counted(), Counted()
    found = measured(first, tokenizer, folder, run)
    assert (first.generated, first.scored) == (len(SUMS), 4 * len(SUMS))
    again.load = lambda: pytest.fail("weights were read for nothing")  # type: ignore[method-assign]
    assert measured(again, tokenizer, folder, run) == found and (again.generated, again.scored) == (0, 0)


def test_answers_and_likelihoods_are_counted_as_they_come(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Hours of a real suite would otherwise look like a hang."""
    counts: list[Count] = []
    engine: Any = Counted()
    settings, run = settings_of(folder).model_copy(update={"batch_size": 4}), RunFolder(tmp_path / "run")
    evaluate_lm_suites("base", engine, tokenizer, settings, run, [folder.parent], model_fingerprint="w", report=counts.append)
    for unit, total in (("answers", len(SUMS)), ("likelihoods", None)):
        found = [one for one in counts if one.unit == unit]
        assert found[-1].done == found[-1].total and len({one.done for one in found}) > 1, (unit, counts)
        assert total is None or found[-1].total == total


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


@pytest.mark.long
@pytest.mark.parametrize(("task", "answers", "kept"), [("tiny_generate", 2, 2), ("tiny_choice", 8, 8)])
def test_a_sigkill_costs_what_was_in_hand_and_nothing_is_stored_twice(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, task: str, answers: int, kept: int
) -> None:
    """A generation is in the journal the moment it is there; likelihoods are committed by the batch of 8."""
    run, again = RunFolder(tmp_path / "run"), Counted()
    words = [sys.executable, "-m", "tests.student.lm_eval_tasks", str(folder), str(run.root), str(answers), task]
    ended = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-3000:]
    assert read_lm_eval(run, "base") is None
    whole = measured(again, tokenizer, folder, run, tasks=[task])
    num_asked = len(SUMS) if task == "tiny_generate" else 3 * len(SUMS)
    assert again.generated + again.scored == num_asked - kept
    assert whole == measured(Counted(), tokenizer, folder, RunFolder(tmp_path / "other"), tasks=[task])
    [store] = [path for path in (run.evaluation / "base.lm_eval.items", run.evaluation / "base.lm_eval.scores") if path.is_dir()]
    stored = [row["item_id"] for segment in segments(store) for row in read_segment(segment).to_pylist()]
    assert len(stored) == len(set(stored)) == num_asked


def test_the_stage_hashes_figures_and_answers(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    run = RunFolder(tmp_path / "run")
    measured(Counted(), tokenizer, folder, run)
    hashed = {path.relative_to(run.evaluation).parts[0] for path in evaluation_files(run, "base")}
    assert hashed == {"base.json", "base.arrow", "base.lm_eval.json", "base.lm_eval.items", "base.lm_eval.scores"}


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
