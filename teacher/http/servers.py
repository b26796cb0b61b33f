"""Which server is asked next: those that are healthy, the least loaded first; and what each says it is."""

import asyncio
import hashlib
import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from configs import schema
from configs.engines import server_url_problem
from configs.errors import UnusableInput
from data.engine import Completion
from data.store import read_json, write_json
from teacher.http.connection import Answer, Connection, Lost, Silent, Unreachable
from teacher.http.replies import error_words, listed_models
from teacher.http.window import Window

TICK_S = 0.1  # how often `stop` is asked at least

log = logging.getLogger(__name__)

GONE = (502, 503, 504)  # what a gateway says of a server behind it; any other answer to GET models is a sign of life
DENIED = (401, 402, 403)
MISSES = 2  # looks in vain before a server that answered is taken out: under load one may come late
PROBE_S = 10.0
FRESH_S = 60.0
"""Age of a server's file in a folder of them: twelve of its beats."""
REFUSALS = 8


@dataclass(slots=True, eq=False)
class Server:
    """One base URL. answered: it has completed a request. withheld: refused requests of a server that has completed none, which
    may be the recipe's fault and not theirs. resume_at: loop time before which it asked to be left alone."""

    url: str
    window: Window
    healthy: bool = True
    listed: bool = True
    why: str = ""
    misses: int = 0
    model: str = ""
    root: str = ""
    answered: bool = False
    withheld: list[Completion] = field(default_factory=list)
    resume_at: float = 0.0

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def usable(self, now: float) -> bool:
        return self.healthy and self.listed and self.window.room > 0 and now >= self.resume_at


def changed(url: str, was: str, now: str) -> UnusableInput:
    return UnusableInput(
        f"teacher.engine.base_urls {url}: its model changed during the run: was {was!r}, is {now!r}; "
        "serve the first again, or start another run (--run-dir) with the new one"
    )


