"""From the dataset folder that `data build` wrote to examples in the student's own tokens."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from data.chat import encode_conversation
from data.dataset import load_dataset
from data.store import RunFolder, read_rollup
from train.batches import Example

COLUMNS = ("trace_id", "messages")


class Examples(NamedTuple):
    train: list[Example]
    validation: list[Example]


def load_examples(dataset_dir: Path, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Every trace of both splits, through the student's template. Nothing is cached: a stale cache would outlive a change
    of the template, and encoding costs under a millisecond a trace.

    Raises:
        UnusableInput: when the folder is no dataset with the expected columns, when its bytes are not the sealed ones, or
            when its train split is empty.
    """
    splits = _open_splits(dataset_dir)
    absent = [name for name in ("train",) if name not in splits]
    absent += [column for split in splits.values() for column in COLUMNS if column not in split.column_names]
    if absent:
        raise UnusableInput(f"dataset {dataset_dir}: no split or column {absent[0]!r}; rebuild with: tracestill data build")
    if not len(splits["train"]):
        raise UnusableInput(f"dataset {dataset_dir}: the train split is empty; loosen data.filters or generate more traces")
    validation = _encode(splits["validation"], tokenizer) if "validation" in splits else []
    return Examples(_encode(splits["train"], tokenizer), validation)


def _encode(split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    columns = zip(split["trace_id"], split["messages"], strict=True)
    return [encode_row(trace_id, messages, tokenizer) for trace_id, messages in columns]


def _open_splits(dataset_dir: Path) -> datasets.DatasetDict:
    """The splits; with every file's hash checked first where `data build` sealed them into a run folder."""
    run = RunFolder(dataset_dir.parent)
    if run.dataset == dataset_dir and read_rollup(dataset_dir) is not None:
        return load_dataset(run)
    if not (dataset_dir / "dataset_dict.json").is_file():
        raise UnusableInput(f"dataset {dataset_dir}: no dataset_dict.json; expected the folder written by: tracestill data build")
    return datasets.DatasetDict.load_from_disk(str(dataset_dir))


def encode_row(trace_id: str, messages: Sequence[dict[str, str | None]], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Arrow gives every message every field; an absent one must be absent again, since templates ask `is defined`."""
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return Example(trace_id, encode_conversation(tokenizer, present))
    except UnusableInput as error:
        raise UnusableInput(f"trace {trace_id}: {error}") from error


def examples_sha256(examples: Iterable[Example]) -> str:
    """Identity of what is trained: ids and masks in order, hence dataset, tokenizer and template at once."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.trace_id}:{len(example.encoded.ids)};".encode())
        digest.update(np.asarray(example.encoded.ids, dtype=np.int32).tobytes())
        digest.update(np.asarray(example.encoded.mask, dtype=np.bool_).tobytes())
    return digest.hexdigest()
