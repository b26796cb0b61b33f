"""Rebuilds one half of the embedded pair from its recipe, in one process:

    python -m train.pretrain teacher/embedded/recipe.yaml
    python -m train.pretrain student/embedded/recipe.yaml

Not a stage of the pipeline: teams bring trained models, and the embedded pair ships trained. Writes model.safetensors
(bf16), config.json, the tokenizer and accuracy.json into the recipe's folder.
"""

import argparse
import functools
import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from data import curriculum
from data.byte_tokenizer import build_byte_tokenizer
from data.chat import IGNORE_INDEX, Encoded, dialect_of, encode_conversation

LESSONS = {"teacher": curriculum.teacher_lessons, "base": curriculum.base_lessons}
MICRO_BATCHES = 4


def to_messages(lesson: curriculum.Lesson) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": lesson.question},
        {"role": "assistant", "reasoning_content": lesson.reasoning, "content": lesson.answer},
    ]


def pad_batch(batch: Sequence[Encoded], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids_BT and labels_BT (int64); labels are IGNORE_INDEX where the mask is False or the row is padding.

    Labels are not shifted: labels[b, t] is the id at t, to be predicted from t - 1.
    """
    length = max(len(row.ids) for row in batch)
    ids_BT = torch.full((len(batch), length), pad_id, dtype=torch.long)
    labels_BT = torch.full((len(batch), length), IGNORE_INDEX, dtype=torch.long)
    for index, row in enumerate(batch):
        ids = torch.tensor(row.ids)
        ids_BT[index, : len(row.ids)] = ids
        labels_BT[index, : len(row.ids)] = torch.where(torch.tensor(row.mask), ids, IGNORE_INDEX)
    return ids_BT, labels_BT


def steps(lessons: Iterator[curriculum.Lesson], tokenizer: PreTrainedTokenizerBase, rows: int) -> Iterator[list[list[Encoded]]]:
    """One optimizer step after another, each an even draw of `rows` lessons cut into micro-batches of similar length.

    Sorting whole windows of lessons into batches pads even less, but makes a batch nearly one family: the loss then
    swings by 0.3 nats from step to step and learning takes half as long again.
    """
    while True:
        drawn = [encode_conversation(tokenizer, to_messages(lesson)) for lesson in itertools.islice(lessons, rows)]
        drawn.sort(key=lambda row: len(row.ids))
        size = -(-rows // MICRO_BATCHES)
        yield [drawn[start : start + size] for start in range(0, rows, size)]


def exact_traces(model: PreTrainedModel, rows: Sequence[Encoded], pad_id: int) -> list[bool]:
    """Whether greedy decoding from each row's opener would reproduce the row: every trained token after the first ten
    is the argmax. Ten, because the opener is drawn at random. A teacher-forced stand-in for generation while training."""
    ids_BT, labels_BT = pad_batch(rows, pad_id)
    with torch.no_grad():
        predicted_BT = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].argmax(-1)
    targets_BT = labels_BT[:, 1:].clone()
    after_opener = (targets_BT != IGNORE_INDEX).cumsum(-1) > 14
    return (~(after_opener & (targets_BT != IGNORE_INDEX) & (predicted_BT != targets_BT)).any(-1)).tolist()


class RouterBalance:
    """Auxiliary-loss-free balancing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): after a step, an overloaded
    expert's selection bias goes down by `rate`, an underloaded one's up. No gradient is involved."""

    def __init__(self, model: PreTrainedModel, rate: float = 2e-3) -> None:
        self.rate = rate
        self.routers = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
        self.loads: dict[int, torch.Tensor] = {}
        for index, router in enumerate(self.routers):
            router.register_forward_hook(functools.partial(self._count, index))

    def _count(self, index: int, router: torch.nn.Module, _: object, output: tuple[torch.Tensor, ...]) -> None:
        counted = torch.bincount(output[2].flatten(), minlength=int(router.num_experts)).float()  # type: ignore[arg-type]
        self.loads[index] = self.loads.get(index, 0.0) + counted

    def step(self) -> None:
        for index, router in enumerate(self.routers):
            bias = router.e_score_correction_bias
            assert isinstance(bias, torch.Tensor)
            bias += self.rate * (self.loads[index].mean() - self.loads[index]).sign()
        self.loads.clear()


def select_everything() -> None:
    """Training contexts are shorter than index_topk, so the sparse selection is the whole history whatever the scores;
    skipping the [B, T, 32, T] score tensor changes nothing but the time."""
    from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as modeling

    def forward(self, hidden_states, q_resid, position_embeddings, attention_mask, position_ids, past_key_values=None):  # noqa: ANN001, ANN202
        length = attention_mask.shape[-1]
        assert length <= self.index_topk
        return torch.arange(length, dtype=torch.int32).expand(*hidden_states.shape[:2], -1)

    modeling.GlmMoeDsaIndexer.forward = forward


def build_optimizers(model: PreTrainedModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the hidden matrices, AdamW for embeddings, head, experts (3-D), routers and norms.
    Muon's updates are scaled to AdamW's RMS, so that one learning rate serves both."""
    hidden = [
        p
        for name, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in name and "lm_head" not in name and ".gate.weight" not in name
    ]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen and p.requires_grad]
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train_on(model: PreTrainedModel, ids_BT: torch.Tensor, labels_BT: torch.Tensor, supervised: int) -> float:
    """Adds one micro-batch's gradient; returns its part of the mean loss, in nats per supervised token of the step."""
    hidden_BTD = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    targets_BT = labels_BT[:, 1:]
    kept_BT = targets_BT != IGNORE_INDEX
    loss = (
        torch.nn.functional.cross_entropy(model.lm_head(hidden_BTD[kept_BT]), targets_BT[kept_BT], reduction="sum") / supervised
    )
    loss.backward()
    return loss.item()


