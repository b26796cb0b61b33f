"""The files and folders that a recipe names, and the hashes of what they hold."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from configs.errors import UnusableInput
from data.store import sha256_file


def find_file(path: str, folders: Sequence[Path], what: str = "prompt file") -> Path:
    """The file `path` means, looked up in `folders` in turn. Raises UnusableInput."""
    for folder in folders:
        if (folder / path).is_file():
            return folder / path
    raise UnusableInput(
        f"{what} {path}: no such file beside the recipe or in the working directory; correct its path in the recipe"
    )


def find_folder(path: str, folders: Sequence[Path], what: str) -> Path:
    """The folder `path` means, with symbolic links resolved. Raises UnusableInput."""
    for folder in folders:
        if (folder / path).is_dir():
            return (folder / path).resolve()
    raise UnusableInput(
        f"{what} {path}: no such folder beside the recipe or in the working directory; correct its path in the recipe"
    )


def find_parts(path: str, folders: Sequence[Path], suffix: str, what: str) -> list[Path]:
    """The file `path` means, or the files of that suffix in the folder it means, by name. Raises UnusableInput."""
    for folder in folders:
        if (folder / path).is_dir():
            parts = sorted(part for part in (folder / path).glob(f"*{suffix}") if part.is_file())
            if not parts:
                raise UnusableInput(f"{what} {path}: the folder holds no *{suffix}; correct its path in the recipe")
            return parts
    return [find_file(path, folders, what)]


def hash_files(files: Iterable[tuple[str, Path]]) -> str:
    """sha256 over names and contents, in the order given."""
    whole = hashlib.sha256()
    for name, path in files:
        whole.update(f"{name}\0{sha256_file(path)}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()
