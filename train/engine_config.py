"""What DeepSpeed is configured with, and the optimizer it drives. Imports no DeepSpeed: train/step.py does."""

from collections.abc import Callable

import torch

from configs.training import Train

ADAM_BETAS = (0.9, 0.95)
# Parameters below this many elements stay whole on every rank under ZeRO-3 (DeepSpeed's default).
ZERO3_PERSISTENCE_THRESHOLD = 100_000
# DeepSpeed's default of gradients reduced at once. It allocates as many elements as it is told: 1 GB in bf16.
REDUCE_BUCKET = 500_000_000


def deepspeed_config(config: Train, world_size: int, trained: int) -> dict[str, object]:
    """trained: elements of all parameters that are.

    Stage 0 in bf16 runs as stage 2: DeepSpeed's stage-0 bf16 optimizer keeps float32 masters that cannot be read whole,
    and without grad_accum_dtype its third gradient norm was 20 % away from everyone else's.

    Gradients of micro-batches are added in float32 whatever the dtype.
    """
    stage = 2 if config.zero_stage == 0 and config.dtype == "bf16" else config.zero_stage
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, object] = {
        "stage": stage,
        "stage3_param_persistence_threshold": ZERO3_PERSISTENCE_THRESHOLD,
        "reduce_bucket_size": min(REDUCE_BUCKET, trained),
    }
    if config.offload != "none":
        zero["offload_optimizer"] = host
    if config.offload == "parameters":
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,  # one packed row
        "train_batch_size": world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: DeepSpeed's CPU Adam would be compiled first
        "steps_per_print": 2**31,
    }


class GatedAdamW(torch.optim.AdamW):
    """AdamW that changes nothing while `is_open` says no.

    DeepSpeed knows a step's gradient norm only inside its step, between reducing and updating, and has no other way to drop a
    step that leaves its buffers and counters as after any step.
    """

    is_open: Callable[[], bool] = staticmethod(lambda: True)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return super().step(closure) if self.is_open() else None
