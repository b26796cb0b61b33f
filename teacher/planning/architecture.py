"""What a config.json says about size: parameters by part and bytes of cache per token. Formulas only; nothing is loaded.

Counts follow transformers' modules, and a test builds those on the meta device to compare. A multi-token-prediction
layer is left out, as transformers leaves it out: GLM-5.2's checkpoint holds 753.3 B parameters, 743.4 B without it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from configs.errors import UnusableInput
from teacher.planning.attention_size import Grouped, Latent

Config = Mapping[str, Any]


class Parts(NamedTuple):
    """Parameters of the whole model, by what they are. `other`: of an architecture that is known by its tensors only."""

    embeddings: int = 0
    head: int = 0
    norms: int = 0
    attention: int = 0
    indexer: int = 0
    router: int = 0
    dense_mlp: int = 0
    shared_experts: int = 0
    routed_experts: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def dense(self) -> int:
        """All but the routed experts."""
        return self.total - self.routed_experts


@dataclass(frozen=True, slots=True)
class Architecture:
    """A causal language model as far as planning is concerned. expert: parameters of one routed expert of one layer.
    layer_dense: dense parameters of the largest decoder layer."""

    model_type: str
    layers: int
    hidden: int
    vocabulary: int
    max_positions: int
    attention: Latent | Grouped
    parts: Parts
    layer_dense: int
    sparse_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert: int = 0
    expert_hidden: int = 0
    tied: bool = field(default=False, kw_only=True)

    @property
    def active(self) -> int:
        """Parameters of the parts one token uses, the whole embedding table among them, as model cards count."""
        return self.parts.dense + self.sparse_layers * self.experts_per_token * self.expert

    def cache_values(self, tensor_parallel: int = 1) -> int:
        """Numbers kept per token of one request on one rank, all layers."""
        return self.attention.cache_values(self.layers, tensor_parallel)


class Family(NamedTuple):
    """How a model_type names and builds what the formulas need. always_biased: query, key and value projections, whatever
    the configuration says. biased_output: the output projection has a bias where the others do. sparse: has routed experts,
    whose hidden width is under expert_size."""

    latent: bool = False
    indexer: bool = False
    query_key_norm: bool = False
    always_biased: bool = False
    biased_output: bool = True
    sparse: bool = False
    expert_size: str = "moe_intermediate_size"


FAMILIES = {
    "glm_moe_dsa": Family(latent=True, indexer=True, sparse=True),
    "deepseek_v3": Family(latent=True, sparse=True),
    "qwen3_moe": Family(query_key_norm=True, sparse=True),
    "mixtral": Family(sparse=True, expert_size="intermediate_size"),
    "qwen3": Family(query_key_norm=True),
    "qwen2": Family(always_biased=True, biased_output=False),
    "llama": Family(),
    "mistral": Family(),
}


MAY_BE_NOTHING = (
    "n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers", "n_routed_experts", "num_experts",
    "num_local_experts", "index_topk_freq", "index_skip_topk_offset",
)  # fmt: skip
MAY_BE_NULL = ("q_lora_rank",)
"""Null says something here: queries are made without a latent. Any other null is a key that is not there."""
MOST_LAYERS, LARGEST = 10_000, 10**9
SIZES = (
    "num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "index_n_heads", "index_head_dim", "index_topk", "num_experts_per_tok", "max_position_embeddings", "decoder_sparse_step",
    *MAY_BE_NOTHING,
)  # fmt: skip


def read_architecture(config: Config, where: str) -> Architecture:
    """The architecture of a known family's config.json.

    Raises:
        UnusableInput: a family that is not in FAMILIES, or a key that is missing or no number one can count with.
    """
    model_type = model_type_of(config, where)
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(FAMILIES)
        raise UnusableInput(f"{where}: model_type {model_type!r} has no size formula; expected one of {known}")
    return counted(config, where, lambda config: _architecture(config, family, model_type))


def model_type_of(config: Config, where: str) -> str:
    """Empty when the file has none. Raises UnusableInput when it is no name."""
    model_type = config.get("model_type") or ""
    if not isinstance(model_type, str):
        raise UnusableInput(f"{where}: model_type {_shown(model_type)} in config.json; expected a name, such as glm_moe_dsa")
    return model_type


def counted(config: Config, where: str, count: Callable[[Config], Architecture]) -> Architecture:
    """What `count` makes of a config.json whose values can be counted with. Raises UnusableInput with the key at fault."""
    _check_values(config, where)
    try:
        return count({key: value for key, value in config.items() if value is not None or key in MAY_BE_NULL})
    except (TypeError, AttributeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise UnusableInput(f"{where}: a value of config.json cannot be counted with ({error}); restore the file") from error
    except KeyError as error:
        needs = f"{config.get('model_type') or 'a plan'} needs to be counted"
        raise UnusableInput(f"{where}: no {error.args[0]} in config.json, which {needs}; restore the file") from error


def _check_values(config: Config, where: str) -> None:
    """Sizes are whole numbers, at least 1 (a few may be 0 or absent); a list by layer has an entry for each."""
    for key in SIZES:
        value, least = config.get(key), 0 if key in MAY_BE_NOTHING else 1
        most = MOST_LAYERS if key == "num_hidden_layers" else LARGEST
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most):
            expected = f"a whole number of at least {least} and at most {most}"
            raise UnusableInput(f"{where}: {key} {_shown(value)} in config.json; expected {expected}")
    for key in ("indexer_types", "mlp_layer_types"):
        entries, layers = config.get(key), config.get("num_hidden_layers")
        if entries is not None and (not isinstance(entries, list) or len(entries) != layers):
            raise UnusableInput(f"{where}: {key} in config.json; expected a list with an entry for each of {layers} layers")
    experts, chosen = routed_experts(config), config.get("num_experts_per_tok") or 0
    if experts and chosen > experts:
        raise UnusableInput(
            f"{where}: num_experts_per_tok {chosen} in config.json, of {experts} experts; expected at most as many"
        )


def _shown(value: object) -> str:
    """On one line that can be read: a damaged file may hold anything."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _architecture(config: Config, family: Family, model_type: str) -> Architecture:
    layers, hidden, vocabulary = config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
    attention, attention_size, norm_size = (_latent if family.latent else _grouped)(config, family)
    sparse = _sparse_layers(config, family)
    num_experts = routed_experts(config) if sparse else 0
    expert_hidden = config[family.expert_size] if sparse else 0
    expert, shared = 3 * hidden * expert_hidden, 3 * hidden * expert_hidden * (config.get("n_shared_experts") or 0)
    mlp = 3 * hidden * config["intermediate_size"] + (_mlp_biases(config) if config.get("mlp_bias") else 0)
    indexer = _indexer_size(config) if family.indexer else 0
    tied = bool(config.get("tie_word_embeddings"))
    parts = Parts(
        embeddings=vocabulary * hidden,
        head=0 if tied else vocabulary * hidden,
        norms=hidden + layers * (2 * hidden + norm_size),
        attention=layers * attention_size,
        indexer=attention.num_indexers * indexer,
        router=sparse * hidden * num_experts,
        dense_mlp=(layers - sparse) * mlp,
        shared_experts=sparse * shared,
        routed_experts=sparse * num_experts * expert,
    )
    return Architecture(
        model_type=model_type,
        layers=layers,
        hidden=hidden,
        vocabulary=vocabulary,
        max_positions=config["max_position_embeddings"],
        attention=attention,
        parts=parts,
        layer_dense=attention_size + indexer + max(mlp if sparse < layers else 0, shared + hidden * num_experts),
        sparse_layers=sparse,
        num_experts=num_experts,
        experts_per_token=config["num_experts_per_tok"] if sparse else 0,
        expert=expert,
        expert_hidden=expert_hidden,
        tied=tied,
    )


