import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

import student
import teacher
from configs.errors import UnusableInput
from configs.evaluation import Evaluate
from configs.progress import Count
from configs.sampling import Sampling
from data.byte_tokenizer import build_byte_tokenizer
from data.chat import dialect_of
from data.engine import Completion, ExpertStats, Handout, Partial, Request, Scores
from data.records import FinishReason, Prompt, prompt_identity
from data.store import RunFolder, segments
from data.verify import VERIFIERS
from student.evaluate import answer_confidence, evaluate_model
from student.results import evaluation_files, read_metrics, read_results
from student.scoring import Metrics

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
GLM = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>"]


def embedded_template(package: str) -> str:
    folder = {"student": student, "teacher": teacher}[package].__path__[0]
    return (Path(folder) / "embedded" / "chat_template.jinja").read_text()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_byte_tokenizer(CHATML, eos="<|im_end|>", pad="<|endoftext|>", chat_template=embedded_template("student"))


def prompt(question: str, answer: str, *, known: bool | None = None, task: str = "sums", verifier: str = "exact") -> Prompt:
    messages = ({"role": "user", "content": question},)
    return Prompt(prompt_identity(messages, "t"), "s", task, "t", messages, answer, verifier, "eval", known, "", "MIT")  # type: ignore[arg-type]


class ScriptedEngine:
    """Writes what `say` returns for a question: (text, finish_reason). Fails after `fail_after` completions."""

    name, version = "scripted", "1"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], tuple[str, FinishReason]], fail_after: int | None = None
    ) -> None:
        self.tokenizer, self.say, self.fail_after = tokenizer, say, fail_after
        self.asked: list[Request] = []
        self.loads = 0

    def load(self) -> None:
        self.loads += 1

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        for count, request in enumerate(requests):
            if count == self.fail_after:
                raise RuntimeError("the engine died")
            self.asked.append(request)
            text, finish = self.say(request.messages[-1].get("content", ""))
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert isinstance(ids, list)
            ids = [*ids, request.stop_ids[0]] if finish == "stop" else ids
            yield Completion(request.request_id, tuple(ids), (0.0,) * len(ids), finish, 0.0, 0.1)

    def score(
        self, sequences: Sequence[Sequence[int]], top_logits: int = 0, log_z_temperatures: Sequence[float] = (1.0,)
    ) -> list[Scores]:
        return [Scores((0.0,) * len(sequence)) for sequence in sequences]

    def expert_stats(self) -> ExpertStats | None:
        return None

    def close(self) -> None: ...


def thoughtful(answer: str) -> tuple[str, FinishReason]:
    return f"<think>hm</think>{answer}", "stop"


def run_evaluation(
    engine: ScriptedEngine,
    items: Sequence[Prompt],
    run: RunFolder,
    *,
    fingerprint: str = "weights",
    batch_size: int = 2,
    name: str = "student",
) -> Metrics:
    settings = Evaluate(sampling=Sampling(temperature=0.0, top_p=1.0, max_tokens=32), batch_size=batch_size)
    return evaluate_model(name, engine, engine.tokenizer, items, settings, run, model_fingerprint=fingerprint)


# --- grading -----------------------------------------------------------------------------------------------------

SAID: dict[str, tuple[str, FinishReason]] = {
    "right": thoughtful("iron"),
    "untidy": ("<think>hm</think>\n Iron. ", "stop"),
    "wrong": thoughtful("gold"),
    "declined": thoughtful("I don't know."),
    "hedged": thoughtful("I don't know, but iron"),  # contains the reference and an abstention, and is neither
    "shouted": thoughtful("NOT_ATTEMPTED A iron"),
    "unclosed": ("<think>it is iron", "stop"),
    "cut": ("<think>hm</think>iron", "length"),  # could have gone on: "ironwood"
    "cut declining": ("<think>hm</think>I don't know", "length"),
    "answer in thought": ("<think>iron</think>", "stop"),
    "reopened": ("<think>a</think>iron<think>b</think>gold", "stop"),
    "plain": ("iron", "stop"),
    "failed": ("", "abort"),
}


