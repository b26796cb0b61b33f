"""What a packed row keeps on one GPU for its backward pass.

Counted from transformers' modules with PEFT's LoRA beside them; Liger's kernels and flash attention keep less. A test sums what
autograd saves on a CPU and finds these numbers.

Symbols: t tokens of the row on this rank (row / sequence_parallel), e bytes of a value (4 in fp32, 2 in bf16), r the rank, D the
hidden width, Q and K the width of all query and of all key heads, F the MLP's hidden width. A base weight is frozen, so its
layer keeps no input; the adapter beside it does, once for all adapters that read the same tensor. ZeRO-3 has a linear function
of its own (DeepSpeed's LinearFunctionForZeroStage3, so that no gathered weight is held), which keeps every input: those of
layers without an adapter too, and with dropout the input before it.

Of a decoder layer:
- norms: two float32 copies of the residual stream and their rsqrt, 8 t D + 8 t; with norms of queries and keys 4 t (Q + K) and
  4 t a head more. The first layer's input needs no gradient: its norm keeps nothing.
- adapters: their inputs, e t D for query, key and value, e t Q for the output projection, e t D for gate and up, e t F for down;
  and e t r behind each A. With dropout an input of its own for each, and a mask of a byte a value (a GPU's). With DoRA what the
  base and the adapter put out.
- attention: rotated queries and keys, values, e t (Q + 2 K); each document's output, e t Q; log-sum-exp, 4 t a head. Under
  sequence parallelism all tokens of fewer heads: as many values, until more ranks than key heads need copies of those.
- MLP: gate, up and silu(gate), 3 e t F.
"""

from typing import NamedTuple

from configs.devices import WEIGHT_BYTES
from configs.training import Train
from student.planning.adapter import Adapter
from student.planning.shape import Shape

LOGITS = 2**22
"""Elements of one chunk's logits (train.losses.CHUNK_ELEMENTS)."""
POSITION_BYTES = 8 + 8 + 8 + 1
"""Of a token in its row: id, target, position, and whether it is trained."""


class LayerBytes(NamedTuple):
    """Bytes that one decoder layer keeps, by what for. first_less: what the first layer keeps less."""

    norms: int
    adapters: int
    attention: int
    mlp: int
    first_less: int

    @property
    def total(self) -> int:
        return self.norms + self.adapters + self.attention + self.mlp


class Activations(NamedTuple):
    """Bytes on one GPU at the peak of a pass. hidden: one hidden state a layer, where layers are computed again. layers: what
    layers keep; of one where they are computed again, else of all. rotary: cosines and sines, the last norm. head: hidden
    states of supervised positions (all of the row at worst), their gradient, and a chunk's logits. gradients: of one layer's
    activations under way in the backward pass."""

    hidden: int
    layers: int
    rotary: int
    head: int
    gradients: int

    @property
    def total(self) -> int:
        return sum(self)


def activations(shape: Shape, adapter: Adapter, train: Train, row_tokens: int) -> Activations:
    tokens, value_bytes = row_tokens // train.sequence_parallel, int(WEIGHT_BYTES[train.dtype])
    layer, hidden = layer_bytes(shape, adapter, tokens, train), tokens * shape.hidden * value_bytes
    if train.activation_checkpointing:
        kept, layers = shape.layers * hidden, layer.total
    else:
        kept, layers = 0, shape.layers * layer.total - layer.first_less
    return Activations(
        hidden=kept,
        layers=layers,
        rotary=_around_layers(shape, tokens, value_bytes),
        head=2 * hidden + head_bytes(shape, adapter, value_bytes),
        gradients=tokens * (2 * shape.hidden + 3 * shape.intermediate) * value_bytes,
    )


def layer_bytes(shape: Shape, adapter: Adapter, tokens: int, train: Train) -> LayerBytes:
    value_bytes, hidden, wide = int(WEIGHT_BYTES[train.dtype]), shape.hidden, shape.intermediate
    keys = max(shape.kv_heads, train.sequence_parallel) * shape.head_dim
    norm = tokens * (4 * hidden + 4)
    heads = shape.heads + shape.kv_heads if shape.norms_queries else 0
    inputs = (
        (hidden, adapter.is_on("q_proj", "k_proj", "v_proj")),
        (shape.queries, adapter.is_on("o_proj")),
        (hidden, adapter.is_on("gate_proj", "up_proj")),
        (wide, adapter.is_on("down_proj")),
    )
    is_dropped, keeps_all = adapter.lora.dropout > 0, train.zero_stage == 3
    read = sum(width * (number * (value_bytes + 1) if is_dropped else min(number, 1) * value_bytes) for width, number in inputs)
    also = [width * value_bytes * (keeps_all and (is_dropped or not number)) for width, number in inputs]
    behind = adapter.lora.rank * sum(number for _, number in inputs) * value_bytes
    outputs = sum(target.outputs for target in adapter.targets if target.kind == "linear")
    scaled = 2 * outputs * value_bytes if adapter.lora.dora else 0
    return LayerBytes(
        norms=2 * norm + tokens * heads * (4 * shape.head_dim + 4),
        adapters=tokens * (read + sum(also) + behind + scaled),
        attention=tokens * (value_bytes * 2 * (shape.queries + keys) + 4 * shape.heads),
        mlp=3 * tokens * wide * value_bytes,
        first_less=norm + tokens * also[0],  # what it reads needs no gradient
    )


def _around_layers(shape: Shape, tokens: int, value_bytes: int) -> int:
    return tokens * (2 * shape.head_dim * value_bytes + 4 * shape.hidden + 4 + POSITION_BYTES)


def head_bytes(shape: Shape, adapter: Adapter, value_bytes: int) -> int:
    """Beside hidden states: logits in float32 and as they are multiplied; a trained head's gradient in float32."""
    is_trained = any(module.kind == "head" or (shape.head.shared and module.kind == "embedding") for module in adapter.saved)
    return LOGITS * (4 + value_bytes) + (4 * shape.vocabulary * shape.hidden if is_trained else 0)
