"""LoRA on the student: which layers, how an adapter is written and read, and when folding it into the weight is quicker."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MethodType

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UnusableInput
from configs.schema import Lora

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def linear_names(model: PreTrainedModel) -> list[str]:
    """Last name components of every linear layer but the output head: `down_proj`, `q_proj`, ...

    Found by module type, so that any architecture works. Fused experts (3-D parameters, no nn.Linear) are not in it.
    """
    head = model.get_output_embeddings()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    names = {name.rpartition(".")[2] for name in layers}
    if not names:
        raise UnusableInput(f"{model.config.model_type}: no nn.Linear layer besides the head; LoRA has nothing to adapt")
    return sorted(names)


def attach(model: PreTrainedModel, lora: Lora, *, seed: int) -> PeftModel:
    """Freezes the base and adds an adapter to all its linear layers. lora_A depends on `seed` alone, lora_B is zero."""
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=linear_names(model), task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, in module order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- adapters on disk --------------------------------------------------------------------------------------------


def save_adapter(
    folder: Path, model: PeftModel, parameters: Mapping[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """PEFT's layout under `folder`, complete or not there: adapter_model.safetensors (float32), adapter_config.json, tokenizer.

    parameters: full tensors by the names of `trainable(model)`. They are an argument because under ZeRO-3 the model's
    own are partitioned, and PEFT's save_pretrained then writes tensors of shape [0] without an error.
    """
    expected = {name.replace(".default.", "."): name for name in trainable(model)}
    state = get_peft_model_state_dict(model, state_dict=dict(parameters), save_embedding_layers=False)
    assert state.keys() == expected.keys(), sorted(state.keys() ^ expected.keys())[:4]
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    assert not empty, f"partitioned parameters reached the adapter file: {empty[:4]}"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}, temporary / ADAPTER_WEIGHTS)
    config = model.peft_config["default"]
    inference_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(temporary))
    config.inference_mode = inference_mode
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    publish_folder(temporary, folder)


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


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """`base` with the adapter in `folder` on it, frozen and in evaluation mode.

    Raises:
        UnusableInput: when a file is missing, or when the tensors do not all fit the base (a key prefix that does not
            match would otherwise load nothing and serve the base in silence).
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UnusableInput(f"adapter {folder}: no {name}; expected a PEFT adapter folder, written by: tracestill train")
    adapted = PeftModel.from_pretrained(base, str(folder), is_trainable=False, autocast_adapter_dtype=False)
    stored = load_file(folder / ADAPTER_WEIGHTS)
    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if stored.keys() != loaded.keys() or any(stored[name].shape != loaded[name].shape for name in stored):
        raise UnusableInput(f"adapter {folder}: its tensors do not fit this base; expected the student.model it was trained on")
    return adapted.eval()


# --- speed -------------------------------------------------------------------------------------------------------


def fold_small_layers(model: PeftModel) -> int:
    """Computes W + s B A once a forward pass where that costs less than the two low-rank products a token; returns how many.

    Forward and backward of one token take 2io + 3r(i+o) multiply-adds as PEFT computes it and 3io folded (i inputs, o
    outputs, rank r), so folding wins when 3r(i+o) > io: always in the embedded pair (r 64 on 128 wide: 1.2 to 1.4 x the tokens
    a second), never in a 7 B model. Only for float32 (in bf16 the sum W + s B A rounds a young adapter away) and
    without dropout. The weight must be whole on this rank: not for ZeRO-3.
    """
    folded = 0
    for module in model.modules():
        if isinstance(module, LoraLinear) and _folding_pays(module):
            module.forward = MethodType(_folded_forward, module)
            folded += 1
    return folded


def _folding_pays(layer: LoraLinear) -> bool:
    base = layer.get_base_layer()
    assert isinstance(base, nn.Linear)
    inputs, outputs = base.in_features, base.out_features
    no_dropout = isinstance(layer.lora_dropout["default"], nn.Identity)
    return base.weight.dtype == torch.float32 and no_dropout and 3 * layer.r["default"] * (inputs + outputs) > inputs * outputs


def _folded_forward(self: LoraLinear, hidden: torch.Tensor) -> torch.Tensor:
    base = self.get_base_layer()
    low, high = self.lora_A["default"].weight, self.lora_B["default"].weight
    assert isinstance(base, nn.Linear) and isinstance(low, torch.Tensor) and isinstance(high, torch.Tensor)
    weight = torch.addmm(base.weight, high, low, alpha=self.scaling["default"])
    return nn.functional.linear(hidden, weight, base.bias)
