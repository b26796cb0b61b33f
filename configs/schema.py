"""What a recipe may say: one frozen model per stage. Unknown keys are refused; YAML states only what differs.

Validators check relations between values and touch no file: a recipe is judged the same on every machine.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from configs.cluster import Slurm
from configs.engines import TORCHRUN_GRACE_S, DeepSpeedEngine, HttpEngine, LocalEngine
from configs.evaluation import Evaluate
from configs.exports import Export
from configs.filters import AnswerPresentFilter, ControlTokensFilter, FilterSettings, FinishReasonFilter, ThinkTagsFilter
from configs.judging import Judging
from configs.planning import Planning
from configs.prompt_sources import PromptSource, SuiteSource
from configs.sampling import Sampling
from configs.section import Section
from configs.training import CrossEntropy, Share, Student, Train
from configs.views import WithViews

# --- teacher -----------------------------------------------------------------------------------------------------


class Hardware(Section):
    gpu: Literal["cpu", "h100", "h200", "b200"] = "cpu"
    gpus_per_node: Annotated[int, Field(ge=1, le=1_024)] = 8
    nodes: Annotated[int, Field(ge=1, le=16_384)] = 1
    network_gb_per_s: Annotated[float, Field(ge=0.001, le=100_000.0)] = 50.0
    """Gigabytes a second, one way, that each GPU can send to other nodes. 50 is one 400 Gb/s port for every GPU; a node that
    shares one such port has 50 / gpus_per_node. Links inside a node are known from the GPU's kind."""


class Layout(Section):
    expert_parallel: PositiveInt | Literal["all"] = 1
    """Ranks over which routed experts are spread; must divide the expert count and the world size. `all`: every rank of the
    launch, so that one recipe serves any number of nodes."""
    tensor_parallel: PositiveInt = 1
    """Ranks that cut one layer's dense matrices and answer the same requests. 1 is data-parallel attention: each rank
    answers requests of its own."""
    zero_stage: Literal[0, 3] = 3
    """ZeRO stage of the dense weights. 3 shards them over all ranks and gathers them layer by layer."""
    kv_cache: Literal["replicated", "sharded"] = "replicated"
    """`replicated`: each rank holds the whole cache of the requests it answers. `sharded`: the tokens of a request are
    spread over the ranks of a node, as servers with context parallelism do; for planning only, no engine here does it."""


class ExpertAlarm(Section):
    """When a sparse layer's load over a whole run is called a collapse: a warning, never an error. Healthy, the embedded
    teacher's layers stand at 1.26, 0.98 and 0, and on one task alone at up to 3.2, 0.75 and 0."""

    max_over_mean: PositiveFloat = 16.0
    """Busiest expert over the mean, above which it is one. At most experts / experts per token: 32 for 256 and 8; small
    teachers never reach 16 (16 experts, 2 a token: 8), there effective_share speaks."""
    effective_share: Share = 0.25
    """exp(entropy) / experts, below which it is one. A collapsed layer has experts per token / experts: 0.03 or 0.125."""
    dead_share: Share = 0.25
    """Share of experts without a token, above which it is one."""
    minimum_mean_load: PositiveFloat = 100.0
    """Assignments per expert below which a layer is not judged. Random routing leaves exp(-mean) of the experts dead: 37 % at
    1, 0.7 % at 5, none at 100, where the busiest of 256 stands at about 1.3 x the mean. Far more than that because the
    tokens of one text resemble each other."""


class Teacher(Section):
    model: str = "embedded"
    """Checkpoint folder, or `embedded` for the shipped teacher."""
    licence: str = "MIT"
    """Licence of the teacher's weights, written into every trace and the student's model card."""
    engine: Annotated[DeepSpeedEngine | LocalEngine | HttpEngine, Field(discriminator="type")] = DeepSpeedEngine()
    hardware: Hardware = Hardware()
    layout: Layout = Layout()
    experts: ExpertAlarm = ExpertAlarm()

    @property
    def ranks_per_node(self) -> int:
        """Processes on each node: of the DeepSpeed launch, or GPUs behind the server; one for the local engine."""
        match self.engine:
            case DeepSpeedEngine(processes=int(processes)):
                return processes
            case LocalEngine():
                return 1
            case _:
                return self.hardware.gpus_per_node

    @property
    def world(self) -> int:
        """Ranks of the whole launch."""
        return 1 if isinstance(self.engine, LocalEngine) else self.ranks_per_node * self.hardware.nodes

    @property
    def expert_parallel(self) -> int:
        """`layout.expert_parallel` as a number."""
        return self.world if self.layout.expert_parallel == "all" else self.layout.expert_parallel

    @model_validator(mode="after")
    def _ranks_fit_layout(self) -> "Teacher":
        if not isinstance(self.engine, LocalEngine):
            for name, degree in (("expert_parallel", self.expert_parallel), ("tensor_parallel", self.layout.tensor_parallel)):
                if self.world % degree:
                    raise ValueError(
                        f"layout.{name} {degree} does not divide the {self.world} ranks "
                        f"({self.ranks_per_node} on each of hardware.nodes {self.hardware.nodes})"
                    )
        return self


