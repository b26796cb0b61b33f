"""Every path to a gradient on ranks: tests/train/test_ranks.py holds them against float64, tests/bench/gradients.py measures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.train.fixtures import REPOSITORY
from tests.train.rank_worker import VOCABULARY, Case, build_loss, packed_rows
from train.reference import Reference, reference_gradients

PLAIN = {"processes": 2, "rows_per_step": 2}
SHARED = {"processes": 2, "sequence_parallel": 2}
HEAD, PAIR = {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head", "embed_tokens"]}
ON_HEAD = {"targets": ["q_proj", "down_proj", "lm_head"]}
FORWARD_KL = {"objective": {"type": "forward_kl", "weight": 0.7, "temperature": 2.0}}
REVERSE_KL = {"objective": {"type": "reverse_kl"}}

QUICK = [
    Case("stage 0", PLAIN | {"zero_stage": 0}, {}, refuses=True),
    Case("stage 2", PLAIN | {"zero_stage": 2}, {}, refuses=True),
    Case("stage 3", PLAIN | {"zero_stage": 3}, {}),
    Case("shared rows, stage 2", SHARED | {"zero_stage": 2}, {}),
    Case("shared rows, stage 3", SHARED | {"zero_stage": 3}, {}),
]
LEAKING = Case("leaking", SHARED | {"zero_stage": 2}, {})
LONG = [
    Case("stage 3, refusing", PLAIN | {"zero_stage": 3}, {}, refuses=True),
    Case("shared rows, stage 0", SHARED | {"zero_stage": 0}, {}, refuses=True),
    Case("one key head for two ranks, stage 2", SHARED | {"zero_stage": 2}, {}, base="single"),
    Case("one key head for two ranks, stage 3", SHARED | {"zero_stage": 3}, {}, base="single"),
    *(
        Case(f"checkpointed, {name} {stage}", settings | {"zero_stage": stage, "activation_checkpointing": True}, {})
        for stage in (0, 2, 3) for name, settings in (("stage", PLAIN), ("shared rows", SHARED))
    ),
    Case("offloaded optimizer, stage 2", PLAIN | {"zero_stage": 2, "offload": "optimizer"}, {}, refuses=True),
    Case("offloaded optimizer, stage 3", PLAIN | {"zero_stage": 3, "offload": "optimizer"}, {}, refuses=True),
    Case("offloaded parameters, stage 3", PLAIN | {"zero_stage": 3, "offload": "parameters"}, {}, refuses=True),
    Case("offloaded parameters, shared rows", SHARED | {"zero_stage": 3, "offload": "parameters"}, {}),
    *(Case(f"trained head, stage {stage}", PLAIN | {"zero_stage": stage}, HEAD) for stage in (0, 2, 3)),
    Case("trained head, shared rows", SHARED | {"zero_stage": 3}, HEAD),
    *(Case(f"tied pair, stage {stage}", PLAIN | {"zero_stage": stage}, PAIR, base="tied") for stage in (0, 2, 3)),
    Case("tied pair, shared rows", SHARED | {"zero_stage": 2}, PAIR, base="tied"),
    *(Case(f"adapter on the head, stage {stage}", PLAIN | {"zero_stage": stage}, ON_HEAD) for stage in (2, 3)),
    *(Case(f"DoRA, stage {stage}", PLAIN | {"zero_stage": stage}, {"dora": True}) for stage in (0, 2, 3)),
    Case("DoRA, shared rows", SHARED | {"zero_stage": 3}, {"dora": True}),
    Case("rsLoRA, shared rows", SHARED | {"zero_stage": 2}, {"rslora": True}),
    *(Case(f"forward KL, stage {stage}", PLAIN | FORWARD_KL | {"zero_stage": stage}, {}) for stage in (0, 2, 3)),
    Case("reverse KL, shared rows", SHARED | REVERSE_KL | {"zero_stage": 2}, {}),
    Case("forward KL, shared rows", SHARED | FORWARD_KL | {"zero_stage": 3}, {}),
]  # fmt: skip


def save_bases(folder: Path) -> None:
    """The students that cases name."""
    save_base(folder / "base", num_key_value_heads=2)
    save_base(folder / "single", num_key_value_heads=1)
    save_base(folder / "tied", num_key_value_heads=2, tie_word_embeddings=True)


def save_base(folder: Path, **changes: Any) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        head_dim=16, max_position_embeddings=256, initializer_range=0.1, **{"tie_word_embeddings": False, **changes},
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def run_cases(folder: Path, cases: list[Case], *, ranks: int = 2) -> None:
    """Under torchrun, as a training is started; one start for all cases: importing is most of its time."""
    job = json.dumps({"folder": str(folder), "cases": cases})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *launcher, "-m", "tests.train.rank_worker", job]
    ended = subprocess.run(
        command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=580
    )
    assert ended.returncode == 0, ended.stdout[-4000:]


def reference_of(case: Case, folder: Path, known: dict[str, Reference]) -> Reference:
    key = f"{case.base} {case.lora} {case.settings.objective}"
    if key not in known:
        rows = packed_rows(with_teacher=case.settings.objective.type != "cross_entropy")
        known[key] = reference_gradients(build_loss(folder / case.base, case).model, rows, case.settings.objective)
    return known[key]
