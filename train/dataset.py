"""From the dataset folder that `data build` wrote to examples in the student's own tokens."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from data.chat import encode_conversation, rendering_identity
from data.dataset import load_dataset
from data.records import digest
from data.stats import dataset_hash
from data.store import Rollup, RunFolder, read_rollup, sha256_file
from train.batches import Example
from train.rendered import Rendered, read_or_render

COLUMNS = ("trace_id", "messages")
SPLITS = ("train", "validation")
READ_ROWS = 256
"""Rows whose messages are in memory at once while they are rendered."""


class Examples(NamedTuple):
    train: Rendered
    validation: Rendered


def load_examples(
    dataset_dir: Path, tokenizer: PreTrainedTokenizerBase, rendered_dir: Path, *, is_writer: bool = True
) -> Examples:
    """Every trace of both splits, through the student's template; rendered into rendered_dir by the writer unless that has been
    done, by anybody, for the same rows, tokenizer and template (train/rendered.py).

    Raises:
        UnusableInput: when the folder is no dataset with the expected columns, when its bytes are not the sealed ones, when
            its train split is empty, or when a trace cannot be rendered.
    """
    splits = _open_splits(dataset_dir)
    absent = [name for name in ("train",) if name not in splits]
    absent += [column for split in splits.values() for column in COLUMNS if column not in split.column_names]
    if absent:
        raise UnusableInput(f"dataset {dataset_dir}: no split or column {absent[0]!r}; rebuild with: tracestill data build")
    if not len(splits["train"]):
        raise UnusableInput(f"dataset {dataset_dir}: the train split is empty; loosen data.filters or generate more traces")
    identity = {"dataset": _content(dataset_dir), **rendering_identity(tokenizer)}
    encoded = {name: _encode(splits[name], tokenizer) if name in splits else iter(()) for name in SPLITS}
    return Examples(**read_or_render(rendered_dir, identity, encoded, is_writer=is_writer))


def _encode(split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    for rows in split.select_columns(list(COLUMNS)).iter(READ_ROWS):
        for trace_id, messages in zip(rows["trace_id"], rows["messages"], strict=True):  # type: ignore[call-overload]
            yield encode_row(trace_id, messages, tokenizer)


def _rollup(dataset_dir: Path) -> Rollup | None:
    """The manifest of a run folder's dataset; None for a folder from elsewhere."""
    return read_rollup(dataset_dir) if RunFolder(dataset_dir.parent).dataset == dataset_dir else None


def _content(dataset_dir: Path) -> str:
    """Hash of the Arrow files: by the manifest where `data build` sealed them, which _open_splits has held them to. The
    fingerprint that `datasets` keeps beside them is drawn at random."""
    if (rollup := _rollup(dataset_dir)) is not None:
        return dataset_hash(rollup)
    files = sorted(dataset_dir.rglob("*.arrow"))
    return digest([[str(path.relative_to(dataset_dir)), sha256_file(path)] for path in files])


def _open_splits(dataset_dir: Path) -> datasets.DatasetDict:
    """The splits; with every file's hash checked first where `data build` sealed them into a run folder."""
    if _rollup(dataset_dir) is not None:
        return load_dataset(RunFolder(dataset_dir.parent))
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
