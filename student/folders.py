"""Where a student lies, and which one it is. No torch: a finished stage is recognised without loading anything."""

import hashlib
import json
from pathlib import Path

from configs.errors import UnusableInput

EMBEDDED = Path(__file__).parent / "embedded"


def resolve(model: str, setting: str = "student.model") -> Path:
    """The checkpoint folder that `setting` means; `embedded` is the shipped base.

    Raises:
        UnusableInput: when it is not a folder with a config.json and safetensors weights.
    """
    folder = EMBEDDED if model == "embedded" else Path(model)
    if not folder.is_dir():
        raise UnusableInput(f"{setting} {model}: no such folder; expected a Hugging Face checkpoint folder, or `embedded`")
    if not (folder / "config.json").is_file():
        raise UnusableInput(f"{setting} {model}: no config.json in the folder; expected a Hugging Face checkpoint")
    try:
        json.loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise UnusableInput(f"{setting} {model}: config.json is no JSON ({error}); restore it") from error
    if not any(folder.glob("*.safetensors")):
        remedy = (
            "rebuild it with: python -m train.pretrain student/embedded/recipe.yaml"
            if model == "embedded"
            else "convert the weights"
        )
        raise UnusableInput(f"{setting} {model}: no *.safetensors in the folder (pickled weights are never loaded); {remedy}")
    return folder


def max_positions(folder: Path) -> int | None:
    """Tokens of a conversation that the model is made for, by its config.json; None where that does not say. A rotary embedding
    that was stretched (YaRN and the like) counts with its factor."""
    said = json.loads((folder / "config.json").read_bytes())
    config = said.get("text_config") or said
    positions = config.get("max_position_embeddings")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    stretched = int(original * factor) if isinstance(original, int) and isinstance(factor, int | float) else 0
    return max(positions, stretched) if isinstance(positions, int) else None


def model_sha256(folder: Path) -> str:
    """Hex sha256 of a checkpoint with its tokenizer and template: of all that decides what it says to a conversation."""
    digest = hashlib.sha256(weights_sha256(folder).encode())
    for path in sorted([*folder.glob("*token*.json"), *folder.glob("*.jinja"), *folder.glob("vocab*"), *folder.glob("merges*")]):
        digest.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()};".encode())
    return digest.hexdigest()


def weights_sha256(folder: Path) -> str:
    """Hex sha256 over config.json and every safetensors file, name and bytes: the identity of a checkpoint.

    Reads all of it (about 1.5 GB/s), which also warms the page cache for the load that follows.
    """
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()