@pytest.mark.parametrize(
    ("said", "for_known", "for_unknown"),
    [
        ("right", "correct", "incorrect"),
        ("untidy", "correct", "incorrect"),
        ("wrong", "incorrect", "incorrect"),
        ("declined", "not_attempted", "not_attempted"),
        ("hedged", "incorrect", "incorrect"),
        ("shouted", "incorrect", "incorrect"),
        ("unclosed", "incorrect", "incorrect"),
        ("cut", "incorrect", "incorrect"),
        ("cut declining", "incorrect", "incorrect"),
        ("answer in thought", "incorrect", "incorrect"),
        ("reopened", "incorrect", "incorrect"),
        ("plain", "correct", "incorrect"),
        ("failed", "ungraded", "ungraded"),
    ],
)
def test_answers_that_try_to_trick_the_grader_get_the_grade_they_deserve(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, said: str, for_known: str, for_unknown: str
) -> None:
    items = [
        prompt(f"known {said}", "iron", known=True, task="facts/metals"),
        prompt(f"unknown {said}", "I don't know", known=False, task="facts/metals"),
    ]
    engine = ScriptedEngine(tokenizer, lambda question: SAID[question.split(" ", 1)[1]])
    run_evaluation(engine, items, RunFolder(tmp_path))
    assert [row.grade for row in read_results(RunFolder(tmp_path), "student")] == [for_known, for_unknown]


