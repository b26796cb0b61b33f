"""Weights in compressed-tensors' layout, which vLLM loads: int8 and int4 for weights alone, fp8 for weights and activations.

Embedding and head stay as they are, in bf16, as vLLM expects. Whatever is left out stands in the config's `ignore`.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from configs.errors import UnusableInput
from student.formats import gptq
from student.formats.base import Trained
from student.formats.calibration import decoder_layers, round_layer_by_layer
from student.formats.transformers_model import TransformersSpeaker
from student.formats.weights import empty_copy, require_rows, save_model
from student.model import load_base

CompressedName = Literal["int8", "int4", "fp8"]
GROUPS = (128, 64, 32)
"""Columns of one int4 scale: the largest that divides the row. vLLM's kernels know these and whole rows, no others."""


class Kind(NamedTuple):
    """multiple: rows have to be one of it; vLLM cuts rows into int32 words and drops what is left over."""

    grid: gptq.Grid
    bits: int
    format: str
    multiple: int


# Not naive-quantized for int8: vLLM takes weight-only integers from pack-quantized alone.
KINDS: dict[CompressedName, Kind] = {
    "int8": Kind(gptq.INT8, 8, "pack-quantized", 4),
    "int4": Kind(gptq.INT4, 4, "pack-quantized", 8),
    "fp8": Kind(gptq.FP8, 8, "float-quantized", 1),
}


class Compressed:
    """One of KINDS. int8: W8A16, a scale a row. int4: W4A16, a scale for every 128, 64 or 32 columns, by GPTQ on the student's
    own traces. fp8: W8A8, float8_e4m3, a scale a row, and one a token taken when served."""

    def __init__(self, name: CompressedName) -> None:
        self.name: CompressedName = name
        self.kind = KINDS[name]

    def write(self, trained: Trained, folder: Path) -> Mapping[str, object]:
        _require_package(self.name)
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import apply_quantization_config

        model = trained.merged
        require_rows(model, trained.tokenizer)
        linears = linear_layers(model)
        groups = {name: self.group(linear.in_features) for name, linear in linears.items() if self.fits(linear.in_features)}
        if not groups:
            raise UnusableInput(
                f"export.formats {self.name}: no linear layer has rows of a multiple of {self.kind.multiple} weights, as vLLM's "
                f"int32 words need (rows of {_listed({one.in_features for one in linears.values()})}); export fp8 or merged"
            )
        settings = quantization_config(self.kind, groups, _ignored(model, groups))
        layout = empty_copy(model).to(torch.bfloat16)  # type: ignore[arg-type]
        with _quiet():
            apply_quantization_config(layout, settings)
            compressor = ModelCompressor(quantization_config=settings)
            compressor.compress_model(layout)
        weights = {
            name: tensor.to(torch.bfloat16)
            for name, tensor in model.state_dict().items()
            if name.removesuffix(".weight") not in groups
        }
        packed, notes = self._packed(trained, linears, groups, settings)
        layout.load_state_dict(weights | packed, assign=True)
        save_model(layout, trained.tokenizer, folder)
        compressor.update_config(str(folder))
        return notes | {"unquantised": [name for name in linears if name not in groups]}

    def open(self, folder: Path) -> TransformersSpeaker:
        """The folder in transformers, loaded compressed and then unpacked in memory; fp8 rounds every token's activations, as a
        server does. In float32, so that what is measured is the format: in bf16 quotient x scale would be rounded once more.
        Not `dequantize=True`: that reads every layer by the first config group, and leaves fp8's activations alone."""
        _require_package(self.name)
        with _quiet():
            model = load_base(str(folder), "fp32").eval()
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 1, dtype=torch.long))  # the first forward pass unpacks the weights
        return TransformersSpeaker(model)

    def fits(self, columns: int) -> bool:
        return columns % self.kind.multiple == 0

    def group(self, columns: int) -> int:
        """Columns of one scale: the whole row, unless this is int4 and one of GROUPS divides it."""
        return next((group for group in GROUPS if columns % group == 0), columns) if self.name == "int4" else columns

    def _packed(
        self, trained: Trained, linears: Mapping[str, nn.Linear], groups: Mapping[str, int], settings: Any
    ) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
        """(tensors by name, as the layout has them; what is worth saying)."""
        packed: dict[str, torch.Tensor] = {}
        errors, sums = [0.0, 0.0], 0.0

        def rounded(name: str, weight_OI: torch.Tensor, hessian_II: torch.Tensor | None) -> torch.Tensor:
            nonlocal sums
            if not bool(weight_OI.isfinite().all()):
                raise UnusableInput(f"export.formats {self.name}: {name} holds values that are no numbers; train again")
            scale_OG = gptq.scales_of(weight_OI, groups[name], self.kind.grid)
            found_OI = nearest_OI = gptq.round_to_nearest(weight_OI, scale_OG, self.kind.grid)
            if hessian_II is not None:
                found_OI = gptq.compensate(weight_OI, hessian_II, scale_OG, self.kind.grid)
                sums += gptq.output_error(weight_OI, torch.zeros_like(weight_OI), hessian_II)
                errors[0] += gptq.output_error(weight_OI, found_OI, hessian_II)
                errors[1] += gptq.output_error(weight_OI, nearest_OI, hessian_II)
            for key, tensor in pack(found_OI, scale_OG, scheme_of(settings, name)).items():
                packed[f"{name}.{key}"] = tensor
            return found_OI

        if self.name != "int4":
            for name in groups:
                rounded(name, linears[name].weight.data, None)
            return packed, {}
        round_layer_by_layer(trained.merged, trained.calibration, {name: linears[name] for name in groups}, rounded)
        return packed, {
            "group_sizes": _counts(groups),
            "calibration_tokens": sum(map(len, trained.calibration)),
            "output_error": (errors[0] / sums) ** 0.5 if sums else 0.0,
            "output_error_round_to_nearest": (errors[1] / sums) ** 0.5 if sums else 0.0,
        }


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Those of the decoder layers, by name, in the model's order."""
    prefix, _ = decoder_layers(model)
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(f"{prefix}.")
    }


