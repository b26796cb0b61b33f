"""One rank's part of the generation stage: ask, keep what came back, commit it in segments.

What the teacher returned is stored before anything judges it. A SIGKILL costs this rank its unfinished rows and the finished ones
of the segment that was filling (`segment_traces`, `segment_seconds`); a signal or an error costs no finished one. The next start
asks only for what is missing.
"""

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from configs.progress import Count, Report
from configs.schema import Recipe
from data.chat import Dialect, dialect_of, encode_prompt
from data.engine import Completion, Engine, ExpertLoad, Handout, Request, request_under
from data.ledger import GenerationState
from data.logits import commit_logits, to_row
from data.prompt_set import read_prompts
from data.records import Message, Trace, Turn, request_seed
from data.schema import to_table
from data.store import RunFolder, commit_segment, segments
from data.structure import count_reasoning_tokens, split_reasoning
from generate.schedule import Ask, all_asks, mean_output_tokens, pending_asks, share
from generate.telemetry import ExpertTally

log = logging.getLogger(__name__)

LOGITS_BYTES = 1 << 29  # ids of kept logits that wait in memory for their segment


class Writer:
    """Turns completions into trace records and commits them `segment_traces` at a time, or when the first has waited for
    `segment_seconds`."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        teacher_fingerprint: str,
        worker: str,
    ) -> None:
        self.recipe, self.run, self.engine, self.tokenizer = recipe, run, engine, tokenizer
        self.teacher_fingerprint, self.worker = teacher_fingerprint, worker
        self.dialect: Dialect = dialect_of(tokenizer)
        self.unwritten: list[Trace] = []
        self.waiting_since = 0.0
        self.unwritten_logits: list[dict[str, object]] = []
        self.tally = ExpertTally()

    def add(self, ask: Ask, request: Request, completion: Completion) -> None:
        if not self.unwritten:
            self.waiting_since = time.monotonic()
        self.unwritten.append(self._trace(ask, request, completion))
        self.tally.add(request, completion)
        if completion.top is not None:
            self.unwritten_logits.append(to_row(ask.trace_id, self.worker, completion.top, request.log_z_temperatures))
        logits_bytes = sum(row["ids"].nbytes for row in self.unwritten_logits)  # type: ignore[attr-defined]
        if len(self.unwritten) >= self.recipe.generate.segment_traces or logits_bytes >= LOGITS_BYTES:
            self.commit()

    def commit_if_old(self) -> bool:
        """Asked before every pass of the model: a long trace must not keep short ones waiting. False: nothing ends by it."""
        if self.unwritten and time.monotonic() - self.waiting_since >= self.recipe.generate.segment_seconds:
            self.commit()
        return False

    def commit(self) -> None:
        if not self.unwritten:
            return
        facts = {
            "trace_ids": [trace.trace_id for trace in self.unwritten],
            "finish_reasons": [trace.finish_reason for trace in self.unwritten],
            "tasks": [trace.task for trace in self.unwritten],
            "output_tokens": [trace.reasoning_tokens + trace.answer_tokens for trace in self.unwritten],
            "teacher_fingerprint": self.teacher_fingerprint,
            **self.tally.save(self.run, self.worker),
        }
        commit_logits(self.run, self.unwritten_logits, worker=self.worker)
        self.unwritten_logits = []
        commit_segment(self.run.traces, to_table(self.unwritten, Trace), worker=self.worker, facts=facts)
        self.unwritten = []

    def _trace(self, ask: Ask, request: Request, completion: Completion) -> Trace:
        ids = list(completion.token_ids)
        spoken = ids[:-1] if completion.finish_reason == "stop" and ids and ids[-1] in request.stop_ids else ids
        raw_text = self.tokenizer.decode(spoken, skip_special_tokens=False)
        assert isinstance(raw_text, str)
        parsed = split_reasoning(raw_text, prompt_opens_think=self.dialect.prompt_opens_think)
        reasoning_tokens = count_reasoning_tokens(ids, self.tokenizer, prompt_opens_think=self.dialect.prompt_opens_think)
        said: Message = {"role": "assistant", "content": parsed.answer, "reasoning_content": parsed.reasoning}
        sampling = self.recipe.generate.sampling
        return Trace(
            trace_id=ask.trace_id,
            prompt_id=ask.prompt.prompt_id,
            sample_index=ask.sample_index,
            source=ask.prompt.source,
            task=ask.prompt.task,
            prompt_version=ask.prompt.prompt_version,
            model_id=self.recipe.teacher.model,
            model_revision=self.teacher_fingerprint,
            teacher_fingerprint=self.teacher_fingerprint,
            engine=self.engine.name,
            engine_version=self.engine.version,
            turns=(
                Turn("user", request.prompt_ids, "given"),
                Turn("assistant", completion.token_ids, "generated", completion.logprobs),
            ),
            messages=(*ask.prompt.messages, said),
            tools="",
            raw_text=raw_text,
            finish_reason=completion.finish_reason,
            prompt_tokens=len(request.prompt_ids),
            reasoning_tokens=reasoning_tokens,
            answer_tokens=len(ids) - reasoning_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=request.seed,
            expert_load=_load_text(completion.expert_load),
            attempt=1,
            worker=self.worker,
            started_at=completion.started_at,
            seconds=completion.seconds,
            cost=0.0,
            teacher_licence=self.recipe.teacher.licence,
            source_licence=ask.prompt.licence,
        )


def _load_text(load: ExpertLoad | None) -> str:
    """The summary as JSON; the counts behind it go their own way, a segment at a time."""
    if load is None:
        return ""
    return json.dumps({"max_over_mean": load.max_over_mean, "entropy": load.entropy, "hottest": load.hottest})


def to_request(ask: Ask, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...], recipe: Recipe) -> Request:
    return request_under(
        recipe.generate.sampling,
        request_id=ask.trace_id,
        prompt_ids=encode_prompt(tokenizer, ask.prompt.messages),
        stop_ids=stop_ids,
        seed=request_seed(ask.trace_id, recipe.generate.seed),
        messages=ask.prompt.messages,
        task=ask.prompt.task,
        logits=recipe.generate.logits,
    )


def observed_means(run: RunFolder) -> dict[str, float]:
    """Mean output tokens per task over the committed traces, from sidecars alone."""
    tasks, tokens = [], []
    for segment in segments(run.traces) if run.traces.is_dir() else ():
        tasks += segment.facts["tasks"]
        tokens += segment.facts["output_tokens"]
    return mean_output_tokens(tasks, tokens)


def generate_share(
    recipe: Recipe, run: RunFolder, engine: Engine, tokenizer: PreTrainedTokenizerBase, teacher_fingerprint: str,
    *, rank: int, world: int, report: Report, writes: bool = True,
) -> int:  # fmt: skip
    """This rank's pending requests are answered and committed; returns how many. With writes=False another rank, which
    answers the same requests together with this one (tensor parallelism), commits them.

    The pending list is read before `engine.load`, which is collective: no rank can commit before every rank has read,
    so all ranks share out one and the same list.
    """
    asks = all_asks(
        read_prompts(run, "train"),
        recipe.generate.samples_per_prompt,
        teacher_fingerprint,
        recipe.generate.sampling,
        recipe.generate.seed,
    )
    state = GenerationState(run)
    refuse_strangers(state, asks, run)
    mine = share(pending_asks(asks, state.finish_reasons.keys(), observed_means(run)), rank, world)
    stop_ids = dialect_of(tokenizer).stop_ids(tokenizer)
    asked: dict[str, tuple[Ask, Request]] = {}

    def requests() -> Iterator[Request]:
        """Encoded as they are asked for: the prompts of a long-context run are gigabytes as ids."""
        for ask in mine:
            asked[ask.trace_id] = ask, to_request(ask, tokenizer, stop_ids, recipe)
            yield asked[ask.trace_id][1]

    worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}-r{rank}"  # pids repeat in containers
    writer = Writer(recipe, run, engine, tokenizer, teacher_fingerprint, worker)
    finished, tokens, started = 0, 0, time.perf_counter()
    engine.load()
    report(Count(0, len(mine)))
    try:
        for completion in engine.generate(requests(), Handout(stop=writer.commit_if_old)):
            ask, request = asked.pop(completion.request_id)
            if writes:
                writer.add(ask, request, completion)
            finished, tokens = finished + 1, tokens + len(completion.token_ids)
            report(Count(finished, len(mine), f"{tokens * world / (time.perf_counter() - started):.0f} tokens/s"))
    finally:
        writer.commit()  # also when it is preempted, or another rank is lost: what is finished was paid for
    log.info("rank %d: %d traces, %d tokens in %.1f s", rank, finished, tokens, time.perf_counter() - started)
    return finished


def refuse_strangers(state: GenerationState, asks: Sequence[Ask], run: RunFolder) -> None:
    """Raises UnusableInput when the folder holds traces that this recipe would never ask for."""
    wanted = {ask.trace_id for ask in asks}
    strangers = [trace_id for trace_id in state.finish_reasons if trace_id not in wanted]
    if strangers:
        raise UnusableInput(
            f"{run.traces}: {len(strangers)} of {len(state.finish_reasons)} traces belong to another teacher, "
            f"sampling or prompt set (first: {strangers[0]}); use another --run-dir"
        )
