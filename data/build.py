"""From traces to a dataset: every completed trace is judged, every judgement is written down, and what all of them let
pass becomes the training set. Nothing is deleted, so that the view can be taken again with other settings.

Killed anywhere, a second call starts over from the traces and leaves the same bytes; only the stage's roll-up, which
the caller seals last, makes the result count.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from configs.errors import Refused, UnusableInput
from configs.progress import Count, Report
from configs.schema import Data
from data.counts import Counts, count
from data.dataset import save_dataset
from data.judge import VERSIONS, Collected, collect, judge_all
from data.ledger import Ledger, generation_ledger, read_fates, with_view
from data.prompt_set import read_prompts
from data.records import Verdict
from data.schema import to_table
from data.select import VIEW_FILE, Decision, Judgement, kept, select, view_table
from data.split import is_held_out
from data.store import ROLLUP, RunFolder, fsync_folder, read_rollup, table_bytes, write_bytes
from data.verify import VERIFIERS, Verifier


class Built(NamedTuple):
    """files: everything to seal (verdicts, view, dataset), in a fixed order."""

    files: list[Path]
    counts: Counts


def build(
    settings: Data,
    run: RunFolder,
    report: Report | None = None,
    *,
    num_workers: int | None = None,
    verifiers: Mapping[str, Verifier] = VERIFIERS,
) -> Built:
    """Verdict files, view and dataset stand in the run folder, unsealed. One builder at a time.

    num_workers: processes that judge answers; the machine's cores when None.

    Raises:
        UnusableInput: a damaged segment, traces without their prompt, a ledger that does not balance. Nothing was written.
        Refused: nothing is left to train on. The verdicts are written and say why.
    """
    tell = report or _silent
    ledger = read_generation_ledger(run)
    prompts = {prompt.prompt_id: prompt for prompt in read_prompts(run)}
    found = collect(run, settings, prompts, ledger.completed, tell)
    judgements = judge_all(found, prompts, settings, verifiers=verifiers, num_workers=num_workers, tell=tell)
    decisions = select(found.identities, judgements)
    splits = split_rows(rows_of(found, kept(decisions)), settings.validation_share)
    counts = count([candidate.prompt.task for candidate in found.candidates], decisions, splits)
    with_view(ledger, counts).check(viewed=True)
    tell(Count(0, 2, "writing verdicts"))
    unseal(run)
    files = write_judgements(run, found, judgements, decisions, verifiers)
    if not splits["train"].num_rows:
        raise Refused(nothing_kept(counts))
    tell(Count(1, 2, "writing dataset"))
    files += save_dataset(run, splits)
    tell(Count(2, 2, "written"))
    return Built(files, counts)


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


def rows_of(found: Collected, wanted: set[str]) -> pa.Table:
    """The dataset rows of the wanted traces, sorted by trace_id: in no way does the log's order show."""
    mask = pa.array([trace_id in wanted for trace_id in found.identities], pa.bool_())
    return found.rows.filter(mask).sort_by("trace_id")


def split_rows(rows: pa.Table, validation_share: float) -> dict[str, pa.Table]:
    """`train` and `validation`, either possibly empty. The prompt's hash decides: one prompt's samples stay together."""
    held_out = [is_held_out(prompt_id, share=validation_share) for prompt_id in rows["prompt_id"].to_pylist()]
    return {
        "train": rows.filter(pa.array([not side for side in held_out], pa.bool_())),
        "validation": rows.filter(pa.array(held_out, pa.bool_())),
    }


def write_judgements(
    run: RunFolder,
    found: Collected,
    judgements: Sequence[Judgement],
    decisions: Sequence[Decision],
    verifiers: Mapping[str, Verifier],
) -> list[Path]:
    """One Arrow file per filter or verifier version, and the view: sorted by trace_id, the same bytes every time."""
    tables = {VIEW_FILE: view_table(decisions)}
    for judgement in judgements:
        if judgement.name == "verifier":
            tables |= _by_verifier(found, judgement, verifiers)
        else:
            tables[f"{judgement.name}-v{VERSIONS[judgement.name]}.arrow"] = _verdict_table(judgement.verdicts.values())
    for leftover in run.verdicts.glob(".*.tmp"):
        leftover.unlink()
    for name, table in tables.items():
        write_bytes(run.verdicts / name, table_bytes(table))
    return sorted(run.verdicts / name for name in tables)


def _by_verifier(found: Collected, judgement: Judgement, verifiers: Mapping[str, Verifier]) -> dict[str, pa.Table]:
    """A file for each verifier in use, with the traces that were its to judge; those of no verifier are in the view alone."""
    verdicts: dict[str, list[Verdict]] = {}
    for candidate in found.candidates:
        if candidate.prompt.verifier:
            verdicts.setdefault(candidate.prompt.verifier, []).append(judgement.verdicts[candidate.trace_id])
    return {f"verifier-{name}-v{verifiers[name].version}.arrow": _verdict_table(its) for name, its in verdicts.items()}


def _verdict_table(verdicts: Iterable[Verdict]) -> pa.Table:
    return to_table(sorted(verdicts, key=lambda verdict: verdict.trace_id), Verdict)


def nothing_kept(counts: Counts) -> str:
    """One line: how many traces went where, by reason."""
    if counts["kept"]:
        return f"data build: all {counts['kept']} kept traces are validation rows; lower data.validation_share or add prompts"
    by_reason = counts["rejected_by_reason"] | counts["unjudged_by_reason"]
    return (
        f"data build: nothing kept of {counts['completed']} completed traces "
        f"({', '.join(f'{reason} {number}' for reason, number in by_reason.items())}); "
        f"the verdicts are in verdicts/{VIEW_FILE}: change data.filters, data.require_verified or the teacher's sampling"
    )
