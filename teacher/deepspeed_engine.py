"""The teacher sharded over ranks: experts by AutoEP, dense weights by ZeRO-3 and, inside a node, AutoTP. The only
module that imports DeepSpeed for inference.

With expert parallelism over all ranks each rank holds its experts whole: tokens travel, expert weights do not. Dense
weights lie in slices on all ranks and are gathered a decoder layer at a time.

Start it with torchrun, one process a rank, and give each rank its own share of the requests; ranks step together until
nobody has work (teacher/decode.py). Pinned to DeepSpeed 0.19: stage 3 with expert and tensor parallelism is beyond its
documented support, so equality with one process is a test (tests/distributed).
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.layers import set_autotp_mode
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from configs.errors import UnusableInput
from data.engine import Completion, ExpertStats, Handout, Request, Scores, Source
from teacher.checkpoint.empty_model import EmptyIsMeta, compute_buffers, empty_model
from teacher.checkpoint.fill import fill, like
from teacher.checkpoint.manifest import check_layout as check_prepared_for
from teacher.checkpoint.manifest import is_prepared, read_manifest
from teacher.checkpoint.partition import Cut, Layout, zero_group
from teacher.checkpoint.shards import read_rank
from teacher.decode import as_it_is
from teacher.heartbeat import DONE, Heartbeat, launch_store
from teacher.parallel import Dtype, Parallel, check_layout, parallel_config, zero_config
from teacher.runner import DTYPES, Runner, build_runner, read_config, read_model

log = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT_S = 1800.0
BACKSTOP_S = 60.0  # the heartbeat ends a rank first: it knows whose fault it is


class DeepSpeedEngine:
    """One rank of the sharded teacher. All ranks construct it, load it, and iterate `generate` to its end together; a
    rank with no requests passes an empty list. Rank and world size come from torchrun's environment.

    batch_size: decode slots on this rank. timeout_s: of a step and of a rank's silence (teacher/heartbeat.py); a rank that
    died, stopped or hangs makes the others fail within it, with its name, instead of waiting for ever.
    """

    name = "deepspeed"
    version = f"deepspeed {deepspeed.__version__}, transformers {transformers.__version__}"

    def __init__(
        self,
        model_dir: Path,
        parallel: Parallel,
        *,
        dtype: Dtype = "bf16",
        batch_size: int = 64,
        max_length: int | None = None,
        cache_bytes: int | None = None,
        timeout_s: float = COLLECTIVE_TIMEOUT_S,
    ) -> None:
        self.model_dir, self.parallel = model_dir, parallel
        self.dtype: Dtype = dtype
        self.batch_size, self.max_length, self.cache_bytes, self.timeout_s = batch_size, max_length, cache_bytes, timeout_s
        self._runner: Runner | None = None
        self._module: nn.Module | None = None
        self._engine: deepspeed.DeepSpeedEngine | None = None
        self._heart: Heartbeat | None = None
        self._said = torch.zeros(1)
        self._tensor_group: dist.ProcessGroup | None = None

    @property
    def runner(self) -> Runner:
        self.load()
        assert self._runner is not None
        return self._runner

    def load(self) -> None:
        """Collective. Joins the process group, reads the weights and shards them; a second call does nothing.

        Raises:
            UnusableInput: no model in the folder, or degrees that do not fit the world or the model's experts.
        """
        if self._runner is not None:
            return
        config = read_config(self.model_dir)
        start_process_group(self.timeout_s)
        check_layout(self.parallel, config, dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"]))
        self._heart = start_heartbeat(self.timeout_s)
        with self._heart.answerable():
            self._load(config)
            self._heart.leave()

    def _load(self, config: PretrainedConfig) -> None:
        device = torch.device(accelerator().current_device_name())
        engine = shard(self.model_dir, config, self.dtype, self.parallel)
        assert isinstance(engine.module, nn.Module)
        self._tensor_group = own_tensor_group(self.parallel.tensor)
        set_group_timeouts(self.timeout_s + BACKSTOP_S)
        self._engine, self._module, self._said = engine, engine.module, self._said.to(device)
        self._runner = build_runner(
            self._forward,
            engine.module,
            config,
            self.model_dir,
            num_slots=self.batch_size,
            max_length=self.max_length,
            device=device,
            cache_bytes=self.cache_bytes,
            agree=self._agree,
            share=self._share if self.parallel.tensor > 1 else as_it_is,
        )

    @property
    def module(self) -> nn.Module:
        """The sharded model itself; its parameters are empty outside a forward pass under ZeRO-3."""
        self.load()
        assert self._module is not None
        return self._module

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        """This rank's completions. Iterate to the end: a rank that stops early leaves the others in a collective; to end
        all of them, let one rank's `handout.stop` say so. Ranks of a tensor-parallel group answer the requests of the first
        of them together; what the others are given is not looked at.

        Raises:
            RankLost: another rank died, stopped or stands still; the message names it, this rank and the step.
        """
        runner, heart = self.runner, self.heart
        source = requests if self._tensor_group is None else self._shared(requests)
        with heart.answerable():
            for completion in runner.generate(source, handout):
                heart.leave()  # the caller's time
                yield completion
                heart.enter("taking requests")
            heart.leave()

    def score(
        self, sequences: Sequence[Sequence[int]], top_logits: int = 0, log_z_temperatures: Sequence[float] = (1.0,)
    ) -> list[Scores]:
        runner, heart = self.runner, self.heart
        with heart.answerable():
            scores = runner.score(sequences, top_logits, log_z_temperatures)
            heart.leave()
            return scores

    def expert_stats(self) -> ExpertStats | None:
        return self.runner.expert_stats()

    def close(self) -> None:
        """Collective: without the barrier and the orderly end a rank may abort at exit while another still talks to it."""
        if self._runner is not None:
            self._runner.watch.detach()
            self._runner = self._module = self._engine = None
        if self._heart is not None:
            with self._heart.answerable():
                self._heart.enter("closing")
                dist.barrier()
            self._heart.end(DONE)
            self._heart = None
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def heart(self) -> Heartbeat:
        """There before the model is loaded, which feeds a token of its own: it must not ask for another load."""
        if self._heart is None:
            self.load()
        assert self._heart is not None
        return self._heart

    def _forward(self, **inputs: object) -> object:
        """A top-level forward pass, the unit in which ranks keep step."""
        self.heart.enter("forward pass", step=self.heart.step + 1)
        assert self._engine is not None
        return self._engine(**inputs)

    def _shared(self, requests: Iterable[Request]) -> Source:
        """The first rank's requests, as it comes by them. All ranks of the group are here at the same point of the loop,
        because everything that decides when a request is taken is the same on all of them."""
        first = dist.get_rank() // self.parallel.tensor * self.parallel.tensor
        source = iter(requests)

        def take() -> Request | None:
            box = [next(source, None) if dist.get_rank() == first else None]
            self.heart.enter("sharing a request")
            dist.broadcast_object_list(box, src=first, group=self._tensor_group)
            return box[0]

        return Source(take)

    def _share(self, sampled: Tensor) -> Tensor:
        """What the first rank of this tensor-parallel group has sampled. Its ranks compute the same logits, but nothing
        promises the last bit, and two ranks that once say different tokens answer different requests from then on."""
        assert self._tensor_group is not None
        self.heart.enter("sharing the sampled tokens")
        first = dist.get_rank() // self.parallel.tensor * self.parallel.tensor
        dist.broadcast(sampled, src=first, group=self._tensor_group)
        return sampled

    def _agree(self, mine: int) -> int:
        self.heart.enter("agreeing on the next step")
        self._said.fill_(float(mine))
        dist.all_reduce(self._said, op=dist.ReduceOp.MAX)
        return int(self._said.item())


def accelerator() -> Any:
    """DeepSpeed's view of the device. Loosely typed, because its abstract class declares methods that return nothing."""
    return get_accelerator()