def test_rows_keep_reasoning_apart_from_the_answer_and_count_its_tokens(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    said: dict[str, tuple[str, FinishReason]] = {
        "q1": ("<think>1+1</think>2", "stop"),
        "q2": ("<think>1+1+", "length"),
        "q3": ("2", "stop"),
    }
    items = [prompt(question, "2") for question in said]
    run_evaluation(ScriptedEngine(tokenizer, said.__getitem__), items, RunFolder(tmp_path))
    first, second, third = read_results(RunFolder(tmp_path), "student")
    assert (first.reasoning, first.answer, first.problem, first.reasoning_tokens, first.output_tokens) == ("1+1", "2", "", 5, 7)
    assert (second.answer, second.problem, second.reasoning_tokens, second.finish_reason) == ("", "think_unclosed", 5, "length")
    assert (third.answer, third.reasoning_tokens) == ("2", 0)


def test_a_dialect_whose_prompt_opens_the_thought_is_split_all_the_same(tmp_path: Path) -> None:
    glm = build_byte_tokenizer(GLM, eos="<|endoftext|>", pad="<|endoftext|>", chat_template=embedded_template("teacher"))
    engine = ScriptedEngine(glm, lambda question: ("hm</think>2", "stop"))
    figures = run_evaluation(engine, [prompt("1+1?", "2")], RunFolder(tmp_path))
    [row] = read_results(RunFolder(tmp_path), "student")
    assert figures.accuracy == 1.0 and (row.reasoning, row.answer, row.reasoning_tokens) == ("hm", "2", 3)
    assert engine.asked[0].stop_ids == dialect_of(glm).stop_ids(glm)


def test_an_item_without_a_verifier_is_ungraded(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    figures = run_evaluation(
        ScriptedEngine(tokenizer, lambda _: thoughtful("2")), [prompt("q", "", verifier="")], RunFolder(tmp_path)
    )
    assert figures.grades == {"ungraded": 1} and figures.accuracy == 0.0


# --- what is written, and resume ---------------------------------------------------------------------------------


def numbered(count: int) -> list[Prompt]:
    return [prompt(f"say {number}", str(number)) for number in range(count)]


def echo(question: str) -> tuple[str, FinishReason]:
    return thoughtful(question.removeprefix("say "))


def test_the_figures_name_their_harness_and_can_be_read_back(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    figures = run_evaluation(ScriptedEngine(tokenizer, echo), numbered(5), run)
    written = json.loads((run.evaluation / "student.json").read_text())
    assert figures.accuracy == 1.0 and read_metrics(run, "student") == figures
    assert written["harness"]["model_fingerprint"] == "weights" and written["harness"]["max_tokens"] == 32
    assert written["harness"]["samples"] == 1 and written["harness"]["retries"] == 0
    assert written["harness"]["verifiers"] == {"exact": VERIFIERS["exact"].version}
    assert (
        written["harness"]["stop_tokens"] == ["<|im_end|>", "<|endoftext|>"] and len(written["harness"]["template_sha256"]) == 64
    )
    assert all(path.is_file() for path in evaluation_files(run, "student")) and len(evaluation_files(run, "student")) == 2 + 2 * 3
    assert read_metrics(run, "nobody") is None


def test_a_dead_engine_costs_only_what_was_in_flight_and_the_result_is_the_same(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    items = numbered(9)
    whole = RunFolder(tmp_path / "whole")
    run_evaluation(ScriptedEngine(tokenizer, echo), items, whole)

    broken = RunFolder(tmp_path / "broken")
    with pytest.raises(RuntimeError, match="died"):
        run_evaluation(ScriptedEngine(tokenizer, echo, fail_after=5), items, broken)
    assert not (broken.evaluation / "student.json").exists()
    second = ScriptedEngine(tokenizer, echo)
    run_evaluation(second, items, broken)
    assert len(second.asked) == 4
    for file in ("student.json", "student.arrow"):
        assert (broken.evaluation / file).read_bytes() == (whole.evaluation / file).read_bytes()


def test_a_finished_evaluation_does_not_load_the_model_again(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    run_evaluation(ScriptedEngine(tokenizer, echo), numbered(3), RunFolder(tmp_path))
    again = ScriptedEngine(tokenizer, echo)
    assert run_evaluation(again, numbered(3), RunFolder(tmp_path)).accuracy == 1.0
    assert again.loads == 0 and not again.asked


def test_completions_of_other_weights_are_not_mixed_in(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run_evaluation(ScriptedEngine(tokenizer, lambda _: thoughtful("stale")), numbered(4), run, fingerprint="old")
    newer = ScriptedEngine(tokenizer, echo)
    assert run_evaluation(newer, numbered(4), run, fingerprint="new").accuracy == 1.0
    assert len(newer.asked) == 4


def test_the_first_committed_copy_of_an_item_counts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    run, other = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    run_evaluation(ScriptedEngine(tokenizer, echo), numbered(2), run)
    run_evaluation(ScriptedEngine(tokenizer, lambda _: thoughtful("late")), numbered(2), other)
    for segment in segments(other.evaluation / "student.items"):
        for file in (segment.path, segment.path.with_suffix(".json")):
            (run.evaluation / "student.items" / file.name).write_bytes(file.read_bytes())
    assert run_evaluation(ScriptedEngine(tokenizer, echo), numbered(2), run).accuracy == 1.0


def test_a_flipped_bit_in_a_committed_batch_is_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run_evaluation(ScriptedEngine(tokenizer, echo), numbered(2), run)
    [segment] = segments(run.evaluation / "student.items")
    content = bytearray(segment.path.read_bytes())
    content[len(content) // 2] ^= 1
    segment.path.write_bytes(content)
    with pytest.raises(UnusableInput, match=segment.path.name):
        run_evaluation(ScriptedEngine(tokenizer, echo), numbered(2), run)


@pytest.mark.parametrize(
    ("items", "message"), [([], "no held-out items"), ([prompt("q", "a"), prompt("q", "a")], "stands twice")]
)
def test_unusable_items_are_refused_before_the_model_is_loaded(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, items: list[Prompt], message: str
) -> None:
    engine = ScriptedEngine(tokenizer, echo)
    with pytest.raises(UnusableInput, match=message):
        run_evaluation(engine, items, RunFolder(tmp_path))
    assert engine.loads == 0 and not (tmp_path / "evaluation").exists()


def test_seeds_follow_the_item_and_not_its_place(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    items = numbered(6)
    engines = [ScriptedEngine(tokenizer, echo) for _ in range(2)]
    run_evaluation(engines[0], items, RunFolder(tmp_path / "a"))
    run_evaluation(engines[1], items[::-1], RunFolder(tmp_path / "b"))
    seeds = [{request.request_id: request.seed for request in engine.asked} for engine in engines]
    assert seeds[0] == seeds[1] and len(set(seeds[0].values())) == 6


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from tests.student import test_evaluate as here

    tokenizer = here.build_byte_tokenizer(
        here.CHATML, eos="<|im_end|>", pad="<|endoftext|>", chat_template=here.embedded_template("student"))
    count = 0

    def say(question):
        global count
        count += 1
        if count == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return here.echo(question)

    here.run_evaluation(here.ScriptedEngine(tokenizer, say), here.numbered(12), here.RunFolder(Path(sys.argv[1])), batch_size=3)
"""


def test_sigkill_loses_no_completion(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)],
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    run, engine = RunFolder(tmp_path), ScriptedEngine(tokenizer, echo)
    assert sum(segment.rows for segment in segments(run.evaluation / "student.items")) == 6  # two batches of three
    assert run_evaluation(engine, numbered(12), run, batch_size=3).accuracy == 1.0
    assert len(engine.asked) == 5  # the seventh was in the journal; the eighth and the four after it were never said
    assert not (run.evaluation / "student.journal").exists()


def test_an_unfinished_completion_goes_on_where_it_was(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """And comes out as if nothing had happened; what it said is asked for once."""

    class Slow(ScriptedEngine):
        """Hands out every token; dies before the end of the second answer."""

        def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
            assert handout is not None
            for completion in super().generate(requests, handout):
                cut = len(completion.token_ids) - 3
                handout.take(Partial(completion.request_id, completion.token_ids[:cut], completion.logprobs[:cut]))
                if len(self.asked) == 2 and self.fail_after is not None:
                    raise RuntimeError("the engine died")
                yield completion

    run, whole = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    with pytest.raises(RuntimeError, match="died"):
        run_evaluation(Slow(tokenizer, echo, fail_after=9), numbered(3), run, batch_size=9)
    second = Slow(tokenizer, echo)
    run_evaluation(second, numbered(3), run, batch_size=9)
    expected = Slow(tokenizer, echo)
    run_evaluation(expected, numbered(3), whole, batch_size=9)
    assert len(second.asked) == 2 and sum(len(request.prefix_ids) > 0 for request in second.asked) == 1
    assert read_results(run, "student") == read_results(whole, "student")


def test_every_part_of_an_evaluation_counts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A watchdog takes silence for a hang: tokens of an answer that is being written count, and answers that are judged."""

    class Slow(ScriptedEngine):
        def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
            assert handout is not None
            for completion in super().generate(requests, handout):
                for share in (1, 2):
                    half = share * len(completion.token_ids) // 2
                    handout.take(Partial(completion.request_id, completion.token_ids[:half], completion.logprobs[:half]))
                yield completion

    settings, counts = Evaluate(sampling=Sampling(temperature=0.0, max_tokens=32), batch_size=2), list[Count]()
    items = [prompt(f"say {number}", str(number), verifier="math") for number in range(3)]  # which is judged by other processes
    evaluate_model(
        "student", Slow(tokenizer, lambda question: thoughtful(f"no {question}")), tokenizer, items, settings,
        RunFolder(tmp_path), counts.append,
        model_fingerprint="weights",
    )  # fmt: skip
    asked, judged = [one for one in counts if not one.unit], [one for one in counts if one.unit == "answers"]
    assert [one.done for one in asked] == [0, 0, 0, 0, 2, 2, 2, 3] and {one.total for one in asked} == {3}
    tokens = [one.tokens for one in asked if one.done < 2]
    assert sorted(set(tokens)) == tokens and tokens[0] > 0
    assert (judged[-1].done, judged[-1].total) == (3, 3)


def test_samples_are_attempts_of_their_own(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    engine, run = ScriptedEngine(tokenizer, echo), RunFolder(tmp_path)
    settings = Evaluate(sampling=Sampling(temperature=1.0, max_tokens=32), samples=3, batch_size=4)
    metrics = evaluate_model("student", engine, tokenizer, numbered(4), settings, run, model_fingerprint="weights")
    rows = read_results(run, "student")
    assert len({request.seed for request in engine.asked}) == 12
    assert [(row.prompt_id, row.sample) for row in rows] == [(one.prompt_id, n) for one in numbered(4) for n in range(3)]
    assert json.loads((run.evaluation / "student.json").read_text())["items"]["num"] == 4 and metrics.accuracy == 1.0
    again = ScriptedEngine(tokenizer, echo)
    evaluate_model("student", again, tokenizer, numbered(4), settings, run, model_fingerprint="weights")
    assert not again.asked
    with pytest.raises(ValueError, match="samples 2 of greedy decoding are all the same"):
        Evaluate(samples=2)


def test_confidence_is_the_likelihood_of_the_answer_by_the_token() -> None:
    assert answer_confidence((-9.0, -9.0, -0.5, -1.5), 2) == pytest.approx(math.exp(-1.0), abs=1e-12)
    assert answer_confidence((-0.5, math.nan, -9999.0), 0) == pytest.approx(math.exp(-10.25), abs=1e-12)
    assert answer_confidence((), 0) is None and answer_confidence((-0.5,), 1) is None


def test_what_the_engine_failed_in_is_asked_again_and_what_ended_is_not(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A server that is down answers nobody; the next start finds it well."""
    run, items = RunFolder(tmp_path), numbered(5)
    down = ScriptedEngine(tokenizer, lambda question: ("", "abort") if question in ("say 1", "say 3") else echo(question))
    figures = run_evaluation(down, items, run)
    assert figures.grades["ungraded"] == 2
    well = ScriptedEngine(tokenizer, echo)
    figures = run_evaluation(well, items, run)
    assert len(well.asked) == 2 and figures.grades == {"correct": 5}
    again = ScriptedEngine(tokenizer, echo)
    assert run_evaluation(again, items, run) == figures and not again.asked
