"""A model's grade of an answer: a request that what it shows cannot talk to, and a reply that is read whole or not at all.

Three things keep a trace from grading itself:
- every part stands between fences with a key that is a hash of all that is shown, the vote and the seed: for its own key to stand
  in it, a text would have to hold a hash of itself. What looks like a marker of a chat template in a part is escaped;
- the grade must come back in a line of JSON that repeats the key, as the very last line of a reply that ended by itself. A judge
  that echoes the trace, or a trace that says `{"grade": "correct"}`, gives no grade;
- nothing is searched for. A reply of any other form is `ungraded`, and its answer unjudged.

Replies are kept as they came, those that nobody can read as the server's bytes (data/asking.py): what was paid for is never
parsed away, and another reading of them costs nothing.
Who is asked, and what becomes of the grades, is data/grading.py's.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from configs.errors import UnusableInput
from configs.judging import Judging
from data.asking import Codec, Reply
from data.calibration_metrics import wilson_interval
from data.engine import Request
from data.records import Message, Prompt, digest, request_seed
from data.structure import split_reasoning
from data.verify.runner import LLM_JUDGE

VERSION = 1
"""Of the reading of replies and the counting of votes; template, settings and model are in `version_of`."""
ASKING_VERSION = 2
"""Of the requests: with another one everything is asked again."""
TEMPLATES = Path(__file__).parents[1] / "judge_templates"

Grade = Literal["correct", "partial", "incorrect", "not_attempted"]
VERIFIER = LLM_JUDGE
GRADES: tuple[Grade, ...] = get_args(Grade)
"""What a judge may say."""


def shown_key(prompt: Prompt, answer: str) -> str:
    """32 hex digits that two traces share exactly when a judge is shown the same of them: such an answer is graded once."""
    return digest("shown", prompt.prompt_id, reference_of(prompt), answer)


def reference_of(prompt: Prompt) -> str:
    """What a judge may be shown as the reference. Of a prompt that another verifier judges it is nothing: agreeing with that one
    in sight of what it compares with would show that the judge can read, and nothing about answers without a reference."""
    return prompt.answer if prompt.verifier == LLM_JUDGE else ""


class Question(NamedTuple):
    """An answer to be graded once. shown: shown_key. again: the repetition that measures flips, in another order; no vote."""

    shown: str
    vote: int
    again: bool = False

    @property
    def request_id(self) -> str:
        return f"{self.shown}-again" if self.again else f"{self.shown}-{self.vote}"


# --- asking ------------------------------------------------------------------------------------------------------


def template_of(settings: Judging, folders: Sequence[Path] = ()) -> str:
    """The template's text. folders: where a path is looked for, in order; else the working directory.

    Raises:
        UnusableInput: there is no such file, or it leaves out a part.
    """
    path = _template_path(settings.template, folders)
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.md")))
        raise UnusableInput(f"{path}: no such judge template; expected a path that ends in .md, or one of {shipped}")
    text = path.read_text(encoding="utf-8")
    if missing := [name for name in ("{key}", "{parts}", "{rubric}") if name not in text]:
        raise UnusableInput(f"{path}: a judge template needs {', '.join(missing)}")
    return text


def _template_path(name: str, folders: Sequence[Path]) -> Path:
    if not name.endswith(".md"):
        return TEMPLATES / f"{name}.md"
    return next((path for folder in folders if (path := folder / name).is_file()), Path(name))


def identity_of(settings: Judging) -> str:
    """Who the server says that it serves, wherever it stands."""
    return digest(settings.engine.model_dump(mode="json", include={"model", "dtype", "kv_dtype"}), size=6)


def asked_under(settings: Judging, template: str, model: str) -> str:
    """12 hex digits of all that a reply depends on besides what is shown. model: the judge's identity. Votes are told apart by
    their requests, and which answers are asked is no matter of the reply."""
    asked = settings.model_dump(mode="json", include={"rubric", "show_reference", "max_tokens", "temperature", "seed"})
    return digest(ASKING_VERSION, template, asked, model, size=6)


def version_of(settings: Judging, template: str, model: str) -> str:
    """`llm_judge-0123456789ab-v1`: names all that a verdict depends on besides the trace."""
    read = settings.model_dump(mode="json", include={"votes", "reasoning", "max_answer_characters"})
    return f"{LLM_JUDGE}-{digest(asked_under(settings, template, model), read, size=6)}-v{VERSION}"


def questions(shown: str, settings: Judging) -> list[Question]:
    """One a vote, and one more for the share of answers that is asked again."""
    asked = [Question(shown, vote) for vote in range(settings.votes)]
    return [*asked, Question(shown, 0, again=True)] if is_asked_again(shown, settings) else asked


def is_asked_again(shown: str, settings: Judging) -> bool:
    return int(digest("asked again", shown, settings.seed, size=8), 16) < settings.resample_share * 2**64


def requests_of(prompt: Prompt, answer: str, settings: Judging, template: str, codec: Codec) -> Iterator[Request]:
    """All that is asked about the answer. Pure: the same answer and settings give the same requests."""
    parts = _parts(prompt, answer, settings)
    for question in questions(shown_key(prompt, answer), settings):
        yield _request_of(question, parts, settings, template, codec)


def _request_of(question: Question, parts: Mapping[str, str], settings: Judging, template: str, codec: Codec) -> Request:
    text = _filled(template, parts, key_of(question.request_id, settings.seed), settings.rubric, question.again)
    messages: tuple[Message, ...] = ({"role": "user", "content": text},)
    return Request(
        request_id=question.request_id,
        prompt_ids=tuple(codec.encode(messages)),
        stop_ids=codec.stop_ids,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=1.0,
        seed=request_seed(question.request_id, settings.seed),
        messages=messages,
        task=LLM_JUDGE,
        prompt_version=f"{LLM_JUDGE}@{digest(template, size=4)}",
    )


def key_of(request_id: str, seed: int) -> str:
    """16 hex digits that a reply has to repeat."""
    return digest("judge key", request_id, seed, size=8)


# A tag, a marker between bars or one in brackets opens a turn where the server tokenises special tokens out of text. The same
# rule as for prompts (docs/prompts.md): a backslash after the first character, and what has one already stays. In brackets it is
# one word with two capitals in a row (`[INST]`, GLM's `[gMASK]`); `a[i]`, `[A]` and `[0, 1)` are mathematics. Two looks ahead, so
# that a long word costs its length and not the square of it.
_MARKER = re.compile(r"<(?=[|/!｜A-Za-z_])|\[(?=/?\w+\])(?=/?\w*?[A-Z]{2})", re.ASCII)


def escape(text: str) -> str:
    """The text with nothing in it that a chat template could take for its own. Idempotent."""
    return _MARKER.sub(lambda found: found.group() + "\\", text)


def _parts(prompt: Prompt, answer: str, settings: Judging) -> dict[str, str]:
    asked = "\n\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt.messages)
    parts = {"TASK": asked, "ANSWER": answer}
    if settings.show_reference and (reference := reference_of(prompt)):
        parts["REFERENCE"] = reference
    return {name: escape(text) for name, text in parts.items()}


def _filled(template: str, parts: Mapping[str, str], key: str, rubric: str, again: bool) -> str:
    """One pass over the template alone: what looks like a placeholder in a part stays text."""
    names = ["ANSWER", "REFERENCE", "TASK"] if again else ["TASK", "REFERENCE", "ANSWER"]
    fenced = "\n\n".join(
        f"===== BEGIN {name} {key} =====\n{parts[name]}\n===== END {name} {key} =====" for name in names if name in parts
    )
    values = {"{key}": key, "{parts}": fenced, "{rubric}": rubric, "{{": "{", "}}": "}"}
    return re.sub(r"\{key\}|\{parts\}|\{rubric\}|\{\{|\}\}", lambda found: values[found.group()], template)


# --- reading -----------------------------------------------------------------------------------------------------


def grade_of(reply: Reply, settings: Judging) -> Grade | None:
    """The grade that the last line gives, with its request's key, of a reply that ended by itself; else None."""
    if reply.finish_reason != "stop" or reply.error:
        return None
    said = _outside_reasoning(reply.text, settings)
    if said is None:
        return None
    return _verdict(said.rstrip().rpartition("\n")[2].strip(), key_of(reply.request_id, settings.seed))


