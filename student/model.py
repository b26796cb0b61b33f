"""The base student: where it lives, and how it is loaded. Safetensors only; no code from a checkpoint is ever run."""

import hashlib
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UnusableInput

EMBEDDED = Path(__file__).parent / "embedded"
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(model: str) -> Path:
    """The checkpoint folder that `student.model` means; `embedded` is the shipped base.

    Raises:
        UnusableInput: when it is not a folder with a config.json and safetensors weights.
    """
    folder = EMBEDDED if model == "embedded" else Path(model)
    if not folder.is_dir():
        raise UnusableInput(f"student.model {model}: no such folder; expected a Hugging Face checkpoint folder, or `embedded`")
    if not (folder / "config.json").is_file():
        raise UnusableInput(f"student.model {model}: no config.json in the folder; expected a Hugging Face checkpoint")
    if not any(folder.glob("*.safetensors")):
        remedy = (
            "rebuild it with: python -m train.pretrain student/embedded/recipe.yaml"
            if model == "embedded"
            else "convert the weights"
        )
        raise UnusableInput(f"student.model {model}: no *.safetensors in the folder (pickled weights are never loaded); {remedy}")
    return folder


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The student's own tokenizer with its chat template. Raises UnusableInput when it has none of either."""
    folder = resolve(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnusableInput(f"student.model {model}: no usable tokenizer in the folder: {_first_line(error)}") from error
    if not tokenizer.chat_template:
        raise UnusableInput(f"student.model {model}: the tokenizer has no chat template; add chat_template.jinja to the folder")
    return tokenizer


def load_base(model: str, dtype: Literal["fp32", "bf16", "fp16"]) -> PreTrainedModel:
    """The base causal LM in `dtype` on the CPU, in evaluation mode. Stored precision does not matter: weights are cast."""
    folder = resolve(model)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UnusableInput(f"student.model {model}: not a causal language model that loads: {_first_line(error)}") from error


def weights_sha256(folder: Path) -> str:
    """Hex sha256 over config.json and every safetensors file, name and bytes: the identity of a checkpoint.

    Reads all of it (about 1.5 GB/s), which also warms the page cache for the load that follows.
    """
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
