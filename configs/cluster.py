"""The `slurm` section of a recipe, and a site's own YAML, which has the same keys: where jobs go, what a node needs before a
stage starts, and how long anything may be silent."""

import re
import shlex
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from configs.section import Section

StageName = Literal[
    "prompts", "prepare", "serve", "headroom", "canary", "generate", "data", "train", "evaluate", "export", "report"
]

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d{1,2}))?(?::(?P<third>\d{1,2}))?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MARGIN_S = 90
"""Slurm sends its warning up to a minute early and some seconds late (measured, 22.05)."""


def seconds_of(limit: str) -> int:
    """Of Slurm's ways to write a time limit: MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS. Raises ValueError."""
    found = _TIME.fullmatch(limit)
    if found is None:
        raise ValueError(f"{limit!r} is no time of Slurm's; expected HH:MM:SS or D-HH:MM:SS")
    days, first, second, third = (None if part is None else int(part) for part in found.group("days", "first", "second", "third"))
    if days is not None:
        return ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return ((first or 0) * 60 + (second or 0)) * 60 + third
    return (first or 0) * 60 + (second or 0)


OWN_OPTIONS = (
    "--array", "-a", "--comment", "--output", "-o", "--error", "-e", "--job-name", "-J", "--chdir", "-D", "--dependency", "-d",
    "--requeue", "--no-requeue", "--signal", "--open-mode", "--nodes", "-N", "--ntasks", "-n", "--ntasks-per-node", "--wrap",
    "--wait", "-W", "--test-only", "--parsable", "--kill-on-invalid-dep",
)  # fmt: skip
"""Of sbatch, that scripts have lines of their own for, or that change what submit hears of it."""
OWN_KEYS = {
    "--time": "time_limit", "-t": "time_limit", "--exclude": "exclude", "-x": "exclude", "--partition": "partition",
    "-p": "partition",
}  # fmt: skip
"""Of sbatch, that the section has keys for which are looked at."""


def own_option(line: str) -> str | None:
    """The first of these that sbatch would read in a line of options, as it does: long ones by any beginning that is enough
    (--arr=0-1), short ones with what follows them (-N3). Raises ValueError for quotation marks that do not end."""
    for word in shlex.split(line):
        name = word.partition("=")[0]
        for own in (*OWN_OPTIONS, *OWN_KEYS):
            is_same = own == word[:2] if len(own) == 2 else len(name) > 2 and own.startswith(name)
            if is_same:
                return own
    return None


class Job(Section):
    """What one job asks of the cluster; what is absent is the site's default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    """For example `gpu:h200:8`; asked for only where a stage uses GPUs."""
    memory: str | None = None
    """Of a node, as sbatch's --mem reads it; `0` is all of it."""
    time_limit: str | None = None
    cpus_per_task: PositiveInt | None = None
    options: tuple[str, ...] = ()
    """Further #SBATCH lines, such as `--exclusive` or `--reservation=night`."""

    @field_validator("time_limit", "memory", mode="before")
    @classmethod
    def _yaml_reads_numbers(cls, value: object) -> object:
        if isinstance(value, int):
            raise ValueError(f'{value}: a number, as YAML reads 24:00:00; put it in quotes, as in "24:00:00" or "64G"')
        return value

    @field_validator("partition", "account", "qos", "constraint", "gres", "memory")
    @classmethod
    def _one_word(cls, value: str | None) -> str | None:
        if value is not None and (not value or re.search(r"\s", value)):
            raise ValueError(f"{value!r}: expected one word, or null for the site's default")
        return value

    @field_validator("time_limit")
    @classmethod
    def _slurm_can_read_it(cls, limit: str | None) -> str | None:
        if limit is not None:
            seconds_of(limit)
        return limit

    @field_validator("options")
    @classmethod
    def _options_are_options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"options {option!r}: expected a line that sbatch reads, such as --exclusive")
            if (name := own_option(option)) in OWN_OPTIONS:
                raise ValueError(f"options {option!r}: {name} is what a job is known and ended by here; leave it out")
            if name is not None:
                raise ValueError(f"options {option!r}: {name} has a key of its own; expected slurm.{OWN_KEYS[name]}")
        return options


class Health(Section):
    """What every node of a job must show before a stage that uses GPUs loads anything. A node that does not is left out of this
    run from then on, and the job goes back into the queue."""

    gpus: NonNegativeInt | None = None
    """Seen by nvidia-smi; absent: as many as the recipe's hardware has a node."""
    gpu_memory_gib: PositiveFloat | None = None
    """Free on each of them: what a dead job has left behind is not."""
    memory_gib: PositiveFloat | None = None
    """Of the node's own memory that is available."""
    scratch_gib: PositiveFloat | None = None
    """Free where `scratch` points to."""
    copy_gib_s: PositiveFloat | None = None
    """Copying from memory to memory on one core. A node with a lost memory channel or another's job on it is slow at it."""
    gpu_copy_gib_s: PositiveFloat | None = None
    """Copying from pinned memory to each GPU (teacher/gpu_probe.py; some seconds). A link with half its lanes is slow at it."""
    command: str | None = None
    """A shell line of the site's own; any exit code but 0 is a bad node, and its last line says why."""


