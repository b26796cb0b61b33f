"""What the model that is being trained says to prompts, greedily, with a key-value cache, without a trace of it in the training.

Attention of training is made for whole packed rows and has no cache, so the model is switched to sdpa meanwhile. Under ZeRO-3
each forward pass gathers the weights from all ranks, so all must run equally many: one that has nothing left to say runs idle
passes of one token until the others are done. The engine has to have run the loss once before: in its forward pass, and only
there, DeepSpeed notices which weights are read outside their own layer (DoRA reads its base layer's), and gathers them later too.

Shape suffixes: B prompts of a group, T tokens so far, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel

AnyBusy = Callable[[bool], bool]
"""Told whether this rank has work left, says whether another pass must be run."""


@contextmanager
def generating(model: PeftModel) -> Iterator[None]:
    """Inside, the model generates: sdpa, no dropout, no gradient. Afterwards, whatever happened, it is as it was."""
    base = model.get_base_model()
    attention, training = base.config._attn_implementation, [module for module in model.modules() if module.training]  # type: ignore
    model.eval()
    try:
        base.set_attn_implementation("sdpa")  # type: ignore
        with torch.no_grad():
            yield
    finally:
        base.set_attn_implementation(attention)  # type: ignore
        for module in training:
            module.training = True


def in_lockstep(model: PeftModel) -> AnyBusy:
    """For parameters that lie in pieces on all ranks (ZeRO-3): whether any rank has work left, a collective. Else whether this
    one has."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return bool

    def any_busy(busy: bool) -> bool:
        flag = torch.tensor(int(busy), device=model.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    return any_busy


def answer_greedily(
    model: PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Collection[int],
    max_tokens: int,
    pad_id: int,
    any_busy: AnyBusy = bool,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """For each prompt the ids that follow it, the stop included; at most max_tokens. Call it while `generating`. is_stopped:
    asked at each token, and this rank says no more once it says yes.

    The prompts are one batch, padded on the left. With in_lockstep every rank calls it, be it with no prompts.
    """
    base, said = model.get_base_model(), [list[int]() for _ in prompts]
    speaking = list(range(len(prompts)))
    fed_BT, mask_BT = left_padded(prompts, pad_id)
    cache = None
    while any_busy(bool(speaking)):
        if not speaking:
            base(input_ids=torch.tensor([[pad_id]], device=model.device), use_cache=False, logits_to_keep=1)
            continue
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -fed_BT.shape[1] :]
        output = base(
            input_ids=fed_BT.to(model.device), attention_mask=mask_BT.to(model.device),
            position_ids=positions_BT.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        fed_BT = output.logits[:, -1].float().argmax(-1, keepdim=True).cpu()
        mask_BT = torch.cat([mask_BT, torch.ones_like(fed_BT)], dim=1)
        for row in speaking:
            said[row].append(int(fed_BT[row, 0]))
        speaking = [row for row in speaking if said[row][-1] not in stop_ids and len(said[row]) < max_tokens and not is_stopped()]
    return said


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [B, T] ids and mask (1: a token of the prompt), each prompt at its row's right end."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    ids_BT = torch.full((len(prompts), longest), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    return ids_BT, mask_BT
