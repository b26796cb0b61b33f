"""The prompt set of a run as it lies on disk: one Arrow file with both sides of the split, written and read a batch at a
time, so that neither a million prompts nor prompts of a million tokens have to fit into memory.

A batch holds at most BATCH_ROWS prompts and BATCH_BYTES of text (a longer prompt stands alone): what one look-up of a
prompt costs. Nothing is mapped into memory, because mapped pages count as resident and 1 M prompts of them are 250 MB.
"""

import hashlib
import os
import uuid
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import UnusableInput
from data.records import Prompt, Split
from data.schema import PROMPT, SCHEMA_VERSION, from_table, is_readable, schema_hash, to_table
from data.store import RunFolder, fsync_folder, read_rollup

BATCH_ROWS = 64
BATCH_BYTES = 1 << 20
CACHED_BATCHES = 8
_ID_BYTES = 16
_KEY = np.dtype(f"S{_ID_BYTES}")


def prompt_file(run: RunFolder) -> Path:
    return run.prompts / "prompts.arrow"


# --- writing -----------------------------------------------------------------------------------------------------


def write_prompts(run: RunFolder, prompts: Iterable[Prompt]) -> Path:
    """The prompts, in the order given, are durable in the run's prompt file; or it is as it was, whatever `prompts` raises."""
    path = prompt_file(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            with pa.ipc.new_file(file, PROMPT, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
                for batch in in_batches(prompts):
                    writer.write_table(to_table(batch, Prompt), max_chunksize=BATCH_ROWS)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return path


def in_batches(prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
    """Runs of at most BATCH_ROWS prompts and BATCH_BYTES of text; a longer prompt is a run of its own."""
    batch: list[Prompt] = []
    num_bytes = 0
    for prompt in prompts:
        size = _text_bytes(prompt)
        if batch and (len(batch) == BATCH_ROWS or num_bytes + size > BATCH_BYTES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(prompt)
        num_bytes += size
    if batch:
        yield batch


def _text_bytes(prompt: Prompt) -> int:
    """UTF-8 bytes of everything that can be long."""
    said = (text for message in prompt.messages for text in message.values() if isinstance(text, str))
    texts = (*said, prompt.answer, prompt.details, prompt.tools, prompt.evidence, prompt.provenance)
    return sum(len(text) if text.isascii() else len(text.encode()) for text in texts)


# --- reading -----------------------------------------------------------------------------------------------------


class PromptIndex(NamedTuple):
    """What has to be known of N prompts to put them in order and to name them; 36 bytes each. positions are those of
    PromptSet.prompts, ascending."""

    prompt_ids_ND: np.ndarray
    """uint8, D = 16: the bytes of prompt_id."""
    task_codes_N: np.ndarray
    """int32 positions in `tasks`."""
    tasks: tuple[str, ...]
    characters_N: np.ndarray
    """int64: of all message contents together."""
    positions_N: np.ndarray
    """int64: row of the prompt in the file."""

    def __len__(self) -> int:
        return len(self.positions_N)

    def prompt_id(self, row: int) -> str:
        return self.prompt_ids_ND[row].tobytes().hex()


class PromptSet:
    """The prompts of a finished stage, by position. Holds CACHED_BATCHES batches; not for several threads at once."""

    def __init__(self, path: Path, sha256: str) -> None:
        """Raises UnusableInput when `path` is missing, is not the file that was hashed, or has another schema."""
        self.path = path
        verify_streaming(path, sha256)
        self._source = pa.OSFile(str(path), "rb")
        self._schema = pa.ipc.open_file(self._source).schema
        if not is_readable(self._schema, Prompt):
            raise UnusableInput(
                f"{path}: schema {schema_hash(self._schema)}, expected {schema_hash(PROMPT)} (version {SCHEMA_VERSION}); "
                "use the release that wrote it, or delete the prompts folder and run its stage again"
            )
        self._reader = self._columns(*self._schema.names)
        self._starts: list[int] = []
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None
        self._cache: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    @classmethod
    def open(cls, run: RunFolder) -> "PromptSet":
        """The run's prompts, verified against the stage's manifest by reading the file once. Raises UnusableInput."""
        rollup = read_rollup(run.prompts)
        if rollup is None:
            raise UnusableInput(f"{run.prompts}: no prompt set yet; run the prompts stage first: tracestill prompts")
        path = prompt_file(run)
        name = str(path.relative_to(run.root))
        if name not in rollup.files:
            raise UnusableInput(f"{run.prompts}: its manifest names no {name}; delete the prompts folder and run its stage again")
        return cls(path, rollup.files[name])

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> "PromptSet":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self._batch_starts()[-1]

    def index(self, split: Split | None = None) -> PromptIndex:
        """Ids, tasks and sizes of one side, or of both. Reads four columns of the whole file."""
        reader = self._columns("prompt_id", "task", "split", "messages")
        codes: dict[str, int] = {}
        parts: list[tuple[np.ndarray, ...]] = []
        start = 0
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            tasks = np.array([codes.setdefault(task, len(codes)) for task in batch["task"].to_pylist()], np.int32)
            wanted = _on_side(batch, split)
            ids_ND, positions_N = _id_bytes(batch["prompt_id"], self.path), np.arange(start, start + batch.num_rows)
            parts.append((ids_ND[wanted], tasks[wanted], _characters(batch["messages"])[wanted], positions_N[wanted]))
            start += batch.num_rows
        empty = (np.zeros((0, _ID_BYTES), np.uint8), np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))
        ids_ND, tasks_N, characters_N, positions_N = (np.concatenate(column) for column in zip(empty, *parts, strict=True))
        return PromptIndex(ids_ND, tasks_N, tuple(codes), characters_N, positions_N)

    def prompts(self, positions: Sequence[int] | np.ndarray) -> list[Prompt]:
        """The prompts at these positions of the file, in the order asked for."""
        starts = self._batch_starts()
        rows = [int(position) for position in positions]
        found: dict[int, Prompt] = {}
        for number, members in groupby(sorted(set(rows)), lambda row: bisect_right(starts, row) - 1):
            wanted = list(members)  # a batch is decompressed once a call, whatever the order
            if not 0 <= wanted[0] <= wanted[-1] < starts[-1]:
                raise IndexError(f"position {wanted[-1] if wanted[0] >= 0 else wanted[0]} of {starts[-1]} prompts")
            batch = self._batch(number).take(pa.array([row - starts[number] for row in wanted]))
            found |= zip(wanted, _records(batch), strict=True)
        return [found[row] for row in rows]

    def positions_of(self, prompt_ids: Sequence[str]) -> np.ndarray:
        """int64: where each of these prompts stands in the file, -1 for one that does not. Holds 24 bytes a prompt from the
        first call on."""
        if self._sorted is None:
            reader = self._columns("prompt_id")
            batches = (reader.get_batch(number)["prompt_id"] for number in range(reader.num_record_batches))
            ids_N = np.concatenate([np.zeros(0, _KEY), *(_keys(_id_bytes(batch, self.path)) for batch in batches)])
            order_N = np.argsort(ids_N, kind="stable")
            self._sorted = ids_N[order_N], order_N
        ids_N, order_N = self._sorted
        if not len(ids_N):
            return np.full(len(prompt_ids), -1)
        wanted_W = _keys(_id_bytes(pa.array(prompt_ids, pa.string()), self.path))
        places_W = np.minimum(np.searchsorted(ids_N, wanted_W), len(ids_N) - 1)
        return np.where(ids_N[places_W] == wanted_W, order_N[places_W], -1)

    def verifiers(self, split: Split | None = None) -> set[str]:
        """Names of those who judge answers to the prompts of one side (or of both)."""
        reader = self._columns("verifier", "split")
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        columns = (batch["verifier"].filter(pa.array(_on_side(batch, split))) for batch in batches)
        return {name for column in columns for name in column.unique().to_pylist()}

    def iterate(self, split: Split | None = None) -> Iterator[Prompt]:
        """The prompts of one side (or of both) in the order of the file, a batch in memory at a time."""
        for number in range(self._reader.num_record_batches):
            for prompt in _records(self._reader.get_batch(number)):
                if split is None or prompt.split == split:
                    yield prompt

    def _batch(self, number: int) -> pa.RecordBatch:
        if number not in self._cache:
            self._cache[number] = self._reader.get_batch(number)
            if len(self._cache) > CACHED_BATCHES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(number)
        return self._cache[number]

    def _batch_starts(self) -> list[int]:
        """First row of each batch, and the number of rows; Arrow's footer has no counts."""
        if not self._starts:
            reader = self._columns("split")
            sizes = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
            self._starts = [0, *np.cumsum(sizes).tolist()]
        return self._starts

    def _columns(self, *names: str) -> pa.RecordBatchFileReader:
        """A reader that decompresses these columns alone, in this thread: for batches this small the pool costs three times
        the decompression."""
        wanted = [self._schema.get_field_index(name) for name in names]
        return pa.ipc.open_file(self._source, options=pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False))


def _records(batch: pa.RecordBatch) -> list[Prompt]:
    return from_table(pa.Table.from_batches([batch]), Prompt)


def read_prompts(run: RunFolder, split: Split | None = None) -> list[Prompt]:
    """The prompts of one side (or of both), all in memory; verified as PromptSet.open does. Raises UnusableInput."""
    with PromptSet.open(run) as found:
        return list(found.iterate(split))


def verify_streaming(path: Path, sha256: str) -> None:
    """Raises UnusableInput when the file is missing or its bytes are not the ones that were hashed."""
    if not path.is_file():
        raise UnusableInput(f"{path}: missing, though its manifest names it; restore it, or run its stage again")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UnusableInput(
            f"{path}: sha256 {found[:12]}, expected {sha256[:12]}: the file changed after it was committed; "
            "restore it from a backup, or delete it with its manifest and run its stage again"
        )


def _on_side(batch: pa.RecordBatch, split: Split | None) -> np.ndarray:
    """Bool, one per row."""
    if split is None:
        return np.ones(batch.num_rows, bool)
    return np.array([side == split for side in batch["split"].to_pylist()], bool)


def _id_bytes(column: pa.Array, path: Path) -> np.ndarray:
    """uint8 [rows, 16] of a column of 32 hex digits each."""
    try:
        return np.frombuffer(bytes.fromhex("".join(column.to_pylist())), np.uint8).reshape(len(column), _ID_BYTES)
    except ValueError as error:
        raise UnusableInput(
            f"{path}: a prompt_id is not {_ID_BYTES} bytes in hex ({error}); build the prompt set again"
        ) from error


def _keys(ids_ND: np.ndarray) -> np.ndarray:
    """The 16 bytes of each id as one value that sorts."""
    return np.ascontiguousarray(ids_ND).view(_KEY).reshape(-1)


def _characters(messages: pa.ListArray) -> np.ndarray:
    """int64: characters of all contents of each row's messages."""
    contents = messages.flatten().field("content").fill_null("")
    lengths = pc.call_function("utf8_length", [contents]).to_numpy(zero_copy_only=False)
    totals = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    counts = np.diff(messages.offsets.to_numpy())
    ends = np.cumsum(counts, dtype=np.int64)
    return totals[ends] - totals[ends - counts]