def quantization_config(kind: Kind, groups: Mapping[str, int], ignore: Sequence[str]) -> Any:
    """compressed_tensors' QuantizationConfig. groups: columns of a scale, by layer.

    One group of layers is called `Linear`, as everybody writes it. Where group sizes differ, layers are called by the ends of
    their names: vLLM asks for the class before it takes a fused layer (qkv_proj) apart, and would find `Linear` first.
    """
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    by_size: dict[int, list[str]] = {}
    for name, size in groups.items():
        by_size.setdefault(size if kind.bits == 4 and size in GROUPS else -1, []).append(name)
    return QuantizationConfig.model_validate(
        {
            "config_groups": {
                f"group_{index}": {
                    "targets": ["Linear"] if len(by_size) == 1 else _endings(names, groups),
                    "weights": _weight_args(kind, size),
                    "input_activations": _TOKEN_ARGS if kind.grid.is_float8 else None,
                    "format": kind.format,
                }
                for index, (size, names) in enumerate(sorted(by_size.items(), reverse=True))
            },
            "format": kind.format,
            "quantization_status": QuantizationStatus.COMPRESSED,
            "ignore": list(ignore),
        }
    )


_TOKEN_ARGS = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}


def _weight_args(kind: Kind, size: int) -> dict[str, object]:
    shared: dict[str, object] = {
        "num_bits": kind.bits,
        "type": "float" if kind.grid.is_float8 else "int",
        "symmetric": True,
        "dynamic": False,
    }
    return shared | ({"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size})


def _endings(names: Sequence[str], groups: Mapping[str, int]) -> list[str]:
    """`re:.*[.]down_proj$` for each; the full names where layers of one ending have rows of several lengths."""
    endings = sorted({name.rpartition(".")[2] for name in names})
    elsewhere = {name.rpartition(".")[2] for name in groups if name not in names}
    return list(names) if elsewhere & set(endings) else [f"re:.*[.]{ending}$" for ending in endings]


def scheme_of(settings: Any, name: str) -> Any:
    """The group of the config that says how this linear layer is stored."""
    from compressed_tensors.utils.match import match_name

    schemes = settings.config_groups.values()
    return next(one for one in schemes if any(target == "Linear" or match_name(name, target) for target in one.targets))


def pack(rounded_OI: torch.Tensor, scale_OG: torch.Tensor, scheme: Any) -> dict[str, torch.Tensor]:
    """compressed-tensors' own compressor: weight_packed (int32) and weight_shape, or weight (float8), and weight_scale (bf16)."""
    from compressed_tensors.compressors import BaseCompressor

    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.compress({"weight": rounded_OI, "weight_scale": scale_OG}, scheme)


def _ignored(model: PreTrainedModel, groups: Mapping[str, int]) -> list[str]:
    """Every linear layer that is not quantised: the head, and what does not fit."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in groups]


def _counts(groups: Mapping[str, int]) -> dict[str, int]:
    """Layers by columns of a scale."""
    sizes = list(groups.values())
    return {str(size): sizes.count(size) for size in sorted(set(sizes))}


def _listed(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _require_package(name: str) -> None:
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise UnusableInput(
            f"export.formats {name}: compressed-tensors is missing ({error}); expected: pip install 'tracestill[compressed]'"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """compressed-tensors draws a progress bar for every pass over the layers, on stderr, with no way to say no."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