def start_process_group(timeout_s: float) -> None:
    """gloo on CPU, nccl on GPUs, through DeepSpeed, which keeps a communicator of its own.

    Its shared-memory all-reduce stays off: it takes 40 s of g++ on first use, a killed build leaves a lock on which
    every later start waits without a word, and it sums over all ranks whatever group it is given, which is wrong as
    soon as tensor parallelism is narrower than the world. Without it the same calls go to gloo.
    """
    if "RANK" not in os.environ:
        raise UnusableInput(
            "teacher.engine deepspeed: not started by torchrun (no RANK in the environment); use tracestill generate"
        )
    if dist.is_initialized():
        return
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo"
    if accelerator().device_name() != "cpu":
        accelerator().set_device(int(os.environ["LOCAL_RANK"]))
        backend = accelerator().communication_backend_name()
    deepspeed.init_distributed(backend, timeout=timedelta(seconds=timeout_s), dist_init_required=True)


def own_tensor_group(degree: int) -> dist.ProcessGroup | None:
    """Of the ranks that answer the same requests; None when each rank answers its own. Collective: every rank makes every
    group."""
    if degree == 1:
        return None
    firsts = range(0, dist.get_world_size(), degree)
    groups = [dist.new_group(list(range(first, first + degree))) for first in firsts]
    group = groups[dist.get_rank() // degree]
    assert isinstance(group, dist.ProcessGroup)
    return group


def set_group_timeouts(timeout_s: float) -> None:
    """Of every process group of this rank. DeepSpeed makes its own without one, and torch then gives them 30 minutes with
    gloo and 10 with NCCL, whose watchdog aborts the process: too long for a test, too short for a large prefill."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def start_heartbeat(timeout_s: float) -> Heartbeat:
    """This rank's heartbeat, started. Right after the process group: it takes part in no collective."""
    heart = Heartbeat(launch_store(timeout_s), dist.get_rank(), dist.get_world_size(), timeout_s)
    heart.start()
    return heart


def shard(model_dir: Path, config: PretrainedConfig, dtype: Dtype, parallel: Parallel) -> deepspeed.DeepSpeedEngine:
    """The model behind a DeepSpeed engine in evaluation mode, its weights spread over the ranks."""
    zero = zero_config(dtype, parallel)
    sections = zero | parallel_config(parallel, config.model_type)
    if is_prepared(model_dir):
        engine = engine_from_shards(model_dir, config, dtype, parallel, sections)
    else:
        announced = HfDeepSpeedConfig(zero) if parallel.zero_stage == 3 else None  # from_pretrained looks for a living one
        model = read_model(model_dir, config, dtype)
        del announced
        if parallel.zero_stage == 3:
            gather_by_layer(model)
        engine, *_ = deepspeed.initialize(model=model, config=sections)
    assert isinstance(engine, deepspeed.DeepSpeedEngine) and isinstance(engine.module, nn.Module)
    route_in_float32(engine.module)
    drop_backward_hooks(engine)
    engine.eval()
    return engine


def engine_from_shards(
    folder: Path, config: PretrainedConfig, dtype: Dtype, parallel: Parallel, sections: dict[str, Any]
) -> deepspeed.DeepSpeedEngine:
    """The engine from prepared shards: each rank opens its own files alone, and no tensor is ever whole anywhere.

    Raises:
        UnusableInput: shards for another layout, or damaged ones.
    """
    manifest, rank = read_manifest(folder), dist.get_rank()
    check_prepared_for(folder, manifest, Layout(dist.get_world_size(), *parallel), dtype)
    device = torch.device(accelerator().current_device_name())
    num_threads = max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    held = read_rank(folder, manifest, rank, device, num_threads)
    model = empty_model(config, DTYPES[dtype])
    compute_buffers(model, device)
    if parallel.zero_stage == 3:
        gather_by_layer(model)
    if parallel.tensor > 1:
        set_autotp_mode(training=True)  # as deepspeed.initialize does
    return PreparedEngine(model, sections, held, manifest.cuts, manifest.layout)


class PreparedEngine(deepspeed.DeepSpeedEngine):
    """DeepSpeed around a model without values. AutoEP and AutoTP replace and cut its layers on the meta device, as they would
    real ones; then every parameter becomes the part that this rank holds, before ZeRO looks for something to partition."""

    def __init__(
        self, model: PreTrainedModel, sections: dict[str, Any], held: dict[str, Tensor], cuts: dict[str, Cut], layout: Layout
    ) -> None:
        self._held, self._cuts, self._layout = held, cuts, layout
        super().__init__(args=None, model=model, config=sections, config_class=deepspeed.DeepSpeedConfig(sections))

    def _configure_expert_parallel(self, model: nn.Module, collect_sources: bool | None = None) -> Any:
        with EmptyIsMeta():
            return super()._configure_expert_parallel(model, collect_sources)

    def _configure_distributed_model(self, model: nn.Module) -> None:
        init = deepspeed.zero.Init(config_dict_or_path=self.config) if self._layout.zero_stage == 3 else None
        held, device = self._held, torch.device(accelerator().current_device_name())
        fill(model, held, device, lambda name, empty, values: adopt(name, empty, values, self._cuts[name], self._layout, init))
        super()._configure_distributed_model(model)

    def _broadcast_model(self) -> None:
        """Nothing to do: every rank has verified its own bytes."""


def adopt(name: str, empty: nn.Parameter, values: Tensor, cut: Cut, layout: Layout, init: Any) -> nn.Parameter:
    """A parameter like `empty` of which this rank holds `values`; init: ZeRO's conversion, None where nothing is cut."""
    size, index = zero_group(cut, layout, dist.get_rank())
    expected = -(-empty.numel() // size)
    if values.numel() != expected:
        raise UnusableInput(
            f"prepared shards hold {values.numel()} numbers of {name}, expected {expected}; run tracestill prepare CONFIG again"
        )
    if init is None:
        return like(empty, values.view(empty.shape))
    # The shape without the memory: one number, seen as many times as there are elements.
    parameter: Any = like(empty, torch.empty((), dtype=values.dtype, device=values.device).expand(empty.shape))
    if cut == "experts":
        parameter.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(f"ep_size_{layout.expert}")
    elif cut != "whole":
        parameter.ds_zero_partition_process_group = groups.get_data_parallel_group()
    adopt_partition(parameter, values, init)
    found = (parameter.ds_zero_partition_world_size, parameter.ds_zero_partition_rank)
    assert found == (size, index), f"{name}: DeepSpeed cuts it as {found}, prepared as {(size, index)}"
    return parameter


def adopt_partition(parameter: Any, values: Any, init: Any) -> None:
    """ZeRO takes `values` for this rank's partition of the parameter. Its own way in broadcasts every whole tensor from rank 0
    and copies a slice of it. Loosely typed: ZeRO keeps its books in attributes of tensors."""
    init._convert_to_deepspeed_param(parameter)
    values.ds_numel, values.final_location = values.numel(), None
    values.status = PartitionedParamStatus.AVAILABLE
    parameter.ds_tensor = values
    parameter.ds_numel_aligned = values.numel() * parameter.ds_zero_partition_world_size
    parameter.partition()  # sees a partition already made, and lets go of the whole


def gather_by_layer(model: PreTrainedModel) -> None:
    """ZeRO-3 gathers a decoder layer as one unit: 8 fetches a step instead of one for each of 90 modules, which is half
    of a small model's step; a large one gets larger messages."""
    layers = set(model._no_split_modules or ())
    names = [name for name, module in model.named_modules() if type(module).__name__ in layers]
    if names:
        deepspeed.utils.set_z3_leaf_modules_by_name(model, names)


def drop_backward_hooks(engine: deepspeed.DeepSpeedEngine) -> None:
    """ZeRO-3 wraps each module's tensors for a backward pass that never comes."""
    for hook in getattr(engine.optimizer, "backward_hooks", ()):
        hook.remove()


def route_in_float32(module: nn.Module) -> None:
    """AutoEP runs the router's matrix product in the model's dtype, transformers in float32. In bf16 that sent 0.26 % of
    the tokens to other experts and changed 1.3 % of the argmaxes; in float32 nothing differs."""
    for router in module.modules():
        if isinstance(router, TokenChoiceTopKRouter):
            gate = router.gate

            def forward(input: Tensor, gate: nn.Linear = gate) -> Tensor:  # the weight is read late: ZeRO-3 gathers it
                bias = None if gate.bias is None else gate.bias.float()
                return torch.nn.functional.linear(input.float(), gate.weight.float(), bias)

            gate.forward = forward
