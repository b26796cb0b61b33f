"""What a recipe may say of the student and of its training."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from configs.section import Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")]


class Lora(Section):
    """Adapters on the frozen base. Their size is rank x (inputs + outputs) of every target."""

    rank: PositiveInt = 64
    alpha: PositiveInt = 128
    """The adapter is scaled by alpha / rank, or by alpha / sqrt(rank) with rslora."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    rslora: bool = False
    """Scale by alpha / sqrt(rank): the update's size then does not shrink with the rank (Kalajdzievski 2023)."""
    dora: bool = False
    """A trained magnitude beside each direction (Liu et al. 2024): somewhat better at small ranks, about half as fast. Not on the
    head."""
    targets: Literal["all-linear"] | Annotated[tuple[ModuleName, ...], Field(min_length=1)] = "all-linear"
    """Last name components of the layers to adapt. all-linear: every nn.Linear but the head and the router of an MoE."""
    modules_to_save: tuple[ModuleName, ...] = ()
    """Modules trained whole beside the adapter and saved with it: `lm_head`, `embed_tokens`. Both of a tied pair, or neither."""

    @model_validator(mode="after")
    def _nothing_twice(self) -> "Lora":
        if isinstance(self.targets, tuple) and (both := sorted({*self.targets} & {*self.modules_to_save})):
            raise ValueError(f"{both[0]} is in targets and in modules_to_save; expected it in one of them")
        return self


class Student(Section):
    model: str = "embedded"
    """Checkpoint folder, or `embedded` for the shipped base student."""
    licence: str = "MIT"
    lora: Lora = Lora()


# --- objectives --------------------------------------------------------------------------------------------------


class CrossEntropy(Section):
    """Of the trace's own tokens."""

    type: Literal["cross_entropy"] = "cross_entropy"


class _Divergence(Section):
    """Kullback-Leibler divergence over the teacher's stored logits and one bucket for all other tokens, mixed with cross-entropy:
    (1 - weight) x cross-entropy + weight x temperature^2 x divergence."""

    weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    temperature: PositiveFloat = 1.0
    """One of generate.logits.temperatures: log Z is stored for those only."""


class ForwardKl(_Divergence):
    """KL(teacher || student): covers all the teacher does (Hinton et al. 2015)."""

    type: Literal["forward_kl"] = "forward_kl"


class ReverseKl(_Divergence):
    """KL(student || teacher): keeps to what the teacher finds likely (Gu et al. 2023)."""

    type: Literal["reverse_kl"] = "reverse_kl"


Objective = Annotated[CrossEntropy | ForwardKl | ReverseKl, Field(discriminator="type")]


FREE_WHILE_TRAINING = (
    "processes", "nodes", "gpu", "zero_stage", "sequence_parallel", "activation_checkpointing", "offload", "liger",
    "max_skipped_steps", "checkpoint_steps", "kept_checkpoints", "early_stop_patience", "wandb", "wandb_project", "wandb_samples",
)  # fmt: skip
"""Settings of Train that may change between a start and the next: what is trained does not depend on them."""


# --- training ----------------------------------------------------------------------------------------------------


