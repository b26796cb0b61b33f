"""The readable text files of a source tree, in an order that no file system decides.

Left out: what .gitignore files say (nested ones too, and those above the root as far as the repository reaches), `.git`,
symbolic links (never followed, so nothing outside is read), what is no regular file (a FIFO would hang the reader), files
that are too large, binary (a NUL byte, or no UTF-8) or empty, and names that cannot stand on a line of a prompt.
"""

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pathspec

from configs.errors import UnusableInput
from configs.prompt_sources import RepositorySource
from generate.sources.paths import find_folder

_SPDX = re.compile(r"SPDX-License-Identifier:\s*([A-Za-z0-9.+()-]+(?: (?:AND|OR|WITH) [A-Za-z0-9.+()-]+)*)")
_SPDX_WITHIN = 2_000  # characters from the start of a file
_LICENCE_FILE = re.compile(r"(licen[cs]e|copying|unlicense)([.-].*)?", re.IGNORECASE)


class SourceFile(NamedTuple):
    """A file of a tree. path: from the root, with slashes. licence: an SPDX expression, `see PATH`, or ""."""

    path: str
    num_bytes: int
    sha256: str
    licence: str


@dataclass(frozen=True, slots=True)
class Tree:
    """name: what prompts call it. files: sorted by path. skipped: how many others there are, by reason; what .gitignore or the
    recipe excludes is not among them."""

    name: str
    root: Path
    files: tuple[SourceFile, ...]
    skipped: dict[str, int]

    def read(self, file: SourceFile) -> str:
        """The text of a file. Raises UnusableInput when it is not what was scanned."""
        content = _read(self.root, file.path, self.name)
        if hashlib.sha256(content or b"").hexdigest() != file.sha256:
            raise UnusableInput(f"repository {self.name}: {file.path} changed while prompts were built; run the command again")
        assert content is not None
        return content.decode()


