"""Long prompts of packed documents with two facts hidden in them, far apart, that one question needs both of.

Documents are taken in an order drawn by hash for every prompt, whole ones (generate/packing.py), until the budget is used, with
control tokens of the teacher escaped (generate/control_tokens.py) before anything is hidden or measured.
The facts and their decoys are inserted at line ends near the depths of a grid (generate/needles.py), and where each came to
stand is measured and recorded, so that a report can show accuracy by depth.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

from configs.errors import UnusableInput
from configs.prompt_sources import DocumentsSource
from data.records import Message, Prompt, Split, digest, prompt_identity
from data.split import is_held_out
from generate.control_tokens import NO_CONTROL_TOKENS, ControlTokens, refuse_in
from generate.hiding import Hidden, Wanted, insert, tokens_before
from generate.needles import DISTANT, STRATUM, Needle, depth_pairs, make_needle
from generate.needles import VARIABLES as NEEDLE_VARIABLES
from generate.packing import CHAT_TOKENS, NAMED_LEFT_OUT, CountTokens, Fitted, Packed, Piece, Shelf, fit, pack
from generate.sources.texts import load_documents
from generate.templates import load_template

VARIABLES = ("context", "question", "num_documents")
"""What a template may use. context: the packed documents with the facts in them."""
SEEDS_PER_PROMPT = 300
"""Seeds tried for a question: one in ten falls on the evaluation's side, so that 300 misses do not happen by chance."""
BUILDS_PER_PROMPT = 20
"""Prompts tried with different questions: their texts may hold a fact's words already, or be too short."""


def read_documents(
    source: DocumentsSource,
    split: Split,
    folders: Sequence[Path],
    count_tokens: CountTokens,
    control: ControlTokens = NO_CONTROL_TOKENS,
) -> Iterator[Prompt]:
    """`source.count` prompts of one side, the same ones for the same documents, seed and control tokens. A question's text
    decides its side.

    Raises:
        UnusableInput: missing or unreadable documents, texts too short for two distant facts, or a template or facts that write
            a control token.
    """
    builder = _Builder(source, split, folders, count_tokens, control)
    seen: set[str] = set()
    missed = failed = 0  # since the last prompt
    for attempt in count():
        if missed == SEEDS_PER_PROMPT or failed == BUILDS_PER_PROMPT:
            break
        needle = make_needle(builder.needles, (source.seed, attempt))
        if is_held_out(needle.question) != (split == "eval") or needle.question in seen:
            missed += 1
        elif (prompt := builder.build(needle, attempt, len(seen))) is None:
            failed += 1
        else:
            missed = failed = 0
            seen.add(needle.question)
            yield prompt
            if len(seen) == source.count:
                return
    raise UnusableInput(
        f"documents {' '.join(source.paths)}: only {len(seen)} different {split} prompts, expected count {source.count}; their "
        f"texts are too short for facts {DISTANT} of the length apart, or hold the facts' words: add texts or raise budget_tokens"
    )


