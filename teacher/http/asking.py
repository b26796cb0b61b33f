"""One request until it is a completion: asked, asked again, continued, or given up."""

import asyncio
import random
from collections.abc import Callable

from configs.errors import UnusableInput
from data.engine import Completion
from data.records import FinishReason
from teacher.http.asks import Asks
from teacher.http.exchange import Exchange, Failed, Live
from teacher.http.reading import REFUSALS as REFUSALS_OF
from teacher.http.reading import Output, Reading
from teacher.http.servers import REFUSALS, Server
from teacher.http.waits import jittered_wait

WITHHELD = ("refused", "bad_reply", "torn", "timed_out")
"""Failures of a request that may be the server's or the recipe's."""
ANSWERS = tuple(REFUSALS_OF.values())
"""Aborts that are a working server's own answer."""


class Asker:
    """stopping: nothing more is asked; what is in flight may end."""

    def __init__(self, asks: Asks, exchange: Exchange, deliver: Callable[[Completion], None], first_wait_s: float) -> None:
        self.asks, self.exchange, self.deliver, self.first_wait_s = asks, exchange, deliver, first_wait_s
        self.engine = asks.engine
        self.stopping = False
        self._random = random.Random()  # unseeded: workers must not wait in step

    async def complete(self, live: Live) -> None:
        """Delivers the request's completion; when the run stops first, its partial output and no completion.

        Raises:
            UnusableInput: what is wrong is wrong for every request.
        """
        try:
            completion = await self._until_done(live)
        except asyncio.CancelledError:
            if live.late != "deadline":
                raise
            self.exchange.hand_out(live)
            error = live.error or ("busy" if self.exchange.servers.healthy else "no_server")
            completion = self._abort(live, error, self._so_far(live))
        if completion is not None and not self._withhold(live, completion):
            self.deliver(completion)

    async def _until_done(self, live: Live) -> Completion | None:
        request = live.request
        if self.engine.api == "completions" and request.prefix_ids and request.prefix_ids[-1] in request.stop_ids:
            return self._whole(live, Output(request.prefix_ids, request.prefix_logprobs), "stop")
        while not self.stopping:
            ask = self.asks.next(request, live.given, live.given_logprobs)
            if ask is None:
                return self._whole(live, self._so_far(live), "length")
            found = await self.exchange.once(live, ask)
            completion = self._failed(live, found) if isinstance(found, Failed) else self._read(live, found)
            if completion is not None:
                return completion
            await self._wait(live)
        self.exchange.hand_out(live)
        return None

    async def _wait(self, live: Live) -> None:
        """Before the next ask: not at all where the last one brought something."""
        if live.failures and not self.stopping:
            await asyncio.sleep(jittered_wait(live.failures, self.first_wait_s, self._random))

    # --- after a reply ------------------------------------------------------------------------------------------------

    def _read(self, live: Live, reading: Reading) -> Completion | None:
        """The completion, or None when more is to be asked: a rest, or the same again."""
        completion = reading.completion
        live.cost += completion.cost
        if completion.finish_reason != "abort" or completion.error in ANSWERS or completion.may_continue:
            self._proved(live.server)
        elif live.server is not None:
            live.server.why = reading.detail or completion.error
        if self._go_on(live, completion):
            live.failures = 0
            return None
        if completion.error in ("bad_reply", "torn"):
            return self._again(live, completion.error, completion)
        output = Output(completion.token_ids, completion.logprobs)
        return self._whole(live, output, completion.finish_reason, completion.error, exact=completion.exact)

    def _go_on(self, live: Live, completion: Completion) -> bool:
        """Takes over what a torn or bounded reply brought; False when nothing that can be continued."""
        new = completion.token_ids[len(live.request.prefix_ids) :]
        if self.engine.api != "completions" or len(new) <= len(live.given) or not completion.may_continue:
            return False
        live.given, live.given_logprobs = new, completion.logprobs[len(live.request.prefix_logprobs) :]
        return True

    def _again(self, live: Live, error: str, completion: Completion | None = None) -> Completion | None:
        """Counts an ask that may be billed; the abort, when there were as many as the recipe allows."""
        live.paid, live.failures, live.error = live.paid + 1, live.failures + 1, error
        if live.paid < self.engine.attempts:
            return None
        if completion is None:
            return self._abort(live, error)
        return self._whole(live, Output(completion.token_ids, completion.logprobs), "abort", error, exact=completion.exact)

    # --- after a failure ----------------------------------------------------------------------------------------------

    def _failed(self, live: Live, failed: Failed) -> Completion | None:
        """The abort of a request that would fail again, or None: refusals of a busy server cost nothing but time."""
        if failed.error == "timed_out":
            return self._again(live, "timed_out")
        if failed.error == "refused":
            return self._abort(live, "refused")
        live.failures += 1
        return None

    def _withhold(self, live: Live, completion: Completion) -> bool:
        """Holds back the failures of a server that never completed anything: a wrong recipe, or an address where something else
        answers, must not fail a million rows one by one.

        Raises:
            UnusableInput: REFUSALS requests have failed at the server, and it completed none.
        """
        server = live.server
        if completion.error not in WITHHELD or server is None or server.answered:
            return False
        server.withheld.append(completion)
        if len(server.withheld) >= REFUSALS:
            raise UnusableInput(
                f"teacher.engine.base_urls {server.url}: the first {REFUSALS} requests all failed, the last as "
                f"{completion.error} ({server.why}); correct the recipe's model, sampling or prompts, or the server"
            )
        return True

    def _proved(self, server: Server | None) -> None:
        """The server completed something: what it refuses is the request's fault."""
        if server is not None and not server.answered:
            server.answered = True
            for completion in server.withheld:
                self.deliver(completion)
            server.withheld.clear()

    # --- the end ------------------------------------------------------------------------------------------------------

    def _so_far(self, live: Live) -> Output:
        """What earlier asks brought, if any did: chat brings all or nothing."""
        if self.engine.api == "chat":
            return Output((), ())
        request = live.request
        return Output((*request.prefix_ids, *live.given), (*request.prefix_logprobs, *live.given_logprobs))

    def _abort(self, live: Live, error: str, output: Output = Output((), ())) -> Completion:  # noqa: B008  (immutable)
        return self._whole(live, output, "abort", error)

    def _whole(self, live: Live, output: Output, reason: FinishReason, error: str = "", *, exact: bool = True) -> Completion:
        """A completion with the request's time and cost in all: the sum over its kept replies."""
        seconds = asyncio.get_running_loop().time() - live.started
        ids, logprobs = output.fitted()
        return Completion(
            live.request.request_id, ids, logprobs, reason, live.started_at, seconds, error=error, cost=live.cost, exact=exact
        )
