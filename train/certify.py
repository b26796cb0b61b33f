"""The certificate: on a sample of the real dataset, with the real recipe scaled down, the gradients that training takes (packed,
accumulated, sharded, chunked) equal those of an unpacked reference in float64.

    metrics/certificate.json    what was compared, the largest difference, the bound; its sha256 stands in the model card

Real are the traces, their masks and targets, the vocabulary, the objective, LoRA's kind and targets, ZeRO stage, ranks, sequence
parallelism, offload, activation checkpointing and kernels. Scaled down are the student's width and depth, LoRA's rank,
the rows, the part of each trace that is taken and, on a CPU, the precision, which is float32. Dropout is off: it is noise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from configs.errors import Refused
from configs.schema import Recipe
from configs.training import Lora, Train
from data.chat import IGNORE_INDEX, Encoded
from data.checksum import checked_json
from data.records import digest
from data.store import RunFolder, code_revision, write_bytes
from student.adapter_files import trainable
from student.certificate import certified_settings
from student.folders import resolve, weights_sha256
from student.lora import attach
from student.model import DTYPES, load_base, load_tokenizer
from train.attention import use_documents
from train.batches import Batch, MicroStep, TrainingOrder, excerpt, num_trained, to_batch
from train.losses import SupervisedLoss
from train.objectives.targets import TeacherTargets
from train.reference import reference_gradients
from train.setup import Corpus, load_corpus
from train.step import TrainingStep, World, joined_world

CERTIFICATE_FILE = "certificate.json"
BOUNDS = {"fp32": 1e-5, "bf16": 3e-2}
"""Of the largest difference of one parameter's gradient, as a share of its norm. bf16 keeps 8 bits of every product, so it can
only show that no factor, row or mask is wrong."""

NUM_TRACES = 24
WINDOW_TOKENS = 320
"""Of a trace: float32 knows the rotary angle at position p to p x 6e-8; longer documents differ from float64 by that alone."""
BEFORE_ANSWER_TOKENS = 64
"""Of them before the first trained token."""
MICRO_STEPS = 2
"""Of accumulation, at least."""
NARROW_LAYERS, NARROW_HEAD = 2, 16
LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "accelerate")
SMALL_PARAMETERS = 5_000_000
"""Up to which a student is taken as it is."""
MAX_RANK = 8
LORA_B_STD = 0.05
"""lora_B starts at zero, where lora_A has no gradient to compare."""
CHUNK = 32
"""Positions: what a vocabulary of 131,072 has. With a small one a whole row of the sample would be one chunk."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """largest_difference: over parameters, the gradient's distance from the reference as a share of the reference's norm.
    loss_difference: relative. settings: of train and LoRA as they were run.
    certified: what of the recipe it stands for. student: what was trained, scaled."""

    recipe: str
    holds: bool
    bound: float
    largest_difference: float
    loss_difference: float
    parameters: int
    traces: int
    tokens: int
    supervised_tokens: int
    rows: int
    micro_steps: int
    ranks: int
    device: str
    settings: Mapping[str, object]
    certified: Mapping[str, object]
    student: Mapping[str, object]
    student_sha256: str
    dataset_sha256: str
    sample_sha256: str
    code_revision: str
    versions: Mapping[str, str]


class Sample(NamedTuple):
    """Documents to compare on, and what the teacher said at their supervised positions."""

    documents: list[Encoded]
    teachers: list[TeacherTargets | None]
    sha256: str


def certify_run(recipe: Recipe, run: RunFolder) -> None:
    """One rank of a launch. Raises what certify does."""
    with joined_world(recipe.train.sequence_parallel) as world:
        is_writer = world.rank == 0
        corpus = load_corpus(recipe, run.dataset, load_tokenizer(recipe.student.model), run, is_writer=is_writer)
        if is_writer:
            run.metrics.mkdir(parents=True, exist_ok=True)
        certify(world, recipe, corpus, run.root)
        torch.distributed.barrier()


def certify(world: World, recipe: Recipe, corpus: Corpus, run_dir: Path) -> Certificate | None:
    """Every rank calls it; rank 0 computes the reference, writes metrics/certificate.json, whether it holds or not, and returns
    it.

    Raises Refused (on rank 0) when a gradient or the loss is further from the reference than the bound allows.
    """
    config, lora = scaled_settings(recipe)
    sample = choose_sample(corpus)
    loss = scaled_loss(recipe, config, lora)
    student = loss.causal_lm
    rows = _micro_steps(sample, config, world)
    batches = [[_batch(sample, documents) for documents in micro_step] for micro_step in rows]
    filled = [batch for micro_step in batches for batch in micro_step if (batch.targets_1T != IGNORE_INDEX).any()]
    supervised = sum(map(num_trained, sample.documents))
    reference = reference_gradients(loss.model, filled, config.objective) if world.rank == 0 else None
    facts = {"model": recipe.student.model, "parameters": student.num_parameters(), "layers": student.config.num_hidden_layers,
             "hidden_size": student.config.hidden_size, "vocabulary": student.config.vocab_size}  # fmt: skip
    measured = as_trained(loss, world, config, batches, supervised)
    if reference is None:
        return None
    differences = {name: difference(measured.gradients.get(name), expected) for name, expected in reference.gradients.items()}
    loss_difference, bound = abs(measured.loss / reference.loss - 1.0), BOUNDS[config.dtype]
    largest = max(differences.values())
    certificate = Certificate(
        recipe=recipe.name, holds=max(largest, loss_difference) <= bound, bound=bound, largest_difference=largest,
        loss_difference=loss_difference, parameters=len(differences), traces=len(sample.documents),
        tokens=sum(len(document.ids) for document in sample.documents), supervised_tokens=supervised, rows=len(filled),
        micro_steps=len(rows), ranks=world.size,
        settings={"train": config.model_dump(mode="json"), "lora": lora.model_dump(mode="json")},
        certified=certified_settings(recipe), student=facts, student_sha256=weights_sha256(resolve(recipe.student.model)),
        dataset_sha256=corpus.sha256, sample_sha256=sample.sha256,
        code_revision=code_revision(), versions={name: version(name) for name in LIBRARIES}, device=_device(),
    )  # fmt: skip
    write_bytes(run_dir / "metrics" / CERTIFICATE_FILE, checked_json(asdict(certificate), indent=1))
    if not certificate.holds:
        worst = max(differences, key=lambda name: differences[name])
        raise Refused(
            f"certificate: the gradient of {worst} is {largest:.2g} of its norm from the float64 reference, the loss "
            f"{loss_difference:.2g}; expected at most {bound:g}: do not train with these settings; see "
            f"{run_dir / 'metrics' / CERTIFICATE_FILE}"
        )
    return certificate


# --- scaling down ------------------------------------------------------------------------------------------------


def scaled_settings(recipe: Recipe) -> tuple[Train, Lora]:
    """What is certified: at most MAX_RANK, the adapter's scale as it is; without dropout; in float32 where there is no GPU."""
    dtype = recipe.train.dtype if torch.cuda.is_available() else "fp32"
    lora = recipe.student.lora
    rank = min(lora.rank, MAX_RANK)
    share = rank / lora.rank
    alpha = max(1, round(lora.alpha * (math.sqrt(share) if lora.rslora else share)))
    scaled = lora.model_copy(update={"rank": rank, "alpha": alpha, "dropout": 0.0})
    return recipe.train.model_copy(update={"dtype": dtype}), scaled


