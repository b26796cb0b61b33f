"""What `data.filters` may say: one section per question about a trace, told apart by `type`.

In a recipe the bare word is the filter with its defaults: `[finish_reason, {type: length, max_tokens: 65536}]`.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from configs.section import Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Word = Annotated[str, Field(min_length=1)]
LanguageCode = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]
"""ISO 639: `en`, `zh`, `de`, `ceb`."""

SecretKind = Literal[
    "anthropic_key", "aws_key", "github_token", "gitlab_token", "google_key", "huggingface_token", "jwt", "npm_token",
    "openai_key", "private_key", "pypi_token", "sendgrid_key", "slack_token", "slack_webhook", "stripe_key",
]  # fmt: skip
PersonalDataKind = Literal["card", "email", "iban", "phone"]
SECRET_KINDS: tuple[SecretKind, ...] = SecretKind.__args__
PERSONAL_DATA_KINDS: tuple[PersonalDataKind, ...] = PersonalDataKind.__args__


# --- broken records: the defaults --------------------------------------------------------------------------------


class FinishReasonFilter(Section):
    """The model ended its output itself."""

    type: Literal["finish_reason"] = "finish_reason"


class ThinkTagsFilter(Section):
    """The think block is opened once and closed once."""

    type: Literal["think_tags"] = "think_tags"


class AnswerPresentFilter(Section):
    """Something follows the reasoning."""

    type: Literal["answer_present"] = "answer_present"


# --- what a recipe may add ---------------------------------------------------------------------------------------


class LengthFilter(Section):
    """Bounds in tokens, the bound itself allowed. Reasoning counts up to and including `</think>`."""

    type: Literal["length"] = "length"
    max_tokens: PositiveInt = 131072
    """Of prompt, reasoning and answer together; the longest row that training can take is train.max_tokens_per_row."""
    min_reasoning_tokens: NonNegativeInt = 0
    max_reasoning_tokens: PositiveInt | None = None
    min_answer_tokens: NonNegativeInt = 0
    max_answer_tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> "LengthFilter":
        for part, least, most in (
            ("reasoning", self.min_reasoning_tokens, self.max_reasoning_tokens),
            ("answer", self.min_answer_tokens, self.max_answer_tokens),
        ):
            if least > (self.max_tokens if most is None else most):
                raise ValueError(f"min_{part}_tokens {least} is above its bound of {most or self.max_tokens}; nothing would pass")
        return self


class LanguageFilter(Section):
    """The prose of reasoning and answer is in a language that the recipe lists; code and mathematics are in none."""

    type: Literal["language"] = "language"
    reasoning: tuple[LanguageCode, ...] = ("en",)
    """Languages the reasoning may be in; empty: any."""
    answer: tuple[LanguageCode, ...] = ("en",)
    """Languages the answer may be in; empty: any."""
    min_letters: PositiveInt = 80
    """Prose shorter than this passes unjudged; a Han or kana character counts as two letters. Of English lines of 10 to 20
    letters 0.4 % are called foreign, of 20 to 40 0.8 %, of 40 to 80 0.1 % (6,000 each, from documentation)."""
    max_foreign_share: Share = 0.5
    """Share of the recognised prose in other languages above which a text is foreign. Quoted words, a translated sentence or a
    bilingual table stay below it."""


class RepetitionFilter(Section):
    """Shares of a text that it has said before: of its lines, its paragraphs, its n-grams. Reasoning and answer are judged apart,
    because an answer rightly repeats the reasoning's draft. The defaults stand far above Gopher's for web pages (0.30 of
    lines and paragraphs, 0.10 of 10-grams; Rae et al. 2021, table A1): reasoning tries again, checks and tabulates."""

    type: Literal["repetition"] = "repetition"
    max_repeated_lines: Share = 0.6
    max_repeated_paragraphs: Share = 0.5
    max_repeated_ngrams: Share = 0.6
    """0.5 is a text said twice, 0.67 three times."""
    ngram_words: Annotated[int, Field(ge=2, le=64)] = 10
    """Words of an n-gram; twice as many characters in texts without spaces."""
    min_words: PositiveInt = 200
    """Shorter texts pass: a worked sum of 60 words repeats its pattern by nature."""


class LoopFilter(Section):
    """Reasoning or answer ends in one cycle, over and over."""

    type: Literal["loop"] = "loop"
    min_repeats: Annotated[int, Field(ge=2)] = 8
    min_characters: PositiveInt = 512
    """The cycles' length together: a rule of 80 dashes or 0.333... is no loop."""
    max_period: PositiveInt = 4096
    """Longest cycle looked for, in characters."""


