"""Where prompts come from: one section per kind of source, told apart by `type`."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from configs.section import Section

MAX_BUDGET_TOKENS = 1_000_000
ControlTokenRule = Literal["refuse", "escape"]
"""What becomes of text that is a control token of the teacher's tokenizer (`<|user|>`, `</think>`)."""
Glob = Annotated[str, Field(min_length=1)]


TWIN_FRAMES = (
    "Please answer this question. {question}",
    "Here is something I would like to know:\n\n{question}",
    "{question}\n\nThank you for your help.",
    "I have a task for you. {question}",
)
"""Plain words around a question that leave what it asks for, and in which form, as they are."""


class Twins(Section):
    """Some items of a suite once more, asked in other words: a gap between the two says what was learned by its wording."""

    count: PositiveInt | None = None
    """So many items, those whose ids hash lowest; all where there are fewer."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """About this share of the items, by the hash of their ids, so that another item changes no other choice."""
    frames: Annotated[tuple[str, ...], Field(min_length=1)] = TWIN_FRAMES
    """Each holds `{question}` once. Which one an item gets is decided by its hash."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "Twins":
        if (self.count is None) == (self.share is None):
            raise ValueError("expected count or share, one of the two")
        return self

    @model_validator(mode="after")
    def _frames_hold_the_question(self) -> "Twins":
        for frame in self.frames:
            if frame.count("{question}") != 1 or frame.strip() == "{question}":
                raise ValueError(f"frame {frame!r}: expected other words around {{question}}, which stands in it once")
        return self


class SuiteSource(Section):
    """What sources of short questions share. Long prompts have no twins: words around 100,000 tokens are no other question, and
    would spend the budget that they were packed to."""

    twins: Twins | None = Field(default=None, exclude_if=lambda twins: twins is None)
    """Only in evaluate.suites. Absent it is in no dump: the fingerprints of earlier runs stay as they are."""


class ReasoningGymSource(SuiteSource):
    """Items of one reasoning-gym task. Which side of the split an item falls on is decided by the hash of its text."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    params: dict[str, int | float | bool | str] = Field(default={})
    """Passed to reasoning_gym.create_dataset."""
    count: PositiveInt
    seed: NonNegativeInt = 0
    licence: str = "Apache-2.0"
    control_tokens: ControlTokenRule = "refuse"
    """As for rows."""


# --- rows --------------------------------------------------------------------------------------------------------


class RowSource(SuiteSource):
    """A prompt a row: `question` or `messages`; optional `answer`, `task`, `verifier`, `details` (what the verifier needs: an
    object or a list, or its JSON text), `split`, `domain`, `known`, `tools` (a list, or its JSON text), `max_tokens`,
    `reasoning_budget`, `id`, `twin_of` (the id of the row that this one asks in other words)."""

    path: str
    """Relative paths are looked up beside the recipe first, then in the working directory."""
    template: str | None = None
    """A template file (or the name of a shipped one) that makes the question of the row's fields; absent: the question as is."""
    count: PositiveInt | None = None
    """Keep at most this many, chosen by hash; all of them when absent."""
    licence: str = "unknown"
    control_tokens: ControlTokenRule = "refuse"
    """A row with a control token of the teacher's tokenizer in its turns or tools ends the stage; `escape` puts a backslash after
    the token's first character instead."""


class JsonlSource(RowSource):
    """One JSON object a line."""

    type: Literal["jsonl"] = "jsonl"


class ParquetSource(RowSource):
    """A Parquet file, or a folder of them; columns are keys, and null is an absent key."""

    type: Literal["parquet"] = "parquet"


class DatasetsSource(RowSource):
    """A folder that `datasets` saved (`save_to_disk`)."""

    type: Literal["datasets"] = "datasets"
    split_name: str | None = None
    """Which part of a DatasetDict; a folder that holds a single dataset has none."""


