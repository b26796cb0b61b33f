"""Where a model lies, what its configuration file says and which model it is. No torch: plans and finished stages need none."""

import hashlib
import json
from pathlib import Path
from typing import Any

from configs import schema
from configs.errors import UnusableInput

EMBEDDED = Path(__file__).parent / "embedded"


def model_folder(model: str) -> Path:
    """The folder that `teacher.model` means, with a readable config.json in it; `embedded` is the shipped teacher.

    Raises:
        UnusableInput: no such folder, or no config.json there.
    """
    folder = EMBEDDED if model == "embedded" else Path(model)
    if not folder.is_dir():
        raise UnusableInput(f"teacher.model {model}: no such folder; expected a Hugging Face checkpoint folder, or `embedded`")
    if not (folder / "config.json").is_file():
        raise UnusableInput(f"teacher.model {model}: no config.json in the folder; expected a Hugging Face checkpoint")
    return folder


def resolve_model(model: str) -> Path:
    """As `model_folder`, with weights.

    Raises:
        UnusableInput: also when the folder holds no safetensors.
    """
    folder = model_folder(model)
    if not any(folder.glob("*.safetensors")):
        remedy = (
            "rebuild it with: python -m train.pretrain teacher/embedded/recipe.yaml"
            if model == "embedded"
            else "convert the weights"
        )
        raise UnusableInput(f"teacher.model {model}: no *.safetensors in the folder (pickled weights are never loaded); {remedy}")
    return folder


def read_config_json(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise UnusableInput(
            f"{folder / 'config.json'}: not valid JSON at line {error.lineno}; expected a Hugging Face configuration"
        ) from error


def fingerprint_model(folder: Path) -> str:
    """Hex digest (16 characters) over config.json, tokenizer, template and every safetensors file: what a trace depends on."""
    digest = hashlib.sha256()
    named = ("config.json", "tokenizer.json", "chat_template.jinja")
    for path in sorted([*(folder / name for name in named if (folder / name).is_file()), *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()[:16]


def fingerprint_teacher(teacher: schema.Teacher) -> str:
    """Identity of what answers: weights, tokenizer and compute dtype; for a server, its address and model name, and the
    tokenizer that counts its tokens. Layout and rank count are not in it: they must not change a token."""
    weights = (
        fingerprint_tokenizer_only(teacher.model)
        if isinstance(teacher.engine, schema.HttpEngine)
        else fingerprint_model(resolve_model(teacher.model))
    )
    if isinstance(teacher.engine, schema.HttpEngine):
        how = f"{teacher.engine.base_url} {teacher.engine.model or teacher.model}"
    else:
        how = teacher.engine.dtype
    return hashlib.sha256(f"{weights} {how}".encode()).hexdigest()[:16]


def fingerprint_tokenizer_only(model: str) -> str:
    folder = EMBEDDED if model == "embedded" else Path(model)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnusableInput(
            f"teacher.model {model}: no tokenizer.json; the http engine needs the teacher's tokenizer folder to count tokens"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()