class _Builder:
    """What all prompts of a source share."""

    def __init__(
        self, source: DocumentsSource, split: Split, folders: Sequence[Path], count_tokens: CountTokens, control: ControlTokens
    ) -> None:
        self.source, self.count_tokens, self.control = source, count_tokens, control
        self.split: Split = split
        self.template = load_template(source.template, folders).require(VARIABLES)
        self.needles = load_template(source.needles, folders).require(NEEDLE_VARIABLES)
        if missing := {"context", "question"} - self.template.variables:
            raise UnusableInput(f"template {self.template.name}: it never uses {{{{ {min(missing)} }}}}")
        self.version = f"{self.template.name}+{self.needles.name}@{digest(self.template.text, self.needles.text, size=4)}"
        self.documents = {document.name: document for document in load_documents(source, folders)}
        self.shelf = Shelf(lambda name: self.documents[name].text, count_tokens, control)
        self.pairs = depth_pairs(source.seed)

    def build(self, needle: Needle, attempt: int, number: int) -> Prompt | None:
        """The `number`-th prompt; None when this needle does not fit these texts."""
        budget = self.source.budget_tokens - CHAT_TOKENS
        facts = self._facts(needle, attempt)
        [frame, *costs] = self.count_tokens([self._render("", needle, len(self.documents)), *(f"\n{fact}\n" for fact in facts)])
        order = sorted(self.documents, key=lambda name: digest(self.source.seed, attempt, name))
        packed = pack(self.shelf, order, [], budget - frame - sum(costs))
        # Facts are put in afterwards: their tokens are kept free here.
        fitted = fit(packed, 0, budget - sum(costs), lambda pieces: self._framed(pieces, needle), self.count_tokens)
        if fitted is None or not fitted.packed.pieces or any(word in fitted.content for word in needle.own):
            return None
        return self._hide(needle, dict(zip(facts, costs, strict=True)), fitted, attempt, number)

    def _facts(self, needle: Needle, attempt: int) -> list[str]:
        """Link and code of the needle, then those of its decoys, all on different places."""
        facts, taken = [needle.link, needle.code], [needle.own[0]]
        for rank in range(self.source.decoys):
            decoy = make_needle(self.needles, (self.source.seed, attempt, "decoy", rank), taken)
            facts += [decoy.link, decoy.code]
            taken.append(decoy.own[0])
        return facts

    def _hide(self, needle: Needle, costs: Mapping[str, int], fitted: Fitted, attempt: int, number: int) -> Prompt | None:
        """The prompt with its facts at the first pair of depths, from the `number`-th on, that the lines allow."""
        pieces, facts = fitted.packed.pieces, list(costs)
        start = fitted.content.find(context_of(pieces))
        if start < 0:
            raise UnusableInput(f"template {self.template.name}: it changes {{{{ context }}}}; no place in it can be named")
        [head] = self.count_tokens([fitted.content[:start]])
        for offset in range(len(self.pairs)):
            depths = [
                *self.pairs[(number + offset) % len(self.pairs)],
                *(self._random_depth(attempt, fact) for fact in facts[2:]),
            ]
            wanted = [Wanted(fact, costs[fact], depth) for fact, depth in zip(facts, depths, strict=True)]
            context, hidden = insert(pieces, wanted, head, fitted.tokens + sum(costs.values()))
            content = self._render(context, needle, len(pieces))
            [total] = self.count_tokens([content])
            if total > self.source.budget_tokens - CHAT_TOKENS:
                return None
            tokens = tokens_before(content, [start + fact.start for fact in hidden], self.count_tokens)
            if _as_wanted(hidden[:2], tokens, total):
                return self._prompt(needle, content, fitted.packed, _evidence(hidden, tokens, total))
        return None

    def _random_depth(self, attempt: int, fact: str) -> float:
        return round(0.02 + 0.96 * int(digest(self.source.seed, attempt, fact, size=4), 16) / 2**32, 4)

    def _framed(self, pieces: Sequence[Piece], needle: Needle) -> str:
        return self._render(context_of(pieces), needle, len(pieces))

    def _render(self, context: str, needle: Needle, num_documents: int) -> str:
        return self.template.render({"context": context, "question": needle.question, "num_documents": num_documents})

    def _prompt(self, needle: Needle, content: str, packed: Packed, evidence: str) -> Prompt:
        where = f"documents {self.source.paths[0]}: the prompt of template {self.template.name} and facts {self.needles.name}"
        refuse_in(content, self.control, where, "no document wrote it: take it out of these two files")
        messages: tuple[Message, ...] = ({"role": "user", "content": content},)
        return Prompt(
            prompt_id=prompt_identity(messages, self.version),
            source=f"documents {self.source.paths[0]}",
            task=f"documents/{self.template.name}",
            prompt_version=self.version,
            messages=messages,
            answer=needle.answer,
            verifier="exact",
            split=self.split,
            known=None,
            details="",
            licence=self.source.licence,
            max_tokens=self.source.max_tokens,
            reasoning_budget=self.source.reasoning_budget,
            evidence=evidence,
            provenance=self._provenance(packed),
        )

    def _provenance(self, packed: Packed) -> str:
        """tokens: of the document's block before facts were put into it; escaped: control tokens of that block."""
        files = []
        for piece in packed.pieces:
            document = self.documents[piece.name]
            files.append(
                {
                    "path": piece.name,
                    "sha256": document.sha256,
                    "licence": document.licence,
                    "tokens": piece.tokens,
                    "truncated": piece.truncated,
                    "escaped": piece.escaped,
                }
            )
        left_out = {"left_out": packed.left_out[:NAMED_LEFT_OUT], "num_left_out": len(packed.left_out)}
        escaped = sum(piece.escaped for piece in packed.pieces)
        return json.dumps({"files": files, **left_out, "escaped": escaped}, ensure_ascii=False)


def context_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.block for piece in pieces)


def _as_wanted(pair: Sequence[Hidden], tokens: Sequence[int], total: int) -> bool:
    """Both facts are within their stratum of the grid, and far enough apart."""
    near = all(abs(token / total - fact.depth) <= STRATUM / 2 for fact, token in zip(pair, tokens, strict=False))
    return near and abs(tokens[0] - tokens[1]) >= DISTANT * total


def _evidence(hidden: Sequence[Hidden], tokens: Sequence[int], total: int) -> str:
    """token: how many tokens of the message stand before the fact; depth: over all of them; target: the depth aimed at."""
    places = [
        {"fact": fact.fact, "path": fact.name, "token": token, "depth": round(token / total, 4), "target": fact.depth}
        for fact, token in zip(hidden, tokens, strict=True)
    ]
    return json.dumps({"total_tokens": total, "places": places[:2], "decoys": places[2:]}, ensure_ascii=False)