class OmniscienceSource(RowSource):
    """Closed-book facts with leave to decline, as AA-Omniscience has them: columns question, answer, domain, and optionally
    topic, aliases, answerable, split. Their task is `facts/DOMAIN`. Rows without `split` are on the side that reads them."""

    type: Literal["omniscience"] = "omniscience"
    path: str
    """A file that ends in .jsonl or .csv."""
    template: str = "answer-or-decline"
    """Asks for the answer or for `I don't know`; may use question, domain, topic, aliases, answerable."""
    verifier: Literal["exact", "llm_judge"] = "exact"
    """exact: the answer or one of its aliases. Nobody asks a judge in an evaluation: under llm_judge answers are `ungraded`
    there."""


# --- long contexts -----------------------------------------------------------------------------------------------


class LongContextSource(Section):
    """What the two builders of long prompts share."""

    budget_tokens: Annotated[PositiveInt, Field(le=MAX_BUDGET_TOKENS)]
    """Most tokens of a rendered prompt, by the teacher's own tokenizer, template words included."""
    count: PositiveInt
    """Prompts to build."""
    seed: NonNegativeInt = 0
    licence: str = "unknown"
    max_tokens: NonNegativeInt = 0
    """Output tokens of each of these prompts; 0: generate.sampling.max_tokens. In evaluate.suites it says nothing: all items have
    evaluate.sampling's."""
    reasoning_budget: NonNegativeInt = 0
    """Most tokens of reasoning before its block is closed; 0 is no bound."""

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> "LongContextSource":
        if self.max_tokens and self.reasoning_budget >= self.max_tokens:
            raise ValueError(
                f"reasoning_budget {self.reasoning_budget} leaves no room for an answer within max_tokens {self.max_tokens}"
            )
        return self


class RepositorySource(LongContextSource):
    """Tasks about a source tree that is packed into the prompt."""

    type: Literal["repository"] = "repository"
    path: str
    """Root of the tree. Its .gitignore files are respected, symbolic links are never followed."""
    template: str = "explain-flow"
    """`explain-flow`, `plan-then-write`, `find-planted-bug`, or the path of an own template."""
    include: tuple[Glob, ...] = ()
    """Patterns as in .gitignore; a file must match one of them. Empty: every text file."""
    exclude: tuple[Glob, ...] = ()
    """Patterns as in .gitignore; a file that matches one is left out."""
    max_file_bytes: PositiveInt = 262_144
    """Larger files are left out: generated code and data, mostly."""
    plant_bug: bool = False
    """Change one line of one file and keep its place as the answer. find-planted-bug always does."""
    verifier: Literal["exact", ""] | None = None
    """Who judges `path:line`. Absent: exact for find-planted-bug, whose words ask for nothing else, and nobody for an own
    template."""

    @property
    def plants(self) -> bool:
        return self.plant_bug or self.template == "find-planted-bug"

    @property
    def judged_by(self) -> str:
        """Key of data.verify.VERIFIERS, or ""."""
        if self.verifier is not None:
            return self.verifier
        return "exact" if self.template == "find-planted-bug" else ""

    @model_validator(mode="after")
    def _answer_to_judge(self) -> "RepositorySource":
        if self.verifier and not self.plants:
            raise ValueError(f"verifier {self.verifier} needs an answer, and only a planted bug has one: set plant_bug")
        return self


class DocumentsSource(LongContextSource):
    """Long texts with a question that needs two inserted facts, far apart, at recorded depths."""

    type: Literal["documents"] = "documents"
    paths: Annotated[tuple[Glob, ...], Field(min_length=1)]
    """Files or glob patterns: plain text (txt, md), or JSONL with a `text` a line."""
    template: str = "two-facts"
    """How documents and question are put to the teacher: `two-facts`, or the path of an own template."""
    needles: str = "vault-codes"
    """The facts, their question and its answer: `vault-codes`, or the path of an own file with these blocks."""
    decoys: NonNegativeInt = 3
    """Further codes of other places. With none, the only code in the text is the answer, and one fact is enough."""


PromptSource = Annotated[
    ReasoningGymSource | JsonlSource | ParquetSource | DatasetsSource | OmniscienceSource | RepositorySource | DocumentsSource,
    Field(discriminator="type"),
]
