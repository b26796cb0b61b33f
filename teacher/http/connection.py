"""One pool of kept-alive connections to all servers. The only module that imports aiohttp.

Whatever goes wrong on a wire leaves here as one of our own exceptions, in our words, because aiohttp's hold the request's
headers, and with them the key.
"""

import asyncio
import os
import resource
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from configs import schema
from configs.errors import UnusableInput

CONNECT_S = 30.0
KEEP_ALIVE_S = 300.0  # aiohttp's 15 s is shorter than one reasoning trace: every answer would open a connection
BUFFER_BYTES = 1 << 20  # a reply with 20 log-probabilities a token is megabytes: fewer pauses
SPARE_FILES = 128


class Unreachable(Exception):
    """No connection: nobody listens, no such host, no trusted certificate."""


class Lost(Exception):
    """The connection broke, or what came over it was no HTTP."""


class Silent(Exception):
    """No answer in time."""


class Answer(NamedTuple):
    """One reply. torn: the connection ended, or went silent, before the body did. sent_at: on the loop's clock; started_at:
    Unix time."""

    status: int
    body: bytes
    streamed: bool
    torn: bool
    retry_after: str
    started_at: float
    sent_at: float
    seconds: float


@dataclass(slots=True)
class Arriving:
    """A reply on its way: what there is of it when its task is cancelled. heard_at: when the last piece came, or the request
    was sent, on the loop's clock."""

    heard_at: float = 0.0
    status: int = 0
    streamed: bool = False
    pieces: list[bytes] = field(default_factory=list)

    def cut(self, started_at: float, sent_at: float, now: float) -> Answer | None:
        """What there is, as a torn reply; None when nothing of it was paid for."""
        if self.status != 200 or not self.pieces:
            return None
        return Answer(200, b"".join(self.pieces), self.streamed, True, "", started_at, sent_at, now - sent_at)


Heard = Callable[[], Awaitable[None]]
"""Called after each piece of a stream."""


class Connection:
    """Made inside a running loop, and closed there."""

    def __init__(self, engine: schema.HttpEngine) -> None:
        self._key = os.environ.get(engine.api_key_env, "")
        self._proxies: dict[str, str | None] = {}
        allow_files(engine.concurrency + SPARE_FILES)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60, keepalive_timeout=KEEP_ALIVE_S, ssl=_tls(engine.ca_file)),
            headers={"Accept-Encoding": "identity", "User-Agent": "tracestill"}  # identity: what is kept is what was sent
            | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),  # silence: see listening.Conversation
            read_bufsize=BUFFER_BYTES,
        )

    @property
    def has_key(self) -> bool:
        return bool(self._key)

    async def close(self) -> None:
        await self._session.close()
        await asyncio.sleep(0)  # transports close in the loop's next pass

    async def get(self, url: str, timeout_s: float) -> Answer:
        """A small page. Raises Unreachable, Lost or Silent."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._exchange("GET", url, None, {}, Arriving(), None)
        except TimeoutError:
            raise Silent(f"no answer within {timeout_s:g} s") from None

    async def post(self, url: str, body: bytes, headers: dict[str, str], arriving: Arriving, heard: Heard | None) -> Answer:
        """The server's reply, whatever its status. A body that was cut off comes back as far as it came, `torn`.

        Raises:
            Unreachable, Lost: there is no reply. Also when a body was cut off that nobody pays for.
        """
        return await self._exchange("POST", url, body, headers, arriving, heard)

    def without_key(self, body: bytes) -> bytes:
        """A server may quote the key that it was sent."""
        key = self._key.encode()
        return body.replace(key, b"***") if key and key in body else body

    def _proxy(self, url: str) -> str | None:
        """Looked up once a URL: aiohttp's trust_env reads environment and ~/.netrc in a thread, twice, for every request."""
        if url not in self._proxies:
            self._proxies[url] = proxy_of(url)
        return self._proxies[url]

    async def _exchange(
        self, method: str, url: str, body: bytes | None, headers: dict[str, str], arriving: Arriving, heard: Heard | None
    ) -> Answer:
        loop = asyncio.get_running_loop()
        started_at, sent_at = time.time(), loop.time()
        arriving.heard_at = sent_at
        retry_after, torn = "", False
        try:
            async with self._session.request(
                method, url, data=body, headers=headers, allow_redirects=False, proxy=self._proxy(url)
            ) as response:
                arriving.status, retry_after = response.status, response.headers.get("Retry-After", "")
                arriving.streamed = response.content_type == "text/event-stream"
                while piece := await response.content.readany():
                    arriving.pieces.append(piece)
                    arriving.heard_at = loop.time()
                    if heard and arriving.streamed and arriving.status == 200:
                        await heard()
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: a head that is no HTTP
            if arriving.status != 200:
                raise _in_our_words(error) from None
            torn = True
        return Answer(
            arriving.status, b"".join(arriving.pieces), arriving.streamed, torn, retry_after, started_at, sent_at,
            loop.time() - sent_at,
        )  # fmt: skip


def _in_our_words(error: Exception) -> Exception:
    """aiohttp's exception as one of ours; never with its text where that may quote headers or a proxy's password."""
    match error:
        case aiohttp.ConnectionTimeoutError():
            return Unreachable(f"no connection within {CONNECT_S:g} s")
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientConnectorSSLError() | aiohttp.ClientSSLError():
            return Unreachable("TLS failed: its certificate is not trusted here; name its authority in ca_file")
        case aiohttp.ClientConnectorDNSError():
            return Unreachable("no such host")
        case aiohttp.ClientProxyConnectionError():
            return Unreachable("the proxy of the environment does not answer")
        case aiohttp.ClientHttpProxyError(status=int(status)):
            return Unreachable(f"the proxy of the environment answered HTTP {status}")
        case aiohttp.ClientConnectorError(os_error=OSError() as cause):
            return Unreachable((os.strerror(cause.errno) if cause.errno else "no connection").lower())
        case aiohttp.ServerDisconnectedError():
            return Lost("the server closed the connection")
        case OSError(strerror=str(words)):
            return Lost(words.lower())
        case _:
            return Lost(f"no valid HTTP ({type(error).__name__})")


def proxy_of(url: str) -> str | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name for a server."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    return proxy if proxy and not proxy_bypass(parts.netloc) else None


def _tls(ca_file: str) -> ssl.SSLContext | bool:
    if not ca_file:
        return True
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise UnusableInput(
            f"teacher.engine.ca_file {ca_file}: {error.strerror or 'no certificate in it'}; expected a PEM file of the "
            "authority that signed the servers' certificates"
        ) from error


def allow_files(needed: int) -> None:
    """Raises the limit on open files to `needed`: a connection is one, and most shells allow 1,024.

    Raises:
        UnusableInput: the machine does not allow that many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UnusableInput(
                f"teacher.engine.concurrency: {needed} open files are needed and this machine allows {hard}; "
                "raise it (ulimit -Hn) or lower concurrency"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
