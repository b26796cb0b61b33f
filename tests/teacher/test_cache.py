"""Slots: rows of their own lengths, in place, in buffers that grow."""

import pytest
import torch

from teacher.admission import FIRST_COLUMNS, Rectangle
from teacher.cache import SlotCache

CPU = torch.device("cpu")


def states(rows: int, tokens: int, value: float) -> torch.Tensor:
    """[B, H=2, S, D=3] filled with one value."""
    return torch.full((rows, 2, tokens, 3), value)


def test_a_span_is_written_to_the_selected_rows_only() -> None:
    cache = SlotCache(4, 1, CPU)
    cache.select_span(slice(0, 4), 0, 3)
    cache.update(states(4, 3, 1.0), states(4, 3, 1.0), 0)
    cache.select_span(slice(2, 4), 3, 5)
    keys, values = cache.update(states(2, 2, 2.0), states(2, 2, 3.0), 0)
    assert keys.shape == values.shape == (2, 2, 5, 3)
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 2, 2] and values[1, 1, :, 2].tolist() == [1, 1, 1, 3, 3]
    data = cache.slot_layers[0].key_buffer.data
    assert data is not None and data[:2, 3:].eq(0).all()


def test_the_next_token_lands_at_each_rows_own_position() -> None:
    cache = SlotCache(3, 1, CPU)
    cache.select_next(torch.tensor([[0], [4], [2]]), columns=5)
    keys, _ = cache.update(states(3, 1, 7.0), states(3, 1, 7.0), 0)
    assert keys[:, 0, :, 0].tolist() == [[7, 0, 0, 0, 0], [0, 0, 0, 0, 7], [0, 0, 7, 0, 0]]
    assert cache.get_seq_length() == 5 and cache.get_mask_sizes(1, 0) == (5, 0)


@pytest.mark.parametrize("columns", [FIRST_COLUMNS - 1, FIRST_COLUMNS, FIRST_COLUMNS + 1, 5 * FIRST_COLUMNS])
def test_growing_keeps_what_was_written(columns: int) -> None:
    cache = SlotCache(2, 1, CPU)
    cache.select_span(slice(0, 2), 0, 3)
    cache.update(states(2, 3, 1.0), states(2, 3, 1.0), 0)
    cache.select_span(slice(0, 2), 3, columns)
    keys, _ = cache.update(states(2, columns - 3, 2.0), states(2, columns - 3, 2.0), 0)
    assert keys[1, 1, :, 1].tolist() == [1.0] * 3 + [2.0] * (columns - 3)


def test_keys_values_and_indexer_keys_have_shapes_of_their_own() -> None:
    cache = SlotCache(2, 2, CPU)
    cache.select_span(slice(0, 2), 0, 4)
    latents, rotary = cache.update(torch.ones(2, 1, 4, 16), torch.ones(2, 1, 4, 8), 1)
    indexer = cache.update_indexer(torch.ones(2, 4, 5), 1)
    assert (latents.shape, rotary.shape, indexer.shape) == ((2, 1, 4, 16), (2, 1, 4, 8), (2, 4, 5))
    assert cache.slot_layers[0].key_buffer.data is None  # a shared layer costs nothing


def test_a_moved_row_takes_all_its_state_along() -> None:
    cache = SlotCache(3, 1, CPU)
    cache.select_next(torch.tensor([[0], [0], [0]]), columns=1)
    rows = torch.arange(3.0)[:, None, None, None].expand(3, 2, 1, 3)
    cache.update(rows, rows * 10, 0)
    cache.update_indexer(rows[:, 0] * 100, 0)
    cache.move_rows([(2, 0)], columns=1)
    layer = cache.slot_layers[0]
    found = [
        buffer.data[:, 0].flatten(1)[:, 0].tolist()
        for buffer in (layer.key_buffer, layer.value_buffer, layer.indexer_buffer)
        if buffer.data is not None
    ]
    assert found == [[2, 1, 2], [20, 10, 20], [200, 100, 200]]


def test_a_new_shape_keeps_what_fits_it() -> None:
    cache = SlotCache(4, 1, CPU)
    cache.reserve(Rectangle(4, 10))
    cache.select_span(slice(0, 4), 0, 10)
    cache.update(states(4, 10, 1.0), states(4, 10, 1.0), 0)
    cache.reserve(Rectangle(2, 20))
    cache.select_span(slice(0, 2), 10, 20)
    keys, _ = cache.update(states(2, 10, 2.0), states(2, 10, 2.0), 0)
    assert keys.shape == (2, 2, 20, 3) and keys[1, 0, :, 0].tolist() == [1.0] * 10 + [2.0] * 10
    assert cache.num_bytes() == 2 * 2 * 20 * 2 * 3 * 4  # keys and values, rows, columns, heads, dims, float32


def test_moves_happen_as_if_at_once() -> None:
    cache = SlotCache(3, 1, CPU)
    cache.select_next(torch.tensor([[0], [0], [0]]), columns=1)
    rows = torch.arange(3.0)[:, None, None, None].expand(3, 2, 1, 3)
    cache.update(rows, rows, 0)
    cache.move_rows([(0, 2), (2, 1), (1, 0)], columns=1)
    data = cache.slot_layers[0].key_buffer.data
    assert data is not None and data[:, 0, 0, 0].tolist() == [1, 2, 0]
