"""What the data stage asks about each trace, as columns: one question, one schema, one key.

A question looks at one trace at a time (a segment's worth of them for speed) and never at another trace, so that its
answer about a segment holds for ever under its key, in whatever order and by whatever number of processes segments are
looked at. What needs all traces at once (copies, agreement, quotas) is decided afterwards, over these columns.

    facts           identity, sizes, licences, and the hash by which copies are found
    filters         one column of reasons a filter
    verifier        verdict, reason and score of the prompt's own verifier
    contamination   the evaluation item whose text a trace holds, and where
    evidence        what agreement and p(correct) are made of: the answer as a key, the teacher's confidence
    near            MinHash slots of what the teacher wrote; asked only where something needs them
    shown           which answers a judge may be shown, by what it would be shown; asked only where there is one

The panel is made once a process, from values that pickle, and opens the prompts.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from configs.filters import FilterSettings
from configs.schema import Data
from data import confidence, decontaminate, facts, grading, groups, minhash
from data.benchmarks import boilerplate_sample, evaluation_items, find_benchmarks, read_benchmark
from data.filters import FILTERS, apply, in_order
from data.look import Look
from data.minhash import NUM_SLOTS
from data.ngram_index import Index, build_index
from data.prompt_set import PromptSet, prompt_file
from data.records import digest
from data.store import RunFolder, read_rollup
from data.verify import VERIFIERS, Verifier
from data.verify.runner import CRASHED, TIMED_OUT, Item, Judgement, Pool, short_cut

KEY_BYTES = 6
BOILERPLATE_CHARACTERS = 4_000
"""Of each training prompt that tells templates from items: templates stand at the beginning."""

VERIFIED = pa.schema(
    [("verifier", pa.string()), ("verdict", pa.string()), ("reason", pa.string()), ("score", pa.float64()),
     ("limit_s", pa.float64())]
)  # fmt: skip
"""limit_s: the seconds that an answer had which is `timed_out` or `crashed`; 0 for every other."""
VERSION = 2
CONTAMINATION = pa.schema(
    [("reason", pa.string()), ("item", pa.string()), ("rule", pa.string()), ("coverage", pa.float32()), ("place", pa.string()),
     ("excerpt", pa.string()), ("others", pa.string())]
)  # fmt: skip
"""Of the hit that covers most of its item; all "" and 0 where there is none. others: JSON text, a list of [item, rule, coverage,
place] of the hits besides; "" where there is none."""
EVIDENCE = pa.schema(
    [
        ("answer", pa.uint64()),
        ("answer_logprob", pa.float64()),
        ("reasoning_logprob", pa.float64()),
        ("lowest_logprob", pa.float64()),
    ]
)
NEAR = pa.schema([("slots", pa.binary(NUM_SLOTS)), ("shingles", pa.float32())])


class Said(NamedTuple):
    """The answer to a question about one segment. open_items: rows that only a verifier's worker can settle."""

    rows: pa.Table
    open_items: Mapping[int, Item] = {}


@dataclass(frozen=True, slots=True)
class Question:
    """ask: one row a trace of the look, under `schema`. key: hex, of everything besides the trace that its answer depends on."""

    key: str
    schema: pa.Schema
    ask: Callable[[Look], Said]


@dataclass(frozen=True, slots=True)
class PanelSpec:
    """What a worker process is told."""

    settings: Data
    prompts: Path
    prompts_sha256: str
    index: Index
    verifiers: Mapping[str, Verifier] = field(default_factory=lambda: VERIFIERS)

    @classmethod
    def of(
        cls, run: RunFolder, settings: Data, folders: Sequence[Path] = (), verifiers: Mapping[str, Verifier] = VERIFIERS
    ) -> "PanelSpec":
        """folders: where benchmark files are looked for, in order. Raises UnusableInput when one cannot be used."""
        rollup, path = read_rollup(run.prompts), prompt_file(run)
        assert rollup is not None, "the ledger was read before"
        sha256 = rollup.files[str(path.relative_to(run.root))]
        with PromptSet(path, sha256) as prompts:
            index = evaluation_index(prompts, find_benchmarks(settings.decontaminate, folders))
        return cls(settings, path, sha256, index, verifiers)


