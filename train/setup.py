"""Everything between a recipe and the first step: examples, their order, the run's identity, the model in its engine."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from configs.load import fingerprint
from configs.schema import Recipe
from configs.training import FREE_WHILE_TRAINING, CrossEntropy
from data.chat import Encoded
from data.row_groups import RowCost
from data.stats import dataset_hash
from data.store import RunFolder, code_revision, read_rollup, write_json
from student.folders import max_positions, resolve, weights_sha256
from student.lora import attach, fold_small_layers
from student.model import load_base
from train.attention import check_isolation, use_documents
from train.batches import Batch, TokenLedger, TrainingOrder, admit, deal_out, excerpt, to_batch
from train.checkpoint import Checkpoint, Identity, remove_leftovers
from train.dataset import load_examples
from train.flops import Arithmetic, Work, arithmetic_of, peak_flops
from train.losses import SupervisedLoss, check_head
from train.measures import Taken
from train.mirror.mirror import Lineage, Sample, open_mirror
from train.rendered import Rendered
from train.step import TrainingStep, World, load_parameters
from train.teacher_targets import TargetStore, load_teacher_targets
from train.tracking import METRICS_FILE, MetricsFile, Report, Tracker

if TYPE_CHECKING:
    from train.answers import ValidationAnswers

SAMPLE_TOKENS = 64
"""Of each of the two pieces of traces that probes run on: a 7B on one CPU core takes some ten seconds for both."""
logger = logging.getLogger(__name__)

NOT_TRAINED = ("validation_steps", "validation_answers", "validation_answer_tokens")
"""What decides which adapter is the best, and no step."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is trained and what the loss is watched on, in the student's tokens. `ledger` accounts for the train split. targets:
    the teacher's logits for the train split's traces, where the objective wants them and they fit."""

    train: Rendered
    validation: Rendered
    ledger: TokenLedger
    sha256: str
    pad_id: int
    targets: TargetStore | None = None


def load_corpus(
    recipe: Recipe, dataset_dir: Path, tokenizer: PreTrainedTokenizerBase, run: RunFolder, *, is_writer: bool = True
) -> Corpus:
    """Every rank calls it; the writer renders into the run's cache what has not been rendered yet. Raises UnusableInput when the
    dataset cannot be used or no trace fits a row."""
    longest = recipe.train.row_lengths[-1]
    examples = load_examples(dataset_dir, tokenizer, run.cache / "rendered", is_writer=is_writer)
    positions = max_positions(resolve(recipe.student.model))
    admitted, validation = (admit(split.counts(), longest, positions) for split in examples)
    if not len(admitted.rows_R):
        raise UnusableInput(
            f"dataset {dataset_dir}: none of its {len(examples.train)} traces can be trained ({_dropped(admitted.ledger)}); "
            f"a row holds {longest} tokens: raise train.max_tokens_per_row"
            + ("" if positions is None else f"; the student has {positions} positions")
        )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(pad_id, int)
    train = examples.train.select(admitted.rows_R)
    objective, targets = recipe.train.objective, None
    if not isinstance(objective, CrossEntropy):
        targets = load_teacher_targets(run, train, objective.temperature, is_writer=is_writer)
    return Corpus(train, examples.validation.select(validation.rows_R), admitted.ledger, train.sha256(), pad_id, targets)


def _dropped(ledger: TokenLedger) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in ledger.dropped_traces.items())


def run_identity(recipe: Recipe, corpus: Corpus) -> Identity:
    """What a checkpoint must have been made with to be continued: settings, base weights, and the examples themselves."""
    settings = recipe.train.model_dump(mode="json", exclude={*FREE_WHILE_TRAINING, *NOT_TRAINED, "objective"})
    return {
        **{f"train.{key}": _plain(value) for key, value in settings.items()},
        "train.objective": json.dumps(recipe.train.objective.model_dump(mode="json"), sort_keys=True),
        **{f"student.lora.{key}": _plain(value) for key, value in recipe.student.lora.model_dump(mode="json").items()},
        "student.model sha256": weights_sha256(resolve(recipe.student.model))[:16],
        "dataset sha256": corpus.sha256[:16],
        **({} if corpus.targets is None else {"logits sha256": corpus.targets.sha256[:16]}),
    }


def _plain(value: object) -> str | int | float:
    return value if isinstance(value, str | int | float) else json.dumps(value)


def prepare_folders(run_dir: Path, ledger: TokenLedger) -> None:
    """Makes the run's folders, clears what a killed process left half-written, and writes metrics/tokens.json."""
    try:
        for name in ("checkpoints", "metrics"):
            (run_dir / name).mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "metrics" / "tokens.json", asdict(ledger))
    except OSError as error:
        raise UnusableInput(
            f"run directory {run_dir}: cannot be written ({error.strerror}); choose another with --run-dir"
        ) from error
    remove_leftovers(run_dir / "checkpoints")
    logger.info("%s", ledger.sentence())


