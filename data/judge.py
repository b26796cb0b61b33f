"""Every judgement on every completed trace of a run, in the order in which they decide."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from configs.errors import Refused, UnusableInput
from configs.progress import Report
from configs.schema import Data
from data import calibration, decontaminate, dedup, details, groups, near_dedup, selection
from data.asking import NOBODY, Models
from data.calibration import Evidence, Labelled
from data.copies import counting_rows, keys_of, segment_keys
from data.filters import FILTERS
from data.filters.control_tokens import has_control_tokens, with_control_tokens
from data.grading import Graded, Traces, grade, overlaid
from data.judging import examine
from data.licences import check_licences, licences
from data.minhash import NUM_SLOTS, Signatures
from data.panel import PanelSpec
from data.select import FAIL, PASS, VERDICTS, Judgement, coded, judgement, order_of, select
from data.selection import Columns, Selection
from data.self_ask import Asked, as_columns, ask_student
from data.store import RunFolder, Segment, segments
from data.verify import VERIFIERS, Verifier
from data.verify.runner import LLM_JUDGE, NO_ANSWER, Pool
from data.what_if import Difference, Groups, Taken, what_if

log = logging.getLogger(__name__)

VERSIONS = {name: judge.version for name, judge in FILTERS.items()} | {
    "decontaminate": decontaminate.VERSION,
    "dedup": dedup.VERSION,
    "near_dedup": near_dedup.VERSION,
    "view": selection.VERSION,
}
"""Of every judgement except the verifiers' (those are data.verify.VERIFIERS')."""


@dataclass(frozen=True, slots=True)
class Judged:
    """The panel's answers about N completed traces, one copy of each, in log order, by question."""

    segments: Sequence[Segment]
    counts_M: np.ndarray
    """bool: which of the M completed rows of the segments is the copy that counts; N of them are."""
    rows_of_segment: Sequence[int]
    """Completed rows of each segment; they add up to M."""
    tables: Mapping[str, pa.Table]
    asked: Asked | None = None
    """What the base student said to their closed-book prompts; None where there are none, or the view does not care."""
    num_unsearched: int = 0
    """Benchmark texts too short to look for."""
    graded: Graded | None = None
    """What a judge makes of the answers; None where no model judges, and then what was its to judge is `not_asked`."""

    def __len__(self) -> int:
        return self.tables["facts"].num_rows

    def __getitem__(self, question: str) -> pa.Table:
        return self.tables[question]

    @property
    def trace_ids(self) -> pa.Array:
        return self["facts"]["trace_id"].combine_chunks()

    def per_segment(self, values_N: np.ndarray, absent: int) -> list[np.ndarray]:
        """A value a completed row of each segment; `absent` for superseded copies."""
        values_M = np.full(len(self.counts_M), absent, values_N.dtype)
        values_M[self.counts_M] = values_N
        return np.split(values_M, np.cumsum(self.rows_of_segment)[:-1])


def judge_run(
    run: RunFolder,
    settings: Data,
    *,
    num_workers: int,
    tell: Report,
    folders: Sequence[Path] = (),
    verifiers: Mapping[str, Verifier] = VERIFIERS,
    models: Models = NOBODY,
) -> Judged:
    """Asks what has not been asked in earlier builds. num_workers: processes that read, and as many that verify. folders: where
    benchmark files are looked for. models: those that may be asked.

    Raises:
        UnusableInput: a damaged segment, no completed trace, one whose prompt is not in the prompt set, or a model that has to be
            asked and is not there or does not answer.
        Refused: a model would be asked, and a trace that may stay has a licence that is not listed.
    """
    committed = segments(run.traces)
    spec = PanelSpec.of(run, _with_words(settings, models), folders, verifiers)
    with Pool(verifiers, timeout_s=settings.verify_timeout_s, num_workers=num_workers) as pool:
        tables = examine(run, committed, spec, num_workers=num_workers, pool=pool, tell=tell)
        found = _counting(run, committed, tables, spec.index.num_unsearched)
        if _somebody_is_asked(settings, models):
            check_licences(licences(found["facts"], _may_stay(found, settings)), settings.permitted_licences, "that may be kept")
        found = replace(found, asked=_asked(run, settings, found["facts"], models, pool, tell))
    return _graded(run, settings, found, models, tell, folders)


def _counting(run: RunFolder, committed: Sequence[Segment], tables: Mapping[str, pa.Table], num_unsearched: int) -> Judged:
    """One copy of each completed trace. Raises UnusableInput where there is none."""
    keys_R2, is_abort_R = segment_keys(committed)
    counts_M = counting_rows(keys_R2, is_abort_R)[~is_abort_R]
    ends = np.cumsum([segment.rows for segment in committed])
    rows_of_segment = [int((~part).sum()) for part in np.split(is_abort_R, ends[:-1])] if committed else []
    if not counts_M.any():
        raise UnusableInput(f"{run.traces}: no completed trace; run tracestill generate first")
    counting = {name: table.filter(pa.array(counts_M)).combine_chunks() for name, table in tables.items()}
    return Judged(committed, counts_M, rows_of_segment, counting, num_unsearched=num_unsearched)


