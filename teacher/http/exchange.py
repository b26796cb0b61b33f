"""One ask at one server: sent, kept before anything looks at it, read; or the reason why there is nothing to read."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from configs import schema
from data.engine import Handout, Partial, Request
from teacher.http.asks import PATHS, Ask, headers_of
from teacher.http.connection import Answer, Arriving, Connection, Heard, Lost, Unreachable
from teacher.http.raw import Line, pack
from teacher.http.readers import Readers
from teacher.http.reading import Output, Reader, Reading
from teacher.http.replies import EventStream, Reply, error_words
from teacher.http.servers import DENIED, Server, Servers, denied
from teacher.http.waits import retry_after_s

BUSY = {408, 409, 425, 429}
"""With every 5xx: a later ask may succeed, and nothing was paid for."""


@dataclass(slots=True, eq=False)
class Live:
    """A request that is neither completed nor given up. started: on the loop's clock; started_at: Unix time.

    given, given_logprobs: what finished asks added to its prefix. asks: sent so far; paid: of them, those that may be billed
    and brought nothing. error: why the last failed; server: who was asked. arriving, stream: of the ask that is being
    answered, if one is; heard: pieces of it that the stream has seen; handed: tokens of it that were handed out. reading: all
    bytes are there and wait to be parsed. late: why its task was cancelled, if it was not for the run's sake.
    """

    request: Request
    started: float
    started_at: float
    given: tuple[int, ...] = ()
    given_logprobs: tuple[float, ...] = ()
    asks: int = 0
    paid: int = 0
    failures: int = 0
    cost: float = 0.0
    error: str = ""
    server: Server | None = None
    ask: Ask | None = None
    arriving: Arriving | None = None
    stream: EventStream | None = None
    heard: int = 0
    handed: int = 0
    reading: bool = False
    late: Literal["", "silence", "deadline"] = ""

    def catch_up(self) -> Reply | None:
        """What the stream that is coming in says so far; None when none is."""
        if self.arriving is None or not self.arriving.streamed or self.arriving.status != 200:
            return None
        self.stream = self.stream or EventStream()
        for piece in self.arriving.pieces[self.heard :]:
            self.stream.feed(piece)
        self.heard = len(self.arriving.pieces)
        return self.stream.reply


class Failed(NamedTuple):
    """Nothing to read, in one countable word: `busy`, `no_server`, `timed_out`, or `refused`, which is for good."""

    error: str


class Exchange:
    """What the exchanges of one run share."""

    def __init__(
        self, engine: schema.HttpEngine, model: str, servers: Servers, connection: Connection, reader: Reader, readers: Readers,
        handout: Handout,
    ) -> None:  # fmt: skip
        self.engine, self.model, self.servers, self.connection = engine, model, servers, connection
        self.reader, self.readers, self.handout = reader, readers, handout
        self.reading = 0
        """Replies that are kept and wait to be parsed."""
        self.room_opened: Callable[[], None] = lambda: None
        """Called when a server has answered: it can be asked for more while the answer is parsed."""
        self.closed = False
        """The caller is gone: hand out nothing any more."""

    async def once(self, live: Live, ask: Ask) -> Reading | Failed:
        """The reading of one reply, or why there is none. live.error is the same word, for whoever is interrupted later.

        Raises:
            UnusableInput: the key is refused, or another model answers than before.
        """
        live.server = server = await self.servers.acquire()
        live.asks += 1
        try:
            found = await self._post(live, ask, server)
        finally:
            self.servers.release(server)
        if isinstance(found, Failed):
            live.error = found.error
            return found
        return await self._read(live, ask, server, found)

    async def _post(self, live: Live, ask: Ask, server: Server) -> Answer | Failed:
        """The reply of status 200, or what came instead; the server's window learns of it."""
        live.ask, live.arriving, live.stream, live.heard, live.handed = ask, (arriving := Arriving()), None, 0, 0
        url, headers = server.path(PATHS[self.engine.api]), headers_of(live.request, self.model)
        heard = self._listener(live) if self.engine.stream and self.handout.every_tokens else None
        loop, started_at = asyncio.get_running_loop(), time.time()
        sent_at = arriving.heard_at = loop.time()
        try:
            return self._weigh(server, await self.connection.post(url, ask.body, headers, arriving, heard))
        except Unreachable as error:
            self.servers.down(server, str(error))
            return Failed("no_server")
        except Lost as error:
            server.why = str(error)
            server.window.complained(sent_at, loop.time())
            return Failed("no_server")
        except asyncio.CancelledError:
            if self.closed:
                raise
            cut = arriving.cut(started_at, sent_at, loop.time())
            if live.late:
                live.error, server.why = "timed_out", "silent"
                server.window.complained(sent_at, loop.time())
            if live.late == "silence":
                live.late = ""
                task = asyncio.current_task()
                assert task is not None
                task.uncancel()
                return cut or Failed("timed_out")
            if cut:  # it was paid for
                raw = self._pack(live, ask, server, cut)
                self.handout.keep(live.request.request_id, raw)
                if live.late:
                    live.cost += self.reader.read(live.request, raw).completion.cost
            self.hand_out(live)
            raise
        finally:
            live.arriving = None

    def _weigh(self, server: Server, answer: Answer) -> Answer | Failed:
        now = asyncio.get_running_loop().time()
        if answer.status == 200:
            server.window.answered(answer.sent_at, now, len(answer.body))
            return answer
        if answer.status in DENIED:
            raise denied(server, answer, self.engine, self.connection)
        server.why = f"HTTP {answer.status}: {error_words(self.connection.without_key(answer.body))}"
        if answer.status in BUSY or answer.status >= 500:
            server.window.complained(answer.sent_at, now)
            if wait_s := retry_after_s(answer.retry_after, time.time()):
                self.servers.pause(server, wait_s)
            return Failed("busy")
        return Failed("refused")

    async def _read(self, live: Live, ask: Ask, server: Server, answer: Answer) -> Reading:
        """Kept, then parsed and tokenised in a thread."""
        raw = self._pack(live, ask, server, answer)
        self.handout.keep(live.request.request_id, raw)
        live.reading = True
        self.reading += 1
        self.room_opened()
        try:
            reading = await self.readers.run(lambda: self.reader.read(live.request, raw))
        finally:
            live.reading = False
            self.reading -= 1
        self.servers.learn(server, "model", reading.model)
        return reading

    def _pack(self, live: Live, ask: Ask, server: Server, answer: Answer) -> bytes:
        line = Line(
            server.path(PATHS[self.engine.api]), answer.status, answer.started_at, answer.seconds, live.asks, answer.streamed,
            answer.torn, ask.given, ask.given_logprobs, ask.phase,
        )  # fmt: skip
        return pack(line, self.connection.without_key(answer.body))

    # --- what is there before the end ---------------------------------------------------------------------------------

    def _listener(self, live: Live) -> Heard:
        every = self.handout.every_tokens

        async def heard() -> None:
            reply = live.catch_up()
            if reply is not None and reply.tokens - live.handed >= every:
                live.handed = reply.tokens
                partial = await self.readers.run(lambda: self._partial(live))
                if partial is not None and not self.closed:
                    self.handout.take(partial)

        return heard

    def hand_out(self, live: Live) -> None:
        """The output so far goes to the caller, if there is more than the request came with."""
        partial = None if self.closed else self._partial(live)
        if partial is not None:
            self.handout.take(partial)

    def _partial(self, live: Live) -> Partial | None:
        ask, reply = live.ask, live.catch_up()
        if ask is None or reply is None or not reply.choices:
            ids, logprobs = (*live.request.prefix_ids, *live.given), (*live.request.prefix_logprobs, *live.given_logprobs)
            if not live.given:
                return None
        else:
            if self.engine.api == "completions" and not reply.ids:
                return None  # a text's last ids need not be the model's, and completions are continued by ids
            line = Line("", 200, 0.0, 0.0, live.asks, True, True, ask.given, ask.given_logprobs)
            try:
                ids, logprobs = self.reader.output(line, reply)
            except (ValueError, TypeError):
                return None  # the reader will call the whole reply bad
        return Partial(live.request.request_id, *Output(ids, logprobs).fitted())
