"""From the dataset folder that `data build` wrote to examples in the student's own tokens."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from data.chat import encode_conversation, ends_with_stop, rendering_identity
from data.dataset import load_dataset
from data.records import digest
from data.stats import dataset_hash
from data.store import Rollup, RunFolder, read_rollup, sha256_file
from train.batches import Example
from train.rendered import Rendered, read_or_render

COLUMNS = ("trace_id", "messages")
OPTIONAL_COLUMNS = ("finish_reason", "tools")
"""Of a dataset from elsewhere."""
SPLITS = ("train", "validation")
READ_ROWS = 256
"""Rows whose messages are in memory at once while they are rendered."""
UNFINISHED = "unfinished"
"""Why a trace is dropped whose generation did not stop by itself: its end would teach a stop in mid-thought."""


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
    known = [name for name in OPTIONAL_COLUMNS if name in split.column_names]
    for rows in split.select_columns([*COLUMNS, *known]).iter(READ_ROWS):
        assert isinstance(rows, dict)
        none = [None] * len(rows["trace_id"])
        columns = [rows.get(name, none) for name in (*COLUMNS, *OPTIONAL_COLUMNS)]
        for trace_id, messages, finish_reason, tools in zip(*columns, strict=True):
            yield encode_row(trace_id, messages, tokenizer, finish_reason, tools or "")


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


def encode_row(
    trace_id: str,
    messages: Sequence[dict[str, str | None]],
    tokenizer: PreTrainedTokenizerBase,
    finish_reason: str | None = None,
    tools: str = "",
) -> Example:
    """The trace in the student's tokens, dropped as UNFINISHED where its generation did not stop by itself. Where that is not
    known (no finish_reason), it did if the template itself ends the last turn; nothing is appended to one that it leaves open.

    Arrow gives every message every field; an absent one must be absent again, since templates ask `is defined`.
    """
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        encoded = encode_conversation(tokenizer, present, finish_reason=finish_reason, tools=tools)
    except UnusableInput as error:
        raise UnusableInput(f"trace {trace_id}: {error}") from error
    if finish_reason is None:
        is_finished = not present or present[-1]["role"] != "assistant" or ends_with_stop(tokenizer, encoded)
    else:
        is_finished = finish_reason == "stop"
    return Example(trace_id, encoded, "" if is_finished else UNFINISHED)