class Servers:
    """All servers of a recipe, for the life of an engine."""

    def __init__(self, engine: schema.HttpEngine, model: str) -> None:
        self.engine, self.model = engine, model
        self.all: dict[str, Server] = {}
        self.in_flight = 0
        self._waiting: deque[asyncio.Future[Server]] = deque()
        self._memory: Path | None = None
        self._adopt(engine.urls)

    # --- who they are ------------------------------------------------------------------------------------------------

    def remember_in(self, folder: Path) -> None:
        """What the run's servers turned out to be is written down there, and was, by workers before this one."""
        self._memory = folder
        for server in self.all.values():
            self._recall(server)

    def _recall(self, server: Server) -> None:
        server.model, server.root = self._told(server.url, "model"), self._told(server.url, "root")

    def _told(self, url: str, what: Literal["model", "root"]) -> str:
        """By any worker of the run so far; "" while nobody has."""
        path = None if self._memory is None else self._memory / _file_of(url, what)
        return str(read_json(path).get(what, "")) if path is not None and path.is_file() else ""

    def learn(self, server: Server, what: Literal["model", "root"], now: str) -> None:
        """What a reply says answered (`model`), what a list says the model's folder is (`root`). Aliases are fine, as long as
        they stay the same.

        Raises:
            UnusableInput: it is another than before, for this worker or for any other of the run.
        """
        was = getattr(server, what)
        if now and not was:
            was = self._tell(server.url, what, now)
            setattr(server, what, was)
        if now and now != was:
            raise changed(server.url, was, now)

    def _tell(self, url: str, what: Literal["model", "root"], now: str) -> str:
        """What the run remembers from now on: the first worker's word."""
        if self._memory is None:
            return now
        try:
            write_json(self._memory / _file_of(url, what), {"url": url, what: now}, replace=False)
        except FileExistsError:
            return self._told(url, what)
        return now

    def is_another(self, url: str, model: str) -> bool:
        """Whether the run remembers another model of the server that was asked at `url`."""
        base = url.removesuffix("/chat/completions").removesuffix("/completions")
        server = self.all.get(base)
        was = server.model if server is not None and server.model else self._told(base, "model")
        return bool(was) and was != model

    # --- who is there ------------------------------------------------------------------------------------------------

    def read_file(self) -> None:
        """The servers that servers_file names now, beside the recipe's. One that is no longer named gets nothing new. Of a
        folder, those of its *.url files that were renewed within FRESH_S.

        Raises:
            UnusableInput: there is no such file, or a line of it is no address.
        """
        path = Path(self.engine.servers_file)
        try:
            text = _fresh_lines(path) if path.is_dir() else path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UnusableInput(f"teacher.engine.servers_file {path}: cannot be read; expected one URL a line") from error
        urls = []
        for number, line in enumerate(text.splitlines(), start=1):
            url = line.split("#")[0].strip()
            if url and (problem := server_url_problem(url)):
                raise UnusableInput(f"teacher.engine.servers_file {path}, line {number}: {problem}")
            urls += [url] if url else []
        self._adopt((*self.engine.urls, *urls))

    def _adopt(self, urls: tuple[str, ...]) -> None:
        wanted = {url.strip().rstrip("/") for url in urls}
        for url in wanted - self.all.keys():
            server = self.all[url] = Server(url, Window(self.engine.concurrency))
            self._recall(server)
        for server in self.all.values():
            server.listed = server.url in wanted

    @property
    def listed(self) -> list[Server]:
        return [server for server in self.all.values() if server.listed]

    @property
    def healthy(self) -> bool:
        return any(server.healthy for server in self.listed)

    def describe(self) -> str:
        """Every server and what is wrong with it, for an error message."""
        return "; ".join(f"{server.url}: {server.why or 'healthy'}" for server in self.listed) or "no server is named"

    # --- whose turn it is --------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Requests that may be in flight now, at least 1: somebody has to find out that a server is back."""
        return max(1, min(self.engine.concurrency, sum(server.window.size for server in self.listed if server.healthy)))

    async def acquire(self) -> Server:
        """A server with room, which now has one request more in flight. Waits, first come first served."""
        if not self._waiting and (server := self._choose()):
            return self._take(server)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self.wake()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(turn.result())  # it was given in the moment of cancelling
            raise

    def release(self, server: Server) -> None:
        server.window.in_flight -= 1
        self.in_flight -= 1
        self.wake()

    def wake(self) -> None:
        """Gives what room there is to those who wait longest."""
        while self._waiting:
            if self._waiting[0].done():
                self._waiting.popleft()
            elif server := self._choose():
                self._waiting.popleft().set_result(self._take(server))
            else:
                return

    def pause(self, server: Server, seconds: float) -> None:
        """The server asked for quiet (Retry-After): nobody asks it before then. At most until whoever waits now has been given
        up, which is looked at once a tick: at the deadline itself a late request was asked once more for nothing."""
        loop = asyncio.get_running_loop()
        server.resume_at = max(server.resume_at, loop.time() + min(seconds, self.engine.deadline_s + 2 * TICK_S))
        loop.call_at(server.resume_at, self.wake)

    def _choose(self) -> Server | None:
        if self.in_flight >= self.engine.concurrency:
            return None
        now = asyncio.get_running_loop().time()
        usable = [server for server in self.all.values() if server.usable(now)]
        if len(usable) < 2:
            return usable[0] if usable else None
        return min(usable, key=lambda server: server.window.in_flight / server.window.size)

    def _take(self, server: Server) -> Server:
        server.window.in_flight += 1
        self.in_flight += 1
        return server

    # --- are they well -----------------------------------------------------------------------------------------------

    def down(self, server: Server, why: str) -> None:
        if server.healthy:
            log.warning("server %s: %s; it gets no requests until it answers again", server.url, why)
        server.healthy, server.why = False, why

    def up(self, server: Server) -> None:
        if not server.healthy:
            log.warning("server %s answers again", server.url)
        server.healthy, server.why, server.misses = True, "", 0
        self.wake()

    async def watch(self, connection: Connection) -> None:
        """Looks at every server each health_s, for ever."""
        while True:
            await asyncio.sleep(self.engine.health_s)
            self._read_file_again()
            await self.probe_all(connection)

    def _read_file_again(self) -> None:
        """A file that is being replaced, or has a wrong line for a moment, must not end the run."""
        if self.engine.servers_file:
            try:
                self.read_file()
            except UnusableInput as error:
                log.warning("%s; the servers read before stay", error)

    async def probe_all(self, connection: Connection) -> None:
        """Asks each for its models. Raises UnusableInput when a key is refused, or a model has changed."""
        await asyncio.gather(*(self._probe(server, connection) for server in self.listed))

    async def _probe(self, server: Server, connection: Connection) -> None:
        try:
            answer = await connection.get(server.path("models"), PROBE_S)
        except (Unreachable, Lost, Silent) as error:
            self._missed(server, str(error), at_once=isinstance(error, Unreachable))
            return
        if answer.status in DENIED:
            raise denied(server, answer, self.engine, connection)
        if answer.status in GONE:
            self._missed(server, f"HTTP {answer.status}", at_once=False)
        elif self._check_model(server, answer):
            self.up(server)

    def _missed(self, server: Server, why: str, *, at_once: bool) -> None:
        server.misses += 1
        if at_once or not server.answered or server.misses >= MISSES:
            self.down(server, why)

    def _check_model(self, server: Server, answer: Answer) -> bool:
        """Whether the server has the model that the recipe asks for. A list that cannot be read says nothing; neither does one
        without a name that is a folder's path: `transformers serve` lists its hub cache and serves any folder.

        Raises:
            UnusableInput: it had another before.
        """
        roots = dict(listed_models(answer.body)) if answer.status == 200 else {}
        if not roots or (self.model not in roots and self.model.startswith(("/", "."))):
            return True
        names = ", ".join(list(roots)[:5])
        if self.model not in roots:
            if server.answered:
                raise changed(server.url, self.model, names)
            self.down(server, f"serves {names} and not {self.model}; set teacher.engine.model")
            return False
        self.learn(server, "root", roots[self.model])
        return True

    # --- the end of a run --------------------------------------------------------------------------------------------

    def withheld(self) -> Iterator[Completion]:
        """What is left of refused requests when nothing more is asked."""
        for server in self.all.values():
            yield from server.withheld
            server.withheld.clear()

    def forget_run(self) -> None:
        """What belongs to a loop that is closed."""
        self._waiting.clear()
        self.in_flight = 0
        for server in self.all.values():
            server.window.in_flight, server.resume_at = 0, 0.0
            server.withheld.clear()


def _fresh_lines(folder: Path) -> str:
    """Ages are by the file server's own clock: a server whose node has died leaves its file behind."""
    probe = folder / f".{os.getpid()}.now"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink(missing_ok=True)
    lines = []
    for path in sorted(folder.glob("*.url")):
        with suppress(FileNotFoundError):  # it was taken back meanwhile
            if now - path.stat().st_mtime <= FRESH_S:
                lines.append(path.read_text())
    return "\n".join(lines)


def _file_of(url: str, what: str) -> str:
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.{what}.json"


def denied(server: Server, answer: Answer, engine: schema.HttpEngine, connection: Connection) -> UnusableInput:
    """The key is missing or wrong."""
    words = error_words(connection.without_key(answer.body))
    remedy = f"{'correct' if connection.has_key else 'set'} {engine.api_key_env} in the environment"
    return UnusableInput(f"teacher.engine.base_urls {server.url}: HTTP {answer.status}: {words}; {remedy}")
