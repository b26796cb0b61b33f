import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import Data
from data import shards
from data.build import build
from data.dataset import features
from data.shards import ROW, num_shards, shard_of
from data.store import RunFolder
from tests.data.make_run import make_prompt, make_run, make_trace


def loaded_rows(run: RunFolder) -> list[dict]:
    whole: Any = datasets.load_from_disk(str(run.dataset))
    return whole["train"].to_list()


identities = st.lists(st.integers(0, 2**128 - 1).map(lambda number: f"{number:032x}"), min_size=1, max_size=40)


@given(identities, st.integers(1, 300))
def test_shards_are_ranges_of_identities(names: list[str], count: int) -> None:
    numbers = shard_of(pa.array(sorted(names)), count)
    assert (np.diff(numbers) >= 0).all() and numbers.min() >= 0 and numbers.max() < count
    assert numbers.tolist() == [int(name[:8], 16) * count // 2**32 for name in sorted(names)]


@pytest.mark.parametrize(
    ("num_bytes", "expected"), [(0, 1), (1, 1), (32 << 20, 1), ((32 << 20) + 1, 2), (4 << 30, 128), (1 << 40, 1024)]
)
def test_shards_are_as_few_as_fit_into_memory(num_bytes: int, expected: int) -> None:
    assert num_shards(num_bytes) == expected


def test_the_features_are_those_that_datasets_itself_would_write() -> None:
    everything = pa.schema(
        [*ROW, ("flag", pa.bool_()), ("share", pa.float32()), ("score", pa.float64()), ("names", pa.list_(pa.string()))]
    )
    assert features(everything) == datasets.Features.from_arrow_schema(everything).to_dict()


def test_many_shards_hold_every_row_once_in_order_as_arrow_and_as_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = make_prompt("q", "4")
    traces = [make_trace(prompt, "4", sample=sample, reasoning=f"thought {sample}") for sample in range(60)]
    run = make_run(tmp_path / "run", [prompt], [traces[start::4] for start in range(4)])
    monkeypatch.setattr(shards, "SHARD_BYTES", 400)
    build(Data(validation_share=0.0), run)
    files = sorted((run.dataset / "train").glob("*.arrow"))
    assert len(files) > 3 and files[0].name == f"data-00000-of-{len(files):05d}.arrow"
    rows = loaded_rows(run)
    assert [row["trace_id"] for row in rows] == sorted(trace.trace_id for trace in traces)
    parquet = pa.concat_tables([pq.read_table(path) for path in sorted((run.dataset / "parquet").glob("train-*.parquet"))])
    assert parquet.to_pylist() == rows
    loaded = datasets.load_dataset("parquet", data_dir=str(run.dataset / "parquet"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].to_list() == rows and list(loaded) == ["train"]
    assert not list(run.dataset.rglob("spilled"))


def test_what_datasets_reads_is_what_it_would_have_written(tmp_path: Path) -> None:
    """The JSON files beside the shards, against datasets' own writer."""
    prompt = make_prompt("q", "4")
    run = make_run(tmp_path / "run", [prompt], [[make_trace(prompt)]])
    build(Data(validation_share=0.0), run)
    loaded = datasets.load_from_disk(str(run.dataset))
    shards_of: Any = {"train": 1, "validation": 1}  # a dictionary, as this method of a DatasetDict wants it
    loaded.save_to_disk(tmp_path / "theirs", num_shards=shards_of)
    for name in ("dataset_dict.json", "train/dataset_info.json", "train/state.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (run.dataset, tmp_path / "theirs"))
        assert all(len(said.pop("_fingerprint", "0" * 16)) == 16 for said in (ours, theirs)) and ours == theirs, name
