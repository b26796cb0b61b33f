"""What GPUs and the links between them can do, from their data sheets. A CPU's figures are unknown, and with them every rate
of a plan."""

from typing import NamedTuple

USABLE_SHARE = 0.92
"""What a plan may fill of a GPU; the rest is the CUDA context, NCCL's buffers and fragmentation."""
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


def device_of(gpu: str) -> Device | None:
    """None for a CPU."""
    return DEVICES.get(gpu)


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
