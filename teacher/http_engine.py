"""A teacher behind any OpenAI-compatible server: vLLM, SGLang, `transformers serve`. Same records, same ledger.

The server owns the chat template and the sampler; this side keeps the identity of the work. Ids are counted with the
teacher's own tokenizer over the text that came back, because servers report 0 reasoning tokens when `<think>` is part
of the prompt. Seeds are sent, but a server's text still depends on its batch: what is promised is which requests are
asked, not what they say.

To try it against a real server on this machine:

    transformers serve "$PWD/teacher/embedded" --device cpu --port 8000 &
    tracestill generate embedded -s "teacher.engine={type: http, model: $PWD/teacher/embedded}"
"""

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from configs import schema
from configs.errors import UnusableInput
from data.chat import Dialect, dialect_of
from data.engine import Completion, ExpertStats, Handout, Request, Scores
from data.records import FinishReason

ATTEMPTS = 5
FIRST_WAIT_S = 1.0
KEEP_ALIVE_S = 300.0  # httpx's 5 s is shorter than one reasoning trace: every answer would open a connection
MAX_STOPS = 4
BEYOND_OPENAI = ("top_k", "min_p", "min_tokens")  # sent only when the recipe asks: vLLM and SGLang know them
BUSY = {408, 429, 500, 502, 503, 504}


