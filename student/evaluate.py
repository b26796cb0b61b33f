"""One model on the held-out items: completions committed as they come, then graded, measured and written down.

What the engine was paid for is stored raw before anything parses it. A batch of completions is a committed segment in
runs/NAME/evaluation/MODEL.items/, so a SIGKILL costs at most one batch and what was in flight; grading starts from the
stored token ids every time and is repeatable. Items are keyed by the harness (model fingerprint, engine, template,
sampling, seed): completions of another model or another template are never mixed in, they are simply not seen.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from configs.evaluation import Evaluate
from configs.sampling import Sampling
from data.chat import dialect_of, encode_prompt
from data.engine import Completion, Engine, Request, request_under
from data.records import FinishReason, Prompt, digest, request_seed
from data.store import (
    RunFolder,
    commit_segment,
    read_first_copies,
)
from data.structure import count_reasoning_tokens, split_reasoning
from data.verify.exact import is_abstention
from data.verify.runner import Item, judge
from student.results import ItemResult, write_results
from student.scoring import Grade, GradedItem, Metrics, grade_answer, measure

Progress = Callable[[int, int], None]
"""Called with (items done, items in all)."""

OUTPUT = pa.schema(
    [
        ("item_id", pa.string()),
        ("prompt_id", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("seconds", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Harness:
    """Everything an item's completion depends on besides its prompt. Two equal keys promise comparable figures."""

    model_fingerprint: str
    engine: str
    engine_version: str
    template_sha256: str
    stop_tokens: tuple[str, ...]
    prompt_opens_think: bool
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    sampling: str = ""
    """The rest of the sampling section as JSON, "" when none of it is set."""

    @property
    def key(self) -> str:
        return digest(dataclasses.asdict(self))


@dataclass(frozen=True, slots=True)
class Output:
    """What the model wrote for one item, raw. token_ids end with the stop token when finish_reason is `stop`."""

    prompt_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seconds: float


def harness_of(engine: Engine, tokenizer: PreTrainedTokenizerBase, settings: Evaluate, model_fingerprint: str) -> Harness:
    dialect = dialect_of(tokenizer)
    plain = Sampling()
    rest = settings.sampling.model_copy(
        update={"temperature": plain.temperature, "top_p": plain.top_p, "max_tokens": plain.max_tokens}
    )
    return Harness(
        model_fingerprint=model_fingerprint,
        engine=engine.name,
        engine_version=engine.version,
        template_sha256=hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        stop_tokens=dialect.stop_tokens,
        prompt_opens_think=dialect.prompt_opens_think,
        temperature=settings.sampling.temperature,
        top_p=settings.sampling.top_p,
        max_tokens=settings.sampling.max_tokens,
        seed=settings.seed,
        sampling=rest.model_dump_json(exclude_defaults=True) if rest != Sampling() else "",
    )


def evaluate_model(
    name: str,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Prompt],
    settings: Evaluate,
    run: RunFolder,
    progress: Progress | None = None,
    *,
    model_fingerprint: str,
    judge_timeout_s: float = 10.0,
) -> Metrics:
    """evaluation/NAME.json (figures and harness) and NAME.arrow (one row an item) stand in the run folder.

    The engine is loaded here, and only when some item has no committed completion yet; closing it is the caller's part.

    Raises:
        UnusableInput: no items, an item twice, or a committed segment whose bytes changed.
    """
    check_items(items)
    harness = harness_of(engine, tokenizer, settings, model_fingerprint)
    folder = run.evaluation / f"{name}.items"
    outputs = read_outputs(folder, harness)
    if missing := [item for item in items if item.prompt_id not in outputs]:
        engine.load()
        requests = requests_for(missing, tokenizer, settings.sampling, settings.seed)
        done = len(items) - len(missing)
        for batch in committed_batches(engine.generate(requests), folder, harness, name, settings.batch_size):
            done += batch
            if progress is not None:
                progress(done, len(items))
        outputs = read_outputs(folder, harness)
    results = grade_outputs(items, outputs, tokenizer, harness, judge_timeout_s)
    metrics = measure([_graded(result) for result in results], seed=settings.seed)
    write_results(run, name, results, metrics, dataclasses.asdict(harness) | {"key": harness.key})
    return metrics


def check_items(items: Sequence[Prompt]) -> None:
    if not items:
        raise UnusableInput(
            "evaluate: no held-out items; expected at least one prompt with split eval: add evaluate.suites to the recipe"
        )
    seen: set[str] = set()
    for item in items:
        if item.prompt_id in seen:
            raise UnusableInput(
                f"evaluate: item {item.prompt_id} ({item.task}) stands twice in the prompt set; expected each once"
            )
        seen.add(item.prompt_id)


# --- completions -------------------------------------------------------------------------------------------------


def item_identity(prompt_id: str, harness: Harness) -> str:
    return digest(prompt_id, harness.key)


def requests_for(items: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, sampling: Sampling, seed: int) -> list[Request]:
    """One request an item, longest prompt first so that prefill batches are of like length. Its seed is its identity's."""
    stop_ids = dialect_of(tokenizer).stop_ids(tokenizer)
    requests = [
        request_under(
            sampling,
            request_id=item.prompt_id,
            prompt_ids=encode_prompt(tokenizer, item.messages),  # type: ignore[arg-type]
            stop_ids=stop_ids,
            seed=request_seed(item.prompt_id, seed),
            messages=item.messages,
        )
        for item in items
    ]
    return sorted(requests, key=lambda request: (-len(request.prompt_ids), request.request_id))


