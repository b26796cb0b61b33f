"""Is the exported folder the model that was trained, and does it speak the way it was trained to?

Three ways an export goes wrong in silence, and the check for each:
- other weights (a bad merge, a lost head, a corrupted file): logits differ from base + adapter by more than rounding;
- the adapter is not in it (a key prefix that matches nothing, a merge in bf16): logits nearer to the base's;
- another template than in training: a stray newline at `<think>` has cost 18 nats.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UnusableInput
from data.chat import dialect_of, encode_conversation, encode_prompt
from data.records import Message
from student.model import load_base, load_tokenizer

# Bound on the root mean square of (exported - reference) logits over that of the reference's centred logits. Weights are
# rounded once to 24, 11 or 8 significant bits and compared in float32. Rounding alone gave 7e-7, 2e-4 and 2e-3 on the embedded
# student (5 layers); the bounds leave a factor of 15 and more for the depth of a 7 B model.
LOGIT_BOUND = {"fp32": 5e-5, "fp16": 4e-3, "bf16": 3e-2}
NUM_NEW_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Observed:
    """One prompt under the trained model. Sequences are prompt + greedy continuation.

    ids_T: int64. adapted_TV, base_TV: float32 logits of every position, with the adapter and without it.
    """

    ids_T: torch.Tensor
    num_prompt_tokens: int
    adapted_TV: torch.Tensor
    base_TV: torch.Tensor


@dataclass(frozen=True, slots=True)
class Parity:
    """What the reload check found. Errors are relative (see LOGIT_BOUND).

    adapter_effect: how far the adapter moves the base's logits. adapter_kept: 1 - error / effect; 1.0 is all of it.
    tokens: greedy tokens compared; near_ties: those that differ where the reference's own lead is within the rounding.
    """

    dtype: str
    logit_error: float
    adapter_effect: float
    adapter_kept: float
    tokens: int
    near_ties: int
    twins: int


@torch.no_grad()
def observe(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]]) -> list[Observed]:
    """What the trained, unmerged model says to each prompt: greedy continuation, and logits with and without adapter."""
    stops = list(dialect_of(tokenizer).stop_ids(tokenizer))
    observed = []
    for messages in prompts:
        prompt = torch.tensor([encode_prompt(tokenizer, messages)])  # type: ignore[arg-type]
        ids = adapted.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NUM_NEW_TOKENS,
            eos_token_id=stops, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        assert isinstance(ids, torch.Tensor)
        with adapted.disable_adapter():
            base = logits_of(adapted, ids)
        observed.append(Observed(ids[0], prompt.shape[1], logits_of(adapted, ids), base))
    return observed


def logits_of(model: PreTrainedModel | PeftModel, ids_1T: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids_1T, use_cache=False).logits[0].float()


def check(
    folder: Path,
    reference: Sequence[Observed],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    conversations: Sequence[Sequence[Message]],
    *,
    dtype: str,
) -> Parity:
    """The findings of loading `folder` afresh, as a server would. Raises UnusableInput naming what does not agree."""
    if not reference:
        raise UnusableInput("export: no prompt to check the exported folder with; expected at least one evaluation item")
    twins = check_twins(folder, tokenizer, prompts, conversations)
    return dataclasses.replace(compare(load_base(str(folder), "fp32"), reference, dtype=dtype), twins=twins)


@torch.no_grad()
def compare(model: PreTrainedModel, reference: Sequence[Observed], *, dtype: str) -> Parity:
    """Logits and greedy tokens of `model` against the reference. Raises UnusableInput when a bound is broken."""
    exported = [logits_of(model, one.ids_T[None]) for one in reference]
    spread = rms([one.adapted_TV - one.adapted_TV.mean(-1, keepdim=True) for one in reference])
    error = rms([found - one.adapted_TV for found, one in zip(exported, reference, strict=True)]) / spread
    effect = rms([one.base_TV - one.adapted_TV for one in reference]) / spread
    to_base = rms([found - one.base_TV for found, one in zip(exported, reference, strict=True)]) / spread
    if not effect > 0.0:
        raise UnusableInput(
            "export: the adapter changes no logit (lora_B is zero, or its keys match no module of the base); train first"
        )
    if not error <= LOGIT_BOUND[dtype]:  # not `>`: a NaN is a failure too
        raise UnusableInput(
            f"export: reloaded logits are off by {error:.2g} of their spread, expected at most {LOGIT_BOUND[dtype]:g} "
            f"for {dtype}: the folder is not base + adapter; export again, or with export.dtype: fp32"
        )
    if to_base < error:
        raise UnusableInput(
            f"export: the reloaded model is nearer to the base ({to_base:.2g}) than to base + adapter ({error:.2g}): "
            f"{dtype} rounds the adapter away; set export.dtype: fp32"
        )
    tokens, ties = compare_greedy(exported, reference, slack=2 * LOGIT_BOUND[dtype] * spread)
    return Parity(dtype, error, effect, 1.0 - error / effect, tokens, ties, 0)


def rms(differences_TV: Sequence[torch.Tensor]) -> float:
    """Root mean square over every position and vocabulary entry of all sequences, in float64."""
    squares = sum(float(difference.double().square().sum()) for difference in differences_TV)
    return (squares / sum(difference.numel() for difference in differences_TV)) ** 0.5


def compare_greedy(exported: Sequence[torch.Tensor], reference: Sequence[Observed], *, slack: float) -> tuple[int, int]:
    """(tokens compared, near ties). Along the reference's own continuation the exported model picks the same tokens.

    Following one path compares every token; two free-running generations would only be compared up to their first tie.
    A different pick passes where the reference's lead of its token is at most `slack` logits, and is counted.
    """
    tokens = ties = 0
    for found_TV, one in zip(exported, reference, strict=True):
        for position in range(one.num_prompt_tokens - 1, len(one.ids_T) - 1):
            chosen, picked = int(one.ids_T[position + 1]), int(found_TV[position].argmax())
            lead = float(one.adapted_TV[position, chosen] - one.adapted_TV[position, picked])
            if lead > slack:
                raise UnusableInput(
                    f"export: at token {position + 1} the reloaded model writes id {picked}, the trained one id {chosen} "
                    f"with a lead of {lead:.3g} logits; export again, or with export.dtype: fp32"
                )
            tokens += 1
            ties += picked != chosen
    return tokens, ties


def check_twins(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    conversations: Sequence[Sequence[Message]],
) -> int:
    """How many conversations were compared. The folder's own tokenizer and template, loaded afresh, must prompt with
    exactly the ids the student was trained after. Raises UnusableInput at the first difference."""
    served = load_tokenizer(str(folder))
    for messages in prompts:
        require_equal(encode_prompt(tokenizer, messages), encode_prompt(served, messages), "prompt")  # type: ignore[arg-type]
    for messages in conversations:
        trained = encode_conversation(tokenizer, messages)  # type: ignore[arg-type]
        first = trained.mask.index(True)
        require_equal(trained.ids[:first], encode_prompt(served, history(messages)), "training conversation")  # type: ignore[arg-type]
    return len(prompts) + len(conversations)


def history(messages: Sequence[Message]) -> list[Message]:
    """The turns before the first assistant turn: what a server is given when the model answers for the first time."""
    first = next(index for index, message in enumerate(messages) if message.get("role") == "assistant")
    return list(messages[:first])


def require_equal(trained: Sequence[int], served: Sequence[int], what: str) -> None:
    if list(trained) != list(served):
        shorter = min(len(trained), len(served))
        differs = next((index for index in range(shorter) if trained[index] != served[index]), shorter)
        raise UnusableInput(
            f"export: the served {what} differs from the trained one at id {differs} ({len(served)} ids, expected "
            f"{len(trained)}): another chat template or tokenizer; export with the one the student was trained with"
        )
