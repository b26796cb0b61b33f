"""What the model is given before its engine holds it: activation checkpointing, and Liger's Triton kernels in its norms, rotary
embedding and gated MLPs (the same arithmetic in fewer passes over memory)."""

import logging
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from configs.errors import UnusableInput
from configs.training import Train

logger = logging.getLogger(__name__)

KERNELS = {"rope": True, "rms_norm": True, "swiglu": True}
NOT_WANTED = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""train/losses.py takes the loss of supervised positions only; liger's would put its own forward in the model's place."""


def prepare_model(model: PreTrainedModel, config: Train) -> None:
    """Puts both in place where the settings ask for them; the kernels only where they run. Raises UnusableInput."""
    apply_liger(model, is_wanted=config.liger)
    if config.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UnusableInput(f"train.activation_checkpointing: type {model.config.model_type} cannot; expected false")
        # reentrant checkpoints drop the gradient where no input of a layer requires one, and a frozen embedding's does not
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def apply_liger(model: PreTrainedModel, *, is_wanted: bool) -> bool:
    """Puts the kernels into `model` where they run; says in the log what was done, or why nothing was. True: done.

    The rotary embedding is replaced in the model's own module of transformers, for every model of that type in this process.
    """
    if reason := why_not(model.config.model_type, is_wanted=is_wanted):
        logger.info("liger kernels: not applied, %s", reason)
        return False
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # pyright: ignore[reportMissingImports]

    _apply_liger_kernel_to_instance(model=model, **KERNELS, **NOT_WANTED)
    logger.info("liger kernels: %s applied to %s", ", ".join(KERNELS), model.config.model_type)
    return True


def why_not(model_type: str, *, is_wanted: bool) -> str | None:
    """None where the kernels can be applied."""
    if not is_wanted:
        return "train.liger is false"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if find_spec("liger_kernel") is None:
        return "no package liger_kernel (pip install liger-kernel)"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # pyright: ignore[reportMissingImports]

    return None if model_type in MODEL_TYPE_TO_APPLY_LIGER_FN else f"liger knows no model of type {model_type}"
