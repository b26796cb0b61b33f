"""What a build leaves in verdicts/, by name and column. Readers start here; data/write_verdicts.py writes.

    view.arrow              what became of each completed trace, by whom, and why
    JUDGE-vN.arrow          what one judge says of each (data.schema.VERDICT); verifiers have the traces that were theirs to judge
    evidence.arrow          what is known of each beside verdicts: sizes, cost, agreement, logprobs, efficiency, p(correct)
    view.json               how p(correct) was fitted and what it is worth; what of the settings met nothing

Tables are sorted by trace_id, so that rows of view.arrow and evidence.arrow are the same traces. The dataset's manifest names
the hash of every file, and nothing is read that is not what was sealed.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
from pydantic import TypeAdapter

from configs.errors import UnusableInput
from data.calibration import KeptError, Model, Report
from data.store import Rollup, RunFolder, read_table

EVIDENCE_FILE = "evidence.arrow"
VIEW_FACTS_FILE = "view.json"

EVIDENCE = pa.schema(
    [
        ("trace_id", pa.string()),
        ("task", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("reasoning_tokens", pa.int32()),
        ("answer_tokens", pa.int32()),
        ("seconds", pa.float64()),
        ("cost", pa.float64()),
        ("agreement", pa.float64()),
        ("answer_logprob", pa.float64()),
        ("reasoning_logprob", pa.float64()),
        ("lowest_logprob", pa.float64()),
        ("tokens_over_shortest", pa.float64()),
        ("wide_spread", pa.bool_()),
        ("p_correct", pa.float64()),
    ]
)
"""Null where it is not known. Tokens are those of the trace, also where its row was relabelled. agreement: share of the prompt's
samples with the same answer. Logprobs: data.confidence. tokens_over_shortest: reasoning and answer, over those of the shortest
right trace of the prompt. wide_spread: the longest right one of the prompt has more than WIDE_SPREAD_RATIO times its tokens.
p_correct: what the view went by: 1 or 0 by a verifier's verdict, else the fitted model's, where there is one."""

WIDE_SPREAD_RATIO = 5.0
"""Right traces of one prompt that differ in length by more are the red flag: a teacher that does not know how hard the prompt is.
If the logarithms of a prompt's lengths are normal with a deviation of 0.375 (a factor of 1.45 either way), the longest of eight
samples exceeds five times the shortest for one prompt in twenty: the upper 5 % point of the range of eight is 4.29 deviations,
ln 5 is 1.61. Of four samples it does so for one in a hundred."""


class Known(NamedTuple):
    """What EVIDENCE says of one trace beside its sizes; None where it is not known."""

    agreement: float | None
    answer_logprob: float | None
    reasoning_logprob: float | None
    lowest_logprob: float | None
    tokens_over_shortest: float | None
    wide_spread: bool
    p_correct: float | None


_JUDGE = re.compile(r"verdicts/([^/]+-v\d+)\.arrow")


@dataclass(frozen=True, slots=True)
class ViewFacts:
    """What a view says of itself.

    reason: why no model was fitted, else "". model, report: data.calibration's. kept_error: of the kept rows, relabelled ones
    aside; None where a verifier has passed every one of them. num_kept_unknown: kept rows of unknown p(correct). idle_quotas:
    names in task_quotas that no trace answers to. num_unsearched: benchmark texts, mostly answers, that are too short to look
    for. abstention: closed-book traces by what became of them.
    """

    view: str
    reason: str
    model: Model | None
    report: Report | None
    kept_error: KeptError | None
    num_kept_unknown: int
    idle_quotas: tuple[str, ...]
    num_unsearched: int
    abstention: dict[str, int] | None


def facts_bytes(facts: ViewFacts) -> bytes:
    """JSON; records within it are objects with named fields."""
    return (json.dumps(plain(facts), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def plain(value: object) -> object:
    """What JSON can say; records are objects with named fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        named = getattr(value, "_asdict", None)
        return {name: plain(part) for name, part in named().items()} if named else [plain(part) for part in value]
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return value


def read_facts(run: RunFolder, rollup: Rollup) -> ViewFacts:
    """Raises UnusableInput for a file that is not what was sealed, or of another version."""
    path = run.verdicts / VIEW_FACTS_FILE
    expected = rollup.files.get(f"verdicts/{VIEW_FACTS_FILE}")
    content = path.read_bytes() if path.is_file() else b""
    if expected is None or hashlib.sha256(content).hexdigest() != expected:
        raise UnusableInput(f"{path}: missing, or not what the data stage sealed; run tracestill data build again")
    try:
        return TypeAdapter(ViewFacts).validate_json(content)
    except ValueError as error:  # pydantic's
        raise UnusableInput(f"{path}: written by another version; run tracestill data build again") from error


def read_file(run: RunFolder, rollup: Rollup, name: str, schema: pa.Schema) -> pa.Table:
    """A table of verdicts/. Raises UnusableInput when it is not what was sealed, or has other columns."""
    path, sha256 = run.verdicts / name, rollup.files.get(f"verdicts/{name}")
    if sha256 is None:
        raise UnusableInput(f"{path}: not made by the build that stands; run tracestill data build again")
    table = read_table(path, sha256=sha256)
    if table.schema != schema:
        raise UnusableInput(f"{path}: columns {table.schema.names}, expected {schema.names}; run tracestill data build again")
    return table


def has_evidence(rollup: Rollup) -> bool:
    """False for a dataset that an earlier release built."""
    return {f"verdicts/{EVIDENCE_FILE}", f"verdicts/{VIEW_FACTS_FILE}"} <= rollup.files.keys()


def judge_files(rollup: Rollup) -> Iterator[str]:
    """The judges' names with their versions (`length-v2`), sorted."""
    for path in sorted(rollup.files):
        if found := _JUDGE.fullmatch(path):
            yield found[1]
