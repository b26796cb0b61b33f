"""A worker with the embedded teacher is gone in the middle of its work: what another one makes of it is what one alone makes."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from configs.load import load_recipe
from configs.schema import Recipe
from data.engine import Completion, Handout, Request
from data.ledger import read_ledger
from data.logits import StoredLogits, read_logits
from data.store import RunFolder
from generate.worker import generate_traces
from teacher.folders import EMBEDDED
from teacher.local_engine import LocalEngine
from tests.generate.test_telemetry import by_task, written
from tests.generate.test_worker import TOKENIZER, Killed, new_run, prompt, traces


class Gone(LocalEngine):
    """The embedded teacher in a process that is killed at its n-th forward pass, or so."""

    def __init__(self, after: int) -> None:
        super().__init__(EMBEDDED, batch_size=4)
        self.after = after

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        assert handout is not None
        asked = iter(range(10**6))

        def stop() -> bool:
            if next(asked) == self.after:
                raise Killed
            return handout.stop()

        yield from super().generate(requests, Handout(handout.every_tokens, handout.take, stop, handout.keep))


def work(recipe: Recipe, run: RunFolder, engine: LocalEngine) -> int:
    return generate_traces(recipe, run, engine, TOKENIZER, "teacher", report=lambda count: None)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    changes = [
        "generate.samples_per_prompt=2", "generate.sampling.max_tokens=24", "generate.checkpoint_tokens=5",
        "generate.logits={top_k: 4, temperatures: [1.0, 2.0]}", "generate.segment_traces=3",
    ]  # fmt: skip
    return load_recipe("embedded", changes).recipe


def six_prompts(folder: Path) -> RunFolder:
    return new_run(folder, [prompt(f"What is {index} + 4?") for index in range(6)], requests=12)


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = six_prompts(tmp_path_factory.mktemp("undisturbed"))
    assert work(recipe, run, LocalEngine(EMBEDDED, batch_size=4)) == 12
    return run


def logits_of(run: RunFolder) -> dict[str, StoredLogits]:
    return {stored.trace_id: stored for stored in read_logits(run)}


@pytest.mark.parametrize("after", [30, pytest.param(12, marks=pytest.mark.long), pytest.param(50, marks=pytest.mark.long)])
def test_traces_logits_and_expert_counts_are_those_of_an_undisturbed_run(
    recipe: Recipe, undisturbed: RunFolder, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = six_prompts(tmp_path)
    with monkeypatch.context() as patch:
        for name in ("generate.writer.Writer.commit", "data.journal.Journal.close", "data.work.Leases.release_all"):
            patch.setattr(name, lambda self: None)
        patch.setattr("data.work.Worker.__exit__", lambda self, *_: self._stopped.set())
        with pytest.raises(Killed):
            work(recipe, run, Gone(after))
    for beat in (run.root / "work" / "workers").glob("*.beat"):
        os.utime(beat, (1.0, 1.0))
    work(recipe, run, LocalEngine(EMBEDDED, batch_size=5))
    assert read_ledger(run).completed == 12 and read_ledger(run).superseded == 0
    expected, found = ({trace.trace_id: trace for trace in traces(one)} for one in (undisturbed, run))
    for trace_id, trace in expected.items():
        assert found[trace_id].turns[1].token_ids == trace.turns[1].token_ids
        assert found[trace_id].turns[1].logprobs == pytest.approx(trace.turns[1].logprobs, abs=1e-4)
    for trace_id, stored in logits_of(undisturbed).items():
        mine = logits_of(run)[trace_id].top
        assert mine.log_z_TC == pytest.approx(stored.top.log_z_TC, abs=1e-3)
        assert np.array_equal(mine.ids_TK[:, 0], stored.top.ids_TK[:, 0])  # ties among the others may fall either way
        assert len(mine.ids_TK) == len(expected[trace_id].turns[1].token_ids)
    assert by_task(written(run, recipe.teacher)) == by_task(written(undisturbed, recipe.teacher))
