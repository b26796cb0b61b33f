"""What a dense student's config.json says: its modules with parameters, by name and size. Nothing is loaded.

Counts follow transformers' modules; a test builds those at true shape on the meta device to compare.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from configs.errors import UnusableInput

Config = Mapping[str, Any]
LARGEST = 10**7
"""Of any size in a config.json: above it the file is damaged."""


class Module(NamedTuple):
    """`count` modules of one name, alike in all layers. name: its last components, as LoRA's targets name it. Weights are
    [outputs, inputs]; an embedding's inputs are the vocabulary, a norm's are 1. shared: its weight is another module's."""

    name: str
    kind: Literal["linear", "head", "embedding", "norm"]
    inputs: int
    outputs: int
    count: int
    has_bias: bool = False
    shared: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each of its tensors."""
        return (self.inputs * self.outputs, *((self.outputs,) if self.has_bias else ()))

    def is_called(self, name: str) -> bool:
        """As PEFT compares a target: the whole name, or its end from a dot on."""
        return self.name == name or self.name.endswith(f".{name}")


@dataclass(frozen=True, slots=True)
class Shape:
    """modules: in the order of a forward pass. queries, keys: width of all query heads together, of all key heads."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    norms_queries: bool
    modules: tuple[Module, ...]

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def head(self) -> Module:
        return next(module for module in self.modules if module.kind == "head")

    @property
    def parameters(self) -> int:
        return sum(module.count * sum(module.sizes) for module in self.modules if not module.shared)

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer's linear modules."""
        return sum(sum(module.sizes) for module in self.modules if module.kind == "linear")


class Family(NamedTuple):
    """What a model_type does without saying so in its config.json. biases: on query, key and value projections. bias_key: the
    configuration's word for biases on those and the output projection, if it has one."""

    norms_queries: bool = False
    biases: bool = False
    bias_key: str = ""


FAMILIES = {
    "llama": Family(bias_key="attention_bias"),
    "mistral": Family(),
    "qwen2": Family(biases=True),
    "qwen3": Family(norms_queries=True, bias_key="attention_bias"),
}


def read_shape(config: Config, where: str) -> Shape:
    """Raises UnusableInput: a family that is not in FAMILIES, or a size that is missing or none."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or not isinstance(model_type, str):
        raise UnusableInput(f"{where}: model_type {model_type!r} has no size formula; expected one of {', '.join(FAMILIES)}")
    layers, hidden, intermediate, heads, vocabulary, positions = (
        _size(config, key, where)
        for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
                    "max_position_embeddings")
    )  # fmt: skip
    kv_heads = heads if config.get("num_key_value_heads") is None else _size(config, "num_key_value_heads", where)
    head_dim = hidden // heads if config.get("head_dim") is None else _size(config, "head_dim", where)
    if heads % kv_heads or head_dim < 1:
        raise UnusableInput(f"{where}: {heads} heads, {kv_heads} for keys, {head_dim} wide in config.json; restore the file")
    queries, keys = heads * head_dim, kv_heads * head_dim
    biased = family.biases or bool(family.bias_key and config.get(family.bias_key))
    output_biased, mlp_biased = biased and not family.biases, model_type == "llama" and bool(config.get("mlp_bias"))
    norms = [("self_attn.q_norm", head_dim), ("self_attn.k_norm", head_dim)] if family.norms_queries else []
    norms += [("input_layernorm", hidden), ("post_attention_layernorm", hidden)]
    return Shape(
        model_type, layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, positions, family.norms_queries,
        modules=(
            Module("model.embed_tokens", "embedding", vocabulary, hidden, 1),
            Module("self_attn.q_proj", "linear", hidden, queries, layers, biased),
            Module("self_attn.k_proj", "linear", hidden, keys, layers, biased),
            Module("self_attn.v_proj", "linear", hidden, keys, layers, biased),
            Module("self_attn.o_proj", "linear", queries, hidden, layers, output_biased),
            Module("mlp.gate_proj", "linear", hidden, intermediate, layers, mlp_biased),
            Module("mlp.up_proj", "linear", hidden, intermediate, layers, mlp_biased),
            Module("mlp.down_proj", "linear", intermediate, hidden, layers, mlp_biased),
            *(Module(name, "norm", 1, width, layers) for name, width in norms),
            Module("model.norm", "norm", 1, hidden, 1),
            Module("lm_head", "head", hidden, vocabulary, 1, shared=bool(config.get("tie_word_embeddings"))),
        ),
    )  # fmt: skip


def _size(config: Config, key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise UnusableInput(f"{where}: {key} {value!r} in config.json; expected a whole number from 1 to {LARGEST}")
    return value
