"""Our side of train_vs_trl: the training stage's own entry, in a process like the others'.

python -m tests.bench.product_peer FOLDER RUN_DIR     (the folder that train_set wrote)
"""

import sys
from pathlib import Path

import transformers.models.qwen3.modeling_qwen3  # noqa: F401  loaded on first use otherwise, and counted as the training's memory
from safetensors.torch import load_file

from student.adapter_files import ADAPTER_WEIGHTS
from tests.bench.marks import mark
from tests.bench.train_set import read_settings, recipe_of
from train.loop import train
from train.measures import LOSS
from train.tracking import METRICS_FILE, Metrics, read_metrics


def on_step(step: int, total: int, _: Metrics) -> None:
    """The step is taken and its metrics are on disk."""
    if step == 1:
        mark("warm")
    if step == total:
        mark("trained")


def main(folder: Path, run_dir: Path) -> None:
    mark("imported")
    result = train(recipe_of(folder, read_settings(folder)), dataset_dir=folder / "dataset", run_dir=run_dir, report=on_step)
    rows = [row for row in read_metrics(run_dir / "metrics" / METRICS_FILE) if LOSS in row]
    mark(
        "done",
        losses=[row[LOSS] for row in rows],
        supervised=[row["loss/supervised_tokens"] for row in rows],
        trainable=sum(tensor.numel() for tensor in load_file(result.adapter_dir / ADAPTER_WEIGHTS).values()),
        checkpoints=len(list((run_dir / "checkpoints").glob("step-*"))),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