def evaluation_index(prompts: PromptSet, benchmarks: Mapping[str, Path]) -> Index:
    """Of the run's own evaluation prompts and of the benchmark files. What two training prompts share is boilerplate."""
    items = itertools.chain(
        evaluation_items(prompts.iterate("eval")), *(read_benchmark(path, name) for name, path in benchmarks.items())
    )
    texts = [text[:BOILERPLATE_CHARACTERS] for text in boilerplate_sample(prompts.iterate("train"))]
    return build_index(items, texts)


class Panel:
    """The questions by name, in the order of the module's docstring."""

    def __init__(self, spec: PanelSpec) -> None:
        """Reads and verifies the prompt file. Raises UnusableInput when it or a benchmark file cannot be used."""
        self.prompts, self.verifiers = PromptSet(spec.prompts, spec.prompts_sha256), spec.verifiers
        chosen = in_order(spec.settings.filters)
        versions = {name: verifier.version for name, verifier in spec.verifiers.items()}
        self.questions: dict[str, Question] = {
            "facts": Question(_key(facts.VERSION), facts.FACTS, lambda look: Said(facts.facts(look))),
            "verifier": Question(_key(VERSION, versions, spec.prompts_sha256), VERIFIED, partial(_verify, spec.verifiers)),
            "contamination": Question(
                _key(decontaminate.VERSION, spec.index.key), CONTAMINATION, partial(_contamination, spec.index)
            ),
            "evidence": Question(_key(groups.VERSION, confidence.VERSION, spec.prompts_sha256), EVIDENCE, _evidence),
        }
        if chosen:
            self.questions["filters"] = _filters(chosen)
        if needs_signatures(spec.settings):
            self.questions["near"] = Question(_key(minhash.VERSION), NEAR, _near)
        if (judging := spec.settings.judging) is not None:
            key = _key(grading.VERSION, judging.checked_share, spec.prompts_sha256)
            self.questions["shown"] = Question(key, grading.SHOWN, partial(_shown, judging.checked_share))

    def require(self) -> None:
        """Every verifier that training prompts name can judge on this machine. Raises its TracestillError."""
        named = self.prompts.verifiers("train")
        for name, verifier in self.verifiers.items():
            if name in named and verifier.require is not None:
                verifier.require()


def needs_signatures(settings: Data) -> bool:
    return settings.dedup == "near" or settings.view.needs_signatures


def _key(*parts: object) -> str:
    return digest(*parts, size=KEY_BYTES)


def _filters(chosen: Sequence[FilterSettings]) -> Question:
    schema = pa.schema([(one.type, pa.string()) for one in chosen])
    versions = {one.type: FILTERS[one.type].version for one in chosen}

    def ask(look: Look) -> Said:
        return Said(pa.table([[apply(trace, one) for trace in look.traces] for one in chosen], schema=schema))

    return Question(_key(versions, [one.model_dump(mode="json") for one in chosen]), schema, ask)


def _verify(verifiers: Mapping[str, Verifier], look: Look) -> Said:
    """What needs no worker is settled here; the rest is left open, `unjudged` in the rows."""
    judgements: list[Judgement] = []
    open_items: dict[int, Item] = {}
    for row, item in enumerate(map(Item, look.prompts, look.answers)):
        settled = short_cut(item, verifiers)
        if settled is None:
            open_items[row] = item
        judgements.append(settled or Judgement("unjudged", "", 0.0))
    verdicts, reasons, scores = (list(column) for column in zip(*judgements, strict=True)) if judgements else ([], [], [])
    names = [prompt.verifier for prompt in look.prompts]
    return Said(pa.table([names, verdicts, reasons, scores, [0.0] * len(names)], schema=VERIFIED), open_items)