class HttpEngine:
    """Chat completions over one pooled, kept-alive client with at most `concurrency` requests in flight.

    The key comes from the environment variable that the recipe names and is never written anywhere. Logprobs stay
    empty: a server's belong to its tokens, which its text does not give back.
    """

    name = "http"

    def __init__(
        self, engine: schema.HttpEngine, model: str, tokenizer: PreTrainedTokenizerBase, *, first_wait_s: float = FIRST_WAIT_S
    ) -> None:
        self.engine, self.model, self.tokenizer, self.first_wait_s = engine, model, tokenizer, first_wait_s
        self.version = f"{engine.base_url} {model}"
        self.dialect: Dialect = dialect_of(tokenizer)
        self._client: httpx.Client | None = None

    @property
    def client(self) -> httpx.Client:
        if self._client is None:
            key = os.environ.get(self.engine.api_key_env, "")
            self._client = httpx.Client(
                base_url=self.engine.base_url.rstrip("/") + "/",
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(self.engine.timeout_s, connect=min(30.0, self.engine.timeout_s)),
                limits=httpx.Limits(max_connections=self.engine.concurrency, keepalive_expiry=KEEP_ALIVE_S),
            )
        return self._client

    def load(self) -> None:
        """Asks the server for its models, so that a wrong address or key shows before a request is paid for.

        Raises:
            UnusableInput: nobody answers there, or the key is refused.
        """
        try:
            answer = self.client.get("models")
        except httpx.TransportError as error:
            raise UnusableInput(
                f"teacher.engine.base_url {self.engine.base_url}: no answer ({error}); start the server or correct it"
            ) from error
        if answer.status_code in (401, 403):
            raise self._refusal(answer)

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        """Completions as they arrive. A request that stays unanswered after the retries comes back as `abort`. When the
        handout says stop, nothing more is asked and what is asked is waited for; a server's partial text is not ours yet."""
        wants_stop = handout.stop if handout else lambda: False
        source = itertools.takewhile(lambda _: not wants_stop(), requests)
        _ = self.client  # made here once: threads that make it at once would each have a pool
        with ThreadPoolExecutor(self.engine.concurrency, thread_name_prefix="http-teacher") as pool:
            flying: set[Future[Completion]] = {
                pool.submit(self._ask, request) for request in itertools.islice(source, self.engine.concurrency)
            }
            try:
                while flying:
                    done, flying = wait(flying, return_when=FIRST_COMPLETED)
                    flying |= {pool.submit(self._ask, request) for request in itertools.islice(source, len(done))}
                    for future in done:
                        yield future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def score(
        self, sequences: Sequence[Sequence[int]], top_logits: int = 0, log_z_temperatures: Sequence[float] = (1.0,)
    ) -> list[Scores]:
        raise UnusableInput("teacher.engine http: servers do not score given tokens; use engine type local or deepspeed")

    def expert_stats(self) -> ExpertStats | None:
        return None

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _ask(self, request: Request) -> Completion:
        started_at, started = time.time(), time.perf_counter()
        answer = self._post(chat_request(request, self.model, self.dialect.stop_tokens))
        seconds = time.perf_counter() - started
        if answer is None:
            return Completion(request.request_id, (), (), "abort", started_at, seconds)
        reason, text = read_choice(answer, self.dialect.prompt_opens_think)
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        stop = self.dialect.stop_ids(self.tokenizer)[:1] if reason == "stop" else ()
        return Completion(request.request_id, ids + stop, (), reason, started_at, seconds)

    def _post(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """The parsed answer, or None when the server stays busy or silent. Waits double between attempts; a server's
        Retry-After, in seconds, is honoured."""
        for attempt in range(ATTEMPTS):
            pause_s = self.first_wait_s * 2**attempt
            try:
                answer = self.client.post("chat/completions", json=body)
            except httpx.TransportError:
                time.sleep(pause_s)
                continue
            if answer.status_code == 200:
                return answer.json()
            if answer.status_code not in BUSY:
                raise self._refusal(answer)
            retry_after = answer.headers.get("retry-after", "")
            time.sleep(float(retry_after) if retry_after.isdigit() else pause_s)
        return None

    def _refusal(self, answer: httpx.Response) -> UnusableInput:
        said = " ".join(answer.text.split())[:200]
        remedy = (
            f"set {self.engine.api_key_env}"
            if answer.status_code in (401, 403)
            else "correct the recipe's model, sampling or prompt"
        )
        return UnusableInput(f"teacher.engine.base_url {self.engine.base_url}: HTTP {answer.status_code}: {said}; {remedy}")


def chat_request(request: Request, model: str, stop_tokens: Sequence[str]) -> dict[str, Any]:
    """The JSON body of one chat completion. The stops are sent because a server knows only what generation_config.json
    tells it, where role markers are often missing; the protocol takes four. Seeds are cut to 31 bits: some servers read
    a C int.

    Raises:
        UnusableInput: the request asks for what the protocol cannot carry.
    """
    if len(stop_tokens) + len(request.stop_strings) > MAX_STOPS and request.stop_strings:
        raise UnusableInput(
            f"sampling.stop_strings: {len(request.stop_strings)} beside the template's own {len(stop_tokens)} stops; "
            f"servers take {MAX_STOPS} in all: name fewer"
        )
    if request.loop_guard is not None:
        raise UnusableInput("sampling.loop_guard: a server cannot be told; leave it out, or use engine type deepspeed or local")
    return {
        "model": model,
        "messages": [dict(message) for message in request.messages],
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed % (1 << 31),
        "stop": [*stop_tokens, *request.stop_strings][:MAX_STOPS],
        "stream": False,
        **{name: value for name in BEYOND_OPENAI if (value := getattr(request, name))},
    }


def read_choice(answer: Mapping[str, Any], prompt_opens_think: bool) -> tuple[FinishReason, str]:
    """Finish reason and the text as the model wrote it, think tags included.

    Servers hand the reasoning over as `reasoning_content`, as `reasoning`, or inside the content. Where a parser cut it
    out, the tag between reasoning and answer is put back; no tag is invented for text that came without one, so that
    reasoning which never closed stays open. An answer without choices, or that ended for a reason of the server's own,
    is an abort.
    """
    choices = answer.get("choices") or []
    reasons: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
    reason = reasons.get(choices[0].get("finish_reason") or "", "abort") if choices else "abort"
    if reason == "abort":
        return "abort", ""
    message = choices[0]["message"]
    content = message.get("content") or ""
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    text = f"<think>{reasoning}" + (f"</think>{content}" if content else "") if reasoning else content
    return reason, text.removeprefix("<think>") if prompt_opens_think else text
