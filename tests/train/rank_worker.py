"""What tests/train/test_ranks.py runs on real ranks: python -m tests.train.rank_worker '{"folder": ..., "cases": [...]}'.

Each case is one accumulated step of a tiny student with its own settings; what it came to is written by rank 0.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.errors import UnusableInput
from configs.launch import end_rank
from configs.training import Lora, Train
from data.chat import IGNORE_INDEX, Encoded
from student.adapter_files import save_adapter, trainable
from student.lora import attach
from train import engine_config, losses
from train.attention import use_documents
from train.batches import Batch, to_batch
from train.losses import SupervisedLoss
from train.objectives.targets import TeacherTargets
from train.reference import documents_in
from train.step import MOMENTS, OptimizerState, TrainingStep, UlyssesSPAttentionHF, joined_world

VOCABULARY, KEPT = 97, 5
ROWS = [[9, 30, 1], [40], [3, 4, 5, 6, 7], [11, 12], [25, 2]]
"""Lengths of the documents of each row: odd sums, so that rows shared by two are padded, and five rows over two ranks."""


PROBED = 3
"""Of ROWS: its last document is trained, so that the probe has something to see."""


class Case(NamedTuple):
    """name: of the files it writes. base: folder of the student. train, lora: settings. refuses: whether steps that must not be
    applied are tried too."""

    name: str
    train: dict[str, Any]
    lora: dict[str, Any]
    base: str = "base"
    refuses: bool = False

    @property
    def settings(self) -> Train:
        defaults = {"dtype": "fp32", "rows_per_step": 1, "lr": 1e-2, "liger": False, "max_grad_norm": 1e9}
        return Train.model_validate(defaults | self.train)


def packed_rows(*, with_teacher: bool = False) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    rows = [to_batch([_document(length, generator) for length in lengths], None) for lengths in ROWS]
    return [row._replace(teacher=_teacher(row, generator)) if with_teacher else row for row in rows]


def _document(length: int, generator: torch.Generator) -> Encoded:
    ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
    return Encoded(ids, [place >= length // 3 for place in range(length)])


def _teacher(row: Batch, generator: torch.Generator) -> TeacherTargets:
    supervised = int((row.targets_1T != IGNORE_INDEX).sum())
    logits_NV = torch.randn(supervised, VOCABULARY, generator=generator) * 2
    log_probs_NK, ids_NK = logits_NV.log_softmax(-1).topk(KEPT)
    return TeacherTargets(ids_NK, log_probs_NK, torch.rand(supervised, generator=generator) < 0.7)


def build_loss(base: Path, case: Case) -> SupervisedLoss:
    """The student with adapters whose lora_B is noise: at zero, the gradients of lora_A would be zero too."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    use_documents(model)
    adapted = attach(model, Lora.model_validate({"rank": 4, "alpha": 8} | case.lora), seed=0)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in trainable(adapted).items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return SupervisedLoss(adapted, case.settings.objective).train()


def take_step(step: TrainingStep, rows: Sequence[Batch]) -> float:
    """Accumulates the rows over micro-steps; returns the mean loss. A rank without a row has a token without a target."""
    world = step.world
    tokens = sum(int((row.targets_1T != IGNORE_INDEX).sum()) for row in rows)
    micro_steps = [rows[start : start + world.data_size] for start in range(0, len(rows), world.data_size)]
    loss_sum = 0.0
    for number, shared_out in enumerate(micro_steps, 1):
        row = shared_out[world.data_rank] if world.data_rank < len(shared_out) else to_batch([], None)
        loss_sum += step.accumulate(row, tokens_in_step=tokens, is_last=number == len(micro_steps))
    return step.sum_over_ranks([loss_sum])[0] / tokens


def run_case(case: Case, folder: Path) -> None:
    with joined_world(case.settings.sequence_parallel) as world:
        step = TrainingStep(build_loss(folder / case.base, case), world, case.settings)
        rows = packed_rows(with_teacher=case.settings.objective.type != "cross_entropy")
        step.check_isolation(rows[PROBED], list(documents_in([rows[PROBED]])))
        facts: dict[str, object] = {"loss": take_step(step, rows), "world": list(world)}
        gradients = {name: tensor.clone() for name, tensor in step.gradients().items()}
        facts["norm"] = step.apply(lr=1e-2).norm
        first = step.export_state()
        if case.refuses:
            facts["refused"] = refused_steps(step, rows)
            facts["unchanged"] = is_equal(first, step.export_state())
            take_step(step, rows)
            facts["next_norm"] = step.apply(lr=0.0).norm
        if world.rank == 0:
            save_file(gradients, folder / f"{case.name}.gradients")
            save_file(first.parameters, folder / f"{case.name}.parameters")
            save_adapter(folder / f"{case.name}.adapter", step.adapted, first.parameters)
            (folder / f"{case.name}.json").write_text(json.dumps(facts))
        step.sum_over_ranks([0.0])
        step.close()


def is_equal(first: OptimizerState, second: OptimizerState) -> bool:
    pairs = [(first.parameters, second.parameters), *((first.moments[moment], second.moments[moment]) for moment in MOMENTS)]
    return first.steps == second.steps and all(torch.equal(one[name], other[name]) for one, other in pairs for name in one)


def refused_steps(step: TrainingStep, rows: Sequence[Batch]) -> list[bool]:
    """Whether a step above the limit, and one whose gradient is no number, were applied."""
    take_step(step, rows)
    spike = step.apply(lr=1.0, limit=1e-6)
    poisoned = next(iter(step.parameters.values()))
    handle = poisoned.register_hook(lambda gradient: gradient * float("nan"))
    take_step(step, rows)
    handle.remove()
    return [spike.is_applied, step.apply(lr=1.0).is_applied]


def leaks(case: Case, folder: Path) -> None:
    """What a row costs packed and its documents alone, in nats, under DeepSpeed's own wrapper around sdpa; and what the start-up
    probe says of it."""
    with joined_world(2) as world:
        step = TrainingStep(build_loss(folder / case.base, case), world, case.settings)
        base = step.adapted.get_base_model()
        assert isinstance(base, PreTrainedModel)
        base.set_attn_implementation("sdpa")
        settings = {"sequence_parallel_size": 2, "micro_batch_size": 1, "seq_length_is_variable": True}
        UlyssesSPAttentionHF.register_with_transformers(base, "sdpa", **settings)
        row, refused = packed_rows()[PROBED], ""
        documents = list(documents_in([row]))
        packed, *alone = step.sum_over_ranks([step.evaluate(batch) for batch in (row, *documents)])
        try:
            step.check_isolation(row, documents)
        except UnusableInput as error:
            refused = str(error)
        if world.rank == 0:
            (folder / f"{case.name}.json").write_text(json.dumps({"packed": packed, "alone": sum(alone), "refused": refused}))
        step.close()


def main(job: Mapping[str, Any]) -> None:
    torch.set_num_threads(1)
    engine_config.ZERO3_PERSISTENCE_THRESHOLD = 0  # so that even tiny parameters are partitioned
    losses.CHUNK_ELEMENTS = 4 * VOCABULARY  # so that even tiny rows have many chunks
    for case in (Case(*case) for case in job["cases"]):
        (leaks if case.name == "leaking" else run_case)(case, Path(job["folder"]))
        print(f"done {case.name}", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    end_rank(0)