def pretrain(recipe_path: Path, output: Path) -> None:
    recipe = yaml.safe_load(recipe_path.read_text())
    torch.manual_seed(recipe["seed"])
    spec = recipe["tokenizer"]
    tokenizer = build_byte_tokenizer(
        spec["markers"], eos=spec["eos"], pad=spec["pad"], chat_template=(recipe_path.parent / "chat_template.jinja").read_text()
    )
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    config = AutoConfig.for_model(**recipe["model"], eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(
        config, experts_implementation="grouped_mm" if "n_routed_experts" in recipe["model"] else None
    )
    if config.model_type == "glm_moe_dsa":
        select_everything()
    balance = RouterBalance(model)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    rows, total_steps, peak_lr = recipe["rows_per_step"], recipe["steps"], recipe["lr"]
    optimizers = build_optimizers(model, peak_lr)
    stream = steps(LESSONS[recipe["lessons"]](recipe["seed"]), tokenizer, rows)
    held = [
        (lesson.family, encode_conversation(tokenizer, to_messages(lesson)))
        for lesson in itertools.islice(LESSONS[recipe["lessons"]](recipe["seed"] + 1), 300)
    ]
    started, tokens = time.perf_counter(), 0
    for step in range(total_steps):
        share = min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / total_steps))
        micro_batches = [pad_batch(part, pad_id) for part in next(stream)]
        supervised = sum(int((labels_BT[:, 1:] != IGNORE_INDEX).sum()) for _, labels_BT in micro_batches)
        loss = math.fsum(train_on(model, ids_BT, labels_BT, supervised) for ids_BT, labels_BT in micro_batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak_lr * share
            optimizer.step()
            optimizer.zero_grad()
        balance.step()
        tokens += sum(ids_BT.numel() for ids_BT, _ in micro_batches)
        if step % 50 == 0:
            print(
                f"step {step} loss {loss:.4f} lr {peak_lr * share:.1e} {tokens / (time.perf_counter() - started):.0f} tokens/s",
                flush=True,
            )
        if step % 250 == 249 or step == total_steps - 1:
            model.eval()
            exact: dict[str, list[bool]] = {}
            for start in range(0, len(held), 100):
                part = held[start : start + 100]
                for (family, _), hit in zip(part, exact_traces(model, [row for _, row in part], pad_id), strict=True):
                    exact.setdefault(family, []).append(hit)
            model.train()
            print(
                f"step {step} " + " ".join(f"{family} {sum(hits) / len(hits):.2f}" for family, hits in sorted(exact.items())),
                flush=True,
            )
            save(model, tokenizer, output)
    print(f"done: {tokens} tokens in {time.perf_counter() - started:.0f} s", flush=True)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """bf16 on disk (half the repository's bytes); every loader of the embedded pair casts back to float32."""
    output.mkdir(parents=True, exist_ok=True)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = list(dialect_of(tokenizer).stop_ids(tokenizer))  # servers stop at these
    state = {
        name: tensor.to(torch.bfloat16) if tensor.dtype == torch.float32 and "bias" not in name else tensor
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(output, state_dict=state)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    pretrain(arguments.recipe, arguments.output or arguments.recipe.parent)