class Train(Section):
    objective: Objective = CrossEntropy()
    processes: PositiveInt = 1
    """Ranks on each node."""
    nodes: PositiveInt = 1
    gpu: Literal["cpu", "h100", "h200", "b200"] = "cpu"
    """What a rank runs on, for the plan of its memory and hours; a training takes what it finds."""
    zero_stage: Literal[0, 2, 3] = 2
    sequence_parallel: PositiveInt = 1
    """Ranks that share each row (Ulysses): the same row, a slice of its tokens and all of some attention heads each."""
    activation_checkpointing: bool = False
    """Keep one hidden state a layer and compute the rest again in the backward pass: a third more arithmetic."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """To the host's memory: float32 masters and moments; parameters: frozen weights too, which needs zero_stage 3."""
    liger: bool = True
    """Liger's fused norms, rotary embedding and gated MLP where a GPU and liger-kernel are there."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    max_tokens_per_row: PositiveInt = 65536
    """Tokens of a packed row, which is one forward pass of one rank. Traces are packed into rows whole; nothing is ever cut."""
    longer_rows: tuple[PositiveInt, ...] = ()
    """Row lengths for traces above max_tokens_per_row, ascending; each goes to the first that holds it. What no row holds is
    dropped and counted as over_length."""
    rows_per_step: PositiveInt = 16
    """Packed rows of an optimizer step, over all ranks and accumulation steps: a multiple of the ranks that have rows of their
    own (nodes x processes / sequence_parallel)."""
    epochs: Annotated[float, Field(gt=0.0, le=1000.0)] = 2.0
    lr: PositiveFloat = 2.0e-4
    """Peak, for alpha 128: ten times what full fine-tuning of the same model wants. LoRA's best rate hardly depends on the rank
    or the model's size (Schulman et al. 2025, "LoRA without regret"), so 7B and 13B share it; runs under a thousand steps take
    twice as much. What counts is rate x alpha: at their alpha of 32 the same is 8e-4. With rslora divide it by sqrt(rank), 8 at
    rank 64. modules_to_save learn at it too, which is high for them."""
    warmup_share: Share = 0.03
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    spike_factor: Annotated[float, Field(gt=1.0)] | None = 10.0
    """A step whose gradient norm is above so many times the median of the last ones is not applied; null: all finite ones are."""
    max_skipped_steps: NonNegativeInt = 10
    """Steps not applied, for a spike or a gradient that is not finite, before the training gives up."""
    checkpoint_steps: PositiveInt = 100
    kept_checkpoints: Annotated[int, Field(ge=2)] = 2
    """The newest; with best_metric also the best. At least 2: a disk may damage the newest, a kill never does."""
    validation_steps: PositiveInt = 100
    validation_answers: NonNegativeInt = 0
    """Prompts of the validation split that the student answers at each validation, greedily, judged by their own verifiers."""
    validation_answer_tokens: PositiveInt = 1024
    """Of one such answer at most."""
    best_metric: Literal["loss", "accuracy"] | None = None
    """The adapter is that of the validation with the least loss or the highest accuracy; null: the last step's."""
    early_stop_patience: PositiveInt | None = None
    """Validations in a row without a better best_metric after which training ends; null: never."""
    seed: NonNegativeInt = 0
    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "tracestill"
    wandb_samples: Annotated[int, Field(ge=0, le=200)] = 16
    """Traces logged as a table, with what looks like a secret or an address removed."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.processes

    @property
    def data_parallel(self) -> int:
        """Ranks, or groups of ranks, that have rows of their own."""
        return self.ranks // self.sequence_parallel

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Capacities of rows in tokens, ascending."""
        return (self.max_tokens_per_row, *self.longer_rows)

    @model_validator(mode="after")
    def _ranks_divide(self) -> "Train":
        if self.ranks % self.sequence_parallel:
            raise ValueError(f"sequence_parallel {self.sequence_parallel} does not divide {self.ranks} ranks (nodes x processes)")
        if self.rows_per_step % self.data_parallel:
            raise ValueError(
                f"rows_per_step {self.rows_per_step} is not divisible by {self.data_parallel} "
                f"({self.ranks} ranks / sequence_parallel {self.sequence_parallel}); each of those needs equally many"
            )
        return self

    @model_validator(mode="after")
    def _rows_ascend(self) -> "Train":
        lengths = self.row_lengths
        if list(lengths) != sorted(set(lengths)):
            raise ValueError(f"longer_rows {list(self.longer_rows)}: expected ascending lengths above {self.max_tokens_per_row}")
        for length in lengths:
            if length % self.sequence_parallel:
                raise ValueError(f"a row of {length} tokens is not divisible by sequence_parallel {self.sequence_parallel}")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> "Train":
        if self.best_metric == "accuracy" and not self.validation_answers:
            raise ValueError("best_metric accuracy needs validation_answers above 0")
        if self.early_stop_patience is not None and self.best_metric is None:
            raise ValueError("early_stop_patience needs best_metric: loss or accuracy")
        return self

    @model_validator(mode="after")
    def _offload_has_its_stage(self) -> "Train":
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError(f"offload parameters needs zero_stage 3, not {self.zero_stage}")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload optimizer needs zero_stage 2 or 3")
        return self
