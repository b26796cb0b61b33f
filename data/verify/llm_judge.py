"""A model's grade of an answer: a request that what it shows cannot talk to, and a reply that is read whole or not at all.

Three things keep a trace from grading itself:
- every part stands between fences with a key that is drawn for the request from the trace's identity, the vote and the seed, and
  that occurs in none of the parts; what looks like a marker of a chat template in them is escaped;
- the grade must come back in a line of JSON that repeats the key, as the very last line of a reply that ended by itself. A judge
  that echoes the trace, or a trace that says `{"grade": "correct"}`, gives no grade;
- nothing is searched for. A reply of any other form is `ungraded`, and its answer unjudged.

Replies are kept as they came (Reply): what was paid for is never parsed away, and another reading of them costs nothing.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa

from configs.errors import UnusableInput
from configs.judging import Judging
from data.engine import Completion, Engine, Request
from data.records import Message, Prompt, digest, request_seed
from data.report_depth import wilson_interval
from data.structure import split_reasoning
from data.verify.runner import RIGHT, Judgement

VERSION = 1
"""Of the reading of replies and the counting of votes; the template and the settings are in `version_of`."""
VERIFIER = "llm_judge"
TEMPLATES = Path(__file__).parents[1] / "judge_templates"

Grade = Literal["correct", "partial", "incorrect", "not_attempted", "ungraded"]
JUDGEMENTS: dict[Grade, Judgement] = {
    "correct": RIGHT,
    "partial": Judgement("fail", "partial", 0.5),
    "incorrect": Judgement("fail", "wrong", 0.0),
    "not_attempted": Judgement("fail", "not_attempted", 0.0),
    "ungraded": Judgement("unjudged", "ungraded", 0.0),
}
UNGRADED: Grade = "ungraded"
_WORDS: dict[str, Grade] = {
    "correct": "correct",
    "partial": "partial",
    "incorrect": "incorrect",
    "not_attempted": "not_attempted",
}
"""What a judge may say."""


class Question(NamedTuple):
    """An answer to be graded once. again: the repetition that measures flips, in another order; it is no vote."""

    trace_id: str
    prompt: Prompt
    answer: str
    vote: int
    again: bool = False

    @property
    def request_id(self) -> str:
        return digest("judge", self.trace_id, self.vote, self.again)


class Codec(NamedTuple):
    """The judge's tokenizer, as far as a request and a reply need it. encode: chat turns to ids, generation prompt included; an
    engine that renders the turns itself may do with none. decode: ids to text, stop token left out."""

    encode: Callable[[tuple[Message, ...]], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    stop_ids: tuple[int, ...] = ()


class Reply(NamedTuple):
    """What the judge said to one question, before anything parsed it."""

    trace_id: str
    vote: int
    again: bool
    version: str
    text: str
    finish_reason: str
    error: str
    output_tokens: int
    seconds: float
    cost: float


REPLY = pa.schema(
    [
        ("trace_id", pa.string()), ("vote", pa.int32()), ("again", pa.bool_()), ("version", pa.string()), ("text", pa.string()),
        ("finish_reason", pa.string()), ("error", pa.string()), ("output_tokens", pa.int32()), ("seconds", pa.float64()),
        ("cost", pa.float64()),
    ]
)  # fmt: skip


# --- asking ------------------------------------------------------------------------------------------------------


def template_of(settings: Judging) -> str:
    """The template's text. Raises UnusableInput when there is no such file or it leaves out a part."""
    path = Path(settings.template) if settings.template.endswith(".md") else TEMPLATES / f"{settings.template}.md"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.md")))
        raise UnusableInput(f"{path}: no such judge template; expected a path that ends in .md, or one of {shipped}")
    text = path.read_text(encoding="utf-8")
    if missing := [name for name in ("{key}", "{parts}", "{rubric}") if name not in text]:
        raise UnusableInput(f"{path}: a judge template needs {', '.join(missing)}")
    return text


def version_of(settings: Judging, template: str) -> str:
    """Names everything that a grade depends on besides the question: template, rubric, sampling, the judge's model."""
    asked = settings.model_dump(mode="json", exclude={"engine", "votes", "resample_share", "template"})
    return f"{VERIFIER}-v{VERSION}-{digest(template, asked, settings.engine.model, size=6)}"