def with_judged(said: Said, pool: Pool) -> pa.Table:
    """The rows with what was left open judged."""
    columns = said.rows.to_pydict()
    for row, judgement in zip(said.open_items, pool.judge(list(said.open_items.values())), strict=True):
        columns["verdict"][row], columns["reason"][row], columns["score"][row] = judgement
        limit_s = pool.limits_s[columns["verifier"][row]]
        columns["limit_s"][row] = limit_s if judgement in (TIMED_OUT, CRASHED) else 0.0
    return pa.table(columns, schema=VERIFIED)


def unsettled(verified: pa.Table, limits_s: Mapping[str, float]) -> tuple[int, ...]:
    """Rows of an earlier build that this one asks for again, by verifier and with its seconds now.

    What timed out is asked again with a longer limit only: with the same one it costs that limit once more, and a build that
    was given nothing new says nothing new. What crashed is asked again whatever the limit: nobody can tell the machine's doing
    (no memory, no sandbox) from the answer's, and asking costs milliseconds where the verifier raises, two starts of a worker
    where it takes one down. What is settled stays settled, under a shorter limit too.
    """
    names, reasons, given_s = (verified[name].to_pylist() for name in ("verifier", "reason", "limit_s"))
    return tuple(
        row
        for row, (name, reason, given) in enumerate(zip(names, reasons, given_s, strict=True))
        if reason == CRASHED.reason or (reason == TIMED_OUT.reason and given < limits_s[name])
    )


def _contamination(index: Index, look: Look) -> Said:
    parts = [(row, part) for row, trace in enumerate(look.traces) for part in decontaminate.parts(trace.messages)]
    hits = decontaminate.scan(index, [part.text for _, part in parts], [part.is_prompt for _, part in parts])
    by_row: dict[int, list[decontaminate.Hit]] = {}
    for hit in hits:
        by_row.setdefault(parts[hit.text][0], []).append(hit)
    found = [_leak(by_row.get(row, []), parts) for row in range(len(look))]
    columns = zip(*found, strict=True) if found else [[]] * len(CONTAMINATION)
    return Said(pa.table([list(column) for column in columns], schema=CONTAMINATION))


def _leak(
    hits: Sequence[decontaminate.Hit], parts: Sequence[tuple[int, decontaminate.Part]]
) -> tuple[str, str, str, float, str, str, str]:
    """A row of CONTAMINATION. hits: of one trace."""
    if not hits:
        return "", "", "", 0.0, "", "", ""
    most, *others = (_place(hit, parts) for hit in sorted(hits, key=lambda hit: -hit.coverage))
    excerpt = max(hits, key=lambda hit: hit.coverage).excerpt
    return "contaminated", *most, excerpt, json.dumps(others, ensure_ascii=False) if others else ""


def _place(hit: decontaminate.Hit, parts: Sequence[tuple[int, decontaminate.Part]]) -> tuple[str, str, float, str]:
    item = f"{hit.source.file}:{hit.source.item}:{hit.source.field}" + (f" and {hit.twins} more" if hit.twins else "")
    return item, hit.rule, hit.coverage, f"{parts[hit.text][1].place}:{hit.first}-{hit.end}"


def _evidence(look: Look) -> Said:
    sure = confidence.confidence(look.table["turns"], look.table["answer_tokens"].to_numpy())
    return Said(pa.table([groups.answer_keys(look.prompts, look.answers), *sure], schema=EVIDENCE))


def _near(look: Look) -> Said:
    found = minhash.signatures(look.generated)
    slots = pa.FixedSizeBinaryArray.from_buffers(pa.binary(NUM_SLOTS), len(look), [None, pa.py_buffer(found.slots_NS.tobytes())])
    return Said(pa.table([slots, found.shingles_N], schema=NEAR))


def _shown(checked_share: float, look: Look) -> Said:
    return Said(grading.shown(look, checked_share))
