"""An engine as lm-evaluation-harness sees a model: text in, text or likelihoods out, every answer stored once.

Likelihoods are of plain text, in the ids of lm-eval's own Hugging Face model: with what the tokenizer writes before a text by
itself (the BOS of Llama and Gemma, whose likelihoods are others without it). A context's trailing blanks belong to the
continuation, whose ids are what the whole text has more than the context; an empty context is the tokenizer's first token.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from configs.progress import Count, Report
from configs.sampling import Sampling
from data.chat import dialect_of, render
from data.engine import Engine, Request, request_under
from data.records import Message, digest, request_seed
from student.evaluate import Harness, parse_output
from student.item_store import AttemptKey, ItemStore, Output
from student.lm_eval_store import Continuation, ScoreStore

LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens")
GENERATION_KEYS = frozenset({"until", "do_sample", "temperature", "top_p", "top_k", "min_p", *LENGTH_KEYS})
"""What a task may ask of a generation; anything else would be ignored, so it is refused."""


class EngineModel(LM):
    """generate_until, loglikelihood and loglikelihood_rolling through a loaded engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        harness: Harness,
        sampling: Sampling,
        seed: int,
        outputs: ItemStore,
        scores: ScoreStore,
        *,
        chat: bool,
        context_tokens: int,
        report: Report | None = None,
    ) -> None:
        super().__init__()
        self.engine, self.tokenizer, self.harness, self.sampling, self.seed = engine, tokenizer, harness, sampling, seed
        self.outputs, self.scores, self.chat, self.context_tokens = outputs, scores, chat, context_tokens
        self.report: Report = report or (lambda count: None)
        self._turns: dict[str, tuple[Message, ...]] = {}
        self.failure: Exception | None = None
        """What the engine or the store died of: no fault of a task."""
        self.aborted: dict[str, Counter[str]] = {}
        """Task -> how many of its requests the engine did not complete, by reason: no fault of the model."""

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failure = error
            raise

    # --- chat ----------------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The rendered turns, which are remembered: servers render their template themselves. Raises UnusableInput for a turn to
        be gone on with (gen_prefix): rendered, it would be a finished one."""
        if not add_generation_prompt:
            raise UnusableInput(
                "lm_eval: gen_prefix begins an answer, which a chat does not allow; expected chat_template: false"
            )
        turns: list[Message] = [{"role": one["role"], "content": one["content"]} for one in chat_history]
        text = render(self.tokenizer, turns, add_generation_prompt=True)
        self._turns[text] = tuple(turns)
        return text

    @property
    def tokenizer_name(self) -> str:
        return self.harness.template_sha256

    # --- generation ----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """One text a request. In chat it is what follows the reasoning, "" where that never ended; and it ends before the first
        of `until`. A request that the engine did not complete is "" and counted in `aborted`. Raises UnusableInput for settings
        that the engine does not know."""
        seen: Counter[str] = Counter()
        keys, asked = [], dict[AttemptKey, Request]()
        for instance in requests:
            context, settings = _arguments(instance)
            sampling = self.sampling_of(settings)
            ids = self.encode(context) or [self.first_id]
            name = digest("lm_eval", context, ids, sampling.model_dump(mode="json"), self.chat)
            key = AttemptKey(name, seen[name] if sampling.temperature else 0)  # repeats of a greedy request are one
            seen[name] += 1
            keys.append(key)
            asked[key] = self._request(context, ids, sampling, key)
        found = self.outputs.outputs()
        if missing := [(key, request) for key, request in asked.items() if key not in found]:
            missing.sort(key=lambda one: (-len(one[1].prompt_ids), one[0]))
            with self._answering():
                self.engine.load()
                done = tokens = 0

                def heard(new: int = 0) -> None:
                    nonlocal tokens
                    tokens += new
                    self.report(Count(done, len(missing), "lm-eval", unit="answers", tokens=tokens))

                for committed in self.outputs.complete(self.engine, missing, heard):
                    done += committed
                    heard()
            found = self.outputs.outputs()
        for key, instance in zip(keys, requests, strict=True):
            if found[key].finish_reason == "abort":
                self.aborted.setdefault(str(instance.task_name), Counter())[found[key].error or "unknown"] += 1
        return [self.text_of(found[key], stops(_arguments(one)[1])) for key, one in zip(keys, requests, strict=True)]

    def sampling_of(self, settings: Mapping[str, Any]) -> Sampling:
        """The task's settings over the recipe's. In chat the recipe's max_tokens hold, because a task's were chosen for answers
        without reasoning. `until` ends a plain text while it is written; in chat it might end the reasoning, and is cut
        afterwards."""
        if unknown := sorted(settings.keys() - GENERATION_KEYS):
            raise UnusableInput(
                f"lm_eval: generation_kwargs has {unknown[0]!r}, which is not known here; expected some of "
                f"{', '.join(sorted(GENERATION_KEYS))}"
            )
        change: dict[str, Any] = {key: settings[key] for key in ("top_p", "top_k", "min_p") if settings.get(key) is not None}
        given = [settings[key] for key in LENGTH_KEYS if settings.get(key) is not None]
        change["temperature"] = float(settings.get("temperature") or 0.0)
        if settings.get("do_sample") is False:
            change["temperature"] = 0.0
        elif settings.get("do_sample") and not change["temperature"]:
            change["temperature"] = self.sampling.temperature or 1.0
        if not self.chat:
            change |= {"stop_strings": tuple(stops(settings))} | ({"max_tokens": int(given[0])} if given else {})
        try:
            return Sampling.model_validate(self.sampling.model_dump() | change)
        except ValueError as error:
            raise UnusableInput(f"lm_eval: generation_kwargs {dict(settings)}: {' '.join(str(error).split())}") from error

    def _request(self, context: str, ids: list[int], sampling: Sampling, key: AttemptKey) -> Request:
        turns = self._turns.get(context, ({"role": "user", "content": context},))
        stop_ids = dialect_of(self.tokenizer).stop_ids(self.tokenizer)
        seed = request_seed(digest(*key), self.seed)
        return request_under(
            sampling, request_id=key.prompt_id, prompt_ids=ids, stop_ids=stop_ids, seed=seed, messages=turns, task="lm_eval"
        )

    def text_of(self, output: Output, until: Sequence[str]) -> str:
        if self.chat:
            text = parse_output(output, self.tokenizer, self.harness).answer
        else:
            ids, stop_ids = list(output.token_ids), dialect_of(self.tokenizer).stop_ids(self.tokenizer)
            said = ids[:-1] if output.finish_reason == "stop" and ids and ids[-1] in stop_ids else ids
            text = str(self.tokenizer.decode(said, skip_special_tokens=False))
        return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]

    # --- likelihoods ---------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        asked = [self.continuation(*instance.args) for instance in requests]
        with self._answering():
            found = self.scores.likelihoods(self.engine, asked, self.report)
        return [(one.logprob, one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each token once, after as much of the text before it as fits. A BOS that the tokenizer writes is one of them, as in
        lm-eval's own model."""
        windows = [self.windows(instance.args[0]) for instance in requests]
        with self._answering():
            found = iter(self.scores.likelihoods(self.engine, [window for one in windows for window in one], self.report))
        return [sum(next(found).logprob for _ in one) for one in windows]

    def continuation(self, context: str, continuation: str) -> Continuation:
        """Raises UnusableInput for a continuation without tokens, or longer than context_tokens."""
        kept = context.rstrip()
        context, continuation = kept, context[len(kept) :] + continuation
        if context:
            whole, before = self.encode(context + continuation), self.encode(context)
        else:
            whole, before = self.encode(continuation, special=False), [self.first_id]
            whole = whole if whole[:1] == before else before + whole
        scored = len(whole) - len(before)
        if not 0 < scored < self.context_tokens:
            raise UnusableInput(
                f"lm_eval: the continuation {continuation[:40]!r} has {scored} tokens; expected 1 to context_tokens - 1, "
                f"{self.context_tokens - 1}"
            )
        return Continuation(tuple(whole[-self.context_tokens :]), scored)

    def windows(self, text: str) -> list[Continuation]:
        parts = get_rolling_token_windows(self.encode(text), self.first_id, self.context_tokens - 1, context_len=1)
        return [Continuation((*before, *scored), len(scored)) for before, scored in map(make_disjoint_window, parts)]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """A rendered chat has its special tokens, and so has a text that begins with the first one."""
        first = self.tokenizer.bos_token or self.tokenizer.eos_token
        special = special and not self.chat and not (first and text.startswith(str(first)))
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]  # type: ignore[return-value]

    @property
    def first_id(self) -> int:
        """What stands before a text: BOS, else the end of the text before it."""
        first = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        if not isinstance(first, int):
            raise UnusableInput("lm_eval: the tokenizer has neither bos nor eos token, so that nothing predicts a first token")
        return first


def _arguments(instance: Instance) -> tuple[str, Mapping[str, Any]]:
    context, settings = instance.arguments
    return context, settings


def stops(settings: Mapping[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else [stop for stop in until if stop]
