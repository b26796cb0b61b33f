"""What sharding has to know of an architecture: how its router scores experts, and which dense matrices tensor
parallelism may slice. No torch.

An architecture that is not in FAMILIES still runs under ZeRO-3 alone; expert or tensor parallelism of it is refused
rather than guessed, because a matrix sliced the wrong way gives fluent nonsense and no error. To add one: name its
matrices here, its router in experts.py, a tiny model in tests/teacher/models.py, and let tests/distributed say whether
two ranks equal one process.
"""

from typing import Literal, NamedTuple

from configs.errors import UnusableInput

# Of every family: dense layers and shared experts. Routed experts are no modules of their own, so `mlp` never means them.
_MLP_COLUMN = (r".*\.(mlp|shared_experts)\.(gate_proj|up_proj)\.weight$",)
_MLP_ROW = (r".*\.(mlp|shared_experts)\.down_proj\.weight$",)
_ALWAYS_WHOLE = (r".*\.mlp\.gate\.weight$", r".*embed_tokens\.weight$")


class Family(NamedTuple):
    """One architecture's entry. Patterns are regular expressions over parameter names, matched from their start.

    scores: how the router turns logits into weights. normalised: whether a token's top-k weights are divided by their sum;
    None: config.json says so (`norm_topk_prob`). has_shared_experts: dense experts beside the routed ones, under that name.
    column: matrices whose output features are sliced over the ranks of a tensor-parallel group; row: whose input features
    are, their products summed over the group. whole: matrices that every rank of the group keeps. The output head is
    sliced by columns and gathered, in every family.
    """

    scores: Literal["sigmoid", "softmax"]
    normalised: bool | None
    has_shared_experts: bool
    column: tuple[str, ...]
    row: tuple[str, ...]
    whole: tuple[str, ...]


# Latent attention: what makes queries and keys of heads is sliced; what makes latents, which all heads share, is not.
_LATENT = Family(
    scores="sigmoid",
    normalised=None,
    has_shared_experts=True,
    column=(r".*\.self_attn\.(q_proj|q_b_proj|kv_b_proj)\.weight$", *_MLP_COLUMN),
    row=(r".*\.self_attn\.o_proj\.weight$", *_MLP_ROW),
    whole=(r".*\.self_attn\.(q_a_proj|kv_a_proj_with_mqa)\.weight$", *_ALWAYS_WHOLE),
)
_GROUPED_QUERY = Family(
    scores="softmax",
    normalised=None,
    has_shared_experts=False,
    column=(r".*\.self_attn\.(q_proj|k_proj|v_proj)\.weight$", *_MLP_COLUMN),
    row=(r".*\.self_attn\.o_proj\.weight$", *_MLP_ROW),
    whole=_ALWAYS_WHOLE,
)

# By `model_type` of config.json.
FAMILIES: dict[str, Family] = {
    # The indexer scores whole tokens, not heads: it stays whole.
    "glm_moe_dsa": _LATENT._replace(whole=(*_LATENT.whole, r".*\.self_attn\.indexer\..*")),
    "deepseek_v3": _LATENT,
    "qwen3_moe": _GROUPED_QUERY,
    "mixtral": _GROUPED_QUERY._replace(normalised=True),  # its config.json does not say; its router does
}

HEAD = r".*lm_head\.weight$"


def family_of(model_type: str) -> Family:
    """Raises UnusableInput for an architecture that nobody has tried sharded."""
    if model_type not in FAMILIES:
        raise UnusableInput(
            f"model_type {model_type}: expert and tensor parallelism know {', '.join(FAMILIES)}; "
            "set layout.expert_parallel and layout.tensor_parallel to 1 (ZeRO-3 alone), or add it to teacher/families.py"
        )
    return FAMILIES[model_type]