def _somebody_is_asked(settings: Data, models: Models) -> bool:
    asks_judge = settings.judging is not None and models.judge is not None
    return asks_judge or (settings.view.abstention_share is not None and models.student is not None)


def _may_stay(found: Judged, settings: Data) -> np.ndarray:
    """bool [N]: traces that nothing known before a model is asked turns down. A licence that their dataset could not have is
    refused before anybody is paid."""
    may_N = select(_before_verdicts(found), len(found)).kept_N
    if not settings.view.require_verified:
        return may_N
    judged_later_N = np.array([name == LLM_JUDGE for name in found["verifier"]["verifier"].to_pylist()], bool)
    return may_N & ((verdicts(found["verifier"]) == calibration.PASSED) | judged_later_N)


def _with_words(settings: Data, models: Models) -> Data:
    """A control_tokens filter, where there is one, also looks for the tokenizers' words."""
    if models.control_words is None or not has_control_tokens(settings.filters):
        return settings
    return settings.model_copy(update={"filters": with_control_tokens(settings.filters, models.control_words.read())})


def _asked(run: RunFolder, settings: Data, facts: pa.Table, models: Models, pool: Pool, tell: Report) -> Asked | None:
    if settings.view.abstention_share is None:
        return None
    return ask_student(run, facts["prompt_id"].unique().to_pylist(), settings.view, models.student, pool, tell)


def _graded(run: RunFolder, settings: Data, found: Judged, models: Models, tell: Report, folders: Sequence[Path]) -> Judged:
    """With the judge's word among the verifiers'. Exact copies are not asked: they have the grade of their original, where it
    answers the same prompt; another one may have another reference."""
    if settings.judging is None or models.judge is None:
        return found
    eligible_N = select(_before_verdicts(found), len(found)).kept_N
    shown, same_as_N = found["shown"], np.arange(len(found))
    if settings.dedup != "none":
        original_N = dedup.originals(conversations(found), preference(found), eligible_N)
        prompts_N, _ = _coded(found["facts"]["prompt_id"])
        same_as_N = np.where((original_N >= 0) & (prompts_N == prompts_N[original_N]), original_N, same_as_N)
    own_N = np.array(found["verifier"]["verifier"].to_pylist(), object) == LLM_JUDGE
    traces = Traces(
        found.segments, np.array(shown["shown"].to_pylist(), "S32"), shown["characters"].to_numpy(),
        shown["has_reference"].to_numpy(), same_as_N, eligible_N, own_N, strong_verdicts(found["verifier"]),
        lambda values_N: found.per_segment(values_N, absent=False),
    )  # fmt: skip
    graded = grade(run, settings.judging, traces, models.judge, tell, folders)
    return replace(found, tables={**found.tables, "verifier": overlaid(found["verifier"], graded)}, graded=graded)


# --- before the view ---------------------------------------------------------------------------------------------

Fitted = tuple[calibration.Model, calibration.Report]


class Calibrated(NamedTuple):
    """p(correct), as far as the view asks for it. labelled: what is known of each trace, and what verifiers say. fitted: None
    where nothing was fitted, and `reason` says why."""

    labelled: Labelled
    fitted: Fitted | None
    reason: str = ""


class Opinion(NamedTuple):
    """What a view makes of the traces. selection: relabelled rows, training tokens. columns: what it was decided over."""

    judgements: list[Judgement]
    selection: Selection
    columns: Columns
    calibration: Calibrated


def opinion(found: Judged, settings: Data) -> Opinion:
    """Filters, decontamination, verifier, copies, view: the first that does not pass decides.

    Copies are looked for among survivors only, so the one that stays is good in itself. Where the view does not require a
    verifier's pass, verdicts are on record and decide nothing by themselves.
    """
    said = _before_verdicts(found)
    eligible_N = select(said, len(found)).kept_N
    said.append(verified(found["verifier"], decides=settings.view.require_verified))
    if settings.dedup != "none":
        original_N = dedup.originals(conversations(found), preference(found), select(said, len(found)).kept_N)
        said.append(_copies("dedup", "duplicate", original_N, details.of_copies(found.trace_ids, original_N)))
    if settings.dedup == "near":
        near = _near_copies(found, settings, select(said, len(found)).kept_N)
        said.append(_copies("near_dedup", "near_duplicate", near.original_N, details.of_copies(found.trace_ids, *near)))
    calibrated = _calibrated(found, settings, eligible_N)
    columns = _columns(found, settings, calibrated, select(said, len(found)).kept_N)
    chosen = selection.apply_view(columns, settings.view)
    said.append(_chosen(chosen))
    return Opinion(said, chosen, columns, calibrated)


