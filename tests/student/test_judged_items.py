"""Evaluation items whose verifier is a model: who is asked, once, and what becomes of each of its grades."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from configs.evaluation import Evaluate
from configs.judging import Judging
from configs.sampling import Sampling
from data.answer_grading import grade_answers
from data.records import Prompt
from data.store import RunFolder
from student.evaluate import AskJudge, evaluate_model
from student.results import read_results
from student.scoring import Metrics
from tests.data.test_grading import HOSTILE, judgement, judging, models_for
from tests.student.test_evaluate import ScriptedEngine, prompt, thoughtful, tokenizer  # noqa: F401 (a fixture)
from tests.teacher.mock_server import MockServer, Reply, encoded

SAYS = {"a?": "right", "b?": "half", "c?": "wrong", "d?": "silent", "e?": "nonsense", "f?": "right, once more"}
EXPECTED = {"a?": "correct", "b?": "partial", "c?": "incorrect", "d?": "not_attempted", "e?": "ungraded", "f?": "ungraded"}


@pytest.fixture
def server() -> Iterator[MockServer]:
    with MockServer(judgement) as found:
        found.models = Reply(body=encoded({"data": [{"id": "a-judge"}]}))
        yield found


def asks(run: RunFolder, settings: Judging) -> AskJudge:
    model = models_for(settings).judge
    assert model is not None
    return lambda answered: grade_answers(run, settings, answered, model, lambda count: None)


def evaluated(
    run: RunFolder, tokens: PreTrainedTokenizerBase, items: list[Prompt], say: Callable[[str], str], ask: AskJudge | None
) -> Metrics:
    engine = ScriptedEngine(tokens, lambda question: thoughtful(say(question)))
    settings = Evaluate(sampling=Sampling(temperature=0.0, top_p=1.0, max_tokens=32))
    return evaluate_model("student", engine, tokens, items, settings, run, model_fingerprint="w", ask_judge=ask)


def test_each_grade_of_a_judge_is_that_of_its_item(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,  # noqa: F811
    server: MockServer,
) -> None:
    """f's answer is right and longer than the judge takes; e's judge echoes the answer."""
    run, settings = RunFolder(tmp_path), judging(server, max_answer_characters=10)
    items = [prompt(question, "algae", verifier="llm_judge", task="essays") for question in SAYS]
    figures = evaluated(run, tokenizer, items, SAYS.__getitem__, asks(run, settings))
    assert {row.question: row.grade for row in read_results(run, "student")} == EXPECTED
    assert figures.accuracy == pytest.approx(1 / 6, abs=1e-9) and figures.grades["partial"] == 1
    assert len(server.asked) == 5
    evaluated(run, tokenizer, items, SAYS.__getitem__, asks(run, settings))
    assert len(server.asked) == 5  # replies are on disk


def test_programs_judge_what_is_theirs_and_nobody_judges_an_abstention(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,  # noqa: F811
    server: MockServer,
) -> None:
    run, says = RunFolder(tmp_path), {"a?": "iron", "b?": "I don't know", "c?": "right"}
    items = [prompt("a?", "iron"), prompt("b?", "x", verifier="llm_judge", known=True), prompt("c?", "x", verifier="llm_judge")]
    evaluated(run, tokenizer, items, says.__getitem__, asks(run, judging(server)))
    assert {row.question: row.grade for row in read_results(run, "student")} == {
        "a?": "correct", "b?": "not_attempted", "c?": "correct",
    }  # fmt: skip
    assert len(server.asked) == 1


def test_an_answer_that_the_judge_repeats_is_not_correct(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,  # noqa: F811
    server: MockServer,
) -> None:
    """The judge says word for word what it was shown: whatever an answer claims of itself is no grade."""
    run = RunFolder(tmp_path)
    hostile = {f"{number}?": text for number, text in enumerate(HOSTILE) if "think" not in text and "|" not in text}
    items = [prompt(question, "x", verifier="llm_judge") for question in hostile]
    evaluated(run, tokenizer, items, hostile.__getitem__, asks(run, judging(server)))
    assert len(hostile) >= 4 and {row.grade for row in read_results(run, "student")} == {"ungraded"}


def test_items_for_a_judge_without_one_are_refused_before_anything_is_asked(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,  # noqa: F811
) -> None:
    items = [prompt("a?", "x", verifier="llm_judge")]
    with pytest.raises(UnusableInput, match="data.judging: evaluation items name the verifier llm_judge"):
        evaluated(RunFolder(tmp_path), tokenizer, items, SAYS.__getitem__, None)
    assert not (tmp_path / "evaluation").exists()
