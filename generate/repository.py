"""Long prompts about a source tree: files packed to a token budget, and one versioned task about them.

Each prompt has a focus file, drawn by hash from the code files of its side of the split: a file that evaluation asks about
is never the focus of a training prompt. Which files go in, until the budget is used: the focus; README and manifests of the
root; then all others by how many folders lie between them and the focus, and by path. In which order they stand: README and
manifests first, then by path, beginning with the file from which on the focus comes to stand at a depth drawn evenly (and
after the last path the first; in plain path order neighbours of a deep folder all stood at the end). Whole files only
(generate/packing.py), with control tokens of the teacher escaped (generate/control_tokens.py); a bug is planted in the file as it
is, before that.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from configs.errors import UnusableInput
from configs.prompt_sources import RepositorySource
from data.records import Message, Prompt, Split, digest, prompt_identity
from data.split import is_held_out
from generate.control_tokens import NO_CONTROL_TOKENS, ControlTokens, refuse_in
from generate.packing import (
    CHAT_TOKENS,
    NAMED_LEFT_OUT,
    CountTokens,
    Fitted,
    Packed,
    Piece,
    Shelf,
    Text,
    fit,
    lines_of,
    pack,
)
from generate.planting import CODE, PLANTABLE, Planted, plant
from generate.templates import Template, load_template
from generate.tree import SourceFile, Tree, scan_tree, tree_hash

VARIABLES = ("context", "repository", "focus", "num_files", "pick")
"""What a template may use. context: the packed files; focus: path of the file asked about; pick: a number of the prompt's
own, for templates that choose among questions."""
PREAMBLE = (
    "readme", "pyproject.toml", "setup.py", "setup.cfg", "requirements.txt", "package.json", "cargo.toml", "go.mod", "pom.xml",
    "build.gradle", "cmakelists.txt", "makefile", "gemfile", "composer.json",
)  # fmt: skip
"""Names (lower case; README with any suffix) of the root's files that come first, in this order."""


class _Focus(NamedTuple):
    """A file to ask about, for the `round`-th time."""

    path: str
    round: int


def read_repository(
    source: RepositorySource,
    split: Split,
    folders: Sequence[Path],
    count_tokens: CountTokens,
    control: ControlTokens = NO_CONTROL_TOKENS,
) -> Iterator[Prompt]:
    """`source.count` prompts of one side, the same ones for the same tree, seed and control tokens.

    Raises:
        UnusableInput: an unreadable tree, a template that asks for what it cannot have or that writes a control token, a budget
            too small for one file, or fewer different prompts than asked for.
    """
    template = load_template(source.template, folders).require(VARIABLES)
    if "context" not in template.variables:
        raise UnusableInput(f"template {template.name}: it never uses {{{{ context }}}}, which holds the packed files")
    builder = _Builder(source, split, scan_tree(source, folders), template, count_tokens, control)
    seen: set[str] = set()
    paths = candidates = builder.candidates()
    for number in range(builder.rounds):
        fruitful = []
        for path in paths:  # no file is asked about twice before each was
            if (prompt := builder.build(_Focus(path, number))) is None or prompt.prompt_id in seen:
                continue
            fruitful.append(path)
            seen.add(prompt.prompt_id)
            yield prompt
            if len(seen) == source.count:
                return
        paths = fruitful
    raise UnusableInput(
        f"repository {source.path}: only {len(seen)} different {split} prompts about {len(candidates)} files, "
        f"expected count {source.count}; lower count, raise budget_tokens or widen include"
    )