class Sizes(NamedTuple):
    """attention: parameters of one layer's projections. norms: of its own norms, beyond the layer's two."""

    shape: Latent | Grouped
    attention: int
    norms: int


def _latent(config: Config, family: Family) -> Sizes:
    hidden, heads, latent, rotary = (
        config[key] for key in ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_rope_head_dim")
    )
    nope, value, query_latent = config["qk_nope_head_dim"], config["v_head_dim"], config["q_lora_rank"]
    per_query = heads * (nope + rotary)
    queries = hidden * query_latent + query_latent * per_query if query_latent else hidden * per_query
    down = hidden * (latent + rotary)
    biases = (query_latent or 0) + latent + rotary + hidden if config.get("attention_bias") else 0
    size = queries + down + latent * heads * (nope + value) + heads * value * hidden + biases
    shape = Latent(
        heads=heads,
        latent=latent,
        rotary=rotary,
        nope=nope,
        value=value,
        query_down=hidden * (query_latent or 0) + down,
        num_indexers=indexer_types(config).count("full") if family.indexer else 0,
        index_heads=config["index_n_heads"] if family.indexer else 0,
        index_dim=config["index_head_dim"] if family.indexer else 0,
        index_topk=config["index_topk"] if family.indexer else 0,
    )
    return Sizes(shape, size, (query_latent or 0) + latent)


