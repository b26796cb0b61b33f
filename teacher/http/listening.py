"""The event loop under a synchronous generator: it runs while the caller waits for the next completion, and stands still while
the caller has one in hand."""

import asyncio
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator

from configs import schema
from data.engine import Completion, Handout, Request
from teacher.http.asking import Asker
from teacher.http.asks import Asks
from teacher.http.connection import Connection
from teacher.http.exchange import Exchange, Live
from teacher.http.readers import Readers
from teacher.http.reading import Reader
from teacher.http.servers import TICK_S, Servers

PULL_S = 0.05  # a source that is slow (it claims leases on a disk) must not keep the sockets waiting longer
GLANCE_S = 0.01  # what they get between two such pulls
BACKLOG = 64  # replies that wait for their ids while their server is asked for more


class ListeningLoop(asyncio.SelectorEventLoop):
    """A loop whose clock stands still while nobody runs it: a caller that commits a segment for a minute must not find that
    every deadline has passed, with the replies waiting in the sockets."""

    def __init__(self) -> None:
        self._stood_s = 0.0
        self._stood_since: float | None = time.monotonic()
        super().__init__()

    def time(self) -> float:
        return (self._stood_since or time.monotonic()) - self._stood_s

    def run_forever(self) -> None:
        if self._stood_since is not None:
            self._stood_s += time.monotonic() - self._stood_since
            self._stood_since = None
        try:
            super().run_forever()
        finally:
            self._stood_since = time.monotonic()


class Conversation:
    """One call of `generate`: everything it opened is closed when it ends, however it ends."""

    def __init__(
        self, engine: schema.HttpEngine, model: str, servers: Servers, reader: Reader, handout: Handout, first_wait_s: float
    ) -> None:
        self.engine, self.servers, self.handout = engine, servers, handout
        self.loop = ListeningLoop()
        try:
            self.connection = self.loop.run_until_complete(self._connect())
        except BaseException:
            self.loop.close()
            raise
        self.readers = Readers(self.loop)
        self.done: deque[Completion] = deque()
        self.live: dict[asyncio.Task[None], Live] = {}
        self.failure: BaseException | None = None
        self._listening, self._looked_at = False, 0.0
        self.exchange = Exchange(engine, model, servers, self.connection, reader, self.readers, handout)
        self.exchange.room_opened = self._rouse
        self.asker = Asker(Asks(engine, model, reader), self.exchange, self._deliver, first_wait_s)
        self.watch = self.loop.create_task(servers.watch(self.connection))
        self.watch.add_done_callback(self._watched)

    async def _connect(self) -> Connection:
        return Connection(self.engine)

    def completions(self, requests: Iterable[Request]) -> Generator[Completion, None, None]:
        """As they come. When the caller wants to stop, or something went wrong for good, nothing more is asked; what is in
        flight has drain_s to end, and what has not by then is handed out as far as it came."""
        source, exhausted, drained_at = iter(requests), False, float("inf")
        while True:
            if (self.handout.stop() or self.failure) and not self.asker.stopping:
                drained_at = time.monotonic() + self.engine.drain_s
                self._stop_asking()
            if not self.asker.stopping:
                exhausted = self._pull(source)
            self._give_up_the_late()
            if self.live:
                self._listen(TICK_S if exhausted or self.asker.stopping or not self._room() else GLANCE_S)
            if time.monotonic() >= drained_at:
                self._cancel([task for task, live in self.live.items() if not live.reading])
            while self.done:
                yield self.done.popleft()
            if not self.live and (exhausted or self.asker.stopping):
                break
        if self.failure:
            raise self.failure
        if not self.asker.stopping:
            yield from self.servers.withheld()

    def close(self) -> None:
        """Cancels what is left, and leaves no task, no socket and no thread behind."""
        self.exchange.closed = True
        self._cancel([*self.live, self.watch])
        self._cancel(list(asyncio.all_tasks(self.loop)))
        self.loop.run_until_complete(self.connection.close())
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.readers.close()
        self.loop.close()
        self.servers.forget_run()

    # --- in and out ---------------------------------------------------------------------------------------------------

    def _room(self) -> int:
        """How many more requests may be pulled: as many as servers would take at once, and a few whose reply only waits to be
        parsed."""
        return self.servers.capacity - (len(self.live) - min(BACKLOG, self.exchange.reading))

    def _pull(self, source: Iterator[Request]) -> bool:
        """Starts requests while there is room; True when there are no more for now."""
        room, until = self._room(), time.monotonic() + PULL_S
        while room > 0:
            try:
                request = next(source)
            except StopIteration:
                return True
            except Exception as error:  # the caller's own: it gets it back when what is paid for has come in
                self.failure = error
                return False
            self._start(request)
            room -= 1
            if time.monotonic() > until:
                break
        return False

    def _start(self, request: Request) -> None:
        live = Live(request, self.loop.time(), time.time())
        task = self.loop.create_task(self.asker.complete(live))
        self.live[task] = live
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self.live[task]
        if not task.cancelled() and (error := task.exception()):
            self.failure = self.failure or error
        self._rouse()

    def _watched(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self.failure = self.failure or error
            self._rouse()

    def _deliver(self, completion: Completion) -> None:
        self.done.append(completion)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _give_up_the_late(self) -> None:
        """Ends exchanges whose server is silent for longer than timeout_s, and requests past their deadline. Looked at once a
        tick: timers of their own cost each request as much as its headers."""
        now = self.loop.time()
        if now < self._looked_at + TICK_S:
            return
        self._looked_at = now
        for task, live in self.live.items():
            if live.reading:
                continue  # it is here, it only has to be parsed
            if now > live.started + self.engine.deadline_s:
                live.late = "deadline"
            elif live.arriving is not None and now > live.arriving.heard_at + self.engine.timeout_s:
                live.late = "silence"
            else:
                continue
            task.cancel()

    def _listen(self, seconds: float) -> None:
        """Runs the loop until there is something to do outside it, at most so long."""
        timer = self.loop.call_later(seconds, self.loop.stop)
        self._listening = True
        try:
            self.loop.run_forever()
        finally:  # a KeyboardInterrupt comes out here
            self._listening = False
            timer.cancel()

    def _rouse(self) -> None:
        """There is something for the caller, or room for one more request."""
        if self._listening:
            self.loop.stop()

    def _stop_asking(self) -> None:
        """Those that wait for a server or for their next attempt go back to the caller now; so does what streams have said."""
        self.asker.stopping = True
        waiting = [task for task, live in self.live.items() if live.arriving is None and not live.reading]
        for live in self.live.values():
            self.exchange.hand_out(live)
        self._cancel(waiting)

    def _cancel(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks))
