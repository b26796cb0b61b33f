"""One optimizer step on one or many ranks. The only training module that imports DeepSpeed.

Facts this module stands on, all measured with accelerate 1.15 and DeepSpeed 0.19.8 on gloo:

- `Accelerator(cpu=True)` ignores DeepSpeed without a word, so `cpu` is never passed; DS_ACCELERATOR picks the CPU.
- accelerate may report one process on every rank. Rank and world come from torch.distributed, and must agree.
- DeepSpeed averages gradients over ranks and divides by its accumulation steps. The loss scale is one function here.
- DeepSpeed is not told that ranks share rows (no `mpu`): see loss_scale.
- Training needs no compiled op: the shared-memory op that DeepSpeed would build at start-up (30 s of g++, and a stale
  lock that makes every later start wait for ever if it is killed) only serves inference.
"""

import math
import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

os.environ.setdefault("DS_LOG_LEVEL", "warning")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is first imported

import accelerate
import deepspeed
from accelerate.state import AcceleratorState
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from peft import PeftModel

from configs.errors import UnusableInput
from configs.training import Train
from data.chat import IGNORE_INDEX
from student.adapter_files import trainable
from train.attention import attend_documents, use_documents
from train.batches import Batch, split_for_sequence_parallel
from train.engine_config import ADAM_BETAS, GatedAdamW, deepspeed_config
from train.kernels import prepare_model
from train.losses import SupervisedLoss, head_weights
from train.sequence_parallel import SHARED_DOCUMENTS, SharedAttention, group_of, refuse_uneven_heads

# DeepSpeed 0.19.8 calls two collectives by names that torch 2.13 renames, once a parameter under ZeRO-3.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)

MOMENTS = ("exp_avg", "exp_avg_sq")
PROBE_TOLERANCE = 1e-6
"""Relative, in any type: the same document at the same place goes through the same sums, so its loss is equal to the last bit."""


class World(NamedTuple):
    """Where this process stands among all of them, on all nodes. sequence_parallel: neighbouring ranks that share each row."""

    rank: int
    size: int
    sequence_parallel: int = 1

    @property
    def data_rank(self) -> int:
        """Which of a micro-step's rows this rank works on; it has all of it, or a slice."""
        return self.rank // self.sequence_parallel

    @property
    def data_size(self) -> int:
        return self.size // self.sequence_parallel

    @property
    def sequence_rank(self) -> int:
        """Which slice of the row this rank has."""
        return self.rank % self.sequence_parallel


class Applied(NamedTuple):
    """What became of a step. norm: of the gradient before clipping; infinity where it is no number."""

    norm: float
    is_applied: bool


class OptimizerState(NamedTuple):
    """Everything a step changes, whole and in float32, by parameter name: independent of ranks and ZeRO stage.

    moments: for each of MOMENTS, AdamW's running average; empty before the first step. steps: AdamW's own counter.
    """

    parameters: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]
    steps: int


@contextmanager
def joined_world(sequence_parallel: int = 1) -> Iterator[World]:
    """In torchrun's process group, or in one of a single process. Rank and size as torch.distributed sees them.

    The environment is given back as it was: accelerate and DeepSpeed need launcher variables even for one process, and
    a RANK left behind would mislead whatever this process starts next. So is torch's linear function, which ZeRO-3 replaces
    for good by one that keeps every input.
    """
    before, linear = dict(os.environ), torch.nn.functional.linear
    if "RANK" not in os.environ:
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():  # before the first collective: NCCL takes the current device, which is the first on every rank
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False)
        world = World(torch.distributed.get_rank(), torch.distributed.get_world_size(), sequence_parallel)
        assert (world.rank, world.size) == (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])), world
        if world.size % sequence_parallel:
            raise UnusableInput(f"train.sequence_parallel {sequence_parallel} does not divide the {world.size} ranks there are")
        yield world
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(before)
        torch.nn.functional.linear = linear


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def loss_scale(ranks: int, tokens_in_step: int) -> float:
    """What a rank's summed loss of a micro-batch is multiplied with, so that the step's gradient is that of the mean over its
    tokens: ranks / tokens, whatever the ZeRO stage, the sequence parallel degree and the accumulation. Measured for stages 0, 2
    and 3 (tests/train/test_ranks.py), because AdamW would hide a constant factor.

    tokens_in_step: supervised tokens (N) over all ranks, micro-batches and slices of rows. With unequal micro-batches a mean of
    means would weigh a token by its neighbours.

    - Ranks (W): DeepSpeed averages over them, and what is wanted is the sum of what each of them has of the mean.
    - Accumulation: DeepSpeed is configured with one step and told the boundary by hand, so it divides by 1, and micro-batches
      may differ in number from step to step.
    - Sequence parallelism: each rank's loss is that of its slice, and the exchanges inside attention carry gradients to where
      the tokens are. Ranks that share a row are then like ranks with rows of their own: what they have adds up. So DeepSpeed is
      not told. Told by an `mpu` it divides by W / degree at stages 0 and 2, but at stage 3 reduce_scatter_coalesced still
      divides by W: the scale would be W / degree / N there and W / N here, exactly the degree apart (measured with W / N and
      degree 2: norms of 2.5494, 2.5494 and 1.2747 at stages 0, 2 and 3, where 1.2747 is right and not told gives it thrice).
    """
    return ranks / max(1, tokens_in_step)