# --- what a run trains, and with what ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training on one rank. answers: None where no generated answers are wanted. peak_flops: of this rank's device, None
    where that is unknown."""

    recipe: Recipe
    corpus: Corpus
    order: TrainingOrder
    step: TrainingStep
    tokenizer: PreTrainedTokenizerBase
    answers: "ValidationAnswers | None"
    arithmetic: Arithmetic
    peak_flops: float | None

    @cached_property
    def lengths_N(self) -> np.ndarray:
        return self.corpus.train.lengths()

    @cached_property
    def supervised_N(self) -> np.ndarray:
        return self.corpus.train.trained()

    @cached_property
    def validation_rows(self) -> list[list[list[int]]]:
        """Of the validation split: micro-steps, each with a packed row's documents for each data-parallel rank."""
        return deal_out(self.corpus.validation.lengths(), self.recipe.train.row_lengths, ranks=self.step.world.data_size)

    def batch(self, split: Rendered, documents: Sequence[int]) -> Batch:
        """A packed row of these documents of a split; a single token without a target where there are none."""
        teacher = None
        if self.corpus.targets is not None and split is self.corpus.train:
            teacher = self.corpus.targets.of(documents)
        return to_batch([split[document] for document in documents], teacher, pad_id=self.corpus.pad_id)

    def validates_after(self, step: int, total: int) -> bool:
        """Before the first step, at every so many, and after the last."""
        return len(self.corpus.validation) > 0 and (step % self.recipe.train.validation_steps == 0 or step == total)

    def mfu(self, taken: Taken) -> float | None:
        """Share of the devices' peak arithmetic that the step used; None where the peak is unknown."""
        if self.peak_flops is None:
            return None
        work = Work(taken.tokens, taken.supervised_tokens, taken.attended)
        return self.arithmetic.flops(work) / (taken.seconds * self.peak_flops * self.step.world.size)


def open_run(
    recipe: Recipe, world: World, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, run_dir: Path,
    checkpoint: Checkpoint | None, *, group: int,
) -> Run:  # fmt: skip
    """The adapted student inside its engine, at the state of `checkpoint` when there is one, and the order of its rows."""
    config = recipe.train
    answers = None
    if config.validation_answers and len(corpus.validation):
        from train.answers import ValidationAnswers

        answers = ValidationAnswers.of(run_dir, recipe, tokenizer)
    loss = build_loss(recipe, corpus)
    arithmetic = arithmetic_of(loss.model, loss.causal_lm)
    step = build_step(recipe, world, loss, corpus, checkpoint)
    order = training_order(recipe, corpus, arithmetic, group=group, ranks=world.data_size)
    if world.rank == 0:
        rows, waste, skew = order.balance()
        logger.info(
            "%d steps an epoch of %d rows, %.2f %% of them unused; the dearest rank of a step has %.3f of the mean rank's work",
            order.steps_per_epoch, rows, 100 * waste, skew,
        )  # fmt: skip
    return Run(recipe, corpus, order, step, tokenizer, answers, arithmetic, peak_flops(config.dtype))


def training_order(recipe: Recipe, corpus: Corpus, arithmetic: Arithmetic, *, group: int, ranks: int) -> TrainingOrder:
    """group: ranks that the rows are balanced for, those of the first start. Raises UnusableInput when they do not divide a
    step."""
    config = recipe.train
    if config.rows_per_step % group:
        raise UnusableInput(
            f"train.rows_per_step {config.rows_per_step} is not divisible by the {group} ranks with rows of their own that were "
            "started; start as many as train.nodes, processes and sequence_parallel say"
        )
    return TrainingOrder(
        corpus.train.lengths(), config.row_lengths, rows_per_step=config.rows_per_step, epochs=config.epochs, seed=config.seed,
        group=group, ranks=ranks, cost=row_cost(arithmetic),
    )  # fmt: skip


