"""One decode step over a long history: teacher/sparse_attention.py against stock transformers, step by step in one process.

    python -m tests.bench.sparse_decode --json docs/bench/sparse_decode.json

The lab shape is two layers of GLM-5.2 at a quarter of its width (hidden 1536, 16 heads, latents 128 + 16, expert FFN 512), the
second one sparse with 8 of 16 experts, both with an indexer of full size: 32 heads x 128, top 2,048. Only 21 of GLM-5.2's 78
layers have one and its other matrices are 16 times larger, so the growth with the history is overstated here. float32, batch 1.

Both sides start from one history of random latents of the scale that the norms give them, and decode greedily: their tokens
must be equal and their logits within LOGIT_BOUND, at every step that is timed. A step is all of it: mask, forward pass, argmax.
The new token is a column too, so with 2,048 columns of history there are 2,049 to choose 2,048 from.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, GlmMoeDsaConfig, PreTrainedModel

from teacher.cache import SlotCache
from teacher.sparse_attention import IMPLEMENTATION, install
from tests.bench.frame import machine

HISTORIES: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
LOGIT_BOUND = 1e-3  # 3e-6 measured; one wrong column among the 2,048 selected moves a logit by 4e-2
CONFIG = GlmMoeDsaConfig(
    vocab_size=1024, hidden_size=1536, intermediate_size=3072, moe_intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=16, num_key_value_heads=16, n_shared_experts=1, n_routed_experts=16, num_experts_per_tok=8,
    routed_scaling_factor=2.5, first_k_dense_replace=1, q_lora_rank=512, kv_lora_rank=128, qk_nope_head_dim=48,
    qk_rope_head_dim=16, v_head_dim=64, head_dim=16, index_n_heads=32, index_head_dim=128, index_topk=2048,
    indexer_types=["full", "full"], max_position_embeddings=1 << 20, initializer_range=0.026, pad_token_id=None,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip

Step = Callable[[int, int], Tensor]
"""Feeds (token, position); returns the next token's logits [V]."""


class Timed(NamedTuple):
    """Seconds of one step by the wall clock and on the processor, and what it said."""

    wall_s: float
    cpu_s: float
    logits_V: Tensor


@dataclass(frozen=True, slots=True)
class Point:
    """Medians over the repeats, in milliseconds a step."""

    history: int
    ours_ms: float
    stock_ms: float
    ours_cpu_ms: float
    stock_cpu_ms: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Least squares over the points: step = a + b T."""

    a_ms: float
    b_ms_per_1k: float


@dataclass(frozen=True, slots=True)
class Found:
    """ratio: stock over ours at the longest history, the median of the pairwise ratios. growth_2k_32k: our longest over our
    shortest, likewise; by the processor's clock too, which neighbours on a shared machine disturb less."""

    benchmark: str
    ratio: float
    ratio_min: float
    ratio_max: float
    growth_2k_32k: float
    growth_2k_32k_cpu: float
    stock_growth_2k_32k: float
    ours_fit: Fit
    stock_fit: Fit
    points: list[Point]
    max_logit_difference: float
    equal_tokens: int
    repeats: int
    threads: int
    machine: str
    versions: str
    config: dict[str, int | list[str]]


