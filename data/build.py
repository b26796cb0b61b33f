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
from data.card import INVISIBLE, CardFacts, origins, render_card
from data.counts import Counts, count
from data.dataset import SPLITS, save_dataset
from data.judge import VERSIONS, Judged, judge_run, opinion
from data.ledger import Ledger, generation_ledger, read_fates, with_view
from data.licences import check_licences, licences
from data.processes import num_cores
from data.select import KEPT, VIEW_FILE, Decisions, Judgement, order_of, select, verdict_table, view_table
from data.split import is_held_out
from data.store import ROLLUP, RunFolder, Segment, fsync_folder, read_rollup, table_bytes, write_bytes
from data.verify import VERIFIERS, Verifier


class Built(NamedTuple):
    """files: everything to seal (verdicts, view, dataset), in a fixed order. settings: those that made it, for the manifest."""

    files: list[Path]
    counts: Counts
    settings: dict[str, object]


def build(
    settings: Data,
    run: RunFolder,
    report: Report | None = None,
    *,
    num_workers: int | None = None,
    folders: Sequence[Path] = (),
    verifiers: Mapping[str, Verifier] = VERIFIERS,
) -> Built:
    """Verdict files, view and dataset stand in the run folder, unsealed. One builder at a time.

    num_workers: processes that read and judge; the machine's cores when None. folders: where benchmark files are looked for.

    Raises:
        UnusableInput: a damaged segment or benchmark file, traces without their prompt, a ledger that does not balance. Nothing
            was written.
        Refused: a licence that is not listed; or nothing is left to train on, and then the verdicts are written and say why.
    """
    tell, num_workers = report or _silent, num_workers or settings.processes or num_cores()
    rows = _judge(settings, run, tell, num_workers, folders, verifiers)
    pa.default_memory_pool().release_unused()  # the columns, which nothing needs any more
    dataset = save_dataset(
        run,
        rows.segments,
        rows.places,
        rows.text_bytes,
        card=rows.card,
        parquet=settings.parquet,
        num_workers=num_workers,
        tell=tell,
    )
    return Built([*rows.files, *dataset], rows.counts, settings.model_dump(mode="json", exclude=INVISIBLE))


class _Rows(NamedTuple):
    """What the dataset is written from, and the verdict files that stand. places, text_bytes: as save_dataset wants them."""

    segments: Sequence[Segment]
    places: Sequence[np.ndarray]
    text_bytes: Mapping[str, int]
    card: str
    counts: Counts
    files: list[Path]


def _judge(
    settings: Data, run: RunFolder, tell: Report, num_workers: int, folders: Sequence[Path], verifiers: Mapping[str, Verifier]
) -> _Rows:
    ledger = read_generation_ledger(run)
    found = judge_run(run, settings, num_workers=num_workers, tell=tell, folders=folders, verifiers=verifiers)
    said = opinion(found, settings).judgements
    decisions = select(said, len(found))
    splits_N = split_rows(found, decisions, settings.validation_share)
    counts = count(found["facts"], decisions, splits_N)
    with_view(ledger, counts).check(viewed=True)
    check_licences(licences(found["facts"], decisions.kept_N), settings.permitted_licences)
    tell(Count(0, 1, "writing verdicts"))
    unseal(run)
    files = write_judgements(run, found, said, decisions, verifiers)
    if not counts["train_rows"]:
        raise Refused(nothing_kept(counts))
    card = render_card(card_facts(settings, found, decisions, counts))
    return _Rows(found.segments, found.per_segment(splits_N, absent=-1), text_bytes_of(found, splits_N), card, counts, files)


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


def write_judgements(
    run: RunFolder, found: Judged, said: Sequence[Judgement], decisions: Decisions, verifiers: Mapping[str, Verifier]
) -> list[Path]:
    """One Arrow file per filter or verifier version, and the view: sorted by trace_id, the same bytes every time."""
    for leftover in run.verdicts.glob(".*.tmp"):
        leftover.unlink()
    trace_ids = found.trace_ids
    order_N = order_of(trace_ids)
    files = []

    def write(name: str, table: pa.Table) -> None:
        write_bytes(run.verdicts / name, table_bytes(table))
        files.append(run.verdicts / name)

    write(VIEW_FILE, view_table(trace_ids, decisions, order_N))
    for one in said:
        if one.name == "view":
            continue  # in VIEW_FILE, with everybody else's
        if one.name != "verifier":
            write(f"{one.name}-v{VERSIONS[one.name]}.arrow", verdict_table(trace_ids, one, order_N))
            continue
        # A file for each verifier in use, with the traces that were its to judge; those of no verifier are in the view alone.
        names_N = np.array(found["verifier"]["verifier"].to_pylist(), object)[order_N]
        for name in sorted(set(names_N.tolist()) - {""}):
            write(f"verifier-{name}-v{verifiers[name].version}.arrow", verdict_table(trace_ids, one, order_N[names_N == name]))
    return sorted(files)


def nothing_kept(counts: Counts) -> str:
    """One line: how many traces went where, by reason."""
    if counts["kept"]:
        return f"data build: all {counts['kept']} kept traces are validation rows; lower data.validation_share or add prompts"
    by_reason = counts["rejected_by_reason"] | counts["unjudged_by_reason"]
    return (
        f"data build: nothing kept of {counts['completed']} completed traces "
        f"({', '.join(f'{reason} {number}' for reason, number in by_reason.items())}); "
        f"the verdicts are in verdicts/{VIEW_FILE}: change data.filters, data.view or the teacher's sampling"
    )