class _Builder:
    """What all prompts of a source share."""

    def __init__(
        self,
        source: RepositorySource,
        split: Split,
        tree: Tree,
        template: Template,
        count_tokens: CountTokens,
        control: ControlTokens,
    ) -> None:
        self.source, self.tree, self.template, self.count_tokens, self.control = source, tree, template, count_tokens, control
        self.split: Split = split
        self.files = {file.path: file for file in tree.files}
        self.shelf = Shelf(lambda path: tree.read(self.files[path]), count_tokens, control, numbered=source.plants)
        self.room = source.budget_tokens - CHAT_TOKENS
        self.hash = tree_hash(tree)
        self.rounds = _ROUNDS if source.plants or "pick" in template.variables else 1

    def candidates(self) -> list[str]:
        """Paths that may be a focus on this side, in the seed's order. With no code in the tree, any file may. None is a focus
        whose path stands escaped in the prompt: the answer would name a file that is not there."""
        code = [path for path in self.files if path.endswith(PLANTABLE if self.source.plants else CODE)]
        if self.source.plants:  # a bug in a test is no bug of the program
            code = [path for path in code if not _TEST.search(path)] or code
        elif not code:
            code = list(self.files)
        ours = [path for path in code if is_held_out(path) == (self.split == "eval") and not self.control.find(path)]
        return sorted(ours, key=lambda path: digest(self.source.seed, path))

    def build(self, focus: _Focus) -> Prompt | None:
        """None when nothing (more) can be planted in the focus, or not even its first line fits."""
        [frame] = self.count_tokens([self._render(focus, "", len(self.files))])
        room = self.room - frame
        piece = self._focus_piece(self.shelf.text(focus.path), room)
        planted = None
        if piece is not None and self.source.plants:
            text = "".join(self.shelf.text(focus.path).lines)
            planted = plant(focus.path, text, str(self.source.seed), focus.round, piece.num_lines)
            piece = None if planted is None else self._focus_piece(Text(focus.path, lines_of(planted.text)), room)
        if piece is None or (planted is not None and planted.site.line > piece.num_lines):
            return None
        packed = pack(self.shelf, self.by_proximity(focus.path), [piece], room)
        fitted = fit(
            packed, 1, self.room, lambda pieces: self._render(focus, self._context(focus, pieces), len(pieces)), self.count_tokens
        )
        return None if fitted is None else self._prompt(focus, fitted, planted)

    def _focus_piece(self, text: Text, room: int) -> Piece | None:
        whole = self.shelf.whole(text)
        return whole if whole.tokens <= room else self.shelf.cut(text, room)

    def by_proximity(self, focus: str) -> list[str]:
        """All paths but the focus, in the order in which they are taken."""
        others = (path for path in self.files if path != focus)
        return sorted(others, key=lambda path: (preamble_rank(path), folders_between(path, focus), path))

    def _arranged(self, focus: _Focus, pieces: Sequence[Piece]) -> list[Piece]:
        return arrange(pieces, focus.path, int(digest(self.source.seed, *focus, "depth", size=4), 16) / 2**32)

    def _context(self, focus: _Focus, pieces: Sequence[Piece]) -> str:
        return "".join(piece.block for piece in self._arranged(focus, pieces))

    def _render(self, focus: _Focus, context: str, num_files: int) -> str:
        values = {
            "context": context,
            "repository": self.tree.name,
            "focus": focus.path,
            "num_files": num_files,
            "pick": int(digest(self.source.seed, focus.path, size=4), 16) + focus.round,
        }
        return self.template.render(values)

    def _prompt(self, focus: _Focus, fitted: Fitted, planted: Planted | None) -> Prompt:
        where = f"repository {self.source.path}: the prompt of template {self.template.name}"
        refuse_in(fitted.content, self.control, where, "no packed file wrote it: take it out of the template or the tree's name")
        messages: tuple[Message, ...] = ({"role": "user", "content": fitted.content},)
        answer = "" if planted is None else f"{focus.path}:{planted.site.line}"
        return Prompt(
            prompt_id=prompt_identity(messages, self.template.version),
            source=f"repository {self.tree.name}",
            task=f"repository/{self.template.name}",
            prompt_version=self.template.version,
            messages=messages,
            answer=answer,
            verifier=self.source.judged_by if answer else "",
            split=self.split,
            known=None,
            details="",
            licence=self.source.licence,
            max_tokens=self.source.max_tokens,
            reasoning_budget=self.source.reasoning_budget,
            evidence="" if planted is None else self._evidence(focus, fitted, planted),
            provenance=self._provenance(focus, fitted.packed),
        )

    def _evidence(self, focus: _Focus, fitted: Fitted, planted: Planted) -> str:
        """token: how many tokens of the message stand before the line, counted on their own; depth: over all of them. before and
        after: the line as the prompt would have shown it, and as it does."""
        before = fitted.content.find(context := self._context(focus, fitted.packed.pieces))
        if before < 0:
            raise UnusableInput(
                f"template {self.template.name}: it changes {{{{ context }}}}, so that no place in it can be named"
            )
        line = f"{planted.site.line:>5} "
        block = next(piece.block for piece in fitted.packed.pieces if piece.name == focus.path)
        before += context.index(block) + block.index(f"\n{line}") + 1
        [token] = self.count_tokens([fitted.content[:before]])
        place = {
            "path": focus.path, "line": planted.site.line, "token": token, "depth": round(token / fitted.tokens, 4),
            "kind": planted.site.kind,
            "before": self.control.escape(planted.before).text, "after": self.control.escape(planted.after).text,
        }  # fmt: skip
        return json.dumps({"total_tokens": fitted.tokens, "places": [place]}, ensure_ascii=False)

    def _provenance(self, focus: _Focus, packed: Packed) -> str:
        """sha256 and licence are the original file's; tokens, and control tokens that were escaped, those of its block in the
        prompt."""
        files = [_origin(self.files[piece.name], piece) for piece in self._arranged(focus, packed.pieces)]
        return json.dumps(
            {
                "repository": self.tree.name,
                "tree": self.hash,
                "focus": focus.path,
                "files": files,
                "left_out": packed.left_out[:NAMED_LEFT_OUT],
                "num_left_out": len(packed.left_out),
                "escaped": sum(piece.escaped for piece in packed.pieces),
                "skipped": self.tree.skipped,
            },
            ensure_ascii=False,
        )


