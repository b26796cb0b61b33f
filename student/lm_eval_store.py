"""Likelihoods that a model gave, each asked for once: committed segments of evaluation/MODEL.lm_eval.scores/.

A request is known by its token ids and by whatever a likelihood depends on (weights, engine), so that those of another model are
never mixed in. Whoever is killed costs what was scored since the last commit.
"""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from configs.errors import UnusableInput
from configs.progress import Count, Report
from data.engine import Engine
from data.records import digest
from data.store import commit_segment, read_first_copies

SCORE = pa.schema(
    [
        ("item_id", pa.string()),
        ("logprob", pa.float64()),
        ("is_greedy", pa.bool_()),
        ("tokens", pa.int32()),
        ("harness", pa.string()),
    ]
)


class Continuation(NamedTuple):
    """ids, of which the last `scored` are asked about; the first one is never."""

    ids: tuple[int, ...]
    scored: int


class Likelihood(NamedTuple):
    """logprob: natural, summed over the scored ids. is_greedy: each of them was the likeliest."""

    logprob: float
    is_greedy: bool


class ScoreStore:
    """The likelihoods of one model. One process writes at a time: the stage holds the run folder's lock."""

    def __init__(self, folder: Path, harness_key: str, *, segment_rows: int) -> None:
        self.folder, self.harness_key, self.segment_rows = folder, harness_key, segment_rows

    def likelihoods(self, engine: Engine, asked: Sequence[Continuation], report: Report | None = None) -> list[Likelihood]:
        """One each, in the order asked; equal ones are asked once, and what is committed not again. Longest first, so that
        batches are of like length."""
        identities = [digest(one.ids, one.scored, self.harness_key) for one in asked]
        known = self._committed()
        missing = {name: one for name, one in zip(identities, asked, strict=True) if name not in known}
        waiting = sorted(missing, key=lambda name: (-len(missing[name].ids), name))
        if waiting:
            engine.load()
        for start in range(0, len(waiting), self.segment_rows):
            names = waiting[start : start + self.segment_rows]
            found = score(engine, [missing[name] for name in names])
            self._commit(names, [missing[name] for name in names], found)
            known |= dict(zip(names, found, strict=True))
            if report is not None:
                report(Count(start + len(names), len(waiting), "lm-eval", unit="likelihoods"))
        return [known[name] for name in identities]

    def _committed(self) -> dict[str, Likelihood]:
        if not self.folder.is_dir():
            return {}
        tables = read_first_copies(self.folder, key="item_id")
        rows = (row for table in tables for row in table.to_pylist() if row["harness"] == self.harness_key)
        return {row["item_id"]: Likelihood(row["logprob"], row["is_greedy"]) for row in rows}

    def _commit(self, names: Sequence[str], asked: Sequence[Continuation], found: Sequence[Likelihood]) -> None:
        rows = [
            {"item_id": name, "tokens": one.scored, "harness": self.harness_key, **likelihood._asdict()}
            for name, one, likelihood in zip(names, asked, found, strict=True)
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        worker = f"evaluate-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        commit_segment(self.folder, pa.Table.from_pylist(rows, schema=SCORE), worker=worker, facts={"harness": self.harness_key})


def score(engine: Engine, asked: Sequence[Continuation]) -> list[Likelihood]:
    """One forward pass a sequence. Raises UnusableInput for one that is longer than the model's positions."""
    found = []
    for one, scores in zip(asked, engine.score([one.ids for one in asked], top_logits=1), strict=True):
        if not 0 < one.scored < len(one.ids):
            raise UnusableInput(f"lm_eval: {one.scored} of {len(one.ids)} tokens to be scored; the first one has no likelihood")
        assert scores.top is not None
        best = scores.top.ids_TK[len(one.ids) - 1 - one.scored : len(one.ids) - 1, 0]  # row t predicted token t + 1
        is_greedy = best.tolist() == list(one.ids[-one.scored :])
        found.append(Likelihood(sum(scores.logprobs[-one.scored :]), is_greedy))
    return found
