"""Where a model lies, and what its configuration file says. No torch: `tracestill plan` answers before one is installed."""

import json
from pathlib import Path
from typing import Any

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