def questions(trace_id: str, prompt: Prompt, answer: str, settings: Judging) -> list[Question]:
    """One a vote, and one more for the share of traces that are asked again. None for an empty or a too long answer."""
    if not answer.strip() or len(answer) > settings.max_answer_characters:
        return []
    asked = [Question(trace_id, prompt, answer, vote) for vote in range(settings.votes)]
    bucket = int(digest("asked again", trace_id, settings.seed, size=8), 16)
    return [*asked, Question(trace_id, prompt, answer, 0, again=True)] if bucket < settings.resample_share * 2**64 else asked


def request_of(question: Question, settings: Judging, template: str, codec: Codec) -> Request:
    """The request that asks it. Pure: the same question and settings give the same request."""
    parts = _parts(question, settings)
    key = key_of(question, settings.seed, parts.values())
    messages: tuple[Message, ...] = ({"role": "user", "content": _filled(template, parts, key, settings, question.again)},)
    return Request(
        request_id=question.request_id,
        prompt_ids=tuple(codec.encode(messages)),
        stop_ids=codec.stop_ids,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=1.0,
        seed=request_seed(question.request_id, settings.seed),
        messages=messages,
        task=VERIFIER,
        prompt_version=version_of(settings, template),
    )


def key_of(question: Question, seed: int, parts: Iterable[str]) -> str:
    """16 hex digits that stand in none of the parts: drawn anew where they do, be it once in 2**64 or by intent."""
    said = "\n".join(parts)
    for attempt in range(2**16):
        key = digest("judge key", question.trace_id, question.vote, question.again, seed, attempt, size=8)
        if key not in said:
            return key
    raise UnusableInput(f"trace {question.trace_id}: no key of the judge is left that its answer does not hold")


# A tag, a marker between bars or one in brackets opens a turn where the server tokenises special tokens out of text. The same
# rule as for prompts (docs/prompts.md): a backslash after the first character, and what has one already stays.
_MARKER = re.compile(r"<(?=[|/!｜A-Za-z_])|\[(?=/?[A-Z_]{2,}\])")


def escape(text: str) -> str:
    """The text with nothing in it that a chat template could take for its own. Idempotent."""
    return _MARKER.sub(lambda found: found.group() + "\\", text)


def _parts(question: Question, settings: Judging) -> dict[str, str]:
    asked = "\n\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in question.prompt.messages)
    parts = {"TASK": asked, "ANSWER": question.answer}
    if settings.show_reference and question.prompt.answer:
        parts["REFERENCE"] = question.prompt.answer
    return {name: escape(text) for name, text in parts.items()}


def _filled(template: str, parts: Mapping[str, str], key: str, settings: Judging, again: bool) -> str:
    """One pass over the template alone: what looks like a placeholder in a part stays text."""
    names = ["ANSWER", "REFERENCE", "TASK"] if again else ["TASK", "REFERENCE", "ANSWER"]
    fenced = "\n\n".join(
        f"===== BEGIN {name} {key} =====\n{parts[name]}\n===== END {name} {key} =====" for name in names if name in parts
    )
    values = {"{key}": key, "{parts}": fenced, "{rubric}": settings.rubric, "{{": "{", "}}": "}"}
    return re.sub(r"\{key\}|\{parts\}|\{rubric\}|\{\{|\}\}", lambda found: values[found.group()], template)


def ask(
    engine: Engine, asked: Iterable[Question], settings: Judging, codec: Codec, template: str | None = None
) -> Iterator[Reply]:
    """A reply to each question, as they come. The engine is loaded by the caller, who stores each reply before it reads any."""
    text = template_of(settings) if template is None else template
    pending: dict[str, Question] = {}

    def requests() -> Iterator[Request]:
        for question in asked:
            pending[question.request_id] = question
            yield request_of(question, settings, text, codec)

    version = version_of(settings, text)
    for completion in engine.generate(requests()):
        yield reply_of(pending.pop(completion.request_id), completion, version, codec)


def reply_of(question: Question, completion: Completion, version: str, codec: Codec) -> Reply:
    text = codec.decode(completion.token_ids)
    return Reply(
        question.trace_id, question.vote, question.again, version, text, completion.finish_reason, completion.error,
        len(completion.token_ids), completion.seconds, completion.cost,
    )  # fmt: skip


