"""What each export of the embedded student keeps, what a real server makes of it, and what its scores hide.

    tracestill run embedded --run-dir RUN_DIR
    python -m tests.bench.exports RUN_DIR --json docs/bench/exports.json

The finished run is copied; all formats that hold for this student are exported there (K-quants do not: its rows have 128 and
352 columns), held against base + adapter on the held-out traces and, where something here serves them, asked through the openai
client.

`formats`: the parity matrix. `served`: chats, tokens and near ties by format; a server that says anything else fails this.
`slices`: accuracy and hallucination rate with their intervals, of teacher, base and student, as the run measured them.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from data.store import RunFolder, read_json
from student.results import read_metrics
from student.scoring import Metrics
from tests.bench.frame import machine

FORMATS = ("merged", "adapter", "gguf-f16", "gguf-q8_0", "int8", "int4", "fp8")
MODELS = ("teacher", "base", "student")
SLICES = ("twins", "unseen", "elsewhere", "pieces")


def measure(run_dir: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run")
        shutil.copytree(run_dir, run.root)
        shutil.rmtree(run.export)
        started = time.perf_counter()
        words = [sys.executable, "-m", "tracestill", "export", "embedded", "--run-dir", str(run.root), "--serve-check"]
        subprocess.run([*words, "-s", f"export.formats=[{', '.join(FORMATS)}]"], check=True)
        seconds = time.perf_counter() - started
        formats = {one["format"]: one for one in read_json(run.export / "parity.json")["formats"]}
        served = read_json(run.evaluation / "serving.json")["served"]
    metrics = {name: found for name in MODELS if (found := read_metrics(RunFolder(run_dir), name)) is not None}
    return {
        "benchmark": "exports", "seconds": round(seconds, 1), "formats": formats, "served": served,
        "slices": {name: slices_of(found) for name, found in metrics.items()},
        "twin_gap": {name: [found.twin_gap, *(found.intervals.get("twin_gap") or ())] for name, found in metrics.items()},
        "machine": machine(),
    }  # fmt: skip


def slices_of(found: Metrics) -> dict[str, dict[str, object]]:
    return {
        name: {
            "items": one.num_items,
            "accuracy": [one.accuracy, *(one.intervals.get("accuracy") or ())],
            "hallucination_rate": [one.hallucination_rate, *(one.intervals.get("hallucination_rate") or ())],
        }
        for name, one in {"all": found, **{name: found.slices[name] for name in SLICES if name in found.slices}}.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What each export keeps.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments.run_dir), indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