def _before_verdicts(found: Judged) -> list[Judgement]:
    """What decides before anybody asks whether the answer is right."""
    return [*_filtered(found), _leaks(found["contamination"])]


def _filtered(found: Judged) -> list[Judgement]:
    table = found.tables.get("filters")
    return [] if table is None else [judgement(name, table[name]) for name in table.column_names]


def verified(table: pa.Table, *, decides: bool) -> Judgement:
    reasons_N, words = coded(table["reason"])
    verdicts_N, names = coded(table["verdict"])
    codes = np.array([0, *(VERDICTS.index(name) for name in names[1:])], np.uint8)[verdicts_N]
    return Judgement("verifier", codes, reasons_N, words, table["score"].to_numpy(), decides)


def _leaks(table: pa.Table) -> Judgement:
    return judgement("decontaminate", table["reason"], detail=details.of_leaks(table))


def _copies(name: str, reason: str, original_N: np.ndarray, detail: pa.Array) -> Judgement:
    repeated_N = original_N >= 0
    verdicts_N = np.where(repeated_N, FAIL, PASS).astype(np.uint8)
    return Judgement(name, verdicts_N, repeated_N.astype(np.int32), ("", reason), 1.0 - repeated_N, detail=detail)


def _near_copies(found: Judged, settings: Data, eligible_N: np.ndarray) -> near_dedup.NearDuplicates:
    trace_keys_N2 = keys_of("".join(found.trace_ids.to_pylist()))
    return near_dedup.near_duplicates(
        signatures(found["near"]), eligible_N, [preference(found)], trace_keys_N2, settings.near_threshold
    )


def signatures(table: pa.Table) -> Signatures:
    column = table["slots"].combine_chunks()
    slots = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, NUM_SLOTS)[column.offset : column.offset + len(column)]
    return Signatures(slots, table["shingles"].to_numpy())


def conversations(found: Judged) -> np.ndarray:
    """S16 [N]: equal for equal conversations."""
    column = found["facts"]["conversation"].combine_chunks()
    return np.frombuffer(column.buffers()[1], "S16")[column.offset : column.offset + len(column)]


def preference(found: Judged) -> np.ndarray:
    """int64 [N], no two alike, lower is better: what a verifier passed (a judge's word will do: it only says which of two copies
    stays), then fewer generated tokens, then the lower trace_id."""
    passed_N = verdicts(found["verifier"]) == calibration.PASSED
    order = np.lexsort((_rank(found.trace_ids), generated_tokens(found), ~passed_N))
    ranks_N = np.empty(len(found), np.int64)
    ranks_N[order] = np.arange(len(found))
    return ranks_N


def _rank(identities: pa.Array) -> np.ndarray:
    """int64 [N]: the place of each identity in their sorted order."""
    ranks_N = np.empty(len(identities), np.int64)
    ranks_N[order_of(identities)] = np.arange(len(identities))
    return ranks_N


def generated_tokens(found: Judged) -> np.ndarray:
    facts = found["facts"]
    return facts["reasoning_tokens"].to_numpy().astype(np.int64) + facts["answer_tokens"].to_numpy()


# --- the view ----------------------------------------------------------------------------------------------------


def verdicts(table: pa.Table) -> np.ndarray:
    """int8 [N] as data.calibration has them, whoever judged."""
    verdicts_N, names = coded(table["verdict"])
    meaning = {"pass": calibration.PASSED, "fail": calibration.FAILED}
    return np.array([meaning.get(name, calibration.UNJUDGED) for name in names], np.int8)[verdicts_N]


def strong_verdicts(table: pa.Table) -> np.ndarray:
    """int8 [N] as data.calibration has them: a pass is the answer's being right. So it is of every verifier but the judge: what
    that one says of an answer is evidence."""
    judges_N, names = coded(table["verifier"])
    reasons_N, reasons = coded(table["reason"])
    by_judge_N = np.array([name == LLM_JUDGE for name in names])[judges_N]
    said_N = np.array([reason != NO_ANSWER.reason for reason in reasons])[reasons_N]
    return np.where(by_judge_N & said_N, np.int8(calibration.UNJUDGED), verdicts(table))


