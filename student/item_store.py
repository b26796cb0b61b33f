"""What a model wrote for evaluation items, raw, before anything parses it, and each attempt exactly once.

A completion stands in the journal (data/journal.py) the moment it is there, an unfinished one with every CHECKPOINT_TOKENS of its
tokens, and is committed with others as a segment of evaluation/MODEL.items/. Whoever is killed costs what the model had said
since the last checkpoint: finished completions are committed from the journal, unfinished ones go on where they were.

An attempt is known by item, sample and harness (model, engine, template, sampling, seed), so that completions of another model
or another template are never mixed in; they are simply not seen.
"""

import dataclasses
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from data.engine import Completion, Engine, Handout, Partial, Request
from data.in_hand import InHand, continued, finished_earlier
from data.journal import Estate, Journal, Salvage
from data.records import FinishReason, digest
from data.store import commit_segment, read_segment, segments

CHECKPOINT_TOKENS = 256
SEGMENT_SECONDS = 60.0

OUTPUT = pa.schema(
    [
        ("item_id", pa.string()),
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("seconds", pa.float64()),
        ("cost", pa.float64()),
        ("error", pa.string()),
    ]
)


class AttemptKey(NamedTuple):
    """One sample of one item."""

    prompt_id: str
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Output:
    """What the model wrote in one attempt, raw. token_ids end with the stop token when finish_reason is `stop`. logprobs:
    natural, one an id, or none where the engine has none. cost: dollars, where the engine knows. error: of an `abort`, why."""

    prompt_id: str
    sample: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    seconds: float
    cost: float
    error: str

    @property
    def key(self) -> AttemptKey:
        return AttemptKey(self.prompt_id, self.sample)


class Ask(NamedTuple):
    """An attempt to be made. trace_id: its identity, under which the journal keeps it."""

    key: AttemptKey
    trace_id: str
    request: Request
    salvage: Salvage | None = None


def attempt_identity(key: AttemptKey, harness_key: str) -> str:
    return digest(key.prompt_id, key.sample, harness_key)


class ItemStore:
    """The attempts of one model under one harness. One process writes at a time: the stage holds the run folder's lock."""

    def __init__(self, folder: Path, harness_key: str, *, segment_rows: int, segment_seconds: float = SEGMENT_SECONDS) -> None:
        self.folder, self.journals = folder, folder.with_suffix(".journal")
        self.harness_key, self.segment_rows, self.segment_seconds = harness_key, segment_rows, segment_seconds

    def outputs(self) -> dict[AttemptKey, Output]:
        """The first committed copy of each attempt under this harness, hashes verified; of one that the engine failed in,
        only where no later one ended."""
        found: dict[AttemptKey, Output] = {}
        if not self.folder.is_dir():
            return found
        for table in map(read_segment, segments(self.folder)):
            if table.schema.names != OUTPUT.names:
                continue  # of an earlier version, and so of another harness
            for row in table.to_pylist():
                key = AttemptKey(row["prompt_id"], row["sample"])
                is_mine = row.pop("item_id") == attempt_identity(key, self.harness_key)
                if is_mine and (key not in found or found[key].finish_reason == "abort" != row["finish_reason"]):
                    found[key] = Output(**row | {name: tuple(row[name]) for name in ("token_ids", "logprobs")})
        return found

    def complete(
        self, engine: Engine, requests: Iterable[tuple[AttemptKey, Request]], heard: Callable[[int], None] = lambda tokens: None
    ) -> Iterator[int]:
        """Asks each request, commits what comes back and yields how many more are committed. What an earlier process left in its
        journal is committed first, or gone on with. When the engine fails, what is in hand is committed all the same. heard: told
        how many tokens have come of each answer that is not whole, now and then."""
        self.journals.mkdir(parents=True, exist_ok=True)
        estate = Estate(self.journals)
        estate.look(set())
        left_behind = sorted(self.journals.glob("*.log"))
        asks = [self._ask(key, request, estate) for key, request in requests]
        worker = f"evaluate-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        with closing(Journal(self.journals, worker)) as journal:
            batch = _Batch(self.folder, worker, self.harness_key, journal)
            open_asks = []
            for ask in asks:
                if ask.salvage is not None and ask.salvage.ending is not None:
                    batch.add(ask, finished_earlier(ask.trace_id, ask.salvage))
                else:
                    open_asks.append(ask)
            if batch.rows:
                yield batch.commit()
            yield from self._asked(engine, open_asks, batch, heard)
        for path in left_behind:  # all that they held is committed
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.journals.rmdir()

    def _asked(self, engine: Engine, asks: Sequence[Ask], batch: "_Batch", heard: Callable[[int], None]) -> Iterator[int]:
        hands = {ask.trace_id: InHand(ask, _to_ask(ask)) for ask in asks}

        def take(partial: Partial) -> None:
            hands[partial.request_id].checkpoint(batch.journal, partial)
            heard(len(partial.token_ids))

        committed_at = time.monotonic()
        try:
            for completion in engine.generate((hand.request for hand in hands.values()), Handout(CHECKPOINT_TOKENS, take)):
                hand = hands[completion.request_id]
                batch.add(hand.ask, hand.finish(batch.journal, completion))
                if len(batch.rows) >= self.segment_rows or time.monotonic() - committed_at > self.segment_seconds:
                    yield batch.commit()
                    committed_at = time.monotonic()
        finally:
            done = batch.commit()
        if done:
            yield done

    def _ask(self, key: AttemptKey, request: Request, estate: Estate) -> Ask:
        identity = attempt_identity(key, self.harness_key)
        return Ask(key, identity, dataclasses.replace(request, request_id=identity), estate.take(identity))


def _to_ask(ask: Ask) -> Request:
    return ask.request if ask.salvage is None or not ask.salvage.token_ids else continued(ask.request, ask.salvage)


class _Batch:
    """Completions that are not committed yet."""

    def __init__(self, folder: Path, worker: str, harness_key: str, journal: Journal) -> None:
        self.folder, self.worker, self.harness_key, self.journal = folder, worker, harness_key, journal
        self.rows: list[dict[str, object]] = []

    def add(self, ask: Ask, completion: Completion) -> None:
        self.rows.append(
            {
                "item_id": ask.trace_id,
                "prompt_id": ask.key.prompt_id,
                "sample": ask.key.sample,
                "token_ids": completion.token_ids,
                "logprobs": completion.logprobs,
                "finish_reason": completion.finish_reason,
                "prompt_tokens": len(ask.request.prompt_ids),
                "seconds": completion.seconds,
                "cost": completion.cost,
                "error": completion.error,
            }
        )

    def commit(self) -> int:
        """How many were committed."""
        rows, self.rows = self.rows, []
        if rows:
            table = pa.Table.from_pylist(rows, schema=OUTPUT)
            commit_segment(self.folder, table, worker=self.worker, facts={"harness": self.harness_key})
        for row in rows:
            self.journal.forget(str(row["item_id"]))
        return len(rows)