# --- reading -----------------------------------------------------------------------------------------------------


def grade_of(reply: Reply, question: Question, settings: Judging) -> Grade:
    """The grade that the reply's last line gives, with this question's key, in a reply that ended by itself; else `ungraded`."""
    if reply.finish_reason != "stop" or reply.error:
        return "ungraded"
    said = _outside_reasoning(reply.text, settings)
    if said is None:
        return "ungraded"
    key = key_of(question, settings.seed, _parts(question, settings).values())
    return _verdict(said.rstrip().rpartition("\n")[2].strip(), key)


def _outside_reasoning(text: str, settings: Judging) -> str | None:
    """None for a think block that is not well formed. A judge that has none may not show one either."""
    parsed = split_reasoning(text, prompt_opens_think=settings.reasoning == "open")
    if settings.reasoning == "none":
        return None if "<think>" in text or "</think>" in text else text
    return None if parsed.problem else parsed.answer


def _verdict(line: str, key: str) -> Grade:
    try:
        pairs = json.loads(line, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return "ungraded"
    if not isinstance(pairs, tuple) or len(pairs) != 2 or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        return "ungraded"
    found = dict(pairs)
    if found.keys() != {"grade", "key"} or found["key"] != key or not isinstance(found["grade"], str):
        return "ungraded"
    return _WORDS.get(found["grade"], "ungraded")


def decide(grades: Sequence[Grade], votes: int) -> Judgement:
    """The judgement that more than half of `votes` give. Votes that are missing or ungraded agree with nothing."""
    for grade in _WORDS.values():
        if 2 * sum(found == grade for found in grades) > votes:
            return JUDGEMENTS[grade]
    return JUDGEMENTS[UNGRADED]


def judge(
    asked: Mapping[str, Sequence[Question]], replies: Iterable[Reply], settings: Judging
) -> tuple[dict[str, Judgement], "FlipRate"]:
    """The judgement of each trace in `asked` (trace_id to its questions), and how often a second look changed a first one."""
    by_question = {question.request_id: question for its in asked.values() for question in its}
    grades: dict[tuple[str, int, bool], Grade] = {}
    for reply in replies:
        question = by_question.get(digest("judge", reply.trace_id, reply.vote, reply.again))
        if question is not None:
            grades.setdefault((reply.trace_id, reply.vote, reply.again), grade_of(reply, question, settings))
    judgements = {
        trace_id: decide([grades.get((trace_id, vote, False), UNGRADED) for vote in range(settings.votes)], settings.votes)
        for trace_id in asked
    }
    looks: list[tuple[Grade, Grade]] = []
    for (trace_id, vote, again), grade in grades.items():
        if again:
            looks.append((grades.get((trace_id, vote, False), UNGRADED), grade))
    return judgements, flip_rate(looks)


# --- how far it can be trusted -----------------------------------------------------------------------------------


class FlipRate(NamedTuple):
    """Of `pairs` answers that were graded twice and both times got a grade, `flips` got another one. rate and the 95 % interval
    are None without pairs. ungraded: pairs with no grade on either side, counted apart."""

    pairs: int
    flips: int
    ungraded: int
    rate: float | None
    interval: tuple[float, float] | None


def flip_rate(looks: Sequence[tuple[Grade, Grade]]) -> FlipRate:
    """Source of the interval: Wilson 1927."""
    graded = [(first, second) for first, second in looks if "ungraded" not in (first, second)]
    flips = sum(first != second for first, second in graded)
    if not graded:
        return FlipRate(0, 0, len(looks), None, None)
    return FlipRate(len(graded), flips, len(looks) - len(graded), flips / len(graded), wilson_interval(flips, len(graded)))


def reply_table(replies: Sequence[Reply]) -> pa.Table:
    """One row a reply, under REPLY, sorted by question."""
    return pa.Table.from_pylist([reply._asdict() for reply in sorted(replies)], schema=REPLY)


def replies_of(table: pa.Table) -> list[Reply]:
    """Raises UnusableInput for a table of another schema."""
    if not table.schema.equals(REPLY):
        raise UnusableInput(f"judge replies: columns {table.schema.names}, expected {REPLY.names}; judge again")
    return [Reply(**row) for row in table.to_pylist()]
