"""From the recipe's sources to one prompt set: what the teacher is asked, and what the evaluation holds back.

Which side an item falls on is decided by the hash of its text (data/split.py) or by its own `split` field, never by the
order or the seed of a source, and the stream is checked as it passes: no evaluation item is a training prompt. Of a prompt
that has passed, 16 bytes are kept. Control tokens of the teacher are refused or escaped where texts are read, because a sealed
set is asked as it stands.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from configs.errors import UnusableInput
from configs.prompt_sources import (
    DatasetsSource,
    DocumentsSource,
    JsonlSource,
    OmniscienceSource,
    ParquetSource,
    PromptSource,
    ReasoningGymSource,
    RepositorySource,
    RowSource,
    SuiteSource,
)
from data.records import Prompt, Split, digest
from data.store import sha256_file
from data.verify.runner import LLM_JUDGE, Pool
from generate.control_tokens import NO_CONTROL_TOKENS, ControlTokens
from generate.digests import DigestTable
from generate.documents import read_documents
from generate.packing import CountTokens
from generate.references import TIMEOUT_S, References
from generate.repository import read_repository
from generate.sources.datasets_folder import read_datasets
from generate.sources.jsonl import read_jsonl
from generate.sources.omniscience import read_omniscience
from generate.sources.parquet import read_parquet
from generate.sources.paths import find_file, find_folder, find_parts, hash_files
from generate.sources.reasoning_gym import read_reasoning_gym
from generate.sources.rows import Candidate, Side
from generate.sources.texts import find_documents
from generate.templates import template_path
from generate.tree import scan_tree, tree_hash
from generate.twins import Framing

log = logging.getLogger(__name__)


FAILS, OTHERWISE = "fails_self_check", "judged_otherwise"
WHY = {
    FAILS: "their reference does not pass their own verifier",
    OTHERWISE: "an earlier row asks the same, and is judged by another answer, verifier or details",
}
"""Reasons for which single rows are left out, and what is said of them."""
NAMED_ROWS = 10
"""So many of them a reason are named in the warning."""


@dataclass(slots=True)
class LostRows:
    """How many rows were left out for one reason, and where the first NAMED_ROWS of them stand, in the order of the stream."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, row: str) -> None:
        self.count += 1
        if self.count <= NAMED_ROWS:
            self.first.append(row)

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return ", ".join(self.first) + (f" and {more} more" if more else "")


@dataclass(slots=True)
class Tally:
    """What a stream of prompts has let pass so far: prompts a side, training prompts a task, candidates left out by reason, and
    control tokens that were escaped, by the source of the prompts they stand in. rows: those left out for a reason in WHY.
    judged_by_model: training prompts whose answers only a model can grade. twins: those that ask another in other
    words."""

    train: int = 0
    eval: int = 0
    by_task: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    escaped: Counter[str] = field(default_factory=Counter)
    rows: dict[str, LostRows] = field(default_factory=lambda: {reason: LostRows() for reason in WHY})
    judged_by_model: int = 0
    twins: int = 0


