"""Every parameter's gradient against float64, by every path: objective, head, ZeRO stage, ranks, shared rows, offload, kept or
recomputed layers.

One accumulated step of a tiny student over five packed rows of 13 documents, four positions to a chunk of logits, on two gloo
ranks under torchrun (the cases of tests/train/rank_cases.py) and in one process; the reference takes the documents one at a time,
with whole logits, by autograd in float64 (train/reference.py). `error` is the largest ||found - expected|| / ||expected|| of any
parameter; float32 on the CPU. A planted error of the scale (twice the gradient) shows that the measure can fail.

    python -m tests.bench.gradients --json docs/bench/gradients.json
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from tests.bench.frame import machine
from tests.train.rank_cases import LONG, QUICK, reference_of, run_cases, save_bases
from tests.train.rank_worker import Case
from train.reference import Reference

ALONE = [
    Case(
        f"{name}, stage {stage}" + (", layers computed again" if again else ""),
        settings | {"zero_stage": stage, "activation_checkpointing": again},
        lora,
    )
    for stage in (0, 2, 3)
    for again in (False, True)
    for name, settings, lora in (
        ("cross-entropy", {}, {}),
        ("forward KL", {"objective": {"type": "forward_kl", "weight": 0.7, "temperature": 2.0}}, {}),
        ("reverse KL", {"objective": {"type": "reverse_kl"}}, {}),
        ("trained head", {}, {"modules_to_save": ["lm_head"]}),
        ("adapter on the head", {}, {"targets": ["q_proj", "down_proj", "lm_head"]}),
        ("rsLoRA", {}, {"rslora": True}),
        ("DoRA", {}, {"dora": True}),
    )
]


def largest_error(found: dict[str, torch.Tensor], reference: Reference) -> float:
    assert found.keys() == reference.gradients.keys()
    errors = ((found[name] - expected).norm() / expected.norm() for name, expected in reference.gradients.items())
    return max(float(error) for error in errors)


def measure(folder: Path) -> tuple[dict[str, float], float]:
    """Largest error by case, and what a gradient of twice the size would show."""
    known: dict[str, Reference] = {}
    found: dict[str, float] = {}
    planted = 0.0
    for ranks, cases in ((1, ALONE), (2, [*QUICK, *LONG])):
        part = folder / str(ranks)
        part.mkdir()
        save_bases(part)
        run_cases(part, cases, ranks=ranks)
        for case in cases:
            gradients, reference = load_file(part / f"{case.name}.gradients"), reference_of(case, part, known)
            found[f"{'two ranks' if ranks > 1 else 'one process'}, {case.name}"] = largest_error(gradients, reference)
            planted = largest_error({name: 2 * one for name, one in gradients.items()}, reference)
    return found, planted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        errors, planted = measure(Path(folder))
    table = Table("case", "largest relative error of a parameter")
    for name, error in errors.items():
        table.add_row(name, f"{error:.1e}")
    Console().print(table)
    result = {
        "benchmark": "gradients", "error": max(errors.values()), "planted": planted, "cases": len(errors), "errors": errors,
        "machine": machine(),
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