class TrainingStep:
    """A model, its optimizer and the engine that shards them. One object per process; `close` before the next."""

    def __init__(self, loss: SupervisedLoss, world: World, config: Train) -> None:
        self.world = world
        assert isinstance(loss.model, PeftModel)
        self.adapted = loss.model
        prepare_model(loss.causal_lm, config)
        self.row_group = share_rows(loss, world)
        self.parameters = trainable(loss.model)
        elements = sum(parameter.numel() for parameter in self.parameters.values())
        settings = deepspeed_config(config, world.size, elements)
        accelerator = accelerate.Accelerator(
            deepspeed_plugin=accelerate.DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)
        )
        assert accelerator.distributed_type is accelerate.DistributedType.DEEPSPEED, accelerator.distributed_type
        self.device = accelerator.device
        # fused on the CPU too: one pass over a flat partition instead of a dozen
        self.optimizer = GatedAdamW(
            self.parameters.values(), lr=config.lr, betas=ADAM_BETAS, weight_decay=config.weight_decay, fused=True
        )
        if config.zero_stage == 3:
            # The loss reads the head's weights outside their own layers' forward; registered, they are gathered with the wrapper.
            for weight in head_weights(loss.head):
                deepspeed.zero.register_external_parameter(loss, weight)
        engine, _ = accelerator.prepare(loss, self.optimizer)
        assert isinstance(engine, DeepSpeedEngine)
        assert (engine.global_rank, engine.dp_world_size) == (world.rank, world.size), (engine.global_rank, engine.dp_world_size)
        self.engine = engine
        # True where DeepSpeed keeps the float32 masters and moments in pieces: always, except for stage 0 in float32.
        self.is_sharded = engine.zero_optimization_stage() > 0

    def accumulate(self, batch: Batch, *, tokens_in_step: int, is_last: bool) -> float:
        """Adds one row's gradient; returns the summed loss, in nats, of what this rank had of it: the row, or a slice.

        batch: the whole row, the same on ranks that share it. is_last: gradients are complete after it.
        """
        self.engine.set_gradient_accumulation_boundary(is_last)
        loss_sum = self._loss(batch)
        self.engine.backward(loss_sum * loss_scale(self.world.size, tokens_in_step))
        return loss_sum.item()

    def _loss(self, batch: Batch) -> torch.Tensor:
        if self.world.sequence_parallel > 1:
            batch = split_for_sequence_parallel(batch, self.world.sequence_rank, self.world.sequence_parallel)
        *row, teacher = batch
        loss_sum = self.engine(*(tensor.to(self.device) for tensor in row), None if teacher is None else teacher.to(self.device))
        assert isinstance(loss_sum, torch.Tensor)
        return loss_sum

    def apply(self, lr: float, limit: float = math.inf) -> Applied:
        """Clips, updates the parameters at learning rate `lr`, clears the gradients. A gradient whose norm is above `limit` or no
        number changes nothing: no parameter, no moment, no counter of AdamW's. Every rank comes to the same."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        plain = None if self.is_sharded else torch.nn.utils.get_total_norm(list(self.gradients().values())).item()
        self.optimizer.is_open = lambda: self._applied(plain, limit).is_applied
        self.engine.step()
        return self._applied(plain, limit)

    def _applied(self, plain: float | None, limit: float) -> Applied:
        """By DeepSpeed's norm, which is there from before its update, or by ours at stage 0, which has none."""
        optimizer: Any = self.engine.optimizer
        norm = float(optimizer._global_grad_norm if plain is None else plain)
        if not math.isfinite(norm) or norm < 0:  # DeepSpeed has -1 for what is no number
            return Applied(math.inf, False)
        return Applied(norm, norm <= limit)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """Summed loss in nats of what this rank has of a row, without dropout; no gradient is taken. A collective under ZeRO-3
        and where ranks share rows."""
        self.engine.eval()
        loss_sum = self._loss(batch).item()
        self.engine.train()
        return loss_sum

    def check_isolation(self, row: Batch, documents: Sequence[Batch]) -> None:
        """Passes when the row's last document has the same loss whatever is before it, and the row that of its documents alone,
        by the very kernels, exchanges and shards of training. A collective.

        Raises:
            UnusableInput: where it is not so: a token saw another document.
        """
        last, changed = last_document(row)
        batches = [last, changed, row, *documents]
        nats = self.sum_over_ranks([self.evaluate(batch) for batch in batches])
        pairs = [(nats[0], nats[1], PROBE_TOLERANCE), (nats[2], sum(nats[3:]), self._rounding())]
        for found, expected, tolerance in pairs:
            if not math.isclose(found, expected, rel_tol=tolerance, abs_tol=1e-6):
                raise UnusableInput(
                    f"packed documents see each other on {self.device}: a loss of {found:.9g} nats is {expected:.9g} "
                    "beside others, expected the same; train with train.sequence_parallel 1 or choose another base model"
                )

    def _rounding(self) -> float:
        """By how much the loss of a row may differ from that of its documents alone, whose products have other numbers of rows:
        hidden states of bf16 have 8 bits, and over many positions their rounding mostly cancels."""
        return 1e-2 if self.engine.bfloat16_enabled() else 1e-4

    def generation_model(self) -> PeftModel:
        """The model as it is trained, to generate with. Under ZeRO-3 each forward pass is a collective."""
        return self.adapted

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

    def import_state(self, state: OptimizerState, batch: Batch) -> None:
        """Continues from `state`; the next step is bit-equal to what it would have been.

        The model must have been built with state.parameters already in it: DeepSpeed copies its compute weights then.
        AdamW creates its moments in the first step, so one step with zero gradient at learning rate zero is taken on
        any micro-batch. It changes no weight, and everything it does change is overwritten.
        """
        if not state.moments:
            return
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(self._loss(batch) * 0.0)
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
        if self.row_group is not None:
            torch.distributed.destroy_process_group(self.row_group)


