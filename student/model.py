"""The base student, loaded. Safetensors only; no code from a checkpoint is ever run."""

from typing import Literal

import jinja2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UnusableInput
from student.folders import resolve

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The student's own tokenizer with its chat template. Raises UnusableInput when it has none of either."""
    folder = resolve(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a damaged tokenizer.json is a KeyError, a TypeError, or tokenizers' own plain Exception
        raise UnusableInput(f"student.model {model}: no usable tokenizer in the folder: {_first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.get_added_vocab()) + 1:  # made of nothing but its class, where the files are not there
        raise UnusableInput(f"student.model {model}: its tokenizer knows no words; add tokenizer.json to the folder")
    if not tokenizer.chat_template:
        raise UnusableInput(f"student.model {model}: the tokenizer has no chat template; add chat_template.jinja to the folder")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise UnusableInput(
            f"student.model {model}: chat template, line {error.lineno}: {_first_line(error)}; mend it"
        ) from error
    except jinja2.TemplateError:
        pass  # it asks for other turns than this one
    return tokenizer


def load_base(model: str, dtype: Literal["fp32", "bf16", "fp16"]) -> PreTrainedModel:
    """The base causal LM in `dtype` on the CPU, in evaluation mode. Stored precision does not matter: weights are cast."""
    folder = resolve(model)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # sizes that do not fit are a RuntimeError, layers that are not there a ValueError
        raise UnusableInput(f"student.model {model}: not a causal language model that loads: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """With the kind of error, where the words alone say little: KeyError's are a name."""
    line = (str(error).strip().splitlines() or [""])[0].rstrip(":")
    return line if isinstance(error, OSError | ValueError) and line else f"{type(error).__name__} {line}".strip()
