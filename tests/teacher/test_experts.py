"""Which tokens are counted: the routers' choices against a plain forward pass over the finished sequences."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import teacher.admission
import teacher.row
from data.engine import Completion, Handout, Partial, Request
from data.expert_load import CountedLoad
from teacher.decode import Batch
from teacher.local_engine import LocalEngine
from tests.teacher.test_decode import changed, make_requests, with_limits


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


def fed_tokens(requests: Iterable[Request], completions: Iterable[Completion]) -> list[list[int]]:
    """The last output token is never fed back, so it is never routed."""
    asked = {request.request_id: request for request in requests}
    return [[*asked[done.request_id].prompt_ids, *done.token_ids[:-1]] for done in completions]


def counts_of(completions: Iterable[Completion]) -> torch.Tensor:
    """[L, E]: what the completions themselves carry, added up."""
    loads = [completion.expert_load for completion in completions]
    return sum((torch.tensor(load.counts) for load in loads if isinstance(load, CountedLoad)), torch.zeros(()).long())


def test_counts_are_those_of_the_sequences_without_padding(glm_folder: Path) -> None:
    """Fourteen requests in five slots, prompts of different lengths: padding and finished rows are in every pass."""
    engine = LocalEngine(glm_folder, batch_size=5)
    requests = make_requests(14, temperature=1.0)
    done = list(engine.generate(requests))
    assert all(one.expert_load is not None and one.expert_load.max_over_mean >= 1 for one in done)
    stats, task_of = engine.expert_stats(), {request.request_id: request.task for request in requests}
    assert stats is not None and stats.counts.keys() == {"odd", "even"}
    for task, counts in stats.counts.items():
        members = [one for one in done if task_of[one.request_id] == task]
        assert torch.equal(torch.tensor(counts), counts_by_hand(glm_folder, fed_tokens(requests, members))), task
        assert torch.equal(torch.tensor(counts), counts_of(members)), task


def test_rows_that_were_sent_back_and_read_in_again_count_once(glm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher.row, "HEADROOM", 1)
    monkeypatch.setattr(teacher.admission, "FIRST_COLUMNS", 8)
    back: list[int] = []
    send_back = Batch._send_back
    monkeypatch.setattr(Batch, "_send_back", lambda batch: (back.append(len(batch.rows)), send_back(batch)))
    engine = with_limits(LocalEngine(glm_folder, batch_size=12), cache_tokens=200, prefill_tokens=11)
    requests = changed(make_requests(12), prompt_ids=(7, 8, 9), max_tokens=30, stop_ids=(), temperature=1.0)
    done = list(engine.generate(requests))
    assert len(back) > 3 and len(done) == 12
    assert torch.equal(counts_of(done), counts_by_hand(glm_folder, fed_tokens(requests, done)))


def test_a_continued_output_counts_its_prefix_and_what_was_handed_out_counts_nowhere_else(glm_folder: Path) -> None:
    """The attempt that was stopped routed these tokens too, but only the attempt that finishes them has a trace."""
    request = changed(make_requests(1), prompt_ids=(7, 8, 9), max_tokens=20, stop_ids=(), temperature=1.0)[0]
    handed_out: list[Partial] = []
    first = LocalEngine(glm_folder, batch_size=2)
    stop = Handout(every_tokens=7, take=handed_out.append, stop=lambda: bool(handed_out))
    assert list(first.generate([request], stop)) == []
    stats = first.expert_stats()
    assert stats is not None and stats.counts == {}
    said = handed_out[-1]
    again = dataclasses.replace(request, prefix_ids=said.token_ids, prefix_logprobs=said.logprobs)
    assert len(said.token_ids) >= 7
    done = list(LocalEngine(glm_folder, batch_size=2).generate([again]))
    assert len(done[0].token_ids) == 20
    assert torch.equal(counts_of(done), counts_by_hand(glm_folder, fed_tokens([request], done)))
    assert int(counts_of(done)[0].sum()) == 2 * (3 + 20 - 1)  # two experts for each token but the last


def test_a_dense_model_has_no_expert_load(qwen_folder: Path) -> None:
    engine = LocalEngine(qwen_folder, batch_size=2)
    assert all(completion.expert_load is None for completion in engine.generate(make_requests(3)))
    assert engine.expert_stats() is None
