"""Expert load: figures by hand, counts against a plain forward pass over the finished sequences."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from teacher.experts import LoadMetrics, load_metrics, rank_loads, summarise
from teacher.local_engine import LocalEngine
from tests.teacher.test_decode import make_requests


def test_even_load_is_one_everywhere() -> None:
    """Figures are max over mean, cv, entropy, dead fraction."""
    assert load_metrics([5, 5, 5, 5]) == pytest.approx((1.0, 0.0, 1.0, 0.0))


def test_collapse_onto_one_expert() -> None:
    found = load_metrics([8, 0, 0, 0])
    assert found == pytest.approx((4.0, math.sqrt(3), 0.25, 0.75))


def test_a_skewed_layer_by_hand() -> None:
    """4, 2, 2, 0: mean 2, variance (4 + 0 + 0 + 4) / 4 = 2, H = 0.5 ln 2 + 2 x 0.25 ln 4 = 1.5 ln 2, exp(H) / 4 = 0.7071."""
    found = load_metrics([4, 2, 2, 0])
    assert found == pytest.approx((2.0, math.sqrt(2) / 2, 2**1.5 / 4, 0.25))


def test_nothing_routed_is_no_load() -> None:
    assert load_metrics([0, 0]) == LoadMetrics(0.0, 0.0, 0.0, 0.0)


def test_ranks_hold_contiguous_blocks_of_experts() -> None:
    assert rank_loads([1, 2, 3, 4, 5, 6], expert_parallel=3) == [3, 7, 11]


def test_a_requests_summary_averages_layers() -> None:
    load = summarise(torch.tensor([[4, 2, 2, 0], [2, 2, 2, 2]]))
    assert load.max_over_mean == pytest.approx(1.5) and load.entropy == pytest.approx((2**1.5 / 4 + 1) / 2)
    assert load.hottest[0] == (0, 0)


def counts_by_hand(folder: Path, sequences: list[list[int]]) -> torch.Tensor:
    """[L, E]: one unpadded forward pass a sequence, the routers' own choices counted one by one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    routers = [module for module in model.modules() if type(module).__name__ == "GlmMoeDsaTopkRouter"]
    counts = torch.zeros(len(routers), 8, dtype=torch.long)

    def hook(layer: int):  # noqa: ANN202
        def count(module: torch.nn.Module, inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
            for expert in outputs[2].flatten().tolist():
                counts[layer, expert] += 1

        return count

    for layer, router in enumerate(routers):
        router.register_forward_hook(hook(layer))
    with torch.no_grad():
        for sequence in sequences:
            model(torch.tensor([sequence]))
    return counts


def test_counts_are_those_of_the_sequences_without_padding(glm_folder: Path) -> None:
    """The last output token is never fed back, so it is never routed."""
    engine = LocalEngine(glm_folder, batch_size=5)
    requests = {request.request_id: request for request in make_requests(14, temperature=1.0)}
    fed = {"odd": [], "even": []}
    for completion in engine.generate(requests.values()):
        request = requests[completion.request_id]
        fed[request.task].append([*request.prompt_ids, *completion.token_ids[:-1]])
        assert completion.expert_load is not None and completion.expert_load.max_over_mean >= 1
    stats = engine.expert_stats()
    assert stats is not None and stats.counts.keys() == fed.keys()
    for task, sequences in fed.items():
        assert torch.equal(torch.tensor(stats.counts[task]), counts_by_hand(glm_folder, sequences)), task


def test_a_dense_model_has_no_expert_load(qwen_folder: Path) -> None:
    engine = LocalEngine(qwen_folder, batch_size=2)
    assert all(completion.expert_load is None for completion in engine.generate(make_requests(3)))
    assert engine.expert_stats() is None
