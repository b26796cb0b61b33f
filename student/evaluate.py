"""One model on the held-out items: completions stored as they come (student/item_store.py), then graded, measured and written
down. Grading starts from the stored token ids every time and is repeatable."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from configs.evaluation import Evaluate, Price
from configs.progress import Count, Report
from configs.sampling import Sampling
from data.chat import dialect_of, encode_prompt
from data.confidence import FLOOR
from data.depth import places_of
from data.engine import Engine, Request, request_under
from data.records import Prompt, digest, request_seed
from data.store import RunFolder
from data.structure import count_reasoning_tokens, split_reasoning
from data.verify import VERIFIERS
from data.verify.exact import is_abstention
from data.verify.runner import LLM_JUDGE, Item, judge
from student.grades import Grade, GradedItem, grade_answer, judged_grade
from student.item_store import AttemptKey, ItemStore, Output
from student.results import ItemResult, write_results
from student.scoring import Metrics, measure
from student.unseen import origin_of

AskJudge = Callable[[Sequence[tuple[Prompt, str]]], Sequence[str]]
"""Items and answers -> what became of each, in the words of data.grading.OUTCOMES."""


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
    report: Report | None = None,
    *,
    model_fingerprint: str,
    judge_timeout_s: float = 10.0,
    price: Price | None = None,
    trained_families: Collection[str] = (),
    ask_judge: AskJudge | None = None,
) -> Metrics:
    """evaluation/NAME.json (figures and harness) and NAME.arrow (one row an item) stand in the run folder.

    The engine is loaded here, and only when some attempt has no committed completion yet; closing it is the caller's part.
    trained_families: of the training prompts; items of other families are `unseen`. ask_judge: grades answers to items whose
    verifier is a model. report: told of attempts that are done and of tokens of those that are not, then of answers judged.

    Raises:
        UnusableInput: no items, an item twice, nobody to judge, or a committed segment whose bytes changed.
    """
    check_items(items, ask_judge)
    harness = harness_of(engine, tokenizer, settings, model_fingerprint)
    store = ItemStore(run.evaluation / f"{name}.items", harness.key, segment_rows=settings.batch_size)
    outputs = store.outputs()
    attempts = [(item, AttemptKey(item.prompt_id, sample)) for item in items for sample in range(settings.samples)]
    # What an engine failed in says nothing of the model, and is asked again whenever the evaluation is: a server may be back.
    if missing := [(item, key) for item, key in attempts if key not in outputs or outputs[key].finish_reason == "abort"]:
        engine.load()
        done, tokens = len(attempts) - len(missing), 0

        def heard(new: int = 0) -> None:
            nonlocal tokens
            tokens += new
            if report is not None:
                report(Count(done, len(attempts), tokens=tokens))

        for committed in store.complete(engine, requests_for(missing, tokenizer, settings.sampling, settings.seed), heard):
            done += committed
            heard()
        outputs = store.outputs()
    answered = [(item, outputs[key]) for item, key in attempts]
    results = grade_outputs(answered, tokenizer, harness, judge_timeout_s, ask_judge, report)
    results = [
        dataclasses.replace(result, cost=cost_of(result, price), is_unseen=origin_of(item, trained_families) == "unseen")
        for result, (item, _) in zip(results, attempts, strict=True)
    ]
    metrics = measure([result.graded for result in results], seed=settings.seed)
    recorded = dataclasses.asdict(harness) | {"key": harness.key} | asked_with(items, settings, engine)
    write_results(run, name, results, metrics, recorded)
    return metrics


def slices_of(item: Prompt, trained_families: Collection[str]) -> tuple[str, ...]:
    """Those that its attempts will be in (student.grades.GradedItem.slices)."""
    places = places_of(item.evidence)
    return GradedItem(
        item.task, item.known, Grade.UNGRADED, 0, 0, "stop", twin_of=item.twin_of, depths=places.depths,
        context_tokens=places.total_tokens, is_unseen=origin_of(item, trained_families) == "unseen",
    ).slices  # fmt: skip


def asked_with(items: Sequence[Prompt], settings: Evaluate, engine: Engine) -> dict[str, object]:
    """What else a reader needs to ask the same again: attempts an item, how often a lost request was repeated, who judged.
    No part of the key: completions do not depend on it."""
    used = sorted({item.verifier for item in items if item.verifier and item.verifier != LLM_JUDGE})
    return {
        "samples": settings.samples,
        "retries": getattr(engine, "max_retries", 0),
        "verifiers": {name: VERIFIERS[name].version for name in used},
        "prompt_versions": sorted({item.prompt_version for item in items}),
    }


def check_items(items: Sequence[Prompt], ask_judge: AskJudge | None = None) -> None:
    if not items:
        raise UnusableInput(
            "evaluate: no held-out items; expected at least one prompt with split eval: add evaluate.suites to the recipe"
        )
    if ask_judge is None and any(item.verifier == LLM_JUDGE for item in items):
        raise UnusableInput(
            "data.judging: evaluation items name the verifier llm_judge and nobody is named to judge; expected "
            "data.judging: {engine: {base_urls: http://HOST:8000/v1, model: NAME}}"
        )
    seen: set[str] = set()
    for item in items:
        if item.prompt_id in seen:
            raise UnusableInput(
                f"evaluate: item {item.prompt_id} ({item.task}) stands twice in the prompt set; expected each once"
            )
        seen.add(item.prompt_id)


# --- completions -------------------------------------------------------------------------------------------------


def requests_for(
    attempts: Sequence[tuple[Prompt, AttemptKey]], tokenizer: PreTrainedTokenizerBase, sampling: Sampling, seed: int
) -> list[tuple[AttemptKey, Request]]:
    """One request an attempt, longest prompt first so that prefill batches are of like length. Its seed is its identity's."""
    stop_ids = dialect_of(tokenizer).stop_ids(tokenizer)
    requests = [
        (
            key,
            request_under(
                sampling,
                request_id=item.prompt_id,
                prompt_ids=encode_prompt(tokenizer, item.messages),  # type: ignore[arg-type]
                stop_ids=stop_ids,
                seed=request_seed(digest(*key), seed),
                messages=item.messages,
            ),
        )
        for item, key in attempts
    ]
    return sorted(requests, key=lambda one: (-len(one[1].prompt_ids), one[0]))


