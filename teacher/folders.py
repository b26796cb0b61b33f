"""Where a model lies, what its configuration file says and which model it is. No torch: plans and finished stages need none."""

import hashlib
import json
from pathlib import Path
from typing import Any

from configs import schema
from configs.errors import UnusableInput

EMBEDDED = Path(__file__).parent / "embedded"
IDENTITY = ("config.json", "tokenizer.json", "chat_template.jinja")
"""With the weights, what a trace depends on."""


def model_folder(model: str, key: str = "teacher.model") -> Path:
    """The folder that `teacher.model` means, with a config.json in it; `embedded` is the shipped teacher. key: of the recipe, for
    whoever is told that it is not there.

    Raises:
        UnusableInput: no such folder, or no config.json there.
    """
    folder = EMBEDDED if model == "embedded" else Path(model)
    if not folder.is_dir():
        raise UnusableInput(f"{key} {model}: no such folder; expected a Hugging Face checkpoint folder, or `embedded`")
    if not (folder / "config.json").is_file():
        raise UnusableInput(f"{key} {model}: no config.json in the folder; expected a Hugging Face checkpoint")
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


def weights_folder(teacher: schema.Teacher) -> Path:
    """Where the engine loads from: the prepared shards that the recipe names, or the checkpoint.

    Raises:
        UnusableInput: also when the shards are not finished, or were made of another checkpoint than teacher.model.
    """
    prepared = prepared_folder(teacher)
    if prepared is None:
        return resolve_model(teacher.model)
    from teacher.checkpoint.manifest import check_source, read_manifest  # pyarrow comes with it, which `plan` can do without

    check_source(prepared, read_manifest(prepared), EMBEDDED if teacher.model == "embedded" else Path(teacher.model))
    return prepared


def prepared_folder(teacher: schema.Teacher) -> Path | None:
    """teacher.engine.prepared, for the one engine that has it."""
    named = teacher.engine.prepared if isinstance(teacher.engine, schema.DeepSpeedEngine) else ""
    return Path(named) if named else None


def read_config_json(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text())
        if not isinstance(found, dict):
            raise UnusableInput(f"{folder / 'config.json'}: a JSON {type(found).__name__}, expected a Hugging Face configuration")
        return found
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f"JSON at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else f"UTF-8 at byte {error.start}"
        raise UnusableInput(f"{folder / 'config.json'}: not valid {where}; expected a Hugging Face configuration") from error


def fingerprint_model(folder: Path) -> str:
    """Hex digest (16 characters) over config.json, tokenizer, template and every safetensors file: what a trace depends on.
    Prepared shards answer with that of the checkpoint they were made of."""
    from teacher.checkpoint.manifest import fingerprint_of, is_prepared, read_manifest

    if is_prepared(folder):
        return read_manifest(folder).source.fingerprint
    return fingerprint_of({path.name: sha256_of(path) for path in identity_files(folder)})


def identity_files(folder: Path) -> list[Path]:
    """The files that decide what a model answers."""
    return sorted([*(folder / name for name in IDENTITY if (folder / name).is_file()), *folder.glob("*.safetensors")])


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_teacher(teacher: schema.Teacher) -> str:
    """Identity of what answers: weights, tokenizer and compute dtype. Layout and rank count are not in it: they must not
    change a token. For a server: its model's name, the precision it serves, which side owns the template, and the tokenizer
    that counts; not its address, for servers come and go while a run goes on."""
    if isinstance(teacher.engine, schema.HttpEngine):
        engine = teacher.engine
        weights, how = fingerprint_tokenizer_only(teacher.model), f"{engine.model or teacher.model} {engine.api} {engine.dtype}"
    else:
        weights, how = fingerprint_model(weights_folder(teacher)), teacher.engine.dtype
    return hashlib.sha256(f"{weights} {how}".encode()).hexdigest()[:16]


def fingerprint_tokenizer_only(model: str) -> str:
    """Of the files that turn messages into ids and text into counts. Raises UnusableInput when there is no tokenizer.json."""
    folder = EMBEDDED if model == "embedded" else Path(model)
    if not (folder / "tokenizer.json").is_file():
        raise UnusableInput(
            f"teacher.model {model}: no tokenizer.json; the http engine needs the teacher's tokenizer folder to count tokens"
        )
    found = [folder / name for name in ("tokenizer.json", "chat_template.jinja") if (folder / name).is_file()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()