def row_cost(arithmetic: Arithmetic) -> RowCost:
    """What a token and a pair of tokens cost this student; the head is left out, which sees trained tokens only."""
    return RowCost(arithmetic.flops(Work(1, 0, 0)), arithmetic.flops(Work(0, 0, 1)))


def build_loss(recipe: Recipe, corpus: Corpus) -> SupervisedLoss:
    """The adapted student with its loss, on the CPU, its attention proven to keep packed documents apart."""
    config = recipe.train
    base = load_base(recipe.student.model, config.dtype)
    use_documents(base)
    sample = sample_of(corpus)
    check_isolation(base, [document.ids for document in sample])
    model = attach(base, recipe.student.lora, seed=config.seed)
    if config.zero_stage != 3:
        fold_small_layers(model)
    loss = SupervisedLoss(model, config.objective)
    check_head(loss, to_batch(sample))
    return loss.train()


def build_step(
    recipe: Recipe, world: World, loss: SupervisedLoss, corpus: Corpus, checkpoint: Checkpoint | None
) -> TrainingStep:  # fmt: skip
    """The loss inside its engine, at the state of `checkpoint` when there is one; isolation is proven once more there, on the
    device and over the ranks that train."""
    if checkpoint is not None:
        load_parameters(loss, checkpoint.state.parameters)
    step = TrainingStep(loss, world, recipe.train)
    pair = sample_of(corpus)
    step.check_isolation(to_batch(pair), [to_batch([document]) for document in pair])
    if checkpoint is not None:
        step.import_state(checkpoint.state, to_batch(pair))
    return step


def sample_of(corpus: Corpus) -> list[Encoded]:
    """Two short pieces of traces with trained tokens, to try things on."""
    pieces = [(whole, excerpt(whole, before=SAMPLE_TOKENS // 4, tokens=SAMPLE_TOKENS)) for whole in corpus.train[:2]]
    return [Encoded(whole.ids[part], whole.reasons[part]) for whole, part in pieces]


# --- what is told of a run ---------------------------------------------------------------------------------------


def open_tracker(
    recipe: Recipe, world: World, run: RunFolder, identity: Identity, *, resume_step: int, total_steps: int, report: Report | None
) -> Tracker:
    if world.rank != 0:
        return Tracker(None, None, None, total_steps)
    file = MetricsFile(run.metrics / METRICS_FILE, resume_step=resume_step)
    mirror = open_mirror(
        run.metrics, mode=recipe.train.wandb, project=recipe.train.wandb_project, name=recipe.name,
        config={**identity, "world_size": world.size, "zero_stage": recipe.train.zero_stage},
        lineage=_lineage(recipe, run, identity), resume_step=resume_step,
    )  # fmt: skip
    tracker = Tracker(file, mirror, report, total_steps)
    if mirror is not None:
        tracker.log_samples(_samples(run, recipe.train.wandb_samples))
    return tracker


def _lineage(recipe: Recipe, run: RunFolder, identity: Identity) -> Lineage:
    """dataset_sha256: of the sealed rows; of the examples in the student's tokens for a dataset from elsewhere."""
    rollup = read_rollup(run.dataset)
    return Lineage(
        dataset_sha256=str(identity["dataset sha256"]) if rollup is None else dataset_hash(rollup),
        base_sha256=str(identity["student.model sha256"]),
        recipe_fingerprint=fingerprint(recipe.model_dump(mode="json")),
        code_revision=code_revision(),
        dataset_files={} if rollup is None else dict(rollup.files),
    )


def _samples(run: RunFolder, count: int) -> list[Sample]:
    """The first traces of the run's dataset; none for one from elsewhere."""
    if not count or read_rollup(run.dataset) is None:
        return []
    import datasets

    # Its bytes were held against the roll-up when the examples were read, a moment ago.
    rows = datasets.Dataset.load_from_disk(str(run.dataset / "train"))
    return [_sample(row) for row in rows.select(range(min(count, len(rows))))]  # type: ignore[arg-type]


def _sample(row: Mapping[str, Any]) -> Sample:
    """prompt: all that was said before the last turn."""
    *given, last = row["messages"]
    prompt = "\n".join(f"{message['role']}: {message['content'] or ''}" for message in given)
    reasoning, answer = last.get("reasoning_content") or "", last.get("content") or ""
    return Sample(row["trace_id"], row["task"], prompt, reasoning, answer, row["reasoning_tokens"] + row["answer_tokens"])
