"""A key-value cache of slots: every row has its own length, and a finished row's place is free at once.

transformers' caches give all rows one length. Here each layer owns one buffer [slots, columns, heads, dim]; a row is
left-aligned in it and a decode step writes each row at that row's own position. Before a forward pass the loop says
which rows take part and where they write (`select`); the layers then return only those rows, cut at the longest live
one. Writing in place beats growing by concatenation: 0.2 ms against 8.9 ms a step at 2,048 columns, 5 layers, 32 rows.

The same class serves GLM's latent attention (keys hold the latents, values the rotary part, plus indexer keys on the
layers with an indexer) and plain grouped-query attention.

Legend: B rows of this forward pass, S new tokens, T columns, H key-value heads, D head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from teacher.admission import Rectangle, rectangle


@dataclass(slots=True)
class Cursor:
    """Where the current forward pass writes: `rows` of the buffers, at `positions_BS`, and how many columns it reads.

    shape: slots and columns that every buffer has when it is next written. start: set when every row writes the same span
    of columns (prefill), which is a copy; otherwise a scatter.
    """

    shape: Rectangle
    rows: slice = field(default_factory=lambda: slice(0, 0))
    positions_BS: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    row_index_B1: Tensor = field(default_factory=lambda: torch.empty(0, 1, dtype=torch.long))
    start: int | None = None
    columns: int = 0


class SlotBuffer:
    """[slots, columns, ...] of one kind of state, in the dtype and on the device of what is first written.

    Zeroed, never `empty`: masked columns get probability 0, and 0 times an uninitialised NaN is NaN.
    """

    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor
        self.data: Tensor | None = None

    def write(self, new_BSX: Tensor) -> Tensor:
        """Stores new_BSX (B, S, then any dims) at the cursor; returns all the columns the cursor reads, as a view."""
        cursor = self.cursor
        data = self._reserve(new_BSX)
        if cursor.start is not None:
            data[cursor.rows, cursor.start : cursor.start + new_BSX.shape[1]] = new_BSX
        else:
            data[cursor.row_index_B1, cursor.positions_BS] = new_BSX
        return data[cursor.rows, : cursor.columns]

    def _reserve(self, like_BSX: Tensor) -> Tensor:
        """Takes the cursor's shape, keeping what fits it. One buffer of one layer exists twice at a time."""
        if self.data is None or self.data.shape[:2] != self.cursor.shape:
            shaped = like_BSX.new_zeros(*self.cursor.shape, *like_BSX.shape[2:])
            if self.data is not None:
                slots, columns = (min(extents) for extents in zip(self.cursor.shape, self.data.shape, strict=False))
                shaped[:slots, :columns] = self.data[:slots, :columns]
            self.data = shaped
        return self.data

    def copy_rows(self, source: Tensor, target: Tensor, columns: int) -> None:
        """Copies as if at once: a row may be a source and a target."""
        if self.data is not None:
            self.data[target, :columns] = self.data[source, :columns]


class SlotLayer(CacheLayerMixin):
    """One attention layer's buffers. Keys, values and indexer keys may differ in every dimension after the columns."""

    is_sliding = False

    def __init__(self, cursor: Cursor) -> None:
        super().__init__()
        self.is_initialized = True
        self.cursor = cursor
        self.key_buffer, self.value_buffer, self.indexer_buffer = (SlotBuffer(cursor) for _ in range(3))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: a buffer takes its shape from what is first written."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """[B, H, S, D] in, [B, H, T, D] out, as transformers' attention modules expect."""
        keys_BTHD = self.key_buffer.write(key_states.transpose(1, 2))
        values_BTHD = self.value_buffer.write(value_states.transpose(1, 2))
        return keys_BTHD.transpose(1, 2), values_BTHD.transpose(1, 2)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """[B, S, D] in, [B, T, D] out."""
        return self.indexer_buffer.write(indexer_key_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cursor.columns, 0

    def get_seq_length(self) -> int:
        return self.cursor.columns

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """`num_slots` rows for `num_layers` attention layers. Rows are chosen per forward pass by `select_*`.

    Columns grow by themselves when a pass needs more; a loop that keeps to a budget calls `reserve` before it does.
    get_seq_length and get_mask_sizes answer with the columns in view; callers pass their own 4-D mask and position ids.
    """

    def __init__(self, num_slots: int, num_layers: int, device: torch.device) -> None:
        self.cursor = Cursor(Rectangle(num_slots, 0))
        self.device = device
        self.slot_layers = [SlotLayer(self.cursor) for _ in range(num_layers)]
        super().__init__(layers=list(self.slot_layers))

    @property
    def num_slots(self) -> int:
        return self.cursor.shape.slots

    @property
    def num_columns(self) -> int:
        return self.cursor.shape.columns

    def reserve(self, shape: Rectangle) -> None:
        """Buffers take this shape when they are next written; rows and columns beyond it are lost."""
        self.cursor.shape = shape

    def select_span(self, rows: slice, start: int, stop: int) -> None:
        """The next forward pass writes columns [start, stop) of each row and reads [0, stop)."""
        self._grow(stop)
        self.cursor.rows, self.cursor.start, self.cursor.columns = rows, start, stop

    def select_next(self, positions_B1: Tensor, columns: int) -> None:
        """The next forward pass writes one token a row, for rows 0..B-1, at each row's own position; reads [0, columns)."""
        self._grow(columns)
        num_rows = positions_B1.shape[0]
        self.cursor.rows, self.cursor.start, self.cursor.columns = slice(0, num_rows), None, columns
        self.cursor.positions_BS = positions_B1
        self.cursor.row_index_B1 = torch.arange(num_rows, device=self.device)[:, None]

    def move_rows(self, moves: list[tuple[int, int]], columns: int) -> None:
        """Copies rows (source, target) over one another, as if all at once. columns: how many hold anything."""
        source, target = torch.tensor(moves, device=self.device).T
        for buffer in self.buffers():
            buffer.copy_rows(source, target, columns)

    def buffers(self) -> Iterator[SlotBuffer]:
        for layer in self.slot_layers:
            yield from (layer.key_buffer, layer.value_buffer, layer.indexer_buffer)

    def num_bytes(self) -> int:
        """What the buffers take now."""
        return sum(buffer.data.nbytes for buffer in self.buffers() if buffer.data is not None)

    def _grow(self, columns: int) -> None:
        if columns > self.num_columns:
            shape = rectangle(self.num_slots, columns, num_slots=self.num_slots, cache_tokens=None)
            assert shape is not None
            self.reserve(shape)
