"""One optimizer step on one or many ranks. The only training module that imports DeepSpeed.

Facts this module stands on, all measured with accelerate 1.15 and DeepSpeed 0.19.8 on gloo:

- `Accelerator(cpu=True)` ignores DeepSpeed without a word, so `cpu` is never passed; DS_ACCELERATOR picks the CPU.
- accelerate may report one process on every rank. Rank and world come from torch.distributed, and must agree.
- DeepSpeed averages gradients over ranks and divides by its accumulation steps. The loss scale is one function here.
- Training needs no compiled op: the shared-memory op that DeepSpeed would build at start-up (30 s of g++, and a stale
  lock that makes every later start wait for ever if it is killed) only serves inference.
"""

import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

os.environ.setdefault("DS_LOG_LEVEL", "warning")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is first imported

import accelerate
import deepspeed
from accelerate.state import AcceleratorState
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from peft import PeftModel

from student.lora import trainable
from train.losses import SupervisedLoss

# DeepSpeed 0.19.8 calls two collectives by names that torch 2.13 renames, once a parameter under ZeRO-3.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)

ZeroStage = Literal[0, 2, 3]

ADAM_BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")
# Parameters below this many elements stay whole on every rank under ZeRO-3 (DeepSpeed's default).
ZERO3_PERSISTENCE_THRESHOLD = 100_000


class World(NamedTuple):
    rank: int
    size: int


class OptimizerState(NamedTuple):
    """Everything a step changes, whole and in float32, by parameter name: independent of ranks and ZeRO stage.

    moments: for each of MOMENTS, AdamW's running average; empty before the first step. steps: AdamW's own counter.
    """

    parameters: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]
    steps: int


@contextmanager
def joined_world() -> Iterator[World]:
    """In torchrun's process group, or in one of a single process. Rank and size as torch.distributed sees them.

    The environment is given back as it was: accelerate and DeepSpeed need launcher variables even for one process, and
    a RANK left behind would mislead whatever this process starts next.
    """
    before = dict(os.environ)
    if "RANK" not in os.environ:
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False)
        world = World(torch.distributed.get_rank(), torch.distributed.get_world_size())
        assert (world.rank, world.size) == (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])), world
        yield world
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def loss_scale(world_size: int, tokens_in_step: int) -> float:
    """What a micro-batch's summed loss is multiplied with, so that the step's gradient is that of the mean over its tokens.

    DeepSpeed averages over ranks, hence W. It is configured with one accumulation step and told the boundary by hand, so
    its division by accumulation steps is by 1: micro-batches may then differ in number from step to step.
    tokens_in_step: supervised tokens over all ranks and micro-batches (N). With unequal micro-batches a mean of means
    would weigh a token by its neighbours.
    """
    return world_size / max(1, tokens_in_step)


def deepspeed_config(
    zero_stage: ZeroStage, dtype: Literal["fp32", "bf16"], max_grad_norm: float, world_size: int
) -> dict[str, object]:
    """Stage 0 in bf16 runs as stage 2: DeepSpeed's stage-0 bf16 optimizer keeps float32 masters that cannot be read whole,
    and without grad_accum_dtype its third gradient norm was 20 % away from everyone else's.

    Gradients of micro-batches are added in float32 whatever the dtype.
    """
    stage = 2 if zero_stage == 0 and dtype == "bf16" else zero_stage
    return {
        "train_micro_batch_size_per_gpu": 1,  # rows vary with their length; the number is only used for DeepSpeed's own logs
        "train_batch_size": world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": ZERO3_PERSISTENCE_THRESHOLD},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: DeepSpeed's CPU Adam would be compiled first
        "steps_per_print": 2**31,
    }