# --- prompts and generation --------------------------------------------------------------------------------------


class KeptLogits(Section):
    """The teacher's best logits of every generated token, for distillation on its distribution."""

    top_k: PositiveInt = 128
    """Logits a token; 128 of them are 770 bytes."""
    temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0, 2.0)
    """Distillation temperatures: log Z is stored at each, because it cannot be had from the kept logits afterwards."""


class Budget(Section):
    """What generation may spend. At a limit nothing more is asked, what is asked is finished, and the rest stays pending."""

    max_cost: PositiveFloat | None = None
    """Dollars: of a server's replies at the engine's prices, or of our own GPUs at plan.price_per_gpu_hour."""
    max_tokens: PositiveInt | None = None
    """Output tokens, of superseded copies too."""
    max_hours: PositiveFloat | None = None
    """Wall-clock hours in which at least one worker was alive."""


class Canary(Section):
    """A small share of the prompts, answered and judged before the fleet is spent; `tracestill generate --canary 0.05`."""

    share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Of each task's prompts, chosen by hash and the recipe's seed, at least one; absent: everything is asked."""
    min_kept_share: Share = 0.3
    """Of the completed traces, those that the filters and verifiers would keep (copies not yet dropped)."""
    max_truncated_share: Share = 0.1
    """Of the completed traces, those that ran into max_tokens. Public runs met 19 to 37 % and found out afterwards."""
    max_failed_share: Share = 0.02
    """Of the requests."""
    max_reasoning_tokens_p99: PositiveInt | None = None
    max_cost: PositiveFloat | None = None
    """Dollars that the whole run would cost at the canary's price a request."""


class Generate(Section):
    prompts: tuple[PromptSource, ...] = ()
    samples_per_prompt: Annotated[int, Field(ge=1, le=100_000)] = 4
    sampling: Sampling = Sampling()
    seed: NonNegativeInt = 0
    budget: Budget = Budget()
    canary: Canary = Canary()
    segment_traces: PositiveInt = 256
    """Traces per committed segment: files of a run, against what other workers and the ledger see late."""
    segment_seconds: PositiveFloat = 120.0
    """A finished trace waits at most this long, in the journal, for its segment to fill."""
    checkpoint_tokens: PositiveInt = 256
    """The journal holds an unfinished output at every so many of its tokens: what a SIGKILL costs each of them at most."""
    lease_ttl_s: PositiveFloat = 30.0
    """A worker that has shown no sign of life for so long is taken for dead, and its requests go to others."""
    drain_seconds: PositiveFloat = 20.0
    """After SIGTERM, SIGUSR2 or Ctrl-C, a worker has committed and journalled everything within this time and exits 75."""
    retry_failed: bool = False
    """Ask once more what failed in earlier launches."""
    accept_code_change: bool = False
    """Go on with a run that other code began."""
    logits: KeptLogits | None = None
    """Kept beside the traces in a folder of their own; absent, none are. Only of a teacher that runs here (not http)."""

    @model_validator(mode="after")
    def _twins_are_for_evaluation(self) -> "Generate":
        for number, source in enumerate(self.prompts):
            if isinstance(source, SuiteSource) and source.twins is not None:
                raise ValueError(f"prompts {number}: twins measure, they do not teach; expected them in evaluate.suites")
        return self


# --- data --------------------------------------------------------------------------------------------------------


