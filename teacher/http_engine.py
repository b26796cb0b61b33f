"""A teacher behind any OpenAI-compatible server: vLLM, SGLang, `transformers serve`. Same records, same ledger.

The server owns the sampler and, in chat, the template; this side keeps the identity of the work. Ids are the server's where it
returns them, else those of its text by the teacher's own tokenizer, because servers report 0 reasoning tokens when `<think>` is
part of the prompt. Seeds are sent, but a server's text still depends on its batch: what is promised is which requests are
asked, not what they say.

To try it against a real server on this machine:

    transformers serve "$PWD/teacher/embedded" --device cpu --port 8000 &
    tracestill generate embedded -s "teacher.engine={type: http, model: $PWD/teacher/embedded}"
"""

import asyncio
import logging
import time
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from configs import schema
from configs.errors import UnusableInput
from data.engine import OTHER_MODEL, Completion, ExpertStats, Handout, Request, Scores
from teacher.http.connection import Connection
from teacher.http.listening import Conversation
from teacher.http.raw import last_reply, url_of
from teacher.http.reading import Prices, Reader
from teacher.http.servers import Servers

log = logging.getLogger(__name__)

FIRST_WAIT_S = 1.0


class HttpEngine:
    """Completions of one or several servers, with at most `concurrency` requests in flight over kept-alive connections.

    The key comes from the environment variable that the recipe names and is never written anywhere.
    """

    name = "http"

    def __init__(
        self, engine: schema.HttpEngine, model: str, tokenizer: PreTrainedTokenizerBase, *, first_wait_s: float = FIRST_WAIT_S
    ) -> None:
        self.engine, self.model, self.first_wait_s = engine, model, first_wait_s
        self.version = f"{' '.join((*engine.urls, engine.servers_file)).strip()} {model}"
        self.servers = Servers(engine, model)
        self.reader = Reader(tokenizer, Prices(engine.price_input_per_million, engine.price_output_per_million))

    @property
    def max_retries(self) -> int:
        """Times that a request whose reply was lost or unreadable is asked again."""
        return self.engine.attempts - 1

    def remember_in(self, folder: Path) -> None:
        """Which model each server of the run has is kept there: one that serves another tomorrow is refused tomorrow too."""
        self.servers.remember_in(folder)

    def load(self) -> None:
        """Asks every server for its models, so that a wrong address, key or name shows before a request is paid for. One
        healthy server is enough.

        Servers that register in a folder come and go with their jobs: one of them is waited for as long as a request would be.

        Raises:
            UnusableInput: nobody usable answers, or a key is refused.
        """
        patience_s = self.engine.deadline_s if Path(self.engine.servers_file or "/dev/null").is_dir() else 0.0
        deadline = time.monotonic() + patience_s
        while True:
            if self.engine.servers_file:
                self.servers.read_file()
            asyncio.run(self._look())
            if self.servers.healthy or time.monotonic() >= deadline:
                break
            log.warning("waiting for a server in %s: %s", self.engine.servers_file, self.servers.describe())
            time.sleep(min(self.engine.health_s, patience_s))
        if not self.servers.healthy:
            key = "servers_file" if self.engine.servers_file and not self.engine.base_urls else "base_urls"
            raise UnusableInput(
                f"teacher.engine.{key}: no answer ({self.servers.describe()}); start a server or correct the list"
            )

    async def _look(self) -> None:
        connection = Connection(self.engine)
        try:
            await self.servers.probe_all(connection)
        finally:
            await connection.close()

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Generator[Completion, None, None]:
        """Completions as they arrive, one per request. `requests` is pulled from only when there is room.

        A request that cannot be completed is an `abort` whose error says why: `busy`, `timed_out`, `no_server`, `refused`,
        `bad_reply`, `torn`, `content_filter`, `tool_call`. What was paid for was given to handout.keep before. After
        handout.stop nothing is asked; what is in flight has drain_s, and the rest has no completion: it is still to be done.

        Raises:
            UnusableInput: every request would fail: the key, the model, or what the recipe asks is refused.
        """
        conversation = Conversation(self.engine, self.model, self.servers, self.reader, handout or Handout(), self.first_wait_s)
        try:
            yield from conversation.completions(requests)
        finally:
            conversation.close()

    def read(self, request: Request, raw: bytes) -> Completion:
        """What `raw`, as handout.keep was given it or as a trace holds it, holds for `request`; no network. Bytes that cannot be
        read are an abort (`bad_reply`); a stream without an end is one too (`torn`), and so is a reasoning phase that was to be
        continued (`unfinished`), both with the ids so far. What another model said than the one that the run remembers of that
        server is `other_model`: it was kept before anybody had read who it came from."""
        last = last_reply(raw)
        reading = self.reader.read(request, last)
        if reading.model and self.servers.is_another(url_of(last), reading.model):
            completion = reading.completion
            return Completion(
                request.request_id, (), (), "abort", completion.started_at, completion.seconds, error=OTHER_MODEL,
                cost=completion.cost,
            )  # fmt: skip
        return reading.completion

    def price(self, prompt_tokens: int, output_tokens: int) -> float:
        """Dollars that a server bills for them."""
        return self.reader.prices.of(prompt_tokens, output_tokens)

    def score(
        self, sequences: Sequence[Sequence[int]], top_logits: int = 0, log_z_temperatures: Sequence[float] = (1.0,)
    ) -> list[Scores]:
        raise UnusableInput("teacher.engine http: servers do not score given tokens; use engine type local or deepspeed")

    def expert_stats(self) -> ExpertStats | None:
        return None

    def close(self) -> None:
        """Nothing is open between two calls of `generate`."""
