"""The architectures beside GLM: what one process says is what transformers says, so that two ranks may be held to it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from teacher.local_engine import LocalEngine
from tests.teacher.models import save_random_model
from tests.teacher.test_decode import make_requests


@pytest.mark.parametrize("kind", ["deepseek", "qwen-moe", "mixtral"])
def test_one_process_says_what_transformers_generates(tmp_path: Path, kind: str) -> None:
    folder, requests = save_random_model(tmp_path, kind), make_requests(4)
    engine = LocalEngine(folder, batch_size=3)
    said = {completion.request_id: completion.token_ids for completion in engine.generate(requests)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for request in requests:
        prompt_1S = torch.tensor([request.prompt_ids])
        output_1S = model.generate(  # type: ignore[attr-defined]
            prompt_1S, max_new_tokens=request.max_tokens, do_sample=False, eos_token_id=list(request.stop_ids), pad_token_id=0
        )
        assert said[request.request_id] == tuple(output_1S[0, prompt_1S.shape[1] :].tolist())
    stats = engine.expert_stats()
    assert stats is not None and all(sum(map(sum, layers)) > 0 for layers in stats.counts.values())
