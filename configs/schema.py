"""What a recipe may say: one frozen model per stage. Unknown keys are refused; YAML states only what differs.

Validators check relations between values and touch no file: a recipe is judged the same on every machine.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


# --- teacher -----------------------------------------------------------------------------------------------------


class DeepSpeedEngine(Section):
    """The teacher sharded by DeepSpeed over torchrun processes: the default."""

    type: Literal["deepspeed"] = "deepspeed"
    processes: PositiveInt = 2
    """Ranks on this node (CPU processes, or GPUs). Multi-node launches multiply by hardware.nodes."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Compute dtype. float32 is exact against the oracle; bf16 is what a 744 B teacher fits in."""
    batch_size: PositiveInt = 64
    """Decode slots per rank. More slots share the fixed cost of a step; the cache grows linearly with them."""


class LocalEngine(Section):
    """One process, plain transformers: the oracle, and the quickest way on one device."""

    type: Literal["local"] = "local"
    dtype: Literal["fp32", "bf16"] = "bf16"
    batch_size: PositiveInt = 64


class HttpEngine(Section):
    """Any OpenAI-compatible server (vLLM, SGLang, transformers serve)."""

    type: Literal["http"] = "http"
    base_url: str = "http://localhost:8000/v1"
    model: str = ""
    """Model name to ask the server for; empty asks for teacher.model."""
    concurrency: PositiveInt = 32
    timeout_s: PositiveFloat = 600.0
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key. The key itself is never written anywhere."""


class Hardware(Section):
    gpu: Literal["cpu", "h100", "h200", "b200"] = "cpu"
    gpus_per_node: PositiveInt = 8
    nodes: PositiveInt = 1


class Layout(Section):
    expert_parallel: PositiveInt = 1
    """Ranks over which routed experts are spread; must divide the expert count and the world size."""
    tensor_parallel: PositiveInt = 1
    zero_stage: Literal[0, 3] = 3
    """ZeRO stage of the dense weights. 3 shards them over all ranks and gathers them layer by layer."""


class Teacher(Section):
    model: str = "embedded"
    """Checkpoint folder, or `embedded` for the shipped teacher."""
    licence: str = "MIT"
    """Licence of the teacher's weights, written into every trace and the student's model card."""
    engine: Annotated[DeepSpeedEngine | LocalEngine | HttpEngine, Field(discriminator="type")] = DeepSpeedEngine()
    hardware: Hardware = Hardware()
    layout: Layout = Layout()

    @model_validator(mode="after")
    def _ranks_fit_layout(self) -> "Teacher":
        if isinstance(self.engine, DeepSpeedEngine):
            world = self.engine.processes * self.hardware.nodes
            for name in ("expert_parallel", "tensor_parallel"):
                if world % getattr(self.layout, name):
                    raise ValueError(
                        f"layout.{name} {getattr(self.layout, name)} does not divide the {world} ranks "
                        f"(engine.processes {self.engine.processes} x hardware.nodes {self.hardware.nodes})"
                    )
        return self


# --- prompts and generation --------------------------------------------------------------------------------------


class ReasoningGymSource(Section):
    """Items of one reasoning-gym task. Which side of the split an item falls on is decided by the hash of its text."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    params: dict[str, int | float | bool | str] = {}
    """Passed to reasoning_gym.create_dataset."""
    count: PositiveInt
    seed: NonNegativeInt = 0
    licence: str = "Apache-2.0"


class JsonlSource(Section):
    """One JSON object a line: `question` or `messages`; optional `answer`, `task`, `verifier`, `split`, `domain`, `known`."""

    type: Literal["jsonl"] = "jsonl"
    path: str
    """Relative paths are looked up beside the recipe first, then in the working directory."""
    count: PositiveInt | None = None
    """Keep at most this many, chosen by hash; all of them when absent."""
    licence: str = "unknown"


PromptSource = Annotated[ReasoningGymSource | JsonlSource, Field(discriminator="type")]


class Sampling(Section):
    temperature: NonNegativeFloat = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    max_tokens: PositiveInt = 65536
    """Output tokens, reasoning included. A trace that reaches it ends with finish_reason `length`."""


