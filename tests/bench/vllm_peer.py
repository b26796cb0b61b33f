"""Runs in the environment .bench/vllm: greedy token ids of vLLM for the prompts of a JSON file.

.bench/vllm/bin/python -P tests/bench/vllm_peer.py SPEC ANSWER
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def answer(spec: dict) -> list[list[int]]:
    """spec: model, adapter (or null) and its rank, prompts as token ids, stop_token_ids, max_tokens."""
    from vllm import LLM, SamplingParams  # type: ignore
    from vllm.lora.request import LoRARequest  # type: ignore

    lora = LoRARequest("student", 1, spec["adapter"]) if spec["adapter"] else None
    more = {"enable_lora": True, "max_lora_rank": spec["rank"]} if lora else {}
    model = LLM(model=spec["model"], dtype="bfloat16", enforce_eager=True, max_model_len=512, seed=0, **more)
    sampling = SamplingParams(temperature=0.0, max_tokens=spec["max_tokens"], stop_token_ids=spec["stop_token_ids"])
    prompts = [{"prompt_token_ids": ids} for ids in spec["prompts"]]
    return [list(one.outputs[0].token_ids) for one in model.generate(prompts, sampling, lora_request=lora)]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answer(json.loads(Path(sys.argv[1]).read_text()))))
