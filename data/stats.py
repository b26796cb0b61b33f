"""What a built dataset is made of, what became of the rest, and what it cost. Values only: data/stats_tables.py shows them.

Everything comes from manifests and from the columns in verdicts/; no text of a trace is read. 200,000 traces take two seconds.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa

from configs.errors import UnusableInput
from data.calibration import LIKELY
from data.counts import TOKENS, Counts, TaskCounts
from data.details import parsed
from data.grading import GradingCounts
from data.ledger import Ledger, fates_of, generation_ledger, with_view
from data.schema import VERDICT
from data.select import VERDICTS, VIEW, VIEW_FILE
from data.store import Rollup, RunFolder, Segment, read_rollup, segments
from data.verdict_files import EVIDENCE, EVIDENCE_FILE, ViewFacts, judge_files, plain, read_facts, read_file

QUANTILES = (0.05, 0.25, 0.50, 0.75, 0.95, 1.0)
LARGEST, WORST = 5, 10
"""Groups of copies and benchmark items that are named; all are counted."""
LENGTH_BINS = 40
EFFICIENCY_EDGES = tuple(2.0 ** (step / 4) for step in range(25))
"""1 to 64 times the shortest, in quarters of an octave; what is longer counts in the last bin."""


class Quantiles(NamedTuple):
    """Of whole tokens: the smallest length with that share of the traces at or under it; 0 where there are none."""

    p5: int
    p25: int
    p50: int
    p75: int
    p95: int
    longest: int


class Lengths(NamedTuple):
    """part: prompt, reasoning or answer."""

    part: str
    completed: Quantiles
    kept: Quantiles


class JudgeCounts(NamedTuple):
    """judge: the name of its file (`length-v2`). reasons: of those that did not pass, most frequent first, whoever decided."""

    judge: str
    passed: int
    failed: int
    unjudged: int
    reasons: dict[str, int]


class Copies(NamedTuple):
    """original: the trace that stays. copies: those that repeat it."""

    original: str
    task: str
    copies: int


class Duplicates(NamedTuple):
    """largest: the originals with most copies."""

    copies: int
    originals: int
    largest: tuple[Copies, ...]


class LeakedItem(NamedTuple):
    """A benchmark item, by the traces that hold it. coverage: the most of it that stands in one of them."""

    item: str
    traces: int
    coverage: float


class Contamination(NamedTuple):
    """by_benchmark: traces by benchmark file. worst: the items in most traces."""

    traces: int
    items: int
    by_benchmark: dict[str, int]
    worst: tuple[LeakedItem, ...]


class Cost(NamedTuple):
    """Of all attempts: failed, superseded and rejected ones too. dollars, tokens (generated): of everything committed. seconds:
    in flight, of completed traces; several are in flight at once. wall_seconds: of the generate stage, None until it is sealed.
    """

    dollars: float
    tokens: int
    seconds: float
    wall_seconds: float | None
    kept: int

    def per_kept(self, spent: float) -> float:
        """Infinite where nothing was kept."""
        return spent / self.kept if self.kept else math.inf


class Histogram(NamedTuple):
    """Counts between edges, the lower one included, in the last bin both."""

    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Stats:
    """tasks: name -> counts, in name order. total: the same over all. ledger: both balances as they stand now.

    generated: histogram of generated tokens of kept and other traces. efficiency: of right traces' tokens over those of the
    shortest right one of their prompt; num_wide_spread: traces whose prompt shows the red flag. grading: what a model graded (the
    manifest's `judge`), None where none did.
    """

    tasks: Mapping[str, TaskCounts]
    total: Counts
    ledger: Ledger
    dataset_sha256: str
    lengths: tuple[Lengths, ...]
    judges: tuple[JudgeCounts, ...]
    exact_copies: Duplicates | None
    near_copies: Duplicates | None
    contamination: Contamination
    cost: Cost
    view: ViewFacts
    generated: Histogram
    efficiency: Histogram
    num_wide_spread: int
    grading: GradingCounts | None


def dataset_stats(run: RunFolder) -> Stats:
    """The figures of the sealed dataset. Raises UnusableInput when there is none, when it is of an earlier release, or when a
    file is not what was sealed."""
    rollup, prompts, committed = _sealed(run), read_rollup(run.prompts), segments(run.traces)
    if prompts is None:
        raise UnusableInput(f"{run.root}: no prompt set yet; run: tracestill run")
    evidence, kept_N = _evidence(run, rollup)
    total = cast(Counts, rollup.counts)
    judges = {name: read_judge(run, rollup, name) for name in judge_files(rollup)}
    ledger = generation_ledger(fates_of(committed), cast(int, prompts.counts["requests"]))
    right_N = evidence["p_correct"].fill_null(0.0).to_numpy() > LIKELY
    over_N = evidence["tokens_over_shortest"].filter(pa.array(right_N)).drop_null().to_numpy()
    return Stats(
        tasks=total["by_task"],
        total=total,
        ledger=with_view(ledger, total),
        dataset_sha256=dataset_hash(rollup),
        lengths=tuple(_lengths(name, evidence[name].to_numpy(), kept_N) for name in TOKENS),
        judges=tuple(one.counts for one in judges.values()),
        exact_copies=_duplicates(judges, "dedup", evidence),
        near_copies=_duplicates(judges, "near_dedup", evidence),
        contamination=contamination_of([detail for one in _named(judges, "decontaminate") for detail in one.details]),
        cost=cost_of(run, committed, evidence, int(kept_N.sum())),
        view=read_facts(run, rollup),
        generated=generated_histogram(generated_tokens(evidence), kept_N),
        efficiency=efficiency_histogram(over_N),
        num_wide_spread=int(evidence["wide_spread"].to_numpy().sum()),
        grading=cast(GradingCounts | None, rollup.counts.get("judge")),
    )


def stats_json(found: Stats) -> str:
    """One line; null where a figure is infinite or not known. per_kept: cost over kept traces."""
    cost = found.cost
    spent = {"dollars": cost.dollars, "tokens": cost.tokens, "seconds": cost.seconds, "wall_seconds": cost.wall_seconds}
    per_kept = {name: None if value is None or not cost.kept else cost.per_kept(value) for name, value in spent.items()}
    return json.dumps(plain(found) | {"per_kept": per_kept}, allow_nan=False)  # type: ignore[operator]


def dataset_hash(rollup: Rollup) -> str:
    """One sha256 for the rows of the dataset: over the names and hashes of its Arrow files, in name order. The card, which also
    tells what was left out, does not count."""
    rows = (path for path in sorted(rollup.files) if path.startswith("dataset/") and path.endswith(".arrow"))
    named = [f"{path} {rollup.files[path]}" for path in rows]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()


def _sealed(run: RunFolder) -> Rollup:
    rollup = read_rollup(run.dataset)
    if rollup is None:
        raise UnusableInput(f"{run.dataset}: no dataset yet; run: tracestill data build")
    return rollup


def _evidence(run: RunFolder, rollup: Rollup) -> tuple[pa.Table, np.ndarray]:
    """EVIDENCE, and bool [N] in the same order: which traces are kept."""
    evidence, view = (read_file(run, rollup, *file) for file in ((EVIDENCE_FILE, EVIDENCE), (VIEW_FILE, VIEW)))
    if not view["trace_id"].equals(evidence["trace_id"]):
        raise UnusableInput(f"{run.verdicts}: {VIEW_FILE} and {EVIDENCE_FILE} name other traces; run tracestill data build again")
    return evidence, view["fate"].to_numpy() == "kept"


# --- lengths -----------------------------------------------------------------------------------------------------


def _lengths(name: str, tokens_N: np.ndarray, kept_N: np.ndarray) -> Lengths:
    return Lengths(name.removesuffix("_tokens"), quantiles(tokens_N), quantiles(tokens_N[kept_N]))


def quantiles(tokens_N: np.ndarray) -> Quantiles:
    if not len(tokens_N):
        return Quantiles(*[0] * len(QUANTILES))
    return Quantiles(*np.quantile(tokens_N, QUANTILES, method="inverted_cdf").astype(int).tolist())


def generated_tokens(evidence: pa.Table) -> np.ndarray:
    """int64 [N]."""
    return evidence["reasoning_tokens"].to_numpy().astype(np.int64) + evidence["answer_tokens"].to_numpy()


def generated_histogram(tokens_N: np.ndarray, kept_N: np.ndarray) -> Histogram:
    """Bins of equal width where few whole tokens apart, else of equal ratio."""
    low, high = (max(1, int(end)) for end in (tokens_N.min(), tokens_N.max()))
    if high - low <= 10 * LENGTH_BINS:
        width = -(-(high - low + 1) // LENGTH_BINS)  # whole tokens: bins of 1 and 2 would alternate in height
        edges = np.arange(low, high + width + 1, width)
    else:
        edges = np.unique(np.geomspace(low, high + 1, LENGTH_BINS + 1).astype(np.int64))
    held_N = np.maximum(tokens_N, low)  # no token at all counts as one
    counted = {name: np.histogram(held_N[rows], edges)[0].tolist() for name, rows in (("kept", kept_N), ("not kept", ~kept_N))}
    return Histogram(tuple(map(float, edges)), {name: tuple(counts) for name, counts in counted.items()})


def efficiency_histogram(over_K: np.ndarray) -> Histogram:
    counts, _ = np.histogram(np.clip(over_K, 1.0, EFFICIENCY_EDGES[-1]), EFFICIENCY_EDGES)
    return Histogram(EFFICIENCY_EDGES, {"right": tuple(counts.tolist())})


# --- verdicts ----------------------------------------------------------------------------------------------------


class Judge(NamedTuple):
    """trace_ids, details: of the traces of which there is something to say."""

    counts: JudgeCounts
    details: list[str]


def read_judge(run: RunFolder, rollup: Rollup, name: str) -> Judge:
    """One file, counted; of its rows only the details stay in memory."""
    table = read_file(run, rollup, f"{name}.arrow", VERDICT)
    grouped = table.group_by(["verdict", "reason"]).aggregate([([], "count_all")]).to_pylist()
    by_verdict = Counter[str]()
    for row in grouped:
        by_verdict[row["verdict"]] += row["count_all"]
    reasons = {row["reason"]: row["count_all"] for row in grouped if row["reason"]}
    ordered = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
    passed, failed, unjudged = (by_verdict[verdict] for verdict in VERDICTS)
    detail = table["detail"].to_pylist()
    return Judge(JudgeCounts(name, passed, failed, unjudged, ordered), [text for text in detail if text])


def _named(judges: Mapping[str, Judge], name: str) -> list[Judge]:
    """Of that judge the file of its version; none where it was not asked."""
    return [judge for one, judge in judges.items() if one.rpartition("-v")[0] == name]


def _duplicates(judges: Mapping[str, Judge], name: str, evidence: pa.Table) -> Duplicates | None:
    found = _named(judges, name)
    return duplicates_of(found[0].details, evidence) if found else None


def duplicates_of(details: Sequence[str], evidence: pa.Table) -> Duplicates:
    copies = Counter(str(parsed(text)["original"]) for text in details)
    largest = sorted(copies.items(), key=lambda item: (-item[1], item[0]))[:LARGEST]
    return Duplicates(copies.total(), len(copies), tuple(Copies(one, _task_of(evidence, one), count) for one, count in largest))


def _task_of(evidence: pa.Table, trace_id: str) -> str:
    return evidence["task"][evidence["trace_id"].index(trace_id).as_py()].as_py()


def contamination_of(details: Sequence[str]) -> Contamination:
    traces, coverage = Counter[str](), dict[str, float]()
    for leak in map(parsed, details):
        item = str(leak["item"])
        traces[item] += 1
        coverage[item] = max(coverage.get(item, 0.0), float(leak["coverage"]))
    by_benchmark = Counter[str]()
    for item, count in traces.items():
        by_benchmark[item.partition(":")[0]] += count
    worst = sorted(traces.items(), key=lambda item: (-item[1], -coverage[item[0]], item[0]))[:WORST]
    return Contamination(
        traces.total(),
        len(traces),
        dict(sorted(by_benchmark.items(), key=lambda item: (-item[1], item[0]))),
        tuple(LeakedItem(item, count, coverage[item]) for item, count in worst),
    )


# --- cost --------------------------------------------------------------------------------------------------------


def cost_of(run: RunFolder, committed: Sequence[Segment], evidence: pa.Table, num_kept: int) -> Cost:
    """From sidecars, which count every attempt; where one of them does not say, from the completed traces."""
    generate = read_rollup(run.traces)
    told = all("cost" in segment.facts and "output_tokens" in segment.facts for segment in committed)
    if told:
        dollars = math.fsum(segment.facts["cost"] for segment in committed)
        tokens = sum(sum(segment.facts["output_tokens"]) for segment in committed)
    else:
        dollars, tokens = math.fsum(evidence["cost"].to_numpy()), int(generated_tokens(evidence).sum())
    seconds = math.fsum(evidence["seconds"].to_numpy())
    return Cost(dollars, tokens, seconds, None if generate is None else generate.seconds, num_kept)