def tree_hash(tree: Tree) -> str:
    """sha256 over path, content and licence of every file: what a prompt can be made of."""
    lines = (f"{file.path}\0{file.sha256}\0{file.licence}\n" for file in tree.files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def scan_tree(source: RepositorySource, folders: Sequence[Path]) -> Tree:
    """The files of a source's tree, each read once.

    Raises:
        UnusableInput: no such folder, a file that cannot be read, or nothing to read.
    """
    root = find_folder(source.path, folders, "repository")
    name = Path(source.path).name  # as the recipe writes it: where a checkout happens to lie must not change its prompts
    name = name if name not in ("", "..") else "repository"
    skipped: Counter[str] = Counter()
    include, exclude = (pathspec.GitIgnoreSpec.from_lines(globs) for globs in (source.include, source.exclude))
    paths = sorted(path for path in walk(root, name, skipped) if not exclude.match_file(path))
    licences = {path.rpartition("/")[0]: path for path in reversed(paths) if _LICENCE_FILE.fullmatch(path.rpartition("/")[2])}
    files = []
    for path in paths:
        if source.include and not include.match_file(path):
            continue
        content = _read(root, path, name)
        if reason := _unusable(content, source.max_file_bytes):
            skipped[reason] += 1
            continue
        assert content is not None
        files.append(SourceFile(path, len(content), hashlib.sha256(content).hexdigest(), _licence(path, content, licences)))
    if not files:
        seen = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "no files"
        raise UnusableInput(
            f"repository {source.path}: no text file to ask about ({seen}); correct path, include or max_file_bytes"
        )
    return Tree(name, root, tuple(files), dict(sorted(skipped.items())))


# --- walking -----------------------------------------------------------------------------------------------------


class _Rules(NamedTuple):
    """One .gitignore: its folder (from the top of the repository, "" or ending in a slash) and what it says."""

    folder: str
    spec: pathspec.GitIgnoreSpec


def walk(root: Path, name: str, skipped: Counter[str]) -> Iterator[str]:
    """Paths below `root` of the regular files that nothing ignores, in any order. Raises UnusableInput."""
    prefix, outer = _rules_above(root)
    pending = [("", outer)]
    while pending:
        folder, rules = pending.pop()
        try:
            with os.scandir(root / folder) as entries:
                found = list(entries)
        except OSError as error:
            raise UnusableInput(
                f"repository {name}: {folder or '.'}: {error.strerror}; exclude it in .gitignore or make it readable"
            ) from error
        if any(entry.name == ".gitignore" and entry.is_file(follow_symlinks=False) for entry in found):
            rules = (*rules, _Rules(prefix + folder, _parse_rules(_read(root, f"{folder}.gitignore", name) or b"")))
        for entry in found:
            path = folder + entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.name == ".git" or _ignored(prefix + path + "/" * is_folder, rules):
                continue
            if reason := _unwalkable(entry, is_folder):
                skipped[reason] += 1
            elif is_folder:
                pending.append((path + "/", rules))
            else:
                yield path


def _unwalkable(entry: os.DirEntry[str], is_folder: bool) -> str:
    if entry.is_symlink():
        return "symbolic link"
    if not is_folder and not entry.is_file(follow_symlinks=False):
        return "not a regular file"
    return "" if entry.name.isprintable() else "unprintable name"  # surrogates (no UTF-8) are not printable either


def _rules_above(root: Path) -> tuple[str, tuple[_Rules, ...]]:
    """`root` from the top of its git repository, and the rules of the folders above it. Outside a repository, or in a
    folder that those rules ignore (and the recipe names all the same), nothing."""
    top = next((folder for folder in (root, *root.parents) if (folder / ".git").exists()), root)
    parts = root.relative_to(top).parts
    rules: list[_Rules] = []
    for depth in range(len(parts)):
        file = top.joinpath(*parts[:depth]) / ".gitignore"
        if file.is_file() and not file.is_symlink():
            rules.append(_Rules("".join(f"{part}/" for part in parts[:depth]), _parse_rules(file.read_bytes())))
        if _ignored("".join(f"{part}/" for part in parts[: depth + 1]), rules):
            return "", ()
    return "".join(f"{part}/" for part in parts), tuple(rules)


def _parse_rules(content: bytes) -> pathspec.GitIgnoreSpec:
    """Lines that are no pattern are passed over, as git does."""
    lines = []
    for line in content.decode(errors="surrogateescape").split("\n"):
        try:
            pathspec.GitIgnoreSpec.from_lines([line.rstrip("\r")])
        except ValueError:
            continue
        lines.append(line.rstrip("\r"))
    return pathspec.GitIgnoreSpec.from_lines(lines)


def _ignored(path: str, rules: Sequence[_Rules]) -> bool:
    """The deepest file with a matching pattern decides. path: from the top, a folder with a slash at its end."""
    for folder, spec in reversed(rules):
        found = spec.check_file(path.removeprefix(folder)).include
        if found is not None:
            return found
    return False


# --- reading -----------------------------------------------------------------------------------------------------


def _read(root: Path, path: str, name: str) -> bytes | None:
    """The bytes of a regular file; None when something else has taken its place since it was listed."""
    try:
        descriptor = os.open(root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:  # noqa: PTH123
            return file.read() if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    except OSError as error:
        raise UnusableInput(
            f"repository {name}: {path}: {error.strerror}; exclude it in .gitignore or make it readable"
        ) from error


def _unusable(content: bytes | None, max_bytes: int) -> str:
    """Why a file cannot be packed; "" when it can."""
    if content is None:
        return "not a regular file"
    if len(content) > max_bytes:
        return "too large"
    if b"\0" in content:
        return "binary"
    try:
        return "" if content.decode().strip() else "empty"
    except UnicodeDecodeError:
        return "binary"


def _licence(path: str, content: bytes, licences: dict[str, str]) -> str:
    """What the file says of itself, else the nearest licence file above it."""
    if found := spdx_licence(content[:_SPDX_WITHIN].decode(errors="replace")):
        return found
    return next((f"see {licences[folder]}" for folder in _folders_above(path) if folder in licences), "")


def spdx_licence(text: str) -> str:
    """The SPDX expression near the start of a text, or ""."""
    found = _SPDX.search(text[:_SPDX_WITHIN])
    return found.group(1) if found else ""


def _folders_above(path: str) -> Iterable[str]:
    """`a/b` and `a` and "" of `a/b/c.py`."""
    while path:
        path = path.rpartition("/")[0]
        yield path