class RestartsFilter(Section):
    """How often the reasoning begins anew: by saying so, or by beginning the same long passage again."""

    type: Literal["restarts"] = "restarts"
    max_restarts: NonNegativeInt = 5
    """A hard problem is rightly begun afresh a few times."""
    opening_characters: PositiveInt = 200
    """Two paragraphs begin the same passage when they are at least this long and agree so far. Above the bound by this rule, were
    they reasoning: 0.4 % of 2,192 Python files (1.4 % at 100 characters), none of 210 worked solutions."""


class ControlTokensFilter(Section):
    """No text holds a word that a tokenizer turns into a control token; the tokenizers' own words are added by the build."""

    type: Literal["control_tokens"] = "control_tokens"
    tokens: tuple[Word, ...] = ()
    """Further words that no text may hold."""
    tool_tokens: tuple[Word, ...] = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    """Allowed where the prompt offers tools: a call is written with them."""


class SelfNamingFilter(Section):
    """The teacher does not say who it is or who made it: the student is somebody else. Case does not matter."""

    type: Literal["self_naming"] = "self_naming"
    names: tuple[Word, ...] = ("GLM", "ChatGLM", "Zhipu", "Z.ai", "智谱", "智譜")
    """The teacher's and its maker's: "I am GLM", "my name is GLM", "trained by Zhipu". An R programmer's `glm` passes."""
    other_names: tuple[Word, ...] = (
        "ChatGPT", "GPT-4", "OpenAI", "Claude", "Anthropic", "Qwen", "Alibaba", "DeepSeek", "Gemini", "Google", "Llama", "Meta",
        "Mistral", "Kimi", "Moonshot",
    )  # fmt: skip
    """Whose model it may take itself for. They have other meanings too, so that the sentence has to speak of a model, and a
    prompt that has the name has asked for it."""
    mentions: tuple[Word, ...] = ("ChatGLM", "Zhipu", "Z.ai", "智谱", "智譜", "GLM-4", "GLM-5")
    """Any mention counts, unless the prompt has one of them or of `names`: for words with no other meaning."""


class SecretsFilter(Section):
    """No credential stands in what the teacher wrote. Placeholders and the vendors' own examples pass."""

    type: Literal["secrets"] = "secrets"
    kinds: tuple[SecretKind, ...] = SECRET_KINDS
    prompts: bool = False
    """Look at the prompt's turns too: they are no target of training, and they are part of the dataset."""


class PersonalDataFilter(Section):
    """Nobody's e-mail address, telephone, account or card number stands in what the teacher wrote. Examples pass
    (user@example.com, 555-0147, the networks' test cards)."""

    type: Literal["personal_data"] = "personal_data"
    kinds: tuple[PersonalDataKind, ...] = PERSONAL_DATA_KINDS
    prompts: bool = False
    """Look at the prompt's turns too; a source tree's licence headers name people."""


def _spelt_out(value: object) -> object:
    """A bare word is the filter of that type with its defaults."""
    return {"type": value} if isinstance(value, str) else value


FilterSettings = Annotated[
    Annotated[
        FinishReasonFilter
        | ThinkTagsFilter
        | AnswerPresentFilter
        | LengthFilter
        | LanguageFilter
        | RepetitionFilter
        | LoopFilter
        | RestartsFilter
        | ControlTokensFilter
        | SelfNamingFilter
        | SecretsFilter
        | PersonalDataFilter,
        Field(discriminator="type"),
    ],
    BeforeValidator(_spelt_out),
]