class PromptStream:
    """Every training prompt and then every evaluation item of a recipe, once, in source order and without duplicates.

    References of rows are held against themselves as they pass, in worker processes that live as long as the iteration.

    `tally` is whole when the iteration has ended; rows that were left out one by one, and what was escaped, are logged then.
    Iterating raises UnusableInput for a source that cannot be read, yields nothing, puts one text on both sides, or holds a
    control token that it was not told to escape, and for references that this machine cannot judge.
    """

    def __init__(
        self,
        training: Sequence[PromptSource],
        suites: Sequence[PromptSource],
        folders: Sequence[Path],
        count_tokens: CountTokens | None = None,
        control: ControlTokens = NO_CONTROL_TOKENS,
    ) -> None:
        """folders: tried in turn for relative paths. count_tokens: by the teacher's tokenizer; only long contexts need it.
        control: of the same tokenizer; without them texts are taken as they are."""
        self._sources: dict[Split, Sequence[PromptSource]] = {"train": training, "eval": suites}
        self._folders, self._count_tokens, self._control = folders, count_tokens, control
        self._taught = DigestTable()
        self.tally = Tally()

    def __iter__(self) -> Iterator[Prompt]:
        self.tally, self._taught = Tally(), DigestTable()
        with Pool(timeout_s=TIMEOUT_S) as pool:  # starts its workers when the first reference needs one
            references = References(pool)
            for prompt in self._distinct("train", references):
                self.tally.train += 1
                self.tally.by_task[prompt.task] += 1
                self.tally.judged_by_model += prompt.verifier == LLM_JUDGE
                yield prompt
            if not self.tally.train:
                self._warn()
                raise UnusableInput(
                    "generate.prompts: the prompt set is empty; expected at least one source with a training prompt"
                )
            for item in self._distinct("eval", references):
                self.tally.eval += 1
                yield item
        self._warn()

    def _warn(self) -> None:
        for reason, lost in self.tally.rows.items():
            if lost.count:
                log.warning("rows left out: %d, because %s: %s", lost.count, WHY[reason], lost)
        if self.tally.escaped:
            counts = ", ".join(f"{count} in {source}" for source, count in self.tally.escaped.items())
            log.warning("control tokens of the teacher escaped by a backslash after their first character: %s", counts)

    def _distinct(self, split: Split, references: References) -> Iterator[Prompt]:
        """A side's prompts without those whose id has passed before: the first one counts."""
        seen, originals = DigestTable(), dict[str, str]()
        for number, source in enumerate(self._sources[split]):
            framing = Framing(source.twins if isinstance(source, SuiteSource) else None, self._control)
            for candidate in self._read(source, split, references):
                if self._passes(candidate, number, seen):
                    framing.see(candidate.prompt)
                    if candidate.prompt.twin_of:
                        originals[candidate.prompt.twin_of] = candidate.where
                    yield candidate.prompt
            for twin in framing.twins():
                if self._passes(Candidate(twin), number, seen):
                    yield twin
        for prompt_id, where in originals.items():
            if seen.find(bytes.fromhex(prompt_id)) is None:
                raise UnusableInput(
                    f"{where}: the original of this twin is not in the set: it was left out, or another source's count ended "
                    "before it; expected both, or leave the twin out too"
                )

    def _passes(self, candidate: Candidate, number: int, seen: DigestTable) -> bool:
        """Whether it is the first of its id, and no training prompt in the evaluation (UnusableInput)."""
        prompt, judged_by = candidate.prompt, judging_label(candidate.prompt)
        first = seen.add(bytes.fromhex(prompt.prompt_id), judged_by)
        if first is None:
            self._refuse_overlap(prompt, number)
            if escaped := num_escaped(prompt):
                self.tally.escaped[prompt.source] += escaped
            self.tally.twins += bool(prompt.twin_of)
            return True
        if candidate.where and first != judged_by:
            self._leave_out(OTHERWISE, candidate.where)
        else:
            self.tally.left_out["duplicate"] += 1
        return False

    def _leave_out(self, reason: str, row: str) -> None:
        self.tally.left_out[reason] += 1
        self.tally.rows[reason].add(row)

    def _refuse_overlap(self, prompt: Prompt, number: int) -> None:
        """Compared by text, not by prompt_id: the same question under another template version would still be a leak."""
        if not self._sources["eval"]:
            return
        text = normalised_text(prompt)
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if prompt.split == "train":
            self._taught.add(key, number)
        elif (twin := self._taught.find(key)) is not None:
            raise UnusableInput(
                f"evaluation item {prompt.prompt_id} of {prompt.source} is also a training prompt of "
                f"generate.prompts {twin}: {text[:60]!r}; mark its rows with one split"
            )

    def _read(self, source: PromptSource, split: Split, references: References) -> Iterator[Candidate]:
        """What a source offers. References of rows have passed; the other sources see to theirs."""
        side = Side(split, not self._is_shared(source, split))
        match source:
            case ReasoningGymSource():
                return map(Candidate, read_reasoning_gym(source, split, self.tally.left_out, self._control))
            case JsonlSource():
                rows = read_jsonl(source, side, self._folders, self.tally.left_out, self._control)
            case ParquetSource():
                rows = read_parquet(source, side, self._folders, self.tally.left_out, self._control)
            case DatasetsSource():
                rows = read_datasets(source, side, self._folders, self.tally.left_out, self._control)
            case OmniscienceSource():
                rows = read_omniscience(source, side, self._folders, self.tally.left_out, self._control)
            case RepositorySource():
                return map(Candidate, read_repository(source, split, self._folders, self._counter(source), self._control))
            case DocumentsSource():
                return map(Candidate, read_documents(source, split, self._folders, self._counter(source), self._control))
        return references.passing(rows, partial(self._leave_out, FAILS))

    def _is_shared(self, source: PromptSource, split: Split) -> bool:
        """True when the other side of the recipe reads the same rows, so that nothing of them is left out."""
        others = self._sources["eval" if split == "train" else "train"]
        return isinstance(source, RowSource) and any(
            isinstance(other, RowSource) and _rows_of(other) == _rows_of(source) for other in others
        )

    def _counter(self, source: PromptSource) -> CountTokens:
        if self._count_tokens is None:
            raise TypeError(f"{source.type} sources pack by tokens: give count_tokens of the teacher's tokenizer")
        return self._count_tokens