class Data(WithViews):
    filters: tuple[FilterSettings, ...] = (FinishReasonFilter(), ThinkTagsFilter(), AnswerPresentFilter(), ControlTokensFilter())
    """What makes a trace unfit whatever its answer, each by its type or as a section. The default finds broken records, which
    nothing should be trained on; what else counts as unfit is the recipe's to say."""
    decontaminate: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Benchmark files, JSONL or Parquet, by path or pattern, looked for beside the recipe and in the working directory. The run's
    own evaluation prompts are always looked for."""
    dedup: Literal["near", "exact", "none"] = "exact"
    """near: also what differs in a few words (MinHash of five-word shingles)."""
    near_threshold: Annotated[float, Field(ge=0.6, le=0.95)] = 0.8
    """Estimated Jaccard similarity of two traces' shingles from which on the second is a copy."""
    validation_share: Share = 0.03
    """Share of prompts (by hash, never of rows) whose traces go to the validation split."""
    verify_timeout_s: PositiveFloat = 10.0
    """Wall seconds for one answer; a verifier that needs more says so itself."""
    judging: Judging | None = None
    """Who grades answers to prompts whose verifier is `llm_judge`, and how. Without it such prompts are refused."""
    permitted_licences: tuple[str, ...] = ("MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "CC-BY-4.0")
    """Of teachers and prompt sources: licences that permit distillation as you read them. Any other stops the build (exit 3).
    `unknown` is a licence too: that of a source which names none."""
    parquet: bool = True
    """The rows once more as Parquet, beside the Arrow files."""
    processes: PositiveInt | None = None
    """That judge and write; absent: as many as this machine has cores. Shows in no byte."""

    @model_validator(mode="before")
    @classmethod
    def _verified_is_a_view(cls, given: object) -> object:
        if isinstance(given, dict) and "require_verified" in given:
            raise ValueError(
                f"require_verified is the view's now; expected view: {{require_verified: {given['require_verified']}}}"
            )
        return given

    @model_validator(mode="before")
    @classmethod
    def _length_is_a_filter(cls, given: object) -> object:
        if isinstance(given, dict) and "max_trace_tokens" in given:
            raise ValueError(
                f"max_trace_tokens is the length filter's now; expected filters: [..., {{type: length, max_tokens: "
                f"{given['max_trace_tokens']}}}]"
            )
        return given

    @model_validator(mode="after")
    def _each_filter_once(self) -> "Data":
        types = [chosen.type for chosen in self.filters]
        if twice := sorted({name for name in types if types.count(name) > 1}):
            raise ValueError(f"filters name {twice[0]} twice; expected each type once: put all its bounds into one section")
        return self


# --- the whole run -----------------------------------------------------------------------------------------------


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
    plan: Planning = Planning()

    @model_validator(mode="after")
    def _logits_need_a_model(self) -> "Recipe":
        if self.generate.logits is not None and isinstance(self.teacher.engine, HttpEngine):
            raise ValueError("generate.logits needs teacher.engine deepspeed or local: a server does not give log Z")
        return self

    @model_validator(mode="after")
    def _distillation_has_logits(self) -> "Recipe":
        objective, kept = self.train.objective, self.generate.logits
        if isinstance(objective, CrossEntropy):
            return self
        if kept is None:
            raise ValueError(f"train.objective {objective.type} needs the teacher's logits; set generate.logits, such as {{}}")
        if objective.temperature not in kept.temperatures:
            raise ValueError(
                f"train.objective.temperature {objective.temperature:g}: log Z is kept at {kept.temperatures} only; "
                "expected one of generate.logits.temperatures"
            )
        return self

    @model_validator(mode="after")
    def _servers_are_asked(self) -> "Recipe":
        if self.slurm.servers is not None and not isinstance(self.teacher.engine, HttpEngine):
            raise ValueError("slurm.servers are asked by teacher.engine http; set it, or leave slurm.servers out")
        return self

    @model_validator(mode="after")
    def _costs_have_prices(self) -> "Recipe":
        engine = self.teacher.engine
        if isinstance(engine, HttpEngine):
            priced, remedy = engine.price_input_per_million + engine.price_output_per_million > 0, "set the engine's prices"
        else:
            priced, remedy = self.teacher.hardware.gpu != "cpu", "a CPU is free"
        for key, limit in (("budget", self.generate.budget.max_cost), ("canary", self.generate.canary.max_cost)):
            if limit is not None and not priced:
                raise ValueError(f"generate.{key}.max_cost {limit:g} can never be reached: no price is known; {remedy}")
        return self

    @model_validator(mode="after")
    def _drains_fit(self) -> "Recipe":
        engine, seconds = self.teacher.engine, self.generate.drain_seconds
        if isinstance(engine, HttpEngine) and engine.drain_s >= seconds:
            raise ValueError(
                f"teacher.engine.drain_s {engine.drain_s:g} leaves nothing of generate.drain_seconds {seconds:g} to commit in; "
                "expected less: lower it, or raise generate.drain_seconds"
            )
        if isinstance(engine, DeepSpeedEngine) and seconds >= TORCHRUN_GRACE_S:
            raise ValueError(
                f"generate.drain_seconds {seconds:g}: torchrun kills its ranks {TORCHRUN_GRACE_S:g} s after a signal; "
                f"expected less than {TORCHRUN_GRACE_S:g}"
            )
        return self