class Servers(Section):
    """Jobs that serve the teacher while it is needed. Each is teacher.hardware.nodes nodes and one address; teacher.layout and
    teacher.engine say how the program is to place the model."""

    program: Literal["vllm", "sglang", "transformers"] = "vllm"
    """`transformers` serves one process on one node."""
    jobs: PositiveInt = 1
    model: str = ""
    """Folder of the weights; empty: teacher.model."""
    options: tuple[str, ...] = ()
    """Further words for the program, such as `--max-model-len=262144`."""
    start_seconds: PositiveFloat = 3600.0
    """From the start of the program to its first answer: reading 750 GB and compiling."""
    idle_seconds: PositiveFloat = 600.0
    """Servers end when for so long no job of the run has asked them or could start to: their nodes are what training waits for.
    Others are submitted for the evaluation."""


class Slurm(Job):
    """Jobs of all stages; `stages` says otherwise for some of them."""

    site: str = ""
    """A YAML file with the keys of this section, beside the recipe or in the working directory: a cluster's values, under the
    recipe's own."""
    time_limit: str | None = "24:00:00"
    cpus_per_task: PositiveInt | None = 2
    stages: dict[StageName, Job] = Field(default={})
    generate_jobs: PositiveInt = 1
    """Jobs that generate at the same time, each on the teacher's nodes (or asking servers)."""
    canary: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """A job that asks this share of the prompts before `generate`, and ends the chain where they disappoint."""
    servers: Servers | None = None
    """The http engine's servers as jobs of this run, which come and go."""
    setup: tuple[str, ...] = ()
    """Shell lines before each stage: module loads, a virtual environment."""
    environment: dict[str, str] = Field(default={})
    """Exported for each stage: NCCL and network settings."""
    srun: tuple[str, ...] = ()
    """Further options of srun, such as `--container-image=...`."""
    exclude: tuple[str, ...] = ()
    """Nodes that no job of this run is to have."""
    scratch: str = ""
    """A folder on each node's own disk."""
    stage_weights: bool = False
    """Copies the prepared shards (teacher.engine.prepared) to `scratch` once a node before they are loaded."""
    warning_seconds: PositiveInt = 300
    """From the warning to the time limit: what a stage has for finishing its step and writing what it holds."""
    silence_seconds: PositiveFloat = 1800.0
    """A stage whose counts have not moved for so long hangs: it is ended and goes back into the queue. Tokens of answers that are
    not whole count. prompts, export and report count nothing: they have their time limit."""
    loading_seconds: PositiveFloat = 5400.0
    """Likewise, before a stage's first count: reading a teacher of 1.5 TB."""
    health: Health | None = Health()

    @field_validator("scratch")
    @classmethod
    def _a_shell_can_read_it(cls, scratch: str) -> str:
        if scratch and not re.fullmatch(r"[A-Za-z0-9_./${}-]+", scratch):
            raise ValueError(f"scratch {scratch!r}: expected a path, variables such as $USER allowed, without spaces")
        return scratch

    @field_validator("environment")
    @classmethod
    def _names_are_names(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"environment {name!r}: expected a variable's name, such as NCCL_SOCKET_IFNAME")
        return environment

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.site and not self.scratch:  # it may be the site's to say; together they are looked at once more
            return self
        if self.stage_weights and not self.scratch:
            raise ValueError("stage_weights needs scratch: a folder on each node's own disk")
        if self.health is not None and self.health.scratch_gib is not None and not self.scratch:
            raise ValueError("health.scratch_gib needs scratch: a folder on each node's own disk")
        for stage, limit in [("", self.time_limit), *((f"stages.{name}.", job.time_limit) for name, job in self.stages.items())]:
            if limit is not None and 0 < seconds_of(limit) < self.warning_seconds + MARGIN_S:
                raise ValueError(
                    f"{stage}time_limit {limit} leaves no time to work: warning_seconds {self.warning_seconds} and {MARGIN_S} s "
                    "for a warning that comes early"
                )
        return self

    def job(self, stage: StageName) -> Job:
        """What this stage asks for: its own values over the section's."""
        own = self.stages.get(stage, Job())
        common = {name: getattr(self, name) for name in Job.model_fields}
        return Job.model_validate(common | own.model_dump(exclude_unset=True) | {"options": (*self.options, *own.options)})
