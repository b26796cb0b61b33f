"""What an evaluation asks, of whom, and what its gates demand."""

import re
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from configs.engines import HttpEngine
from configs.prompt_sources import PromptSource
from configs.sampling import Sampling
from configs.section import Section

# --- gates -------------------------------------------------------------------------------------------------------

MetricName = Literal[
    "accuracy", "hallucination_rate", "abstention_rate", "unknown_abstention_rate", "over_refusal_rate", "omniscience_index",
    "simpleqa_f", "ece", "brier", "aurc", "coverage_at_5_risk", "truncation_rate", "reasoning_tokens_per_correct",
    "cost_per_completed_task", "twin_gap",
]  # fmt: skip
UNPAIRED = ("ece", "aurc", "coverage_at_5_risk", "twin_gap")
"""Compared between models by their values alone."""
Reference = Literal["teacher", "base"]
_GATE = re.compile(r"(?P<metric>\w+?)(?: (?P<relation>of|above) (?P<reference>teacher|base))?(?: in (?P<slice>.+))?")
_EARLIER = {"accuracy_of_teacher": "accuracy of teacher", "hallucination_above_teacher": "hallucination_rate above teacher"}
"""Names of releases in which a metric and what it is held against were one word."""


class Gated(NamedTuple):
    """What a gate is about. relation: `of`, the student's figure over the reference's; `above`, the difference of the two; "",
    the student's own. slice: a family, a domain, `unseen`, `twins`, and of long prompts `middle`, `ends` or a length (`32k`); ""
    for all items."""

    metric: MetricName
    relation: Literal["of", "above", ""] = ""
    reference: Reference | None = None
    slice: str = ""


def read_gate(name: str) -> Gated:
    """`METRIC [of|above teacher|base] [in SLICE]`. Raises ValueError with what was expected."""
    found = _GATE.fullmatch(_EARLIER.get(name, name))
    if found is None or found["metric"] not in get_args(MetricName):
        raise ValueError(
            f"gate {name!r}: expected METRIC [of|above teacher|base] [in SLICE], such as `accuracy of teacher` or "
            f"`hallucination_rate in finance`, METRIC one of {', '.join(get_args(MetricName))}"
        )
    return Gated(found["metric"], found["relation"] or "", found["reference"], found["slice"] or "")  # type: ignore[arg-type]


class Gate(Section):
    """Bounds of one figure of the student; either side may be left open."""

    min: float | None = None
    max: float | None = None
    interval: bool = False
    """The whole 95 % interval must keep the bound, not the figure alone: at most 0.30 by its upper end."""

    @model_validator(mode="after")
    def _some_bound(self) -> "Gate":
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min or max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"gate min {self.min} is above max {self.max}")
        return self


class Headroom(Section):
    """Before anything is trained: is there something to distil? The teacher's figure above the base's on the same items, by the
    lower end of its 95 % interval."""

    metric: Literal["accuracy", "omniscience_index"] = "accuracy"
    above: NonNegativeFloat = 0.0
    """So much the teacher must be better."""


# --- models ------------------------------------------------------------------------------------------------------

OWN_MODELS = ("teacher", "base", "student", "export")
"""Every run's own. `export` is the recipe's first format; `export/FORMAT` any of them."""


class Price(Section):
    """Dollars per million tokens."""

    input: NonNegativeFloat
    output: NonNegativeFloat


class OtherModel(Section):
    """A model beside the run's own: a folder, or a model behind a server."""

    folder: str | None = None
    """A Hugging Face checkpoint."""
    adapter: str | None = None
    """A PEFT folder on top of it."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    server: HttpEngine | None = None
    """An OpenAI-compatible server; `model` is its name for the model, and `tokenizer` counts its tokens."""
    tokenizer: str | None = None
    """Folder with the server's tokenizer and chat template; absent: the student's."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "OtherModel":
        if (self.folder is None) == (self.server is None):
            raise ValueError("expected folder or server, one of the two")
        if self.server is not None and not self.server.model:
            raise ValueError("server.model: expected the name that the server knows the model by")
        if self.adapter is not None and self.folder is None:
            raise ValueError("adapter needs folder: the base it was trained on")
        return self


