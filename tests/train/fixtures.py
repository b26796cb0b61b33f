"""A student small enough to train in a second, its dataset, and the runs that need processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from configs.schema import Recipe
from data.byte_tokenizer import build_byte_tokenizer
from student.folders import EMBEDDED

REPOSITORY = Path(__file__).parents[2]
MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    template = (EMBEDDED / "chat_template.jinja").read_text()
    return build_byte_tokenizer(MARKERS, eos="<|im_end|>", pad="<|endoftext|>", chat_template=template)


def save_tiny_base(folder: Path) -> Path:
    """A random Qwen3 of two layers, 32 wide, in float32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3", vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def conversation(question: str, reasoning: str, answer: str) -> list[dict[str, str | None]]:
    return [
        {"role": "user", "content": question, "reasoning_content": None},
        {"role": "assistant", "content": answer, "reasoning_content": reasoning},
    ]


def save_dataset(folder: Path, num_train: int = 34, num_validation: int = 3, long_traces: int = 0) -> Path:
    """Sums with traces of unequal length; `long_traces` of them are over 200 tokens."""

    def rows(start: int, count: int) -> datasets.Dataset:
        return datasets.Dataset.from_list(
            [
                {
                    "trace_id": f"t{number:04d}", "prompt_id": f"p{number:04d}", "task": "sums",
                    "messages": conversation(
                        f"{number}+{number}?", "x" * 200 if number < start + long_traces else "+" * (number % 7), str(2 * number)
                    ),
                }
                for number in range(start, start + count)
            ]
        )  # fmt: skip

    splits: dict[str | datasets.NamedSplit, datasets.Dataset] = {"train": rows(0, num_train)}
    if num_validation:
        splits["validation"] = rows(1000, num_validation)
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def tiny_recipe(base: Path, lora: Mapping[str, Any] | None = None, **train: Any) -> Recipe:
    settings = {
        "dtype": "fp32", "zero_stage": 2, "lr": 3e-3, "epochs": 1.0, "rows_per_step": 2, "max_tokens_per_row": 100,
        "checkpoint_steps": 2, "validation_steps": 3, "wandb": "disabled",
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "name": "tiny",
            "student": {"model": str(base), "lora": {"rank": 4, "alpha": 8, **(lora or {})}},
            "train": settings | train,
        }
    )


def start_worker(task: Mapping[str, Any], *, ranks: int = 1) -> subprocess.Popen[str]:
    """tests/train/worker.py in a process of its own; two ranks start under torchrun. Its output is one pipe."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    command = [sys.executable, *launcher, "-m", "tests.train.worker", json.dumps(task)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_worker(task: Mapping[str, Any], *, ranks: int = 1) -> str:
    process = start_worker(task, ranks=ranks)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return output


def read_lines(process: subprocess.Popen[str]) -> Sequence[str]:
    assert process.stdout is not None
    return process.stdout.readlines()