def build_model(attention: str) -> PreTrainedModel:
    """The same weights every time. The config is copied: a model writes its attention into it."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation="grouped_mm").eval()


def fill(caches: list[Cache], columns: int) -> None:
    """Writes one random history into all of the caches. Latents and index keys leave a norm with unit scale; rotary parts leave a
    projection of normed states: standard deviation 0.026 x sqrt(1536)."""
    generator = torch.Generator().manual_seed(columns)
    for layer in range(CONFIG.num_hidden_layers):
        latents, rotary, index_keys = (
            torch.randn(1, columns, dim, generator=generator)
            for dim in (CONFIG.kv_lora_rank, CONFIG.qk_rope_head_dim, CONFIG.index_head_dim)
        )
        rotary *= CONFIG.initializer_range * CONFIG.hidden_size**0.5
        for cache in caches:
            cache.update(latents[:, None], rotary[:, None], layer)
            cache.update_indexer(index_keys, layer)


def step_of_ours(model: PreTrainedModel, cache: SlotCache) -> Step:
    def step(token: int, position: int) -> Tensor:
        positions_11 = torch.tensor([[position]])
        cache.select_next(positions_11, position + 1)
        mask_1T = torch.arange(position + 1) <= positions_11
        inputs = {"input_ids": torch.tensor([[token]]), "position_ids": positions_11, "attention_mask": mask_1T[:, None, None]}
        return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    return step


def step_of_stock(model: PreTrainedModel, cache: Cache) -> Step:
    def step(token: int, position: int) -> Tensor:
        return model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    return step


def timed(step: Step, token: int, position: int) -> Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    logits_V = step(token, position)
    logits_V.argmax().item()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu, logits_V)


def steps_at(ours: PreTrainedModel, stock: PreTrainedModel, columns: int) -> tuple[Step, Step]:
    slots = SlotCache(1, CONFIG.num_hidden_layers, torch.device("cpu"))
    slots.select_span(slice(0, 1), 0, columns)
    growing = DynamicCache(config=CONFIG)
    fill([slots, growing], columns)
    return step_of_ours(ours, slots), step_of_stock(stock, growing)


def measure(repeats: int, warmup: int = 2) -> Found:
    """Every repeat takes one step of ours and one of stock at each history, shortest first. The first steps warm up: our
    buffers double then."""
    ours, stock = build_model(IMPLEMENTATION), build_model("sdpa")
    install(ours)
    sides = {columns: steps_at(ours, stock, columns) for columns in HISTORIES}
    tokens = dict.fromkeys(HISTORIES, 7)
    runs: dict[int, list[tuple[Timed, Timed]]] = {columns: [] for columns in HISTORIES}
    difference = 0.0
    for repeat in range(warmup + repeats):
        for columns, (our_step, stock_step) in sides.items():
            token, position = tokens[columns], columns + repeat
            pair = timed(our_step, token, position), timed(stock_step, token, position)
            ours_V, stock_V = pair[0].logits_V, pair[1].logits_V
            difference = max(difference, (ours_V - stock_V).abs().max().item())
            assert ours_V.argmax() == stock_V.argmax(), f"history {columns}, step {repeat}: other tokens"
            tokens[columns] = int(ours_V.argmax())
            runs[columns] += [pair] if repeat >= warmup else []
    assert difference <= LOGIT_BOUND, f"logits differ by {difference}"
    return summarise(runs, difference, len(HISTORIES) * (warmup + repeats))


def summarise(runs: dict[int, list[tuple[Timed, Timed]]], difference: float, equal_tokens: int) -> Found:
    shortest, longest = runs[HISTORIES[0]], runs[HISTORIES[-1]]
    ratios = [stock.wall_s / ours.wall_s for ours, stock in longest]
    points = [point(columns, pairs) for columns, pairs in runs.items()]
    ends = list(zip(shortest, longest, strict=True))
    return Found(
        benchmark="sparse_decode",
        ratio=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        growth_2k_32k=statistics.median(late[0].wall_s / early[0].wall_s for early, late in ends),
        growth_2k_32k_cpu=statistics.median(late[0].cpu_s / early[0].cpu_s for early, late in ends),
        stock_growth_2k_32k=statistics.median(late[1].wall_s / early[1].wall_s for early, late in ends),
        ours_fit=fit([(at.history, at.ours_ms) for at in points]),
        stock_fit=fit([(at.history, at.stock_ms) for at in points]),
        points=points,
        max_logit_difference=difference,
        equal_tokens=equal_tokens,
        repeats=len(longest),
        threads=torch.get_num_threads(),
        machine=machine(),
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        config={
            name: value for name, value in CONFIG.to_diff_dict().items() if isinstance(value, int) or name == "indexer_types"
        },
    )


def point(history: int, pairs: list[tuple[Timed, Timed]]) -> Point:
    ours, stock = zip(*pairs, strict=True)
    return Point(
        history,
        ours_ms=1e3 * statistics.median(one.wall_s for one in ours),
        stock_ms=1e3 * statistics.median(one.wall_s for one in stock),
        ours_cpu_ms=1e3 * statistics.median(one.cpu_s for one in ours),
        stock_cpu_ms=1e3 * statistics.median(one.cpu_s for one in stock),
        ratio=statistics.median(other.wall_s / one.wall_s for one, other in pairs),
    )


def fit(points: list[tuple[int, float]]) -> Fit:
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    return Fit(intercept, 1024 * slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there as well")
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    with torch.inference_mode():
        found = measure(arguments.repeats)
    table = Table("history", "ours ms", "stock ms", "ratio", title=f"one decode step, {found.threads} thread(s)")
    for at in found.points:
        table.add_row(f"{at.history:,}", f"{at.ours_ms:.1f}", f"{at.stock_ms:.1f}", f"{at.ratio:.1f}")
    Console().print(table)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(asdict(found), indent=1) + "\n")
    print(json.dumps(asdict(found), separators=(",", ":")))


if __name__ == "__main__":
    main()
