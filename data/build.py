"""From traces to a dataset: every completed trace is judged, every judgement is written down, and what all of them let
pass becomes the training set. Nothing is deleted, so that the view can be taken again with other settings.

Traces are read a segment at a time by worker processes, decisions are made over columns, and rows go from segments into
sorted shards: what is held in memory grows by some 200 bytes a trace, whatever its length. Killed anywhere, a second call
takes over what was judged and leaves the same bytes; only the stage's roll-up, which the caller seals last, makes the
result count. Neither the number of processes nor the way the log was cut into segments shows in any byte.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from configs.errors import Refused, UnusableInput
from configs.progress import Count, Report
from configs.schema import Data
from configs.views import View
from data.asking import NOBODY, Models, kept_replies
from data.card import INVISIBLE, CardFacts, origins, render_card
from data.counts import Counts, count
from data.dataset import SPLITS, save_dataset
from data.grading import GradingCounts, require_judge
from data.judge import Judged, judge_run, opinion
from data.ledger import Ledger, generation_ledger, read_fates, with_view
from data.licences import check_licences, licences
from data.processes import num_cores
from data.relabel import Relabelling, codes_of, with_row_tokens
from data.row_check import RowCheck, check_rows
from data.select import KEPT, VIEW_FILE, Decisions, select
from data.selection import Selection
from data.self_ask import as_columns
from data.split import is_held_out
from data.store import ROLLUP, RunFolder, Segment, fsync_folder, read_rollup
from data.verify import VERIFIERS, Verifier
from data.write_verdicts import write_verdicts


class Built(NamedTuple):
    """files: everything to seal (verdicts, view, dataset), in a fixed order. settings: those that made it, for the manifest.
    judge: what a model graded, where one did. checked: what some rows are in the student's tokens."""

    files: list[Path]
    counts: Counts
    settings: dict[str, object]
    judge: GradingCounts | None = None
    checked: RowCheck | None = None


def build(
    settings: Data,
    run: RunFolder,
    report: Report | None = None,
    *,
    num_workers: int | None = None,
    folders: Sequence[Path] = (),
    verifiers: Mapping[str, Verifier] = VERIFIERS,
    models: Models = NOBODY,
) -> Built:
    """Verdict files, view and dataset stand in the run folder, unsealed. One builder at a time.

    num_workers: processes that read and judge; the machine's cores when None. folders: where benchmark files are looked for.
    models: those that settings may want asked.

    Raises:
        UnusableInput: a damaged segment or benchmark file, traces without their prompt, a ledger that does not balance, a model
            that cannot be asked, a row that the student would not be trained on as it is served. Nothing was written.
        Refused: a licence that is not listed; or nothing is left to train on. Where a dataset stands it stays; else the
            verdicts are written and say why.
    """
    tell, num_workers = report or _silent, num_workers or settings.processes or num_cores()
    ledger = read_generation_ledger(run)
    require_judge(run, settings.judging, models.judge)
    found = judge_run(run, settings, num_workers=num_workers, tell=tell, folders=folders, verifiers=verifiers, models=models)
    rows = _decide(settings, run, found, ledger, tell, verifiers, models)
    del found
    pa.default_memory_pool().release_unused()  # the columns, which nothing needs any more
    dataset = save_dataset(
        run,
        rows.segments,
        rows.places,
        rows.text_bytes,
        relabels=rows.relabels,
        relabelling=rows.relabelling,
        card=rows.card,
        parquet=settings.parquet,
        num_workers=num_workers,
        tell=tell,
    )
    used = settings.model_dump(mode="json", exclude=INVISIBLE)
    return Built([*rows.files, *dataset], rows.counts, used, rows.judge, rows.checked)


class _Rows(NamedTuple):
    """What the dataset is written from, as save_dataset wants it, and the verdict files that stand."""

    segments: Sequence[Segment]
    places: Sequence[np.ndarray]
    relabels: Sequence[np.ndarray]
    relabelling: Relabelling
    text_bytes: Mapping[str, int]
    card: str
    counts: Counts
    judge: GradingCounts | None
    checked: RowCheck | None
    files: list[Path]