def scaled_loss(recipe: Recipe, config: Train, lora: Lora) -> SupervisedLoss:
    """The scaled student with an adapter that is not at its start, in the precision of training."""
    student = scaled_student(recipe)
    use_documents(student)
    model = attach(student, lora, seed=config.seed)
    raise_lora_b(model, config.seed)
    return SupervisedLoss(model.to(DTYPES[config.dtype]), config.objective, chunk=CHUNK)


def scaled_student(recipe: Recipe) -> PreTrainedModel:
    """The student itself where it is small; else one of its architecture and vocabulary with few, narrow layers of random
    weights. In float32."""
    base = recipe.student.model
    config = AutoConfig.from_pretrained(resolve(base), trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    if parameters <= SMALL_PARAMETERS:
        return load_base(base, "fp32")
    with torch.random.fork_rng():
        torch.manual_seed(recipe.train.seed)
        return AutoModelForCausalLM.from_config(narrowed(config, recipe.train.sequence_parallel), dtype=torch.float32)


def narrowed(config: PreTrainedConfig, sequence_parallel: int) -> PreTrainedConfig:
    """Two layers of 8 or so heads of 16, with as many query heads to a key head as before."""
    heads = max(8, sequence_parallel)
    ratio = config.num_attention_heads // (config.num_key_value_heads or config.num_attention_heads)
    kinds = getattr(config, "layer_types", None)
    changes: dict[str, object] = {
        "num_hidden_layers": NARROW_LAYERS, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // ratio),
        "head_dim": NARROW_HEAD, "hidden_size": heads * NARROW_HEAD, "intermediate_size": 2 * heads * NARROW_HEAD,
        **({} if kinds is None else {"layer_types": list(kinds[:NARROW_LAYERS])}),
    }  # fmt: skip
    return type(config).from_dict({**config.to_dict(), **changes})


def raise_lora_b(model: PeftModel, seed: int) -> None:
    """lora_B starts at zero, where lora_A has no gradient to compare: it gets noise, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * LORA_B_STD).to(parameter.dtype)


# --- the sample --------------------------------------------------------------------------------------------------


def choose_sample(corpus: Corpus) -> Sample:
    """NUM_TRACES of the train split, by hash, each a window around where its training begins."""
    order = sorted(range(len(corpus.train)), key=lambda row: digest("certificate", row))
    documents, teachers = [], []
    for row in order[:NUM_TRACES]:
        whole = corpus.train[row]
        part = excerpt(whole, before=BEFORE_ANSWER_TOKENS, tokens=WINDOW_TOKENS)
        documents.append(Encoded(whole.ids[part], whole.mask[part]))
        teacher = None if corpus.targets is None else corpus.targets.of([row])  # from the first supervised position on
        teachers.append(None if teacher is None else teacher.part(slice(num_trained(documents[-1]))))
    return Sample(documents, teachers, digest([[document.ids, document.mask] for document in documents]))


def _micro_steps(sample: Sample, config: Train, world: World) -> list[MicroStep]:
    """All documents as one step of at least MICRO_STEPS rows a rank, packed and grouped as training does it."""
    lengths_N = np.array([len(document.ids) for document in sample.documents], np.int64)
    share = -(-int(lengths_N.sum()) // (world.data_size * MICRO_STEPS))
    capacity = max(int(lengths_N.max()), share)
    order = TrainingOrder(
        lengths_N, (capacity,), rows_per_step=world.data_size * len(lengths_N), epochs=1.0, seed=config.seed,
        group=world.data_size, ranks=world.data_size,
    )  # fmt: skip
    return order.step(0)


def _batch(sample: Sample, documents: Sequence[int]) -> Batch:
    parts = [part for document in documents if (part := sample.teachers[document]) is not None]
    teacher = TeacherTargets(*(torch.cat(column) for column in zip(*parts, strict=True))) if parts else None
    return to_batch([sample.documents[document] for document in documents], teacher)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


# --- what training does ------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """loss: nats per supervised token. gradients: whole, of the mean."""

    loss: float
    gradients: Mapping[str, torch.Tensor]


def as_trained(
    loss: SupervisedLoss, world: World, config: Train, micro_steps: Sequence[Sequence[Batch]], supervised: int
) -> Measured:
    """One step through the engine, up to its gradients."""
    step = TrainingStep(loss.train(), world, config)
    loss_sum = 0.0
    for number, rows in enumerate(micro_steps, 1):
        loss_sum += step.accumulate(rows[world.data_rank], tokens_in_step=supervised, is_last=number == len(micro_steps))
    gradients = {name: gradient.cpu().clone() for name, gradient in step.gradients().items()}
    mean = step.sum_over_ranks([loss_sum])[0] / supervised
    step.close()
    return Measured(mean, gradients)


def difference(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    """Distance as a share of the expected norm; infinity for a gradient that is missing or of another shape."""
    if found is None or found.shape != expected.shape:
        return math.inf
    distance = (found.double() - expected).norm().item()
    return distance / max(expected.norm().item(), 1e-30) if distance else 0.0
