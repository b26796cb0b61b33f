"""The worker: what came back is a record, a record is committed, and nothing is asked twice."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from configs.errors import UnusableInput
from configs.load import load_recipe
from configs.schema import Recipe, Teacher
from data.engine import Completion, ExpertStats, Handout, Request, Scores
from data.ledger import GenerationState, read_ledger
from data.prompt_set import write_prompts
from data.records import Prompt, Trace, prompt_identity
from data.schema import from_table
from data.store import RunFolder, read_first_copies, seal, segments
from generate.worker import generate_share
from teacher.engines import load_tokenizer

TOKENIZER = load_tokenizer(Teacher())


def prompt(text: str) -> Prompt:
    messages = ({"role": "user", "content": text},)
    return Prompt(prompt_identity(messages, "v"), "s", "t", "v", messages, "", "", "train", None, "", "MIT")  # type: ignore[arg-type]


class Scripted:
    """Our own seam, filled by hand: says what it is told to, and fails after `fails_after` completions."""

    name, version = "scripted", "1"

    def __init__(self, text: str = "Hm.</think>5<|user|>", fails_after: int | None = None) -> None:
        self.ids = tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        self.fails_after, self.asked = fails_after, []

    def load(self) -> None: ...

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        for index, request in enumerate(requests):
            if index == self.fails_after:
                raise RuntimeError("power cut")
            self.asked.append(request.request_id)
            reason = "stop" if self.ids[-1] in request.stop_ids else "length"
            yield Completion(request.request_id, self.ids, tuple(-0.5 for _ in self.ids), reason, 1.0, 0.5)

    def score(
        self, sequences: Sequence[Sequence[int]], top_logits: int = 0, log_z_temperatures: Sequence[float] = (1.0,)
    ) -> list[Scores]:
        raise NotImplementedError

    def expert_stats(self) -> ExpertStats | None:
        return None

    def close(self) -> None: ...


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("embedded", ["generate.segment_traces=4", "generate.samples_per_prompt=2"]).recipe


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    path = write_prompts(run, [prompt(f"What is {index}?") for index in range(5)])
    seal(run, run.prompts, stage="prompts", fingerprint="f", inputs={}, files=[path], counts={"requests": 10}, seconds=0.0)
    return run


def work(
    recipe: Recipe,
    run: RunFolder,
    engine: Scripted,
    *,
    rank: int = 0,
    world: int = 1,
    teacher: str = "teacher",
    writes: bool = True,
) -> int:
    return generate_share(
        recipe, run, engine, TOKENIZER, teacher, rank=rank, world=world, report=lambda count: None, writes=writes
    )


def traces(run: RunFolder) -> list[Trace]:
    return [trace for table in read_first_copies(run.traces) for trace in from_table(table, Trace)]


def test_a_completion_becomes_a_whole_record(recipe: Recipe, run: RunFolder) -> None:
    work(recipe, run, Scripted())
    trace = traces(run)[0]
    given, generated = trace.turns
    assert given.origin == "given" and TOKENIZER.decode(list(given.token_ids)).endswith("<|assistant|><think>")  # type: ignore[union-attr]
    assert generated.origin == "generated" and len(generated.logprobs) == len(generated.token_ids)
    assert trace.raw_text == "Hm.</think>5" and trace.finish_reason == "stop"
    assert trace.messages[-1] == {"role": "assistant", "content": "5", "reasoning_content": "Hm."}
    assert (trace.reasoning_tokens, trace.answer_tokens) == (4, 2)  # H m . </think> | 5 <|user|>
    assert trace.prompt_tokens == len(given.token_ids) and trace.teacher_licence == "MIT"


def test_an_unclosed_think_block_is_kept_raw_and_has_no_answer(recipe: Recipe, run: RunFolder) -> None:
    work(recipe, run, Scripted("Hm. 5, I would say"))
    trace = traces(run)[0]
    assert trace.raw_text == "Hm. 5, I would say" and trace.finish_reason == "length"
    assert trace.messages[-1].get("content") == "" and trace.answer_tokens == 0


def test_segments_hold_the_stated_number_of_traces(recipe: Recipe, run: RunFolder) -> None:
    assert work(recipe, run, Scripted()) == 10
    assert [segment.rows for segment in segments(run.traces)] == [4, 4, 2]
    ledger = read_ledger(run)
    assert (ledger.completed, ledger.failed, ledger.pending) == (10, 0, 0)


def test_after_a_failure_only_what_is_missing_is_asked(recipe: Recipe, run: RunFolder) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        work(recipe, run, Scripted(fails_after=7))
    assert read_ledger(run).completed == 7  # a whole segment, and what was finished when it failed
    again = Scripted()
    assert work(recipe, run, again) == 3
    assert len({trace.trace_id for trace in traces(run)}) == 10 and read_ledger(run).superseded == 0
    assert work(recipe, run, Scripted()) == 0


def test_a_finished_trace_does_not_wait_for_ever_for_its_segment(recipe: Recipe, run: RunFolder) -> None:
    """Asked before every pass, as an engine does, the writer commits what is old enough."""
    patient = recipe.model_copy(update={"generate": recipe.generate.model_copy(update={"segment_seconds": 1e-9})})

    class Asking(Scripted):
        def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
            for completion in super().generate(requests, handout):
                yield completion
                assert handout is not None and not handout.stop()

    work(patient, run, Asking())
    assert [segment.rows for segment in segments(run.traces)] == [1] * 10


def test_ranks_share_and_duplicates_are_superseded(recipe: Recipe, run: RunFolder, tmp_path: Path) -> None:
    first, second = Scripted(), Scripted()
    work(recipe, run, first, rank=0, world=2)
    state = GenerationState(run)
    assert len(state.finish_reasons) == 5
    other = RunFolder(tmp_path / "other")
    other.root.mkdir()
    for name in ("prompts",):
        (other.root / name).symlink_to(run.root / name)
    work(recipe, other, second, rank=0, world=1)
    for path in other.traces.iterdir():  # a second worker that asked for everything, without having seen the first
        path.rename(run.traces / path.name)
    ledger = read_ledger(run)
    assert (ledger.completed, ledger.superseded, ledger.pending) == (10, 5, 0)
    assert len(traces(run)) == 10


def test_traces_of_another_teacher_are_refused(recipe: Recipe, run: RunFolder) -> None:
    work(recipe, run, Scripted())
    with pytest.raises(UnusableInput, match="10 of 10 traces belong to another teacher"):
        work(recipe, run, Scripted(), teacher="another")


def test_a_tensor_parallel_helper_answers_and_leaves_the_writing_to_its_first_rank(recipe: Recipe, run: RunFolder) -> None:
    helper = Scripted()
    assert work(recipe, run, helper, writes=False) == 10 and len(helper.asked) == 10
    assert read_ledger(run).completed == 0 and not run.metrics.exists()
