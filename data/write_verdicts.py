"""The files of verdicts/, written from columns: the same traces, settings and code give the same bytes, in any order."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from configs.schema import Data
from data.calibration import LIKELY, PASSED, UNJUDGED, kept_error
from data.groups import efficiency, wide_spread
from data.judge import VERSIONS, Judged, Opinion, generated_tokens
from data.ngram_index import LEAST_WORDS
from data.select import VIEW_FILE, Decisions, Judgement, order_of, verdict_table, view_table
from data.store import RunFolder, table_bytes, write_bytes
from data.verdict_files import EVIDENCE, EVIDENCE_FILE, VIEW_FACTS_FILE, WIDE_SPREAD_RATIO, ViewFacts, facts_bytes
from data.verify import Verifier
from data.verify.runner import LLM_JUDGE

log = logging.getLogger(__name__)


def write_verdicts(
    run: RunFolder,
    found: Judged,
    view: Opinion,
    decisions: Decisions,
    settings: Data,
    verifiers: Mapping[str, Verifier],
) -> list[Path]:
    """Every file of data/verdict_files.py stands, unsealed; their paths, sorted. What of the settings meets nothing is logged."""
    for leftover in run.verdicts.glob(".*.tmp"):
        leftover.unlink()
    order_N = order_of(found.trace_ids)
    facts = view_facts(found, view, decisions, settings)
    _tell(facts)
    write_bytes(run.verdicts / VIEW_FACTS_FILE, facts_bytes(facts))
    files = [run.verdicts / VIEW_FACTS_FILE]
    for name, table in _tables(found, view, decisions, order_N, verifiers):
        write_bytes(run.verdicts / name, table_bytes(table))
        files.append(run.verdicts / name)
    return sorted(files)


def _tables(
    found: Judged, view: Opinion, decisions: Decisions, order_N: np.ndarray, verifiers: Mapping[str, Verifier]
) -> Iterator[tuple[str, pa.Table]]:
    """One at a time: a million rows are 100 MB."""
    yield VIEW_FILE, view_table(found.trace_ids, decisions, order_N)
    yield EVIDENCE_FILE, evidence_table(found, view, order_N)
    for said in view.judgements:
        if said.name == "view":
            continue  # in VIEW_FILE, with everybody else's
        if said.name == "verifier":
            yield from _verifier_tables(found, said, order_N, verifiers)
        else:
            yield f"{said.name}-v{VERSIONS[said.name]}.arrow", verdict_table(found.trace_ids, said, order_N)


def _verifier_tables(
    found: Judged, said: Judgement, order_N: np.ndarray, verifiers: Mapping[str, Verifier]
) -> Iterator[tuple[str, pa.Table]]:
    """A file for each verifier in use, with the traces that were its to judge; those of no verifier are in the view alone."""
    names_N = np.array(found["verifier"]["verifier"].to_pylist(), object)[order_N]
    for name in sorted(set(names_N.tolist()) - {""}):
        rows = verdict_table(found.trace_ids, said, order_N[names_N == name])
        version = found.graded.version if name == LLM_JUDGE and found.graded else f"{name}-v{verifiers[name].version}"
        yield f"verifier-{version}.arrow", rows


# --- evidence ----------------------------------------------------------------------------------------------------


def evidence_table(found: Judged, view: Opinion, order_N: np.ndarray) -> pa.Table:
    """One row a completed trace under EVIDENCE, in the order given.

    Agreement is among the samples that the filters left, copies and wrong ones included: who agrees is asked before it is known
    who is right. Right, for efficiency: passed by a verifier, or not judged and likelier right than wrong.
    """
    known, columns = view.calibration.labelled, view.columns
    unjudged_N = known.verdicts_N == UNJUDGED
    right_N = known.eligible_N & ((known.verdicts_N == PASSED) | (unjudged_N & (columns.p_correct_N > LIKELY)))  # NaN is not
    spent_N, codes_N = generated_tokens(found), known.prompt_codes_N
    said = {
        "agreement": known.evidence.agreement_N,
        "answer_logprob": known.evidence.answer_logprob_N,
        "reasoning_logprob": known.evidence.reasoning_logprob_N,
        "lowest_logprob": known.evidence.lowest_logprob_N,
        "tokens_over_shortest": efficiency(codes_N, spent_N, right_N),
        "wide_spread": wide_spread(codes_N, spent_N, right_N, ratio=WIDE_SPREAD_RATIO),
        "p_correct": columns.p_correct_N,
    }
    taken = found["facts"].select([name for name in EVIDENCE.names if name not in said]).take(pa.array(order_N))
    columns_N = [taken[name] if name in taken.column_names else _nullable(said[name][order_N]) for name in EVIDENCE.names]
    return pa.table(columns_N, schema=EVIDENCE).combine_chunks()


def _nullable(values_N: np.ndarray) -> pa.Array:
    if values_N.dtype == bool:
        return pa.array(values_N)
    unknown_N = np.isnan(values_N)
    return pa.array(np.where(unknown_N, 0.0, values_N), mask=unknown_N)  # what lies under a null is written too: always 0


# --- the view ----------------------------------------------------------------------------------------------------


def view_facts(found: Judged, view: Opinion, decisions: Decisions, settings: Data) -> ViewFacts:
    known, p_N, fitted = view.calibration.labelled, view.columns.p_correct_N, view.calibration.fitted
    kept_N = decisions.kept_N & ~view.selection.relabelled_N
    model, report = fitted or (None, None)
    return ViewFacts(
        view=settings.view.name,
        reason=view.calibration.reason,
        model=model,
        report=report,
        kept_error=None if settings.view.require_verified else kept_error(model, known, p_N, kept_N),
        num_kept_unknown=int((kept_N & np.isnan(p_N)).sum()),
        idle_quotas=view.selection.idle_quotas,
        num_unsearched=found.num_unsearched,
        abstention=view.selection.abstention,
    )


def _tell(facts: ViewFacts) -> None:
    if facts.idle_quotas:
        log.warning("view %s: task_quotas %s name no task of these traces", facts.view, ", ".join(facts.idle_quotas))
    if facts.num_unsearched:
        log.warning(
            "decontamination: %d benchmark answers are not searched for: fewer than %d words stand anywhere",
            facts.num_unsearched, LEAST_WORDS,
        )  # fmt: skip
