"""The parity matrix: how much of the trained student each exported format still is, on held-out teacher traces.

KL(adapter || export) is in nats a token over supervised positions. retention = 1 - KL(adapter || export) / KL(adapter || base): 1
is the student, 0 is no better than the base that nobody trained.

T tokens of a sequence    P chosen positions    V vocabulary
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from data.chat import dialect_of, encode_conversation
from data.records import Message
from student.formats.base import Format, Speaker
from student.parity import Observed

MAX_TRACES, MAX_POSITIONS, MAX_TOKENS = 32, 128, 4096
"""Of the held-out traces, of each one's supervised positions (evenly spread), and tokens of a trace: what is kept of the trained
model is at most 32 x 128 rows of the vocabulary, 2.5 GB at 152,064 entries."""
NUM_NEW_TOKENS = 128


class HeldTrace(NamedTuple):
    """One trace. logits_PV: float32, of the trained model, at positions that predict a supervised token."""

    ids_T: tuple[int, ...]
    positions_P: torch.Tensor
    logits_PV: torch.Tensor


class HeldPrompt(NamedTuple):
    """One prompt, and the trained model's greedy continuation."""

    ids: tuple[int, ...]
    said: tuple[int, ...]


class Held(NamedTuple):
    """What the trained model says. kl_base: KL(adapter || base) in nats a token."""

    traces: Sequence[HeldTrace]
    prompts: Sequence[HeldPrompt]
    kl_base: float
    stop_ids: tuple[int, ...]
    closes_think: int | None


class ParityRow(NamedTuple):
    """One format. KL in nats a token over `positions` of `traces`. Rates are shares of the prompts' greedy continuations (of at
    most NUM_NEW_TOKENS), the adapter's beside them. first_divergence: mean number of tokens that equal the adapter's before one
    differs, or the continuation ends. size_bytes: of the folder. tokens_per_second: one sequence at a time, on the machine that
    exported."""

    format: str
    kl_adapter: float
    kl_base: float
    retention: float
    stop_rate: float
    adapter_stop_rate: float
    think_close_rate: float
    adapter_think_close_rate: float
    first_divergence: float
    adapter_length: float
    size_bytes: int
    tokens_per_second: float
    traces: int
    positions: int


@torch.no_grad()
def observe_traces(
    adapted: PeftModel, tokenizer: PreTrainedTokenizerBase, traces: Sequence[Sequence[Message]], prompts: Sequence[Observed]
) -> Held:
    """Raises UnusableInput where there is no trace to measure on."""
    stop_ids = tuple(dialect_of(tokenizer).stop_ids(tokenizer))
    held, total, count = list[HeldTrace](), 0.0, 0
    for messages in traces[:MAX_TRACES]:
        encoded = encode_conversation(tokenizer, messages)  # type: ignore[arg-type]
        ids = torch.tensor([encoded.ids[:MAX_TOKENS]])
        supervised = [at - 1 for at, is_said in enumerate(encoded.mask[:MAX_TOKENS]) if is_said and at]
        if not supervised:
            continue
        spread = torch.linspace(0, len(supervised) - 1, min(MAX_POSITIONS, len(supervised))).round().long()
        positions_P = torch.tensor(supervised)[spread]
        logits_PV = adapted(input_ids=ids, use_cache=False).logits[0][positions_P].float()
        with adapted.disable_adapter():
            base_PV = adapted(input_ids=ids, use_cache=False).logits[0][positions_P].float()
        total, count = total + divergence(logits_PV, base_PV), count + len(positions_P)
        held.append(HeldTrace(tuple(ids[0].tolist()), positions_P, logits_PV))
    if not count:
        raise UnusableInput("export: no held-out trace to measure the exports on; expected at least one in the dataset")
    said = []
    for one in prompts:
        prompt = one.ids_T[: one.num_prompt_tokens]
        ids = adapted.generate(
            input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], do_sample=False, max_new_tokens=NUM_NEW_TOKENS,
            eos_token_id=list(stop_ids), pad_token_id=stop_ids[0],
        )  # fmt: skip
        assert isinstance(ids, torch.Tensor)
        said.append(HeldPrompt(tuple(prompt.tolist()), tuple(ids[0, len(prompt) :].tolist())))
    closes = tokenizer.convert_tokens_to_ids("</think>")
    return Held(held, said, total / count, stop_ids, closes if isinstance(closes, int) else None)


def measure_format(form: Format, folder: Path, held: Held) -> ParityRow:
    """Opens the folder as it will be served."""
    speaker = form.open(folder)
    try:
        total = sum(divergence(one.logits_PV, speaker.logits(one.ids_T)[one.positions_P]) for one in held.traces)
        started = time.perf_counter()
        said = [_continued(speaker, one, held.stop_ids) for one in held.prompts]
        seconds = time.perf_counter() - started
    finally:
        speaker.close()
    positions = sum(len(one.positions_P) for one in held.traces)
    theirs = [one.said for one in held.prompts]
    number = max(len(said), 1)
    return ParityRow(
        format=form.name,
        kl_adapter=total / positions,
        kl_base=held.kl_base,
        retention=retention(total / positions, held.kl_base),
        stop_rate=sum(_stops(ids, held) for ids in said) / number,
        adapter_stop_rate=sum(_stops(ids, held) for ids in theirs) / number,
        think_close_rate=sum(held.closes_think in ids for ids in said) / number,
        adapter_think_close_rate=sum(held.closes_think in ids for ids in theirs) / number,
        first_divergence=sum(agreed(mine, other) for mine, other in zip(said, theirs, strict=True)) / number,
        adapter_length=sum(map(len, theirs)) / number,
        size_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        tokens_per_second=sum(map(len, said)) / max(seconds, 1e-9),
        traces=len(held.traces),
        positions=positions,
    )


def divergence(logits_PV: torch.Tensor, others_PV: torch.Tensor) -> float:
    """Sum over the positions of KL(first || second). A padded vocabulary is compared as far as both go. In float64: rounded to
    float32, log probabilities do not add up to 1 by 1e-8, which is all that a light adapter does."""
    width = min(logits_PV.shape[1], others_PV.shape[1])
    first_PV, second_PV = (logits[:, :width].double().log_softmax(-1) for logits in (logits_PV, others_PV))
    return float((first_PV.exp() * (first_PV - second_PV)).sum())


def retention(kl_export: float, kl_base: float) -> float:
    """Raises UnusableInput where the adapter changes nothing that could be kept."""
    if not kl_base > 0.0:
        raise UnusableInput(
            "export: the adapter changes no logit (lora_B is zero, or its keys match no module of the base); train first"
        )
    return 1.0 - kl_export / kl_base


def agreed(mine: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens that are the same."""
    return next((at for at, (one, two) in enumerate(zip(mine, other, strict=False)) if one != two), min(len(mine), len(other)))


def _continued(speaker: Speaker, prompt: HeldPrompt, stop_ids: Sequence[int]) -> list[int]:
    return speaker.generate(prompt.ids, max_new_tokens=NUM_NEW_TOKENS, stop_ids=stop_ids)


def _stops(ids: Sequence[int], held: Held) -> bool:
    return bool(ids) and ids[-1] in held.stop_ids
