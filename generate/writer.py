"""From completions to trace records, committed in segments."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from configs.schema import Recipe
from data.chat import Dialect, dialect_of
from data.columns import coded
from data.decoding import decode
from data.engine import Completion, Engine, ExpertLoad, Request
from data.logits import commit_logits, to_row
from data.records import Message, Trace, Turn
from data.schema import to_table
from data.store import RunFolder, commit_segment
from data.structure import count_reasoning_tokens, split_reasoning
from generate.claims import Ask
from generate.telemetry import ExpertTally

LOGITS_BYTES = 1 << 29  # ids of kept logits that wait in memory for their segment
RAW_BYTES = 1 << 28
FREE_GPU = "cpu"


class Writer:
    """Turns completions into trace records and commits them `segment_traces` at a time, or when the first has waited for
    `segment_seconds`. committed: told which asks are durable now."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        teacher_fingerprint: str,
        worker: str,
        committed: Callable[[Sequence[Ask]], None],
    ) -> None:
        self.recipe, self.run, self.engine, self.tokenizer = recipe, run, engine, tokenizer
        self.teacher_fingerprint, self.worker, self.committed = teacher_fingerprint, worker, committed
        self.dialect: Dialect = dialect_of(tokenizer)
        self.unwritten: list[Trace] = []
        self.asks: list[Ask] = []
        self.waiting_since = 0.0
        self.unwritten_logits: list[dict[str, object]] = []
        self.unwritten_bytes = 0
        self.paid_until = time.monotonic()
        self.tally = ExpertTally()
        self.failed = False

    def add(self, ask: Ask, request: Request, completion: Completion, replies: Sequence[bytes] = ()) -> None:
        if not self.unwritten:
            self.waiting_since = time.monotonic()
        self.unwritten.append(self._trace(ask, request, completion, b"".join(replies)))
        self.asks.append(ask)
        self.unwritten_bytes += sum(map(len, replies))
        self.tally.add(request, completion)
        if completion.top is not None:
            self.unwritten_logits.append(to_row(ask.trace_id, self.worker, completion.top, request.log_z_temperatures))
        logits_bytes = sum(row["ids"].nbytes for row in self.unwritten_logits)  # type: ignore[attr-defined]
        is_full = len(self.unwritten) >= self.recipe.generate.segment_traces
        if is_full or logits_bytes >= LOGITS_BYTES or self.unwritten_bytes >= RAW_BYTES:
            self.commit()

    def commit_if_old(self) -> None:
        """Asked all the time: a long trace must not keep short ones waiting."""
        if self.unwritten and time.monotonic() - self.waiting_since >= self.recipe.generate.segment_seconds:
            self.commit()

    def commit(self) -> None:
        """Not tried again by a worker that is going down because it failed: side files of the first try may stand, and the
        journal has it all."""
        if not self.unwritten or self.failed:
            return
        self.failed = True
        self.run.config.stat()  # a folder that is gone must not be made anew, with nothing in it but this segment
        traces = self._priced(self.unwritten)
        facts = {
            "trace_ids": "".join(trace.trace_id for trace in traces),
            "finish_reasons": coded([trace.finish_reason for trace in traces]),
            "errors": {str(row): trace.error for row, trace in enumerate(traces) if trace.error},
            "tasks": coded([trace.task for trace in traces]),
            "output_tokens": [trace.reasoning_tokens + trace.answer_tokens for trace in traces],
            "cost": sum(trace.cost for trace in traces),
            "teacher_fingerprint": self.teacher_fingerprint,
            **self.tally.save(self.run, self.worker),
        }
        commit_logits(self.run, self.unwritten_logits, worker=self.worker)
        commit_segment(self.run.traces, to_table(traces, Trace), worker=self.worker, facts=facts)
        self.failed = False
        asks, self.asks, self.unwritten, self.unwritten_logits, self.unwritten_bytes = self.asks, [], [], [], 0
        self.committed(asks)

    def _priced(self, traces: list[Trace]) -> list[Trace]:
        """On GPUs of our own, the time since the last commit is shared by the traces of this one, token by token."""
        now, before = time.monotonic(), self.paid_until
        self.paid_until = now
        price = price_per_second(self.recipe)
        tokens = sum(trace.reasoning_tokens + trace.answer_tokens for trace in traces)
        if not price or not tokens:
            return traces
        share = (now - before) * price / tokens
        return [dataclasses.replace(trace, cost=share * (trace.reasoning_tokens + trace.answer_tokens)) for trace in traces]

    def _trace(self, ask: Ask, request: Request, completion: Completion, raw: bytes) -> Trace:
        ids = list(completion.token_ids)
        spoken = ids[:-1] if completion.finish_reason == "stop" and ids and ids[-1] in request.stop_ids else ids
        raw_text = decode(self.tokenizer, spoken)
        parsed = split_reasoning(raw_text, prompt_opens_think=self.dialect.prompt_opens_think)
        reasoning_tokens = count_reasoning_tokens(ids, self.tokenizer, prompt_opens_think=self.dialect.prompt_opens_think)
        said: Message = {"role": "assistant", "content": parsed.answer, "reasoning_content": parsed.reasoning}
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
            tools=ask.prompt.tools,
            raw_text=raw_text,
            finish_reason=completion.finish_reason,
            prompt_tokens=len(request.prompt_ids),
            reasoning_tokens=reasoning_tokens,
            answer_tokens=len(ids) - reasoning_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=request.max_tokens,
            seed=request.seed,
            expert_load=_load_text(completion.expert_load),
            attempt=ask.attempt,
            worker=self.worker,
            started_at=completion.started_at,
            seconds=completion.seconds,
            cost=completion.cost,
            teacher_licence=self.recipe.teacher.licence,
            source_licence=ask.prompt.licence,
            error=completion.error or ("unknown" if completion.finish_reason == "abort" else ""),
            raw=raw,
        )


def price_per_second(recipe: Recipe) -> float:
    """Dollars a second of the GPUs behind one writer: a tensor-parallel group of the launch; nothing on a CPU, and nothing
    for a server, whose replies have prices of their own."""
    teacher = recipe.teacher
    if teacher.hardware.gpu == FREE_GPU or teacher.engine.type == "http":
        return 0.0
    gpus = teacher.layout.tensor_parallel if teacher.engine.type == "deepspeed" else 1
    return gpus * recipe.plan.price_per_gpu_hour / 3600


def _load_text(load: ExpertLoad | None) -> str:
    """The summary as JSON; the counts behind it go their own way, a segment at a time."""
    if load is None:
        return ""
    return json.dumps({"max_over_mean": load.max_over_mean, "entropy": load.entropy, "hottest": load.hottest})
