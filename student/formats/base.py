"""What every export format offers: a folder that a server loads, and the model in that folder, so that it can be measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Trained(NamedTuple):
    """What is exported. base: its folder. adapter: PEFT layout. merged: base + adapter in float32 on the CPU, which no format may
    change. calibration: ids of whole training conversations, a sample of the trace mix."""

    base: Path
    adapter: Path
    tokenizer: PreTrainedTokenizerBase
    merged: PreTrainedModel
    calibration: Sequence[Sequence[int]]


class Speaker(Protocol):
    """An exported model as it will be served. `close` frees it."""

    def logits(self, ids_T: Sequence[int]) -> torch.Tensor:
        """float32 [T, V]: the logits behind every position of one sequence."""
        ...

    def generate(self, ids: Sequence[int], *, max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
        """The greedy continuation, without `ids`; it ends with the stop token when there is one."""
        ...

    def close(self) -> None: ...


class Format(Protocol):
    """One file of this package each. name: as recipes call it, and the name of its folder under export/."""

    @property
    def name(self) -> str: ...

    def write(self, trained: Trained, folder: Path) -> Mapping[str, object]:
        """Everything a server needs goes into `folder`, which is empty; what it says of itself (settings, notes) is returned for
        the card. Raises UnusableInput when this student cannot be had in this format, and says why."""
        ...

    def open(self, folder: Path) -> Speaker: ...