def last_document(row: Batch) -> tuple[Batch, Batch]:
    """The row with the targets of its last document only; and the same with other tokens before that document."""
    start = int((row.position_ids_1T[0] == 0).nonzero()[-1])
    ids_1T, targets_1T = row.ids_1T.clone(), row.targets_1T.clone()
    ids_1T[:, :start], targets_1T[:, :start] = ids_1T[:, start : start + 1], IGNORE_INDEX
    return Batch(row.ids_1T, targets_1T, row.position_ids_1T), Batch(ids_1T, targets_1T, row.position_ids_1T)


def load_parameters(loss: SupervisedLoss, parameters: Mapping[str, torch.Tensor]) -> None:
    """Copies whole tensors into a model that no engine holds yet."""
    own = trainable(loss.model)
    assert own.keys() == parameters.keys(), sorted(own.keys() ^ parameters.keys())[:4]
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(parameters[name])


def share_rows(loss: SupervisedLoss, world: World) -> torch.distributed.ProcessGroup | None:
    """Switches the model to attention over rows that a group of ranks shares; returns the group. None: ranks do not share rows.

    Raises UnusableInput when the model's heads cannot be dealt out.
    """
    if world.sequence_parallel == 1:
        return None
    model = loss.causal_lm
    config = model.config.get_text_config()
    refuse_uneven_heads(config, world.sequence_parallel)
    group: Any = group_of(world.rank, world.size, world.sequence_parallel)  # DeepSpeed declares a class of its own
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exchange = UlyssesSPAttentionHF(
        attend_documents, batch_size=1, attn_head_count=config.num_attention_heads, attn_head_size=width,
        kv_head_count=config.num_key_value_heads, num_hidden_layers=config.num_hidden_layers, process_group=group,
        seq_length_is_variable=True,
    )  # fmt: skip
    use_documents(model, name=SHARED_DOCUMENTS, attention=SharedAttention(exchange, group))
    return group