_TEST = re.compile(r"(^|/)(tests?|specs?)/|(^|/)test_|_test\.|\.(test|spec)\.")
_ROUNDS = 64
"""How often a file may be asked about, each time another bug or another question."""


def _origin(file: SourceFile, piece: Piece) -> dict[str, object]:
    return {
        "path": file.path,
        "sha256": file.sha256,
        "licence": file.licence,
        "tokens": piece.tokens,
        "truncated": piece.truncated,
        "escaped": piece.escaped,
    }


def arrange(pieces: Sequence[Piece], focus: str, depth: float) -> list[Piece]:
    """README and manifests, then the others by path, turned until about `depth` of their tokens stand before the focus."""
    ordered = sorted(pieces, key=lambda piece: (preamble_rank(piece.name), piece.name))
    first = sum(preamble_rank(piece.name) < len(PREAMBLE) for piece in pieces)
    others = ordered[first:]
    place = next((index for index, piece in enumerate(others) if piece.name == focus), None)
    if place is None:  # the focus is of the README's kind
        return ordered
    wanted, start = depth * sum(piece.tokens for piece in others), place
    for _ in others[1:]:
        if (wanted := wanted - others[start - 1].tokens) < 0:
            break
        start = (start - 1) % len(others)
    return [*ordered[:first], *others[start:], *others[:start]]


def preamble_rank(path: str) -> int:
    """Place among README and manifests of the root; the same number, behind them, for everything else."""
    name = path.lower()
    name = "readme" if name.startswith("readme.") else name
    return PREAMBLE.index(name) if name in PREAMBLE else len(PREAMBLE)


def folders_between(path: str, other: str) -> int:
    """Steps from one file's folder to the other's: up to the common one and down again."""
    ours, theirs = path.split("/")[:-1], other.split("/")[:-1]
    common = 0
    while common < min(len(ours), len(theirs)) and ours[common] == theirs[common]:
        common += 1
    return len(ours) + len(theirs) - 2 * common
