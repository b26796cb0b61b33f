"""Adapters as they lie on disk: PEFT's layout, whole and proven to be, there completely or not at all.

What goes wrong here goes wrong in silence: under ZeRO-3 PEFT writes tensors of shape [0] without an error, an adapter whose
lora_B stayed zero serves the base, and so does one whose keys have a prefix that matches nothing.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import TracestillError, UnusableInput

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, in module order, with the weights that are trained whole. A weight that a head and an
    embedding share is there once, under the name that comes first."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- writing -----------------------------------------------------------------------------------------------------


def save_adapter(
    folder: Path,
    model: PeftModel,
    parameters: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    may_be_untrained: bool = False,
) -> None:
    """PEFT's layout under `folder`, complete or not there: adapter_model.safetensors (float32), adapter_config.json, tokenizer.

    parameters: full tensors by the names of `trainable(model)`. They are an argument because under ZeRO-3 the model's own are
    partitioned. may_be_untrained: no step has been applied yet, so a lora_B may be zero.

    Raises:
        TracestillError: a tensor that is not finite, or a lora_B that is all zero: it never learnt. Nothing is written.
    """
    check_parameters(model, parameters, may_be_untrained=may_be_untrained)
    state = adapter_state(model, parameters)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # copies: safetensors refuses two names for one memory, which is what a tied pair is
    whole = {name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous() for name, tensor in state.items()}
    write_tensors(temporary / ADAPTER_WEIGHTS, whole, metadata={"format": "pt"})
    _save_config(temporary, model)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    publish_folder(temporary, folder)


def check_parameters(model: nn.Module, parameters: Mapping[str, torch.Tensor], *, may_be_untrained: bool) -> None:
    """Passes when there is a whole, finite tensor for everything that is trained, and every lora_B has learnt something."""
    own = trainable(model)
    assert own.keys() == parameters.keys(), sorted(own.keys() ^ parameters.keys())[:4]
    for name, parameter in own.items():
        tensor, expected = parameters[name], tuple(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: of all pieces
        assert tuple(tensor.shape) == expected, (
            f"partitioned parameters: {name} is {list(tensor.shape)}, expected {list(expected)}"
        )
        if not torch.isfinite(tensor).all():
            raise TracestillError(
                f"adapter: {name} has values that are not finite; continue an earlier checkpoint with a lower train.lr"
            )
        if starts_at_zero(name) and not may_be_untrained and not tensor.any():
            raise TracestillError(
                f"adapter: {name} is all zero after training, so its layer is the base's: no gradient reached it; expected every "
                "target to learn; leave the layer out of student.lora.targets, or raise train.lr"
            )


def starts_at_zero(name: str) -> bool:
    """Of the two factors of an adapter the one that training has to move first."""
    return ".lora_B." in name or ".lora_embedding_A." in name


def adapter_state(model: PeftModel, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`parameters` by the names that PEFT gives them in a file: the adapter's own name left out, modules that are trained whole
    under their place in the base, a tied weight under both of its."""
    of = {id(parameter): parameters[name] for name, parameter in trainable(model).items()}
    every = model.named_parameters(remove_duplicate=False)
    whole = {name: of[id(parameter)] for name, parameter in every if id(parameter) in of}
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, state_dict=whole, save_embedding_layers=False)
    lost = of.values() if len(state) < len(whole) else ()
    assert not lost, f"PEFT keeps {len(state)} of {len(whole)} trained tensors"
    return state


def _save_config(folder: Path, model: PeftModel) -> None:
    """adapter_config.json as whoever loads it needs it; the model's own is as it was."""
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    before = config.inference_mode, config.modules_to_save
    config.inference_mode = True
    if config.ensure_weight_tying:  # PEFT has rewritten the pair to `embed_tokens` twice over; an older one would lose the head
        config.modules_to_save = sorted(
            {name.rpartition(".")[2] for name in [*(config.modules_to_save or ()), *_tied_names(config)]}
        )
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode, config.modules_to_save = before


def _tied_names(config: LoraConfig) -> list[str]:
    return sorted(getattr(config, "modules_to_tie", None) or ())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """The safetensors file. Raises OSError for a full disk and its like, as any other write does: safetensors has an error of its
    own for them, which says no more than the number."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def publish_folder(temporary: Path, folder: Path) -> None:
    """Makes `temporary` (beside `folder`) durable and gives it its final name. An older folder of that name is replaced."""
    for path in [*temporary.iterdir(), temporary]:
        _fsync(path)
    replaced = folder.with_name(f"{temporary.name}.replaced")
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading -----------------------------------------------------------------------------------------------------


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """`base` with the adapter in `folder` on it, frozen and in evaluation mode; every stored tensor is in it, bit for bit.

    Raises:
        UnusableInput: when a file is missing or damaged, or when the tensors do not all fit the base (a key prefix that does
            not match would otherwise load nothing and serve the base in silence).
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UnusableInput(f"adapter {folder}: no {name}; expected a PEFT adapter folder, written by: tracestill train")
    unfit = f"adapter {folder}: its tensors do not fit this base; expected the student.model it was trained on"
    try:
        adapted = PeftModel.from_pretrained(base, str(folder), is_trainable=False, autocast_adapter_dtype=False)
    except (RuntimeError, ValueError, SafetensorError) as error:  # other shapes; targets that the base does not have; damage
        raise UnusableInput(f"{unfit} ({str(error).strip().splitlines()[-1].strip()})") from error
    stored = load_file(folder / ADAPTER_WEIGHTS)
    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if stored.keys() != loaded.keys() or any(
        not torch.equal(loaded[name].cpu(), stored[name].to(loaded[name].dtype)) for name in stored
    ):
        raise UnusableInput(unfit)
    return adapted.eval()
