"""Long texts from files: plain text, or JSONL with a text a line."""

import glob
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from configs.errors import UnusableInput
from configs.prompt_sources import DocumentsSource
from generate.sources.jsonl import json_lines
from generate.tree import spdx_licence


class Document(NamedTuple):
    """A text to pack. name: of its file, with the line for JSONL. sha256: of the text. licence: SPDX, or ""."""

    name: str
    text: str
    sha256: str
    licence: str


def find_documents(source: DocumentsSource, folders: Sequence[Path]) -> dict[str, Path]:
    """Name (path from the folder it was found in) -> file, sorted, for all that the source's paths and patterns mean.

    Raises:
        UnusableInput: for a pattern that means no file, or a name that cannot stand on a line.
    """
    found: dict[Path, tuple[str, Path]] = {}
    for pattern in source.paths:
        for name, path in sorted(_matches(pattern, folders).items(), key=lambda match: (match[0].count("/"), match)):
            found.setdefault(path.resolve(), (name, path))  # a loop of links gives one file forty names, the shortest first
    names = Counter(name for name, _ in found.values())
    if bad := [name for name in names if not name.isprintable() or names[name] > 1]:
        raise UnusableInput(f"document {min(bad)!r}: its name is no printable UTF-8, or another's too; rename it")
    return dict(sorted(found.values()))


def _matches(pattern: str, folders: Sequence[Path]) -> dict[str, Path]:
    for folder in folders:
        matches = [Path(path) for path in glob.glob(str(folder / pattern), recursive=True)]  # noqa: PTH207
        if files := [path for path in matches if path.is_file()]:
            return {str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name: path for path in files}
    raise UnusableInput(
        f"documents {pattern}: no such file beside the recipe or in the working directory; correct its paths in the recipe"
    )


def load_documents(source: DocumentsSource, folders: Sequence[Path]) -> list[Document]:
    """The texts in the order of their names, empty ones left out. Raises UnusableInput naming file and line."""
    files = find_documents(source, folders)
    documents = [document for name, path in files.items() for document in _documents_of(path, name) if document.text.strip()]
    if not documents:
        raise UnusableInput(f"documents {' '.join(source.paths)}: no text in them; correct its paths in the recipe")
    return documents


def _documents_of(path: Path, name: str) -> list[Document]:
    if path.suffix == ".jsonl":
        texts = [(row.where.replace(path.name, name, 1), row.values.get("text")) for row in json_lines(path)]
        for where, text in texts:
            if not isinstance(text, str):
                raise UnusableInput(f"{where}: text is {type(text).__name__}, expected a string under the key text")
        return [_document(where, text) for where, text in texts if isinstance(text, str)]
    try:
        content = path.read_bytes().decode()
    except (UnicodeDecodeError, OSError) as error:
        raise UnusableInput(f"document {name}: {' '.join(str(error).split())}; expected readable UTF-8 text") from error
    if "\0" in content:
        raise UnusableInput(f"document {name}: it holds NUL bytes; expected text")
    return [_document(name, content)]


def _document(name: str, text: str) -> Document:
    return Document(name, text, hashlib.sha256(text.encode()).hexdigest(), spdx_licence(text))
