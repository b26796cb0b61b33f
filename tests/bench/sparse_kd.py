"""A whole training step by each divergence against the same step by cross-entropy alone.

Packed rows of 4,096 tokens, 12 documents, 60 % of them supervised; a tiny Qwen3 with V = 65,536, LoRA r16, float32, one thread.
The teacher's 128 logits a token come off the disk in the timed step, as they do in training. Every objective takes a step in
each round, in turns; figures are medians, ratios medians over rounds. Besides the width of the headline, a narrower and a wider
model: the narrower, the more of a step is the passes over logits that a divergence adds to.

    python -m tests.bench.sparse_kd --json docs/bench/sparse_kd.json
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from configs.training import CrossEntropy, ForwardKl, Lora, Objective, ReverseKl
from data.chat import IGNORE_INDEX
from student.adapter_files import trainable
from student.lora import attach
from tests.bench.frame import machine
from train.attention import use_documents
from train.batches import Batch
from train.cached_table import read_or_write
from train.losses import SupervisedLoss
from train.teacher_targets import TARGETS, TargetStore

VOCABULARY, TOKENS, DOCUMENTS, SUPERVISED, TOP_K = 65_536, 4_096, 12, 0.6, 128
WIDTHS = (64, 128, 256)
HEADLINE_WIDTH = 128
OBJECTIVES: Mapping[str, Objective] = {
    "cross_entropy": CrossEntropy(),
    "forward_kl": ForwardKl(weight=0.5, temperature=2.0),
    "reverse_kl": ReverseKl(weight=0.5, temperature=2.0),
    "forward_kl_t1": ForwardKl(weight=0.5, temperature=1.0),
    "forward_kl_t3": ForwardKl(weight=0.5, temperature=3.0),
}


def build_model(width: int) -> torch.nn.Module:
    config = AutoConfig.for_model(
        "qwen3", vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    use_documents(model)
    return attach(model, Lora(rank=16, alpha=32), seed=0)


def build_row() -> Batch:
    """Every document starts with what is masked."""
    ids_1T = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    lengths = [TOKENS // DOCUMENTS + (document < TOKENS % DOCUMENTS) for document in range(DOCUMENTS)]
    position_ids_T = torch.cat([torch.arange(length) for length in lengths])
    targets_T = torch.roll(ids_1T[0], -1)
    masked_T = torch.cat([torch.arange(length) < round((1 - SUPERVISED) * length) for length in lengths])
    targets_T[masked_T] = IGNORE_INDEX
    targets_T[torch.tensor(lengths).cumsum(0) - 1] = IGNORE_INDEX
    return Batch(ids_1T, targets_T[None], position_ids_T[None])


def build_store(folder: Path, row: Batch, temperature: float) -> TargetStore:
    """The row's documents as traces of their own, every supervised position with logits."""
    ends = (row.position_ids_1T[0] == 0).nonzero()[1:, 0].tolist()
    counts = [int((part != IGNORE_INDEX).sum()) for part in row.targets_1T[0].tensor_split(ends)]
    rng = np.random.default_rng(0)

    def write(writer: pa.RecordBatchFileWriter) -> dict[str, int]:
        for document, count in enumerate(counts):
            ids = np.concatenate([rng.choice(VOCABULARY, TOP_K, replace=False) for _ in range(count)])
            logits = -np.sort(rng.exponential(6, (count, TOP_K)))
            log_z = np.log(np.exp(logits / temperature).sum(-1)) + 0.2
            columns = [[document], [True], [TOP_K], [ids], [logits.astype(np.float16).ravel()], [log_z]]
            writer.write_table(pa.table(columns, schema=TARGETS))
        return {"top_k": TOP_K}

    cached = read_or_write(folder, TARGETS, {"temperature": repr(temperature)}, write, is_writer=True, what="")
    return TargetStore(cached, np.array(counts), temperature)


def make_step(model: torch.nn.Module, objective: Objective, row: Batch, folder: Path) -> Callable[[], float]:
    """One optimizer step; returns the loss."""
    loss = SupervisedLoss(model, objective)
    store = None if isinstance(objective, CrossEntropy) else build_store(folder, row, objective.temperature)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-5, fused=True)

    def step() -> float:
        teacher = None if store is None else store.of(range(DOCUMENTS))
        value = loss(row.ids_1T, row.targets_1T, row.position_ids_1T, teacher)
        (value / len(row.targets_1T)).backward()
        torch.nn.utils.clip_grad_norm_(trainable(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def measure(width: int, repeats: int, folder: Path) -> dict[str, object]:
    """Processor seconds of a step by objective, and each one's ratio to cross-entropy's of the same round."""
    model, row = build_model(width), build_row()
    steps = {name: make_step(model, objective, row, folder) for name, objective in OBJECTIVES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(1 + repeats):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if repeat:
                seconds[name].append(time.process_time() - started)
    plain = seconds["cross_entropy"]
    ratios = {
        name: [one / other for one, other in zip(seconds[name], plain, strict=True)] for name in steps if name != "cross_entropy"
    }
    return {
        "width": width,
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "ratio": {name: statistics.median(found) for name, found in ratios.items()},
        "ratio_min": {name: min(found) for name, found in ratios.items()},
        "ratio_max": {name: max(found) for name, found in ratios.items()},
    }


def show(widths: Sequence[dict]) -> None:
    table = Table("width", *OBJECTIVES)
    for one in widths:
        cells = [
            f"{one['seconds'][name]:.2f} s" + (f" ({one['ratio'][name]:.2f} x)" if name in one["ratio"] else "")
            for name in OBJECTIVES
        ]
        table.add_row(str(one["width"]), *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        widths = [measure(width, arguments.repeats, Path(folder)) for width in arguments.widths]
    show(widths)
    [headline] = [one for one in widths if one["width"] == HEADLINE_WIDTH] or widths[:1]
    result = {
        "benchmark": "sparse_kd",
        "forward_kl": headline["ratio"]["forward_kl"],  # type: ignore[index]
        "reverse_kl": headline["ratio"]["reverse_kl"],  # type: ignore[index]
        "repeats": arguments.repeats,
        "machine": machine(),
        "widths": widths,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
