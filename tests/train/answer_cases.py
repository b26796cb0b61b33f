"""Questions for a student, and what tests/train/test_answers.py runs on real ranks:
python -m tests.train.answer_cases '{"folder": ..., "cases": {"NAME": [zero_stage, lora]}}'.

The embedded student answers anything in some thirty tokens and ends by itself, so which answers are right is decided by the
references that its own words are given or denied. On ranks it is a random model of two layers: under ZeRO-3 a pass is 60
collectives even there.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from configs.launch import end_rank
from configs.training import CrossEntropy, Lora, Train
from data.chat import encode_conversation, encode_prompt
from data.records import Message, Prompt, prompt_identity
from student.adapter_files import trainable
from student.lora import attach
from student.model import load_base, load_tokenizer
from train import engine_config
from train.answers import Question, ValidationAnswers, grouped
from train.attention import use_documents
from train.batches import Batch, to_batch
from train.losses import SupervisedLoss
from train.step import TrainingStep, joined_world

MAX_TOKENS = 24
"""Some answers of the embedded student are longer, and are cut."""
LR, TOKENS_IN_STEP = 3e-3, 50
TEXTS = (
    "What is 12 + 30?",
    "Spell cat backwards.",
    "2+2?",
    "Sxela is made of?",
    "Nududi: which metal is it made of?",
    "7 - 3?",
    "a",
)


def make_prompt(text: str, answer: str = "?", verifier: str = "exact", known: bool | None = None) -> Prompt:
    messages: tuple[Message, ...] = ({"role": "user", "content": text},)
    return Prompt(prompt_identity(messages, "v1"), "test", "t", "v1", messages, answer, verifier, "train", known, "", "CC0-1.0")


def student(lora: Lora, base: str = "embedded") -> PeftModel:
    """As it is trained: document by document, with an adapter that has moved."""
    model = load_base(base, "fp32")
    use_documents(model)
    adapted = attach(model, lora, seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in trainable(adapted).items():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.003
    return adapted.train()


def answers_to(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = MAX_TOKENS, row_tokens: int = 160
) -> ValidationAnswers:
    """In groups of two or three."""
    questions = [Question(prompt, tuple(encode_prompt(tokenizer, prompt.messages))) for prompt in prompts]  # type: ignore[arg-type]
    return ValidationAnswers(grouped(questions, max_tokens, row_tokens), max_tokens, verify_timeout_s=10.0)


def rows(tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """One packed row for each of two ranks."""
    said = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "42", "reasoning_content": f"Well, {text}"}]
        for text in TEXTS[:4]
    ]
    encoded = [encode_conversation(tokenizer, messages) for messages in said]
    return [to_batch(encoded[:2], None), to_batch(encoded[2:], None)]


def on_ranks(tokenizer: PreTrainedTokenizerBase) -> ValidationAnswers:
    """Three groups of few tokens: with two ranks one has nothing to say in the second round."""
    return answers_to([make_prompt(text) for text in TEXTS[:5]], tokenizer, max_tokens=3, row_tokens=80)


def run_case(name: str, stage: int, lora: Lora, folder: Path) -> None:
    """NAME.RANK.json: a rank's prompts and outputs. NAME.gradients: of a step after answering, `later.` of the one after it."""
    tokenizer = load_tokenizer(str(folder / "base"))
    settings = Train.model_validate({"dtype": "fp32", "zero_stage": stage, "processes": 2, "rows_per_step": 2, "liger": False})
    with joined_world() as world:
        model = student(lora, str(folder / "base"))
        step = TrainingStep(SupervisedLoss(model, CrossEntropy()).train(), world, settings)

        step.evaluate(rows(tokenizer)[world.rank])  # as every training does first; see train/greedy.py

        def answer_and_accumulate() -> tuple[dict[str, list[int]], dict[str, torch.Tensor]]:
            outputs = on_ranks(tokenizer).outputs(step.generation_model(), tokenizer, rank=world.rank, size=world.size)
            step.accumulate(rows(tokenizer)[world.rank], tokens_in_step=TOKENS_IN_STEP, is_last=True)
            said = {prompt.prompt_id: ids for prompt, ids in outputs}
            return said, {key: gradient.clone() for key, gradient in step.gradients().items()}

        said, gradients = answer_and_accumulate()
        step.apply(lr=LR)
        _, later = answer_and_accumulate()
        (folder / f"{name}.{world.rank}.json").write_text(json.dumps(said))
        if world.rank == 0:
            save_file(gradients | {f"later.{key}": value for key, value in later.items()}, folder / f"{name}.gradients")
        step.sum_over_ranks([0.0])
        step.close()


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    engine_config.ZERO3_PERSISTENCE_THRESHOLD = 0  # so that even tiny parameters are partitioned
    for name, (stage, lora) in job["cases"].items():
        run_case(name, stage, Lora.model_validate({"rank": 4, "alpha": 8} | lora), Path(job["folder"]))
        print(f"done {name}", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    end_rank(0)
