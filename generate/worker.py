"""One worker of the generation stage: claim, ask, journal what comes, commit it in segments, until nothing is left.

Any number of workers may be at one run folder, and each may die at any moment. What the teacher returned is in the journal
before anything reads it; what is finished is committed by whoever holds its lease next; what is not goes on from its last
checkpoint. So a SIGKILL costs the tokens since then, `checkpoint_tokens` a request at most.
"""

import logging
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from configs.draining import Drain, draining
from configs.errors import UnusableInput
from configs.progress import Count, Report
from configs.schema import Recipe
from data.chat import dialect_of, encode_prompt
from data.engine import OTHER_MODEL, Completion, Engine, Handout, Partial, Request, Source, request_under
from data.in_hand import InHand, continued, finished_earlier, replies_of
from data.journal import Journal
from data.prompt_set import PromptSet
from data.records import request_seed
from data.store import RunFolder, SegmentLog
from data.structure import CLOSE
from data.work import Leases, Worker, WorkFolder, ages, read_facts
from generate import identity
from generate.budget import Others, Spent, others, spent
from generate.canary import canary_prompts
from generate.claims import Ask, Claims
from generate.pool import Pool
from generate.writer import Writer, price_per_second

log = logging.getLogger(__name__)

FINAL = ("content_filter", "tool_call")
"""Errors by which a server says that asking again brings the same."""
TELL_S = 5.0
LOOK_AGAIN_S = 5.0
OTHERS_S = 1.0
NAMED_STRAGGLERS = 5


def to_request(ask: Ask, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...], recipe: Recipe) -> Request:
    """A prompt's own budget is at most the recipe's."""
    prompt = ask.prompt
    request = request_under(
        recipe.generate.sampling,
        request_id=ask.trace_id,
        prompt_ids=encode_prompt(tokenizer, prompt.messages, prompt.tools),
        stop_ids=stop_ids,
        seed=request_seed(ask.trace_id, recipe.generate.seed),
        messages=prompt.messages,
        task=prompt.task,
        logits=recipe.generate.logits,
    )
    max_tokens = min(request.max_tokens, prompt.max_tokens or request.max_tokens)
    return replace(
        request,
        max_tokens=max_tokens,
        min_tokens=min(request.min_tokens, max_tokens),
        prompt_version=prompt.prompt_version,
        tools=prompt.tools,
        reasoning_budget=prompt.reasoning_budget,
        reasoning_end=reasoning_end(tokenizer) if prompt.reasoning_budget else -1,
    )


