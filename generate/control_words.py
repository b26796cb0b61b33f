"""Which words the tokenizers of a recipe turn into control tokens, for a filter over answers (data/filters/control_tokens.py)."""

import functools
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UnusableInput
from data.processes import map_unordered
from generate.control_tokens import control_tokens_of


def tokenizers_sha256(folders: Sequence[Path]) -> str:
    """Hex, of the files that decide which words those are; loads nothing."""
    state = hashlib.sha256()
    for folder in folders:
        for path in sorted([*folder.glob("*token*.json"), *folder.glob("*.jinja"), *folder.glob("*.model")]):
            state.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()};".encode())
    return state.hexdigest()


@functools.cache
def control_words(folders: tuple[Path, ...]) -> tuple[str, ...]:
    """The words of all these tokenizers, sorted. Raises UnusableInput for a folder without one.

    In a process of its own, unless torch is here already: transformers brings it along, and 300 MB would stay for as long as a
    build lasts.
    """
    (words,) = map_unordered(_words, [folders], num_workers=0 if "torch" in sys.modules else 1)
    return words


def _words(folders: Sequence[Path]) -> tuple[str, ...]:
    return tuple(sorted({word for folder in folders for word in _words_of(folder)}))


def _words_of(folder: Path) -> tuple[str, ...]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnusableInput(
            f"{folder}: no usable tokenizer, which says what no text may hold; copy the model's tokenizer.json and "
            "tokenizer_config.json there, or leave control_tokens out of data.filters"
        ) from error
    return control_tokens_of(tokenizer).tokens