class TrainingStep:
    """A model, its optimizer and the engine that shards them. One object per process; `close` before the next."""

    def __init__(
        self, loss: SupervisedLoss, world: World, *, zero_stage: ZeroStage, dtype: Literal["fp32", "bf16"],
        lr: float, weight_decay: float, max_grad_norm: float
    ) -> None:  # fmt: skip
        self.world = world
        assert isinstance(loss.model, PeftModel)
        self.adapted = loss.model
        config = deepspeed_config(zero_stage, dtype, max_grad_norm, world.size)
        accelerator = accelerate.Accelerator(
            deepspeed_plugin=accelerate.DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
        )
        assert accelerator.distributed_type is accelerate.DistributedType.DEEPSPEED, accelerator.distributed_type
        self.device = accelerator.device
        self.parameters = trainable(loss.model)
        # fused on the CPU too: one pass over a flat partition instead of a dozen
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=lr, betas=ADAM_BETAS, weight_decay=weight_decay, fused=True
        )
        if zero_stage == 3:
            # The loss reads the head's weight outside the head's own forward; registered, it is gathered with the wrapper.
            deepspeed.zero.register_external_parameter(loss, loss.head.weight)
        engine, _ = accelerator.prepare(loss, self.optimizer)
        assert isinstance(engine, DeepSpeedEngine)
        assert (engine.global_rank, engine.dp_world_size) == world, (engine.global_rank, engine.dp_world_size, world)
        self.engine = engine
        # True where DeepSpeed keeps the float32 masters and moments in pieces: always, except for stage 0 in float32.
        self.is_sharded = engine.zero_optimization_stage() > 0

    def accumulate(self, ids_BT: torch.Tensor, labels_BT: torch.Tensor, *, tokens_in_step: int, is_last: bool) -> float:
        """Adds one micro-batch's gradient; returns its summed loss in nats. is_last: gradients are complete after it."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        loss_sum = self.engine(ids_BT.to(self.device), labels_BT.to(self.device))
        self.engine.backward(loss_sum * loss_scale(self.world.size, tokens_in_step))
        return loss_sum.item()

    def apply(self, lr: float) -> float:
        """Clips, updates the parameters at learning rate `lr`, clears the gradients. Returns the norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        plain_norm = None if self.is_sharded else torch.nn.utils.get_total_norm(list(self.gradients().values()))
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if plain_norm is None else plain_norm  # stage 0 reports none
        assert norm is not None
        return float(norm)

    @torch.no_grad()
    def evaluate(self, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> float:
        """Summed loss in nats of one micro-batch, without dropout; no gradient is taken. A collective under ZeRO-3."""
        self.engine.eval()
        loss_sum = self.engine(ids_BT.to(self.device), labels_BT.to(self.device)).item()
        self.engine.train()
        return loss_sum

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients of the accumulated step, averaged over ranks, before clipping. A collective."""
        whole = {name: safe_get_full_grad(parameter) for name, parameter in self.parameters.items()}
        return {name: gradient.detach() for name, gradient in whole.items() if gradient is not None}

    # --- state: every rank calls these together ------------------------------------------------------------------

    def export_parameters(self) -> dict[str, torch.Tensor]:
        """Float32 masters of the adapter, whole, on the CPU."""
        return {name: self._whole(parameter).cpu().clone() for name, parameter in self.parameters.items()}

    def export_state(self) -> OptimizerState:
        counters = [int(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        if not counters:
            return OptimizerState(self.export_parameters(), {}, 0)
        moments = {
            moment: {name: self._whole(parameter, moment).cpu().clone() for name, parameter in self.parameters.items()}
            for moment in MOMENTS
        }
        return OptimizerState(self.export_parameters(), moments, max(counters))

    def import_state(self, state: OptimizerState, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> None:
        """Continues from `state`; the next step is bit-equal to what it would have been.

        The model must have been built with state.parameters already in it: DeepSpeed copies its compute weights then.
        AdamW creates its moments in the first step, so one step with zero gradient at learning rate zero is taken on
        any micro-batch. It changes no weight, and everything it does change is overwritten.
        """
        if not state.moments:
            return
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(self.engine(ids_BT.to(self.device), labels_BT.to(self.device)) * 0.0)
        self.apply(lr=0.0)
        for name, parameter in self.parameters.items():
            self._set_whole(parameter, state.parameters[name])
            for moment in MOMENTS:
                self._set_whole(parameter, state.moments[moment][name], moment)
        for entry in self.optimizer.state.values():
            entry["step"].fill_(state.steps)

    def _whole(self, parameter: torch.nn.Parameter, moment: str | None = None) -> torch.Tensor:
        """The float32 master of a parameter, or one of its moments, assembled from all ranks."""
        if not self.is_sharded:
            return parameter.detach() if moment is None else self.optimizer.state[parameter][moment]
        whole = safe_get_full_fp32_param(parameter) if moment is None else safe_get_full_optimizer_state(parameter, moment)
        assert whole is not None
        return whole

    def _set_whole(self, parameter: torch.nn.Parameter, value: torch.Tensor, moment: str | None = None) -> None:
        value = value.to(self.device)
        if not self.is_sharded:
            (parameter.detach() if moment is None else self.optimizer.state[parameter][moment]).copy_(value)
        elif moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the model."""
        self.engine.destroy()


def load_parameters(loss: SupervisedLoss, parameters: Mapping[str, torch.Tensor]) -> None:
    """Copies whole tensors into a model that no engine holds yet."""
    own = trainable(loss.model)
    assert own.keys() == parameters.keys(), sorted(own.keys() ^ parameters.keys())[:4]
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(parameters[name])