def _calibrated(found: Judged, settings: Data, eligible_N: np.ndarray) -> Calibrated:
    """Not fitted where the view asks for no p(correct), or where verdicts are too few to learn from: what is verified stays
    known."""
    codes_N, prompt_ids = _coded(found["facts"]["prompt_id"])
    tasks_N, tasks = _coded(found["facts"]["task"])
    labelled = Labelled(
        evidence(found, codes_N, eligible_N), strong_verdicts(found["verifier"]), eligible_N, codes_N, prompt_ids, tasks_N, tasks,
        groups.trace_keys(found.trace_ids.to_pylist()),
    )  # fmt: skip
    if not settings.view.needs_p_correct:
        return Calibrated(labelled, None, f"view {settings.view.name} asks for no p(correct)")
    try:
        return Calibrated(labelled, calibration.fit(labelled))
    except Refused as few:
        log.warning("%s; traces that no verifier has judged are left out", few)
        return Calibrated(labelled, None, str(few))


def evidence(found: Judged, prompt_codes_N: np.ndarray, eligible_N: np.ndarray) -> Evidence:
    said, tokens_N = found["evidence"], generated_tokens(found)
    answers_N = said["answer"].to_numpy()
    unknown_N = np.full(len(found), np.nan)
    return Evidence(
        agreement_N=groups.agreement(prompt_codes_N, answers_N, eligible_N),
        answer_logprob_N=said["answer_logprob"].to_numpy(),
        reasoning_logprob_N=said["reasoning_logprob"].to_numpy(),
        lowest_logprob_N=said["lowest_logprob"].to_numpy(),
        tokens_N=tokens_N.astype(float),
        relative_length_N=groups.relative_length(prompt_codes_N, tokens_N, eligible_N),
        judge_N=unknown_N if found.graded is None else found.graded.judge_N,
        weak_score_N=unknown_N,
    )


def _columns(found: Judged, settings: Data, calibrated: Calibrated, eligible_N: np.ndarray) -> Columns:
    """p(correct) is of the evidence that it was fitted on: agreement among what is left once copies are gone is another thing."""
    facts, fitted = found["facts"], calibrated.fitted
    codes_N, _ = _coded(facts["prompt_id"])
    tasks_N, tasks = _coded(facts["task"])
    strong_N = strong_verdicts(found["verifier"])
    # A prompt that names the judge as its verifier wants its pass, where the view wants a verifier's.
    verdicts_N = verdicts(found["verifier"]) if settings.view.require_verified else strong_N
    needs_p = settings.view.needs_p_correct
    p_N = (
        calibration.final_p(fitted[0] if fitted else None, calibrated.labelled.evidence, strong_N)
        if needs_p
        else np.where(verdicts_N == calibration.UNJUDGED, np.nan, verdicts_N == calibration.PASSED)
    )
    return Columns(
        trace_keys_N=groups.trace_keys(found.trace_ids.to_pylist()),
        prompt_codes_N=codes_N,
        task_codes_N=tasks_N,
        tasks=tasks,
        eligible_N=eligible_N,
        verdicts_N=verdicts_N,
        p_correct_N=p_N,
        prompt_tokens_N=facts["prompt_tokens"].to_numpy().astype(np.int64),
        generated_tokens_N=generated_tokens(found),
        answer_keys_N=found["evidence"]["answer"].to_numpy(),
        signatures_NP=signatures(found["near"]).slots_NS if "near" in found.tables else None,
        self_ask=None if settings.view.abstention_share is None else as_columns(found.asked, facts["prompt_id"]),
        error_margin=fitted[1].error_margin if fitted else 0.0,
    )


def _coded(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """int64 codes and words, as they come."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def _chosen(found: Selection) -> Judgement:
    """`ineligible` passes here: what turned such a trace down has the better reason, and has decided already."""
    words = tuple(selection.REASONS)
    verdict_of = {"kept": PASS, "rejected": FAIL, "unjudged": VERDICTS.index("unjudged")}
    verdicts = np.array([verdict_of[fate] for fate in selection.REASONS.values()], np.uint8)
    verdicts[selection.CODES["ineligible"]] = PASS
    reasons_N = np.where(found.codes_N == selection.CODES["ineligible"], 0, found.codes_N).astype(np.int32)
    return Judgement("view", verdicts[found.codes_N], reasons_N, words, (found.codes_N == 0).astype(float))


# --- two views side by side --------------------------------------------------------------------------------------


def compare(found: Judged, current: Data, other_found: Judged, other: Data) -> Difference:
    """What building with the other settings would change. The same traces twice, each asked what its settings ask."""
    codes_N, _ = _coded(found["facts"]["prompt_id"])
    tasks_N, tasks = _coded(found["facts"]["task"])
    return what_if(Groups(codes_N, tasks_N, tasks), _taken(found, current), _taken(other_found, other))


def _taken(found: Judged, settings: Data) -> Taken:
    view = opinion(found, settings)
    decisions = select(view.judgements, len(found))
    return Taken(decisions.reasons_N, decisions.words, view.selection.tokens_N, view.selection.relabelled_N)