# --- suites ------------------------------------------------------------------------------------------------------


class LmEvalSuite(Section):
    """Tasks of lm-evaluation-harness from a folder, with data files beside them. Nothing is fetched. Their figures stand beside
    the others, in evaluation/MODEL.lm_eval.json, and in no gate."""

    type: Literal["lm_eval"] = "lm_eval"
    path: str
    """A folder of lm-eval YAML files; relative paths of their data files begin there. Functions that they name (`!function`) are
    Python of that folder, and run."""
    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Names of tasks, groups or tags; empty: every task of the folder."""
    limit: PositiveInt | None = None
    """Only the first so many documents of each task."""
    chat_template: bool = True
    """Of tasks that generate: contexts are chat turns, answers are what follows the reasoning. False: plain text and the task's
    own length, for tasks with gen_prefix the only way; a server of chats is not asked for it. Tasks that compare likelihoods are
    always plain text."""
    context_tokens: PositiveInt = 4096
    """Longest sequence whose likelihood is asked for. Longer contexts lose their beginning, longer texts are cut into windows."""


Suite = Annotated[PromptSource | LmEvalSuite, Field(discriminator="type")]


# --- the stage ---------------------------------------------------------------------------------------------------


class Evaluate(Section):
    suites: tuple[Suite, ...] = ()
    """Held-out items: reasoning_gym sources take the held-out side of the hash, JSONL ones the rows with split `eval`, documents
    the questions and repository the files on the held-out side; and lm_eval folders."""
    sampling: Sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=8192)
    samples: PositiveInt = 1
    """Attempts at each item; intervals draw an item with all its attempts."""
    batch_size: PositiveInt = 64
    seed: NonNegativeInt = 0
    gates: dict[str, Gate] = Field(default={})
    """By name: `METRIC [of|above teacher|base] [in SLICE]`. `accuracy of teacher`: the student's over the teacher's.
    `hallucination_rate in finance`: of one domain. `accuracy above base in unseen`: on families without a training trace."""
    headroom: Headroom | None = Headroom()
    """Null: nobody asks whether the teacher is better than the base."""
    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], OtherModel] = Field(default={})
    """For --compare, by name."""
    prices: dict[str, Price] = Field(default={})
    """By model (`teacher`, `base`, `student`, `export`, one of `models`), for the cost of a completed task. A server's own prices
    (price_input_per_million) need not be said again."""

    @property
    def prompt_suites(self) -> tuple[PromptSource, ...]:
        """Those whose items stand in the prompt set."""
        return tuple(suite for suite in self.suites if not isinstance(suite, LmEvalSuite))

    @property
    def lm_eval_suites(self) -> tuple[LmEvalSuite, ...]:
        return tuple(suite for suite in self.suites if isinstance(suite, LmEvalSuite))

    @model_validator(mode="after")
    def _samples_differ(self) -> "Evaluate":
        if self.samples > 1 and self.sampling.temperature == 0.0:
            raise ValueError(f"samples {self.samples} of greedy decoding are all the same; expected sampling.temperature above 0")
        return self

    @model_validator(mode="after")
    def _gates_are_understood(self) -> "Evaluate":
        for name in self.gates:
            read_gate(name)
        return self

    @model_validator(mode="after")
    def _intervals_are_there(self) -> "Evaluate":
        for name, gate in self.gates.items():
            gated = read_gate(name)
            if gate.interval and gated.relation and gated.metric in UNPAIRED:
                raise ValueError(
                    f"gate {name!r}: the difference of two models' {gated.metric} has no interval; leave interval out"
                )
        return self

    @model_validator(mode="after")
    def _names_are_free(self) -> "Evaluate":
        if taken := sorted(set(self.models) & set(OWN_MODELS)):
            raise ValueError(f"models.{taken[0]}: the name of a model of every run; choose another")
        if unknown := sorted(set(self.prices) - set(OWN_MODELS) - set(self.models)):
            raise ValueError(f"prices.{unknown[0]}: no such model; expected {', '.join((*OWN_MODELS, *self.models))}")
        return self
