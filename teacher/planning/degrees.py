"""A layout's degrees, every number resolved."""

from typing import NamedTuple

from configs.schema import Teacher


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