def committed_batches(completions: Iterable[Completion], folder: Path, harness: Harness, worker: str, size: int) -> Iterator[int]:
    """Commits `size` completions at a time and yields how many; what is in hand when the engine fails is committed too."""
    batch: list[Completion] = []
    try:
        for completion in completions:
            batch.append(completion)
            if len(batch) == size:
                commit_outputs(folder, batch, harness, worker)
                batch.clear()
                yield size
    finally:
        if batch:
            commit_outputs(folder, batch, harness, worker)
    if batch:
        yield len(batch)


def commit_outputs(folder: Path, batch: Sequence[Completion], harness: Harness, worker: str) -> None:
    rows = [
        {
            "item_id": item_identity(completion.request_id, harness),
            "prompt_id": completion.request_id,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "seconds": completion.seconds,
        }
        for completion in batch
    ]
    commit_segment(folder, pa.Table.from_pylist(rows, schema=OUTPUT), worker=worker, facts={"harness": harness.key})


def read_outputs(folder: Path, harness: Harness) -> dict[str, Output]:
    """prompt_id -> its first committed completion under this harness, hashes verified."""
    found: dict[str, Output] = {}
    if not folder.is_dir():
        return found
    for table in read_first_copies(folder, key="item_id"):
        for row in table.to_pylist():
            if row.pop("item_id") == item_identity(row["prompt_id"], harness):
                found[row["prompt_id"]] = Output(**row | {"token_ids": tuple(row["token_ids"])})
    return found


# --- grading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parsed:
    """One output as text. answer is "" where the output gives none, and problem then says why."""

    reasoning: str
    answer: str
    problem: str
    reasoning_tokens: int


def parse_output(output: Output, tokenizer: PreTrainedTokenizerBase, harness: Harness) -> Parsed:
    """Splits the text at its think tags. Only an output that ended by itself has an answer: what stands after
    `</think>` in a truncated one may be half of it ("I don't kn")."""
    stop_ids = dialect_of(tokenizer).stop_ids(tokenizer)
    ids = list(output.token_ids)
    spoken = ids[:-1] if output.finish_reason == "stop" and ids and ids[-1] in stop_ids else ids
    text = tokenizer.decode(spoken, skip_special_tokens=False)
    assert isinstance(text, str)
    split = split_reasoning(text, prompt_opens_think=harness.prompt_opens_think)
    reasoning_tokens = count_reasoning_tokens(spoken, tokenizer, prompt_opens_think=harness.prompt_opens_think)
    problem = split.problem or {"stop": "", "length": "truncated", "loop": "looped", "abort": "aborted"}[output.finish_reason]
    return Parsed(split.reasoning, "" if problem else split.answer.strip(), problem, reasoning_tokens)


def grade_outputs(
    items: Sequence[Prompt],
    outputs: Mapping[str, Output],
    tokenizer: PreTrainedTokenizerBase,
    harness: Harness,
    judge_timeout_s: float,
) -> list[ItemResult]:
    """One result an item, in the items' order. Abstentions and empty answers never reach a verifier."""
    parsed = {item.prompt_id: parse_output(outputs[item.prompt_id], tokenizer, harness) for item in items}
    judged = [
        item
        for item in items
        if (answer := parsed[item.prompt_id].answer) and not is_abstention(answer) and item.known is not False
    ]
    scores = verifier_scores([(item, parsed[item.prompt_id].answer) for item in judged], judge_timeout_s)
    score_of = dict(zip((item.prompt_id for item in judged), scores, strict=True))
    return [_result(item, outputs[item.prompt_id], parsed[item.prompt_id], score_of.get(item.prompt_id)) for item in items]


def _result(item: Prompt, output: Output, parsed: Parsed, score: float | None) -> ItemResult:
    grade = grade_answer(known=item.known, answer=parsed.answer, abstained=is_abstention(parsed.answer), score=score)
    if output.finish_reason == "abort":
        grade = Grade.UNGRADED  # the engine failed, not the model; `grades` in the figures says how often
    return ItemResult(
        prompt_id=item.prompt_id,
        task=item.task,
        known=item.known,
        question=next((message.get("content", "") for message in reversed(item.messages) if message.get("role") == "user"), ""),
        reference=item.answer,
        reasoning=parsed.reasoning,
        answer=parsed.answer,
        problem=parsed.problem,
        grade=grade.value,
        reasoning_tokens=parsed.reasoning_tokens,
        output_tokens=len(output.token_ids),
        finish_reason=output.finish_reason,
    )


def _graded(result: ItemResult) -> GradedItem:
    return GradedItem(
        result.task, result.known, Grade(result.grade), result.reasoning_tokens, result.output_tokens, result.finish_reason
    )


def verifier_scores(judged: Sequence[tuple[Prompt, str]], timeout_s: float) -> list[float | None]:
    """Each answer's score by its item's own verifier, or None where that timed out, crashed, or there is none."""
    judgements = judge([Item(prompt, answer) for prompt, answer in judged], timeout_s=timeout_s)
    return [None if judgement.verdict == "unjudged" else judgement.score for judgement in judgements]
