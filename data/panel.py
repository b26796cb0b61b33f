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

The panel is made once a process, from values that pickle, and opens the prompts.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from configs.filters import FilterSettings
from configs.schema import Data
from data import confidence, decontaminate, facts, groups, minhash
from data.benchmarks import boilerplate_sample, evaluation_items, find_benchmarks, read_benchmark
from data.filters import FILTERS, apply, in_order
from data.look import Look
from data.minhash import NUM_SLOTS
from data.ngram_index import Index, build_index
from data.prompt_set import PromptSet, prompt_file
from data.records import digest
from data.store import RunFolder, read_rollup
from data.verify import VERIFIERS, Verifier
from data.verify.runner import Item, Judgement, short_cut

KEY_BYTES = 6
BOILERPLATE_CHARACTERS = 4_000
"""Of each training prompt that tells templates from items: templates stand at the beginning."""

VERIFIED = pa.schema([("verifier", pa.string()), ("verdict", pa.string()), ("reason", pa.string()), ("score", pa.float64())])
CONTAMINATION = pa.schema(
    [("reason", pa.string()), ("item", pa.string()), ("rule", pa.string()), ("coverage", pa.float32()), ("place", pa.string()),
     ("excerpt", pa.string())]
)  # fmt: skip
"""Of the hit that covers most of its item; all "" and 0 where there is none."""
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
        self.prompts = PromptSet(spec.prompts, spec.prompts_sha256)
        chosen = in_order(spec.settings.filters)
        versions = {name: verifier.version for name, verifier in spec.verifiers.items()}
        self.questions: dict[str, Question] = {
            "facts": Question(_key(facts.VERSION), facts.FACTS, lambda look: Said(facts.facts(look))),
            "verifier": Question(_key(versions, spec.prompts_sha256), VERIFIED, partial(_verify, spec.verifiers)),
            "contamination": Question(
                _key(decontaminate.VERSION, spec.index.key), CONTAMINATION, partial(_contamination, spec.index)
            ),
            "evidence": Question(_key(groups.VERSION, confidence.VERSION, spec.prompts_sha256), EVIDENCE, _evidence),
        }
        if chosen:
            self.questions["filters"] = _filters(chosen)
        if needs_signatures(spec.settings):
            self.questions["near"] = Question(_key(minhash.VERSION), NEAR, _near)


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
    return Said(_verified([prompt.verifier for prompt in look.prompts], judgements), open_items)


def _verified(names: list[str], judgements: list[Judgement]) -> pa.Table:
    verdicts, reasons, scores = (list(column) for column in zip(*judgements, strict=True)) if judgements else ([], [], [])
    return pa.table([names, verdicts, reasons, scores], schema=VERIFIED)


def with_judged(said: Said, judge: Callable[[list[Item]], list[Judgement]]) -> pa.Table:
    """The rows with what was left open settled."""
    rows = list(said.open_items)
    settled = dict(zip(rows, judge([said.open_items[row] for row in rows]), strict=True))
    names = said.rows["verifier"].to_pylist()
    quick = zip(*(said.rows[name].to_pylist() for name in ("verdict", "reason", "score")), strict=True)
    return _verified(names, [settled.get(row, Judgement(*values)) for row, values in enumerate(quick)])


def _contamination(index: Index, look: Look) -> Said:
    parts = [(row, part) for row, trace in enumerate(look.traces) for part in decontaminate.parts(trace.messages)]
    hits = decontaminate.scan(index, [part.text for _, part in parts], [part.is_prompt for _, part in parts])
    most: dict[int, tuple[float, decontaminate.Hit]] = {}
    for hit in hits:
        row = parts[hit.text][0]
        if row not in most or hit.coverage > most[row][0]:
            most[row] = hit.coverage, hit
    found = [_leak(most[row][1], parts) if row in most else ("", "", "", 0.0, "", "") for row in range(len(look))]
    return Said(pa.table([list(column) for column in zip(*found, strict=True)] if found else [[]] * 6, schema=CONTAMINATION))


def _leak(hit: decontaminate.Hit, parts: Sequence[tuple[int, decontaminate.Part]]) -> tuple[str, str, str, float, str, str]:
    item = f"{hit.source.file}:{hit.source.item}:{hit.source.field}" + (f" and {hit.twins} more" if hit.twins else "")
    place = f"{parts[hit.text][1].place}:{hit.first}-{hit.end}"
    return "contaminated", item, hit.rule, hit.coverage, place, hit.excerpt


def _evidence(look: Look) -> Said:
    sure = confidence.confidence(look.table["turns"], look.table["answer_tokens"].to_numpy())
    return Said(pa.table([groups.answer_keys(look.prompts, look.answers), *sure], schema=EVIDENCE))


def _near(look: Look) -> Said:
    found = minhash.signatures(look.generated)
    slots = pa.FixedSizeBinaryArray.from_buffers(pa.binary(NUM_SLOTS), len(look), [None, pa.py_buffer(found.slots_NS.tobytes())])
    return Said(pa.table([slots, found.shingles_N], schema=NEAR))