def _rows_of(source: RowSource) -> tuple[str, str, str | None]:
    return type(source).__name__, source.path, source.split_name if isinstance(source, DatasetsSource) else None


def normalised_text(prompt: Prompt) -> str:
    """All contents in a row, runs of whitespace made one."""
    return " ".join(" ".join(message.get("content", "").split()) for message in prompt.messages)


def judging_label(prompt: Prompt) -> int:
    """16 bits of a hash of all that decides a verdict. Of 65,536 pairs that ask the same and are judged otherwise, one agrees."""
    text = json.dumps((prompt.verifier, prompt.answer, prompt.details), ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=2).digest(), "little")


def num_escaped(prompt: Prompt) -> int:
    """Control tokens that were escaped in it, by its provenance."""
    return json.loads(prompt.provenance).get("escaped", 0) if prompt.provenance else 0


class PromptList(NamedTuple):
    """Prompts in source order, without duplicates; and how many candidates were left out, by reason."""

    prompts: list[Prompt]
    left_out: Counter[str]


def build_prompt_set(
    training: Sequence[PromptSource],
    suites: Sequence[PromptSource],
    folders: Sequence[Path],
    count_tokens: CountTokens | None = None,
    control: ControlTokens = NO_CONTROL_TOKENS,
) -> PromptList:
    """A whole PromptStream in memory, for small sets. Raises UnusableInput."""
    stream = PromptStream(training, suites, folders, count_tokens, control)
    return PromptList(list(stream), stream.tally.left_out)


# --- what decides a prompt set -----------------------------------------------------------------------------------


def source_hashes(sources: Iterable[PromptSource], folders: Sequence[Path]) -> dict[str, str]:
    """Name -> sha256 of everything outside the recipe that decides its prompts: files, trees, and templates, the shipped ones
    too. A path stands as the recipe writes it. (The tokenizer, whose control tokens no prompt may hold and by which long contexts
    are packed, is the caller's to add.)

    Raises:
        UnusableInput: for what is missing.
    """
    hashes: dict[str, str] = {}
    for source in sources:
        hashes |= _content_hashes(source, folders)
        for name in _template_names(source):
            hashes[f"template {name}"] = sha256_file(template_path(name, folders))
    return hashes


def _content_hashes(source: PromptSource, folders: Sequence[Path]) -> Mapping[str, str]:
    match source:
        case JsonlSource() | OmniscienceSource():
            return {source.path: sha256_file(find_file(source.path, folders))}
        case ParquetSource():
            parts = find_parts(source.path, folders, ".parquet", "prompt file")
            return {source.path: hash_files((part.name, part) for part in parts)}
        case DatasetsSource():
            folder = find_folder(source.path, folders, "datasets folder")
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return {source.path: hash_files((str(path.relative_to(folder)), path) for path in files)}
        case RepositorySource():
            seen = digest(
                source.include, source.exclude, source.max_file_bytes, size=4
            )  # of one tree, two sources may see two parts
            return {f"{source.path} {seen}": tree_hash(scan_tree(source, folders))}
        case DocumentsSource():
            return {" ".join(source.paths): hash_files(find_documents(source, folders).items())}
        case ReasoningGymSource():
            return {}


def _template_names(source: PromptSource) -> list[str]:
    match source:
        case RowSource():
            return [] if source.template is None else [source.template]
        case RepositorySource():
            return [source.template]
        case DocumentsSource():
            return [source.template, source.needles]
        case _:
            return []