def _grouped(config: Config, family: Family) -> Sizes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    if head_dim < 1:
        raise ValueError(f"{heads} attention heads of hidden_size {hidden}")
    projected = (heads + 2 * kv_heads) * head_dim
    biases = 0
    if family.always_biased or config.get("attention_bias"):
        biases = projected + (hidden if family.biased_output else 0)
    size = hidden * projected + heads * head_dim * hidden + biases
    return Sizes(Grouped(heads, kv_heads, head_dim), size, 2 * head_dim if family.query_key_norm else 0)


def routed_experts(config: Config) -> int:
    """Their number. Its key differs by family, and transformers 5 saves another one than published checkpoints have."""
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    return next((config[name] for name in names if config.get(name) is not None), 0)


def indexer_types(config: Config) -> list[str]:
    """`full` or `shared` for each layer: as listed, else by the schedule's keys with transformers' defaults (every
    index_topk_freq-th layer from index_skip_topk_offset on). GLM-5.2 lists them: 0, 1, 2, then every fourth from 6."""
    if listed := config.get("indexer_types"):
        return list(listed)
    if pattern := config.get("index_topk_pattern"):
        return [{"F": "full", "S": "shared"}.get(letter, str(letter)) for letter in pattern]
    frequency, offset = max(config.get("index_topk_freq", 1), 1), config.get("index_skip_topk_offset", 2)
    layers = range(config["num_hidden_layers"])
    return ["full" if max(layer - offset + 1, 0) % frequency == 0 else "shared" for layer in layers]


def _indexer_size(config: Config) -> int:
    hidden, heads, dim = config["hidden_size"], config["index_n_heads"], config["index_head_dim"]
    return config["q_lora_rank"] * heads * dim + hidden * dim + 2 * dim + hidden * heads


def _mlp_biases(config: Config) -> int:
    return 2 * config["intermediate_size"] + config["hidden_size"]


def _sparse_layers(config: Config, family: Family) -> int:
    """Layers with routed experts: as listed, after the first dense ones, or every decoder_sparse_step-th."""
    layers = config["num_hidden_layers"]
    if not family.sparse or routed_experts(config) == 0:
        return 0
    if listed := config.get("mlp_layer_types"):
        return list(listed).count("sparse")
    if family.latent:
        return layers - min(config.get("first_k_dense_replace", 3), layers)
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return sum((layer + 1) % step == 0 and layer not in dense for layer in range(layers))