class Generate(Section):
    prompts: tuple[PromptSource, ...] = ()
    samples_per_prompt: PositiveInt = 4
    sampling: Sampling = Sampling()
    seed: NonNegativeInt = 0
    segment_traces: PositiveInt = 256
    """Traces per committed segment: what a SIGKILL can cost a rank, against one fsync group each."""


# --- data --------------------------------------------------------------------------------------------------------

FilterName = Literal["finish_reason", "think_tags", "answer_present", "length"]


class Data(Section):
    filters: tuple[FilterName, ...] = ("finish_reason", "think_tags", "answer_present")
    max_trace_tokens: PositiveInt = 131072
    """For the `length` filter: prompt + output tokens."""
    require_verified: bool = True
    """Keep only traces whose verifier scored 1.0; traces without a verifier are then `unjudged`."""
    dedup: Literal["exact", "none"] = "exact"
    validation_share: Share = 0.03
    """Share of prompts (by hash, never of rows) whose traces go to the validation split."""
    verify_timeout_s: PositiveFloat = 10.0


# --- student and training ----------------------------------------------------------------------------------------


class Lora(Section):
    rank: PositiveInt = 64
    alpha: PositiveInt = 128
    dropout: Share = 0.0


class Student(Section):
    model: str = "embedded"
    """Checkpoint folder, or `embedded` for the shipped base student."""
    licence: str = "MIT"
    lora: Lora = Lora()


class CrossEntropy(Section):
    type: Literal["cross_entropy"] = "cross_entropy"


class Train(Section):
    objective: CrossEntropy = CrossEntropy()
    processes: PositiveInt = 1
    """Ranks on this node."""
    zero_stage: Literal[0, 2, 3] = 2
    dtype: Literal["fp32", "bf16"] = "bf16"
    max_tokens_per_row: PositiveInt = 65536
    """Longest trace that is trained. Longer ones are counted as dropped; nothing is ever cut."""
    traces_per_step: PositiveInt = 64
    """Traces per optimizer step over all ranks and accumulation steps."""
    tokens_per_micro_batch: PositiveInt = 65536
    """Padded tokens of one forward pass on one rank; accumulation follows from it."""
    epochs: PositiveFloat = 2.0
    lr: PositiveFloat = 2.0e-4
    warmup_share: Share = 0.03
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    checkpoint_steps: PositiveInt = 100
    validation_steps: PositiveInt = 100
    seed: NonNegativeInt = 0
    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "tracestill"

    @model_validator(mode="after")
    def _rows_fit_micro_batches(self) -> "Train":
        if self.max_tokens_per_row > self.tokens_per_micro_batch:
            raise ValueError(
                f"max_tokens_per_row {self.max_tokens_per_row} is above tokens_per_micro_batch {self.tokens_per_micro_batch}; "
                "a row is never split: raise the latter"
            )
        return self


# --- evaluation, export, cluster ---------------------------------------------------------------------------------


class Gate(Section):
    """Bounds of one metric of the student; either side may be left open."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _some_bound(self) -> "Gate":
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min or max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"gate min {self.min} is above max {self.max}")
        return self


MetricName = Literal[
    "accuracy", "hallucination_rate", "abstention_rate", "omniscience_index", "reasoning_tokens_per_correct",
    "accuracy_of_teacher", "hallucination_above_teacher",
]  # fmt: skip


class Evaluate(Section):
    suites: tuple[PromptSource, ...] = ()
    """Held-out items: reasoning_gym sources take the held-out side of the hash, JSONL ones the rows with split `eval`."""
    sampling: Sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=8192)
    batch_size: PositiveInt = 64
    seed: NonNegativeInt = 0
    gates: dict[MetricName, Gate] = {}
    """`accuracy_of_teacher`: student's accuracy over teacher's; `hallucination_above_teacher`: the difference of their rates."""


class Export(Section):
    formats: tuple[Literal["merged"], ...] = ("merged",)
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"


class Slurm(Section):
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str | None = None
    """For example `gpu:h200:8`; absent on CPU partitions."""
    time_limit: str = "24:00:00"
    cpus_per_task: PositiveInt = 2
    setup: tuple[str, ...] = ()
    """Shell lines before each stage: module loads, container, virtual environment."""


class Recipe(Section):
    """A whole run. `name` is also the default run folder, runs/NAME."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    teacher: Teacher = Teacher()
    generate: Generate = Generate()
    data: Data = Data()
    student: Student = Student()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    slurm: Slurm = Slurm()
