from pathlib import Path

import pytest

from configs.errors import UnusableInput
from configs.schema import Data
from data.stats import dataset_hash, dataset_stats
from data.store import RunFolder, read_rollup
from tests.data.make_run import build_and_seal, make_prompt, make_run, make_trace

SUM, FACT = make_prompt("What is 2 + 2?"), make_prompt("Which metal is mined in Fasosur?", "iron", task="facts")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    first = [make_trace(SUM), make_trace(SUM, "5", sample=1), make_trace(SUM, sample=2, finish="abort")]
    run = make_run(tmp_path, [SUM, FACT], [first, [make_trace(FACT, "iron"), make_trace(FACT, "gold", sample=1)]])
    build_and_seal(run, Data(validation_share=0.0))
    return run


def test_stats_are_the_manifests_figures_by_task(run: RunFolder) -> None:
    stats = dataset_stats(run)
    assert list(stats.tasks) == ["facts", "sums"]
    assert stats.tasks["sums"]["train_rows"] == 1 and stats.tasks["sums"]["reasoning_tokens"] == 5
    assert (stats.total["kept"], stats.total["rejected_by_reason"]) == (2, {"wrong": 2})
    assert (stats.ledger.requested, stats.ledger.failed, stats.ledger.kept) == (5, 1, 2)


def test_the_dataset_hash_follows_its_content_and_nothing_else(tmp_path: Path, run: RunFolder) -> None:
    other = make_run(tmp_path / "other", [SUM, FACT], [[make_trace(FACT), make_trace(SUM)]])
    same = make_run(tmp_path / "same", [SUM, FACT], [[make_trace(SUM)], [make_trace(FACT, "iron")]])
    for folder in (other, same):
        build_and_seal(folder, Data(validation_share=0.0))
    hashes = [dataset_hash(rollup) for folder in (run, same, other) if (rollup := read_rollup(folder.dataset)) is not None]
    assert hashes[0] == hashes[1] != hashes[2]


def test_without_a_sealed_dataset_there_is_nothing_to_tell(tmp_path: Path) -> None:
    run = make_run(tmp_path / "empty", [SUM], [[make_trace(SUM)]])
    with pytest.raises(UnusableInput, match="no dataset yet"):
        dataset_stats(run)
