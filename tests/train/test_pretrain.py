"""What rebuilds the embedded pair pads its lessons; training packs its rows (train/batches.py)."""

import torch

from data.chat import IGNORE_INDEX, Encoded
from train.pretrain import pad_batch


def test_padding_is_never_a_label() -> None:
    ids, labels = pad_batch([Encoded([5, 6, 7], [False, True, True]), Encoded([8], [True])], pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert labels.tolist() == [[IGNORE_INDEX, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]]
    assert ids.dtype == labels.dtype == torch.int64