# --- grading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parsed:
    """One output as text. answer is "" where the output gives none, and problem then says why."""

    reasoning: str
    answer: str
    problem: str
    reasoning_tokens: int
    confidence: float | None
    """exp of the answer's mean logprob, its length-normalised likelihood (arXiv 2002.07650); None without logprobs or answer."""


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
    answer = "" if problem else split.answer.strip()
    confidence = answer_confidence(output.logprobs, reasoning_tokens) if answer else None
    return Parsed(split.reasoning, answer, problem, reasoning_tokens, confidence)


def answer_confidence(logprobs: Sequence[float], reasoning_tokens: int) -> float | None:
    said = [max(value, FLOOR) for value in logprobs[reasoning_tokens:] if not math.isnan(value)]
    return math.exp(math.fsum(said) / len(said)) if said else None


def grade_outputs(
    attempts: Sequence[tuple[Prompt, Output]],
    tokenizer: PreTrainedTokenizerBase,
    harness: Harness,
    judge_timeout_s: float,
    ask_judge: AskJudge | None = None,
    report: Report | None = None,
) -> list[ItemResult]:
    """One result an attempt, in the order given. Abstentions and empty answers never reach a verifier, nor a judge."""
    parsed = [parse_output(output, tokenizer, harness) for _, output in attempts]
    answered = [
        index
        for index, (item, _) in enumerate(attempts)
        if (answer := parsed[index].answer) and not is_abstention(answer) and item.known is not False
    ]
    by_model = [index for index in answered if attempts[index][0].verifier == LLM_JUDGE]
    by_program = [index for index in answered if attempts[index][0].verifier != LLM_JUDGE]
    scores = verifier_scores([(attempts[index][0], parsed[index].answer) for index in by_program], judge_timeout_s, report)
    score_of = dict(zip(by_program, scores, strict=True))
    said = ask_judge([(attempts[index][0], parsed[index].answer) for index in by_model]) if ask_judge and by_model else []
    grade_of = {index: judged_grade(outcome) for index, outcome in zip(by_model, said, strict=True)}
    return [
        _result(item, output, parsed[index], score_of.get(index), grade_of.get(index))
        for index, (item, output) in enumerate(attempts)
    ]


def _result(item: Prompt, output: Output, parsed: Parsed, score: float | None, judged: Grade | None) -> ItemResult:
    grade = judged or grade_answer(known=item.known, answer=parsed.answer, abstained=is_abstention(parsed.answer), score=score)
    if output.finish_reason == "abort":
        grade = Grade.UNGRADED  # the engine failed, not the model; `grades` in the figures says how often
    places = places_of(item.evidence)
    return ItemResult(
        prompt_id=item.prompt_id,
        sample=output.sample,
        task=item.task,
        known=item.known,
        question=next((message.get("content", "") for message in reversed(item.messages) if message.get("role") == "user"), ""),
        reference=item.answer,
        reasoning=parsed.reasoning,
        answer=parsed.answer,
        problem=parsed.problem,
        grade=grade.value,
        confidence=parsed.confidence,
        prompt_tokens=output.prompt_tokens,
        reasoning_tokens=parsed.reasoning_tokens,
        output_tokens=len(output.token_ids),
        finish_reason=output.finish_reason,
        cost=output.cost or None,
        is_unseen=False,
        twin_of=item.twin_of,
        depths=places.depths,
        context_tokens=places.total_tokens,
    )


def cost_of(result: ItemResult, price: Price | None) -> float | None:
    """Dollars of an attempt, at the recipe's price of this model, else as its engine said."""
    if price is None:
        return result.cost
    return (result.prompt_tokens * price.input + result.output_tokens * price.output) / 1e6


def verifier_scores(
    judged: Sequence[tuple[Prompt, str]], timeout_s: float, report: Report | None = None
) -> list[float | None]:  # fmt: skip
    """Each answer's score by its item's own verifier, or None where that timed out, crashed, or there is none."""

    def tell(count: Count) -> None:
        if report is not None:
            report(count._replace(unit="answers"))

    judgements = judge([Item(prompt, answer) for prompt, answer in judged], timeout_s=timeout_s, report=tell)
    return [None if judgement.verdict == "unjudged" else judgement.score for judgement in judgements]
