"""Checkpoints as they are published: several files with an index, experts one by one or fused, FP8 with block scales."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 128
# What DeepSeek-V3 and GLM-5 leave in BF16: everything that is no large projection.
UNTOUCHED = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "weights_proj")


def load_all(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def save_sharded(source: Path, folder: Path, tensors: dict[str, Tensor], num_files: int = 3) -> Path:
    """`tensors` in several files with an index, beside the configuration of `source`."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
            shutil.copy(path, folder)
    weight_map: dict[str, str] = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        chosen = {name: value.contiguous() for name, value in list(tensors.items())[number::num_files]}
        save_file(chosen, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5's layout: [E, 2F, H] and [E, H, F] for each layer."""
    fused = {name: value for name, value in tensors.items() if ".experts." not in name}
    blocks = sorted({name.partition(".experts.")[0] for name in tensors if ".experts." in name})
    for block in blocks:
        here = [name.split(".experts.")[1] for name in tensors if name.startswith(f"{block}.experts.")]
        experts = sorted({int(name.split(".")[0]) for name in here})

        def matrix(expert: int, name: str, block: str = block) -> Tensor:
            return tensors[f"{block}.experts.{expert}.{name}_proj.weight"]

        fused[f"{block}.experts.gate_up_proj"] = torch.stack([torch.cat([matrix(e, "gate"), matrix(e, "up")]) for e in experts])
        fused[f"{block}.experts.down_proj"] = torch.stack([matrix(e, "down") for e in experts])
    return fused


def to_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every projection as FP8 with `weight_scale_inv`; the rest in BF16, selection biases in float32."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if value.ndim < 2 or any(part in name for part in UNTOUCHED):
            found[name] = value if name.endswith("_bias") else value.bfloat16()
            continue
        rows, columns = value.shape[-2:]
        grid = (*value.shape[:-2], -(-rows // BLOCK), -(-columns // BLOCK))
        scale = torch.rand(grid, generator=torch.Generator().manual_seed(len(found))).mul_(3e-3).add_(1e-3)
        spread = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :rows, :columns]
        found[name], found[f"{name}_scale_inv"] = (value / spread).clamp(-448, 448).to(torch.float8_e4m3fn), scale
    return found


def declare_fp8(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    skip = [part.strip(".") for part in UNTOUCHED]
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": skip,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