def reasoning_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `</think>`. Raises UnusableInput where it is more than one."""
    ids = tokenizer.encode(CLOSE, add_special_tokens=False)
    if len(ids) != 1:
        said = f"{CLOSE} is {len(ids)} tokens of the teacher's tokenizer, expected one"
        raise UnusableInput(f"reasoning_budget: {said}; leave the budget out")
    return ids[0]


def make_pool(recipe: Recipe, run: RunFolder, teacher_fingerprint: str) -> Pool:
    """Every request of the run, in the order of its prompt set; with a canary, all but its own are left alone."""
    with PromptSet.open(run) as prompts:
        index = prompts.index("train")
    share = recipe.generate.canary.share
    wanted = None if share is None else canary_prompts(index, share, recipe.generate.seed)
    return Pool(
        index,
        samples=recipe.generate.samples_per_prompt,
        teacher_fingerprint=teacher_fingerprint,
        sampling_fingerprint=identity.sampling_fingerprint(recipe.generate.sampling, recipe.generate.seed),
        wanted=wanted,
    )


def generate_traces(
    recipe: Recipe, run: RunFolder, engine: Engine, tokenizer: PreTrainedTokenizerBase, teacher_fingerprint: str,
    *, report: Report, rank: int = 0,
) -> int:  # fmt: skip
    """As many of the run's requests as this worker can get hold of are answered and committed; returns how many.

    Others may still be at the rest when this returns.

    Raises:
        Interrupted: a signal asked for a drain, and it is done.
        UnusableInput: the run was begun with another teacher, template, sampling or code.
    """
    identity.join(recipe, run, tokenizer, teacher_fingerprint)
    pool = make_pool(recipe, run, teacher_fingerprint)
    name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}-r{rank}"  # pids repeat in containers
    with ExitStack() as stack:
        drain = stack.enter_context(draining(recipe.generate.drain_seconds))
        leases = Leases(Worker(WorkFolder.of(run), name, recipe.generate.lease_ttl_s))
        # After the beat is gone: whoever claims what we leave behind then sees that our journal is there to be read.
        stack.callback(leases.release_all)
        stack.enter_context(leases.worker)
        shift = Shift(recipe, run, engine, tokenizer, teacher_fingerprint, leases, pool, drain, report)
        shift.tell("loading")
        if shift.is_served:
            engine.remember_in(shift.worker.folder.servers)  # type: ignore[attr-defined]
        engine.load()
        finished = shift.work()
        drain.end()
    return finished


class Shift:
    """What one worker does between its first claim and its last commit."""

    def __init__(
        self, recipe: Recipe, run: RunFolder, engine: Engine, tokenizer: PreTrainedTokenizerBase, teacher_fingerprint: str,
        leases: Leases, pool: Pool, drain: Drain, report: Report,
    ) -> None:  # fmt: skip
        self.recipe, self.run, self.engine, self.tokenizer = recipe, run, engine, tokenizer
        self.drain, self.report = drain, report
        self.worker, self.leases, self.pool = leases.worker, leases, pool
        self.stop_ids = dialect_of(tokenizer).stop_ids(tokenizer)
        prompts = PromptSet.open(run)
        again = recipe.generate.retry_failed
        self.claims = Claims(
            pool, SegmentLog(run.traces), leases, prompts.prompts, may_admit=self.may_admit, asks_aborted_again=again
        )
        self.journal = Journal(self.worker.folder.journal, self.worker.name)
        self.writer = Writer(recipe, run, engine, tokenizer, teacher_fingerprint, self.worker.name, self._committed)
        self.asked: dict[str, InHand[Ask]] = {}
        self.tokens_of: dict[str, int] = {}
        self.finished = self.tokens = self.shown = 0
        self.nothing_free_until = -float("inf")
        self.failures = Counter[str]()
        self.started, self.started_at, self.told = time.perf_counter(), self.worker.renew(), -float("inf")
        self.facts: dict[str, dict[str, object]] = {}
        self.others, self.others_read = Others(), -float("inf")
        self.is_served = recipe.teacher.engine.type == "http"
        budget = recipe.generate.budget
        self.price_per_second = price_per_second(recipe)
        self.has_budget = any(limit is not None for limit in (budget.max_cost, budget.max_tokens, budget.max_hours))

    def work(self) -> int:
        self.tell("working")
        self.report(Count(0, self.pool.num_open))
        handout = Handout(self.recipe.generate.checkpoint_tokens, self.checkpoint, self.must_stop, self.keep, self.drain.join)
        try:
            for completion in self.engine.generate(Source(self.next_request), handout):
                self.take(completion)
        finally:  # also when another rank is lost: what is finished was paid for
            self.writer.commit()
            self.tell("ended")
            self.journal.close()
        log.info("%d traces, %d tokens in %.1f s", self.finished, self.tokens, time.perf_counter() - self.started)
        return self.finished

    def next_request(self) -> Request | None:
        """Claimed and encoded when it is asked for: the prompts of a long-context run are gigabytes as ids. None when nothing is
        free; leases grow stale, so it is looked for again a little later."""
        if time.monotonic() < self.nothing_free_until:
            return None
        while (ask := self.claims.next()) is not None:
            hand = InHand(ask, to_request(ask, self.tokenizer, self.stop_ids, self.recipe))
            if (completion := self._taken_up(hand)) is None:
                self.asked[ask.trace_id] = hand
                return hand.request
            self._add(hand, completion)
        self.nothing_free_until = time.monotonic() + LOOK_AGAIN_S
        return None

    def _taken_up(self, hand: InHand[Ask]) -> Completion | None:
        """The answer, where an earlier holder had all of it; else the request goes on from what there is."""
        salvage = hand.ask.salvage
        if salvage is None:
            return None
        if salvage.ending is not None:
            return finished_earlier(hand.ask.trace_id, salvage)
        asked, hand.request, said, completion = hand.request, continued(hand.request, salvage), 0, None
        for raw in replies_of(salvage):
            completion = self.engine.read(asked, raw)  # type: ignore[attr-defined]
            hand.paid += completion.cost
            if completion.error == OTHER_MODEL:
                continue
            hand.replies.append(raw)
            said = max(said, len(completion.token_ids))
            if completion.may_continue and len(completion.token_ids) > len(hand.request.prefix_ids):
                hand.request = replace(asked, prefix_ids=completion.token_ids, prefix_logprobs=completion.logprobs)
        if completion is not None and (completion.finish_reason != "abort" or completion.error in FINAL):
            return replace(completion, cost=hand.paid)
        if self.is_served and (streamed := len(salvage.token_ids) - said) > 0:  # billed, and cut off before it was a reply
            hand.paid += self.engine.price(len(asked.prompt_ids) + said, streamed)  # type: ignore[attr-defined]
        return None

    # --- asked by the engine, in its loop ---

    def checkpoint(self, partial: Partial) -> None:
        if (hand := self.asked.get(partial.request_id)) is not None:  # else it has ended meanwhile
            hand.checkpoint(self.journal, partial)
            self.tokens_of[partial.request_id] = len(partial.token_ids)
            self._show()

    def keep(self, request_id: str, raw: bytes) -> None:
        self.asked[request_id].keep(self.journal, raw)

    def must_stop(self) -> bool:
        self.writer.commit_if_old()
        if time.monotonic() - self.told >= TELL_S:
            self.tell("draining" if self.drain.requested else "working")
            if not self.is_served:  # that loop turns while servers are silent too; a rank's stands still when one of them does
                self._show(reading=True)
        return bool(self.drain.requested)

    def may_admit(self) -> bool:
        """Whether the drain and the budget leave room for more."""
        if self.drain.requested:
            return False
        return not self.has_budget or not self.spent().exceeds(self.recipe.generate.budget)

    # --- what came back ---

    def take(self, completion: Completion) -> None:
        hand = self.asked.pop(completion.request_id)
        self._add(hand, hand.finish(self.journal, completion))
        self.tokens_of.pop(completion.request_id, None)
        self.finished, self.tokens = self.finished + 1, self.tokens + len(completion.token_ids)
        if completion.finish_reason == "abort":
            self._count_failure(completion)
        self._show()

    def _show(self, *, reading: bool = False) -> None:
        """reading: told between passes, which may be over prompts of a million tokens: minutes in which nothing is said."""
        total, rate = self.finished + self.pool.num_open, self.tokens / (time.perf_counter() - self.started)
        tokens = self.tokens + sum(self.tokens_of.values())
        note = f"{rate:.0f} tokens/s"
        if reading and tokens == self.shown:
            note += f", reading prompts, {time.perf_counter() - self.started:.0f} s"
        self.shown = tokens
        self.report(Count(self.finished, total, note, self.failures.total(), tokens=tokens))

    def _count_failure(self, completion: Completion) -> None:
        """The first of each kind is a warning: a run that fails must not look like one that works."""
        error = completion.error or "unknown"
        self.failures[error] += 1
        if self.failures[error] == 1:
            log.warning("request %s failed: %s; more of these are counted, see --status", completion.request_id, error)

    def _add(self, hand: InHand[Ask], completion: Completion) -> None:
        self.writer.add(hand.ask, hand.request, completion, hand.replies)

    def _committed(self, asks: Sequence[Ask]) -> None:
        for ask in asks:
            self.journal.forget(ask.trace_id)
        self.claims.committed(asks)
        if self.has_budget:
            self.tell("working")  # others would else count these twice for a while: in our hand, and in the segment

    def tell(self, state: str) -> None:
        """What `--status` shows, and budgets count, of this worker."""
        self.told = time.monotonic()
        oldest = sorted(self.asked.values(), key=lambda hand: hand.asked_at)[:NAMED_STRAGGLERS]
        tokens, cost = self.in_hand()
        self.worker.tell(
            {
                "state": state, "started_at": self.started_at, "finished": self.finished,
                "tokens": self.tokens, "in_flight": len(self.asked), "uncommitted": len(self.writer.unwritten),
                "tokens_in_hand": tokens,
                "cost_in_hand": cost, "price_per_second": self.price_per_second, "engine": self.engine.name,
                "oldest": [
                    {"trace_id": hand.ask.trace_id, "task": hand.ask.prompt.task, "since": hand.asked_at,
                     "tokens": self.tokens_of.get(hand.ask.trace_id, 0), "attempt": hand.ask.attempt} for hand in oldest
                ],
            }
        )  # fmt: skip

    def spent(self) -> Spent:
        """By all workers so far; of the others what they said a moment ago."""
        if time.monotonic() - self.others_read >= OTHERS_S:
            self.others_read, folder = time.monotonic(), self.worker.folder
            self.facts = read_facts(folder, self.facts)
            alive = [name for name, age in ages(folder).items() if age <= self.worker.ttl_s and name != self.worker.name]
            self.others = others(self.facts, alive)
        tokens, cost = self.in_hand()
        return spent(self.claims.cost_committed + cost, self.claims.tokens_committed + tokens, self.others)

    def in_hand(self) -> tuple[int, float]:
        """Tokens and dollars of answers that are not committed."""
        traces = self.writer.unwritten
        tokens = sum(trace.reasoning_tokens + trace.answer_tokens for trace in traces) + sum(self.tokens_of.values())
        return tokens, sum(trace.cost for trace in traces)
