"""Everything between a recipe and the first step: examples, the run's identity, the model in its engine, the tracker."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from configs.schema import Recipe
from data.chat import Encoded, pad_batch
from student.folders import resolve, weights_sha256
from student.lora import attach, fold_small_layers
from student.model import load_base
from train.batches import TokenLedger, admit
from train.checkpoint import Checkpoint, Identity, remove_leftovers
from train.dataset import examples_sha256, load_examples
from train.losses import SupervisedLoss, check_head
from train.rendered import Rendered
from train.step import TrainingStep, World, load_parameters
from train.tracking import METRICS_FILE, MetricsFile, Report, Tracker, WandbMirror

# Settings that may change between a checkpoint and its resume: what is trained does not depend on them.
FREE_SETTINGS = {
    "processes",
    "zero_stage",
    "tokens_per_micro_batch",
    "checkpoint_steps",
    "validation_steps",
    "wandb",
    "wandb_project",
}


class MicroBatch(NamedTuple):
    """Right-padded ids_BT and labels_BT, both int64; labels are IGNORE_INDEX where nothing is trained."""

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is trained and what the loss is watched on, in the student's tokens. `ledger` accounts for the train split."""

    train: Rendered
    validation: Rendered
    ledger: TokenLedger
    sha256: str
    pad_id: int

    def micro_batch(self, rows: Sequence[Encoded]) -> MicroBatch:
        """The rows as tensors. No rows give one padding token without a label: a rank that has nothing to do in a
        micro-batch still takes part in its collectives."""
        return MicroBatch(*pad_batch(rows or [Encoded([self.pad_id], [False])], self.pad_id))


def load_corpus(
    recipe: Recipe, dataset_dir: Path, tokenizer: PreTrainedTokenizerBase, cache_dir: Path, *, is_writer: bool = True
) -> Corpus:
    """Every rank calls it; the writer renders into cache_dir what has not been rendered yet. Raises UnusableInput when the
    dataset cannot be used or no trace is short enough."""
    max_tokens = recipe.train.max_tokens_per_row
    examples = load_examples(dataset_dir, tokenizer, cache_dir / "rendered", is_writer=is_writer)
    admitted, validation = (admit(split.lengths(), split.trained(), max_tokens) for split in examples)
    if not len(admitted.rows_R):
        raise UnusableInput(f"dataset {dataset_dir}: all {len(examples.train)} traces are longer than train.max_tokens_per_row "
                            f"{max_tokens}; raise it")  # fmt: skip
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(pad_id, int)
    train = examples.train.select(admitted.rows_R)
    return Corpus(
        train, examples.validation.select(validation.rows_R), admitted.ledger, examples_sha256(train.examples()), pad_id
    )


def run_identity(recipe: Recipe, corpus: Corpus) -> Identity:
    """What a checkpoint must have been made with to be continued: settings, base weights, and the examples themselves."""
    settings = recipe.train.model_dump(mode="json", exclude=FREE_SETTINGS | {"objective"})
    return {
        **{f"train.{key}": value for key, value in settings.items()},
        "train.objective": json.dumps(recipe.train.objective.model_dump(mode="json"), sort_keys=True),
        **{f"student.lora.{key}": value for key, value in recipe.student.lora.model_dump(mode="json").items()},
        "student.model sha256": weights_sha256(resolve(recipe.student.model))[:16],
        "dataset sha256": corpus.sha256[:16],
    }


def prepare_folders(run_dir: Path, ledger: TokenLedger) -> None:
    """Makes the run's folders, clears what a killed process left half-written, and writes metrics/tokens.json."""
    try:
        for name in ("checkpoints", "metrics"):
            (run_dir / name).mkdir(parents=True, exist_ok=True)
        (run_dir / "metrics" / "tokens.json").write_text(json.dumps(asdict(ledger), indent=1))
    except OSError as error:
        raise UnusableInput(
            f"run directory {run_dir}: cannot be written ({error.strerror}); choose another with --run-dir"
        ) from error
    remove_leftovers(run_dir / "checkpoints")


def build_step(recipe: Recipe, world: World, corpus: Corpus, checkpoint: Checkpoint | None) -> TrainingStep:
    """The adapted student inside its engine, at the state of `checkpoint` when there is one."""
    config = recipe.train
    model = attach(load_base(recipe.student.model, config.dtype), recipe.student.lora, seed=config.seed)
    if config.zero_stage != 3:
        fold_small_layers(model)
    loss, sample = SupervisedLoss(model), corpus.micro_batch(corpus.train[:1])
    check_head(loss, *sample)
    loss.train()
    if checkpoint is not None:
        load_parameters(loss, checkpoint.state.parameters)
    step = TrainingStep(
        loss, world, zero_stage=config.zero_stage, dtype=config.dtype,
        lr=config.lr, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
    )  # fmt: skip
    if checkpoint is not None:
        step.import_state(checkpoint.state, *sample)
    return step


def open_tracker(
    recipe: Recipe, world: World, run_dir: Path, identity: Identity, *, resume_step: int, total_steps: int, report: Report | None
) -> Tracker:
    if world.rank != 0:
        return Tracker(None, None, None, total_steps)
    file = MetricsFile(run_dir / "metrics" / METRICS_FILE, resume_step=resume_step)
    mirror = WandbMirror(
        run_dir / "metrics", mode=recipe.train.wandb, project=recipe.train.wandb_project, name=recipe.name,
        config={**identity, "world_size": world.size, "zero_stage": recipe.train.zero_stage},
    )  # fmt: skip
    return Tracker(file, mirror, report, total_steps)
