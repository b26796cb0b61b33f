"""What the GPUs of a plan can do, from their data sheets. A CPU's figures are unknown, and every rate is then unknown."""

from typing import NamedTuple

from configs.schema import Hardware, Teacher

USABLE_SHARE = 0.92
"""What weights and cache may take of a GPU; the rest is the CUDA context, NCCL's buffers and fragmentation."""
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int4": 0.5}


class Device(NamedTuple):
    """memory: bytes. bandwidth: of it, bytes/s. link: to the GPUs of the same node, bytes/s one way (data sheets give
    both directions). bf16_flops, fp8_flops: dense peak, without structured sparsity."""

    memory: float
    bandwidth: float
    link: float
    bf16_flops: float
    fp8_flops: float

    @property
    def usable(self) -> int:
        return int(self.memory * USABLE_SHARE)

    def flops(self, dtype: str) -> float:
        """Peak for weights of that dtype; int4 is unpacked to bf16, and fp32 is not what a plan would choose."""
        return {"fp8": self.fp8_flops, "fp32": self.bf16_flops / 2}.get(dtype, self.bf16_flops)


DEVICES = {
    "h100": Device(80e9, 3.35e12, 450e9, 989e12, 1979e12),
    "h200": Device(141e9, 4.8e12, 450e9, 989e12, 1979e12),
    "b200": Device(180e9, 8.0e12, 900e9, 2250e12, 4500e12),
}


def device_of(hardware: Hardware) -> Device | None:
    return DEVICES.get(hardware.gpu)


class Degrees(NamedTuple):
    """A layout with every number resolved. tensor: ranks that answer the same requests. zero: dense weights lie in slices
    on all ranks and are gathered at each use; so do the experts of expert groups that hold the same ones.

    server: behind http. A server without expert parallelism cuts each expert over its tensor-parallel ranks; DeepSpeed's
    AutoTP leaves experts whole. kv_sharded: tokens of a request are spread over the ranks of a node.
    """

    world: int
    ranks_per_node: int
    expert: int
    tensor: int
    zero: bool
    kv_sharded: bool = False
    server: bool = False

    @property
    def replicas(self) -> int:
        """Groups of ranks that answer requests of their own."""
        return self.world // self.tensor

    @property
    def expert_slices(self) -> int:
        """Ranks over which one copy of the experts is spread."""
        return self.tensor if self.server and self.expert == 1 else self.expert

    @property
    def nodes(self) -> int:
        return max(1, self.world // self.ranks_per_node)


def degrees_of(teacher: Teacher) -> Degrees:
    """ZeRO is DeepSpeed's; the local engine is one rank whatever the layout says."""
    layout, kind = teacher.layout, teacher.engine.type
    if kind == "local":
        return Degrees(world=1, ranks_per_node=1, expert=1, tensor=1, zero=False)
    return Degrees(
        world=teacher.world,
        ranks_per_node=teacher.ranks_per_node,
        expert=teacher.expert_parallel,
        tensor=layout.tensor_parallel,
        zero=kind == "deepspeed" and layout.zero_stage == 3,
        kv_sharded=layout.kv_cache == "sharded",
        server=kind == "http",
    )


class Links(NamedTuple):
    """Time that collectives take, at the full rate of the slowest link they cross. link, network: bytes/s of one GPU, one
    way, inside its node and between nodes."""

    link: float
    network: float
    ranks_per_node: int

    def within(self, ranks: int) -> float:
        """Bytes/s of one GPU to the others of a group of neighbouring ranks."""
        return self.link if ranks <= self.ranks_per_node else min(self.link, self.network)

    def ring(self, num_bytes: float, ranks: int, stride: int = 1) -> float:
        """Seconds to gather `num_bytes` that lie in equal slices on `ranks` ranks, `stride` apart: every link of the ring
        carries all but one slice. Between nodes a ring has the ports of its own ranks there: 16 ranks, one a 400 Gb/s port
        a node and 1.49 TB (ZeRO-3 over all of GLM-5.2) are 28 s, over NVLink alone 3.1 s."""
        if ranks == 1:
            return 0.0
        spans_nodes = ranks * stride > self.ranks_per_node
        ports = max(1, self.ranks_per_node // stride)
        rate = min(self.link, ports * self.network) if spans_nodes else self.link
        return num_bytes * (ranks - 1) / ranks / rate

    def all_to_all(self, num_bytes: float, ranks: int) -> float:
        """Seconds for each rank to send `num_bytes` in equal shares to `ranks` ranks, itself among them."""
        inside = min(ranks, self.ranks_per_node)
        return max(num_bytes * (inside - 1) / ranks / self.link, num_bytes * (ranks - inside) / ranks / self.network)