def _decide(
    settings: Data, run: RunFolder, found: Judged, ledger: Ledger, tell: Report, verifiers: Mapping[str, Verifier], models: Models
) -> _Rows:
    view = opinion(found, settings)
    decisions = select(view.judgements, len(found))
    splits_N = split_rows(found, decisions, settings.validation_share)
    codes_N, relabelling = relabelling_of(found, view.selection, settings.view)
    facts = with_row_tokens(found["facts"], codes_N >= 0, relabelling.tokens)
    counts = count(facts, decisions, splits_N, codes_N >= 0)
    with_view(ledger, counts).check(viewed=True)
    check_licences(licences(found["facts"], decisions.kept_N), settings.permitted_licences)
    if not counts["train_rows"] and (run.dataset / ROLLUP).exists():
        raise Refused(f"{nothing_kept(counts)}; the dataset that stands, and its verdicts, are as they were")
    checked = None
    if models.trained_ids is not None:
        checked = check_rows(found, decisions.kept_N, codes_N, relabelling, models.trained_ids)
    unseal(run)
    files = [*write_verdicts(run, found, view, decisions, settings, verifiers), *kept_replies(run)]
    if not counts["train_rows"]:
        raise Refused(f"{nothing_kept(counts)}; the verdicts are in verdicts/{VIEW_FILE}")
    card = render_card(card_facts(settings, found, decisions, counts))
    judge = None if found.graded is None else found.graded.counts
    places, relabels = (found.per_segment(values_N, absent=-1) for values_N in (splits_N, codes_N))
    text_bytes = text_bytes_of(found, splits_N)
    return _Rows(found.segments, places, relabels, relabelling, text_bytes, card, counts, judge, checked, files)


def relabelling_of(found: Judged, chosen: Selection, view: View) -> tuple[np.ndarray, Relabelling]:
    """int16 [N], -1 or a position in the relabelling's grades; and what the relabelled rows become."""
    if found.asked is None:
        return np.full(len(found), -1, np.int16), Relabelling()
    codes_N, grades = codes_of(chosen, as_columns(found.asked, found["facts"]["prompt_id"]))
    return codes_N, Relabelling(view.abstention_reasoning, found.asked.row_tokens, view.abstention_min_correct, grades)


def _silent(count: Count) -> None:
    return None


def read_generation_ledger(run: RunFolder) -> Ledger:
    """The first balance, checked. Raises UnusableInput when it does not hold or there is no prompt set."""
    rollup = read_rollup(run.prompts)
    requested = None if rollup is None else rollup.counts.get("requests")
    if not isinstance(requested, int):
        raise UnusableInput(f"{run.prompts}: the prompts stage has not finished; run it and generate first: tracestill run")
    ledger = generation_ledger(read_fates(run), requested)
    ledger.check(viewed=False)
    return ledger


def unseal(run: RunFolder) -> None:
    """The old roll-up no longer vouches for anything: its verdict files are about to be replaced."""
    if (run.dataset / ROLLUP).exists():
        (run.dataset / ROLLUP).unlink()
        fsync_folder(run.dataset)


def split_rows(found: Judged, decisions: Decisions, validation_share: float) -> np.ndarray:
    """int8 [N]: position in SPLITS of each kept trace, -1 for the others. The prompt's hash decides: one prompt's samples stay
    together."""
    prompts = found["facts"]["prompt_id"].combine_chunks().dictionary_encode()
    held_out = np.array([is_held_out(prompt_id, share=validation_share) for prompt_id in prompts.dictionary.to_pylist()], bool)
    side_N = held_out[prompts.indices.to_numpy()].astype(np.int8)
    return np.where(decisions.fates_N == KEPT, side_N, np.int8(-1))


def card_facts(settings: Data, found: Judged, decisions: Decisions, counts: Counts) -> CardFacts:
    facts, kept_N = found["facts"], decisions.kept_N
    teachers = origins(facts, kept_N, ["model_id", "model_revision"], "teacher_licence")
    return CardFacts(settings, counts, teachers, origins(facts, kept_N, ["source"], "source_licence"))


def text_bytes_of(found: Judged, splits_N: np.ndarray) -> dict[str, int]:
    bytes_N = found["facts"]["text_bytes"].to_numpy()
    return {split: int(bytes_N[splits_N == number].sum()) for number, split in enumerate(SPLITS)}


def nothing_kept(counts: Counts) -> str:
    """One line: how many traces went where, by reason."""
    if counts["kept"]:
        return f"data build: all {counts['kept']} kept traces are validation rows; lower data.validation_share or add prompts"
    by_reason = counts["rejected_by_reason"] | counts["unjudged_by_reason"]
    return (
        f"data build: nothing kept of {counts['completed']} completed traces "
        f"({', '.join(f'{reason} {number}' for reason, number in by_reason.items())}): "
        "change data.filters, data.view or the teacher's sampling"
    )
