"""A server that speaks the OpenAI protocol and misbehaves on demand, over real sockets.

In tests a `MockServer` runs in a thread and `reply` decides, request by request, what happens to it. As a process

    python -m tests.teacher.mock_server --port 0 --reply-bytes 16000 --latency-median-s 0.2 --latency-sigma 1.0

it prints its port and answers for ever. What it says about a request is a function of the request's id and the position
alone, so that a continued output can be compared with an uninterrupted one.
"""

import argparse
import asyncio
import hashlib
import json
import math
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Self

LETTERS = b"abcdefghijklmnopqrstuvwxyz "
PROSE = (
    "The two stations stand eleven miles apart, so the first train has gone some way before the second one leaves. Let us write "
    "down what we know: the speed of each, the hour at which it starts, and the distance between them. If they meet after t "
    "hours, both have covered the whole line together, hence 40 t + 30 (t - 1/2) = 11. That gives t = 26/70, or a little over "
    "twenty-two minutes; but the second train has not left by then, so something is wrong with the order of the two. Check it "
    "again: the timetable lists the departure in local time, and the clocks differ by a quarter of an hour.\n"
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as the server saw it."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    connection: int

    @property
    def request_id(self) -> str:
        return self.headers.get("x-tracestill-request-id", "")


@dataclass(frozen=True, slots=True)
class Reply:
    """What to send. length: the Content-Length to claim; absent, the true one. cut: bytes of the body (events of a stream) after
    which the connection is closed. reset: with a RST, and before anything is sent when cut is 0 or absent. wait_s: before
    anything. hold: until the server has been full (MockServer.full). pause_s: between single bytes, or between events. events:
    send these as a stream instead of the body."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None
    cut: int | None = None
    reset: bool = False
    wait_s: float = 0.0
    hold: bool = False
    pause_s: float = 0.0
    events: tuple[bytes, ...] = ()


def encoded(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def said(finish_reason: str | None = "stop", **message: str | None) -> dict[str, Any]:
    """A chat completion."""
    return {
        "model": "tiny",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", **message}}],
    }


def completed(ids: Sequence[int], finish_reason: str | None = "stop", **more: object) -> dict[str, Any]:
    """A completion by token ids, as vLLM gives it."""
    return {
        "model": "tiny",
        "choices": [{"index": 0, "text": "", "finish_reason": finish_reason, "token_ids": list(ids)}],
        **more,
    }


def events(chunks: Sequence[Mapping[str, Any]], *, end: bool = True) -> tuple[bytes, ...]:
    lines = [b"data: " + encoded(chunk) + b"\n\n" for chunk in chunks]
    return (*lines, b"data: [DONE]\n\n") if end else tuple(lines)


def token(request_id: str, position: int) -> int:
    """The id at `position` of the output for a request: a letter or a space of the byte tokenizer."""
    return LETTERS[hashlib.blake2b(f"{request_id}/{position}".encode(), digest_size=1).digest()[0] % len(LETTERS)]


class MockServer:
    """asked: every POST, in the order of arrival. peak: most that were in the server at once. connections: how many were
    ever opened. models: what GET models answers. full: requests at once, at which held replies are let go."""

    def __init__(self, reply: Callable[[Asked], Reply] | None = None) -> None:
        self.reply = reply or (lambda asked: Reply(body=encoded(said(content="4", reasoning_content="2+2"))))
        self.models = Reply(body=encoded({"data": [{"id": "tiny"}]}))
        self.asked: list[Asked] = []
        self.connections = self.inside = self.peak = 0
        self.port = self.full = 0
        self._filled = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [asked.body for asked in self.asked]

    def __enter__(self) -> Self:
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.vanish()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def listen(self) -> None:
        """Starts to listen, on the port it had before if it had one."""
        asyncio.run_coroutine_threadsafe(self.serve(self.port), self._loop).result()

    def vanish(self) -> None:
        """As if the process had been killed: no port, no connection."""

        async def close() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()

    async def serve(self, port: int) -> None:
        self._server = await asyncio.start_server(self._converse, "127.0.0.1", port, backlog=4096, limit=1 << 24)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._one(reader, writer, number):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        """Answers one request; False when the connection is to be closed."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(_header(line) for line in head[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, path, _ = head[0].split(" ")
        stays = headers.get("connection", "").lower() != "close"
        if method == "GET":
            return await self._send(writer, self.models) and stays
        asked = Asked(path, headers, json.loads(body), number)
        self.asked.append(asked)
        self.inside += 1
        self.peak = max(self.peak, self.inside)
        if self.inside == self.full:
            self._filled.set()
        try:
            return await self._send(writer, self.reply(asked)) and stays
        finally:
            self.inside -= 1

    async def _send(self, writer: asyncio.StreamWriter, reply: Reply) -> bool:
        if reply.hold:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._filled.wait(), 30.0)
        if reply.wait_s:
            await asyncio.sleep(reply.wait_s)
        if reply.reset and not reply.cut:
            writer.transport.abort()
            return False
        body = b"".join(reply.events) if reply.events else reply.body
        kind = "text/event-stream" if reply.events else "application/json"
        length = len(body) if reply.length is None else reply.length
        framing = "Transfer-Encoding: chunked" if reply.events else f"Content-Length: {length}"
        more = "".join(f"{name}: {value}\r\n" for name, value in reply.headers.items())
        writer.write(f"HTTP/1.1 {reply.status} X\r\nContent-Type: {kind}\r\n{framing}\r\n{more}\r\n".encode())
        if reply.events:
            return await self._stream(writer, reply)
        sent = body if reply.cut is None else body[: reply.cut]
        for piece in [bytes([byte]) for byte in sent] if reply.pause_s else [sent]:
            writer.write(piece)
            await writer.drain()
            if reply.pause_s:
                await asyncio.sleep(reply.pause_s)
        if reply.reset:
            writer.transport.abort()
        return not reply.reset and reply.cut is None and length == len(body)

    async def _stream(self, writer: asyncio.StreamWriter, reply: Reply) -> bool:
        for event in reply.events[: reply.cut]:
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            await writer.drain()
            await asyncio.sleep(reply.pause_s)
        if reply.cut is not None:
            writer.transport.abort() if reply.reset else None
            return False
        writer.write(b"0\r\n\r\n")
        return True


