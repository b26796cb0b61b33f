"""Which experts the teacher's tokens went to: counted by hooks on its routers, a row of the batch at a time.

AutoEP keeps counters of its own, but they include padding and the dummy steps of ranks that wait for others, and
`output_router_logits` returns nothing under AutoEP. The routers' outputs are the same in both worlds: transformers'
`GlmMoeDsaTopkRouter` gives the chosen experts as output 2, AutoEP's `TokenChoiceTopKRouter` as output 1.

A row's counts join the totals when its request finishes, so that telemetry and completions speak of the same tokens: the
prompt and all of the output but its last token, once each, whether or not the row was sent back to the queue and read in
again in between. What an output that was handed out had routed so far is dropped: whoever continues it counts it.

Legend: B slots, L sparse layers, E experts, S tokens of a row, K experts per token.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from data.engine import ExpertStats
from data.expert_load import CountedLoad, summarise

CHOSEN_OUTPUT = {
    "GlmMoeDsaTopkRouter": 2,
    "DeepseekV3TopkRouter": 2,
    "Qwen3MoeTopKRouter": 2,
    "MixtralTopKRouter": 2,
    "TokenChoiceTopKRouter": 1,
}


class ExpertWatch:
    """Counts routed tokens per slot. A model without routers is watched at no cost and has nothing to tell.

    Before each forward pass the decode loop says which slots its rows are (`watch`) or that they are nobody's
    (`ignore`). Experts of layer l are those of the l-th router in the model's order.
    """

    def __init__(self, model: nn.Module, num_slots: int, device: torch.device) -> None:
        routers = [module for module in model.modules() if type(module).__name__ in CHOSEN_OUTPUT]
        self.handles = [router.register_forward_hook(self._hook(layer, router)) for layer, router in enumerate(routers)]
        num_experts = cast(int, routers[0].num_experts) if routers else 0
        self.counts_BLE = torch.zeros(num_slots, len(routers), num_experts, dtype=torch.int32, device=device)
        self.totals: dict[str, Tensor] = {}
        self.rows = slice(0, 0)
        self.weights_BS: Tensor | None = None

    def watch(self, rows: slice, real_BS: Tensor) -> None:
        """The next forward pass holds these slots' tokens; real_BS is False on padding."""
        self.rows, self.weights_BS = rows, real_BS.to(torch.int32)

    def ignore(self) -> None:
        self.weights_BS = None

    def _hook(self, layer: int, router: nn.Module):  # noqa: ANN202 (a torch hook)
        chosen_output = CHOSEN_OUTPUT[type(router).__name__]

        def count(module: nn.Module, inputs: object, outputs: Sequence[Tensor]) -> None:
            if self.weights_BS is None:
                return
            num_rows, length = self.weights_BS.shape
            chosen_BX = outputs[chosen_output].reshape(num_rows, -1)
            weights_BX = self.weights_BS.repeat_interleave(chosen_BX.shape[1] // length, dim=1)
            self.counts_BLE[self.rows, layer].scatter_add_(1, chosen_BX, weights_BX)

        return count

    def start(self, rows: slice) -> None:
        self.counts_BLE[rows] = 0

    def move_rows(self, moves: Sequence[tuple[int, int]]) -> None:
        source, target = torch.tensor(moves, device=self.counts_BLE.device).T
        self.counts_BLE[target] = self.counts_BLE[source]

    def finish(self, slot: int, task: str) -> CountedLoad | None:
        """The slot's counts join its task's totals; returns them with their summary."""
        if self.counts_BLE.numel() == 0:
            return None
        counts_LE = self.counts_BLE[slot].cpu().long()
        self.totals[task] = self.totals.get(task, 0) + counts_LE
        return summarise(counts_LE.numpy())

    def stats(self) -> ExpertStats | None:
        if self.counts_BLE.numel() == 0:
            return None
        return ExpertStats({task: total_LE.tolist() for task, total_LE in self.totals.items()})

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