def _outside_reasoning(text: str, settings: Judging) -> str | None:
    """None for a think block that is not well formed. A judge that has none may not show one either."""
    parsed = split_reasoning(text, prompt_opens_think=settings.reasoning == "open")
    if settings.reasoning == "none":
        return None if "<think>" in text or "</think>" in text else text
    return None if parsed.problem else parsed.answer


def _verdict(line: str, key: str) -> Grade | None:
    try:
        pairs = json.loads(line, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return None
    if not isinstance(pairs, tuple) or len(pairs) != 2 or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        return None
    found = dict(pairs)
    if found.keys() != {"grade", "key"} or found["key"] != key or not isinstance(found["grade"], str):
        return None
    return next((grade for grade in GRADES if grade == found["grade"]), None)


# --- how far it can be trusted -----------------------------------------------------------------------------------


class FlipRate(NamedTuple):
    """Of `pairs` answers that were graded twice and both times got a grade, `flips` got another one. rate and the 95 % interval
    are None without pairs. ungraded: pairs with no grade on either side, counted apart."""

    pairs: int
    flips: int
    ungraded: int
    rate: float | None
    interval: tuple[float, float] | None


def flip_rate(pairs: int, flips: int, ungraded: int) -> FlipRate:
    """Source of the interval: Wilson 1927."""
    if not pairs:
        return FlipRate(0, 0, ungraded, None, None)
    return FlipRate(pairs, flips, ungraded, flips / pairs, wilson_interval(flips, pairs))