def _header(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip().lower(), value.strip()


@contextmanager
def serving(reply: Callable[[Asked], Reply] | None = None) -> Iterator[MockServer]:
    with MockServer(reply) as server:
        yield server


# --- a server of its own process ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Author:
    """Writes for every request the text that its id stands for. reply_bytes: length of a whole output, in letters, each a
    token of the byte tokenizer. Latencies are log-normal and drawn by request id, so every run has the same. refuse, fail,
    reset: shares of asks that end in 429, 500 or a reset connection, drawn by ask."""

    reply_bytes: int = 16_000
    latency_median_s: float = 0.0
    latency_sigma: float = 0.0
    refuse: float = 0.0
    fail: float = 0.0
    reset: float = 0.0
    tokens_per_event: int = 8
    first_prompt: dict[str, int] = field(default_factory=dict)
    draw: random.Random = field(default_factory=random.Random)

    def __call__(self, asked: Asked) -> Reply:
        luck = self.draw.random()
        if luck < self.refuse:
            return Reply(429, headers={"Retry-After": "0.05"})
        if luck < self.refuse + self.fail:
            return Reply(500)
        if luck < self.refuse + self.fail + self.reset:
            return Reply(reset=True)
        wait_s = self.latency(asked.request_id)
        return self._by_ids(asked, wait_s) if "prompt" in asked.body else self._chat(asked, wait_s)

    def latency(self, request_id: str) -> float:
        return self.latency_median_s * math.exp(self.latency_sigma * random.Random(request_id).gauss(0.0, 1.0))

    def _chat(self, asked: Asked, wait_s: float) -> Reply:
        letters = min(self.reply_bytes, asked.body.get("max_tokens") or self.reply_bytes)
        start = hashlib.blake2b(asked.request_id.encode(), digest_size=2).digest()
        text = f"{start.hex()} " + PROSE * (letters // len(PROSE) + 1)
        half = letters // 2
        content = said(
            "stop" if letters == self.reply_bytes else "length", reasoning_content=text[:half], content=text[half:letters]
        )
        return Reply(body=encoded(content), wait_s=wait_s)

    def _by_ids(self, asked: Asked, wait_s: float) -> Reply:
        """The rest of the output, from where the prompt's ids end."""
        prompt = len(asked.body["prompt"])
        position = prompt - self.first_prompt.setdefault(asked.request_id, prompt)
        end = min(self.reply_bytes, position + asked.body["max_tokens"])
        ids = [token(asked.request_id, index) for index in range(position, end)]
        reason = "stop" if end == self.reply_bytes else "length"
        if not asked.body["stream"]:
            return Reply(body=encoded(completed(ids, reason)), wait_s=wait_s * len(ids) / self.reply_bytes)
        size = self.tokens_per_event
        chunks = [completed(ids[start : start + size], None) for start in range(0, len(ids), size)]
        return Reply(events=events([*chunks, completed([], reason)]), pause_s=wait_s * size / self.reply_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    for name, default in (("reply-bytes", 16_000), ("latency-median-s", 0.0), ("latency-sigma", 0.0), ("refuse", 0.0),
                          ("fail", 0.0), ("reset", 0.0), ("tokens-per-event", 8)):  # fmt: skip
        parser.add_argument(f"--{name}", type=type(default), default=default)
    settings = vars(parser.parse_args())
    port = settings.pop("port")

    async def forever() -> None:
        server = MockServer(Author(**settings))
        await server.serve(port)
        print(server.port, flush=True)
        await asyncio.Event().wait()

    asyncio.run(forever())


if __name__ == "__main__":
    main()
