"""The plain loop of train_vs_trl: transformers, `model(..., labels=...)`, peft, torch's AdamW.

    python -m tests.bench.labels_peer FOLDER     (the folder that train_set wrote)

The product's rows in the product's order, one row a forward pass. Documents are kept apart as transformers does it without flash
attention: position_ids that start again, no 2-D mask, no cache, which makes a boolean mask of the whole row.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401  loaded on first use otherwise, and counted as the loop's memory
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from tests.bench.marks import mark


class Row(NamedTuple):
    """int64 [1, T]. labels: not shifted, -100 where nothing is trained and at each document's first token."""

    ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor

    @property
    def supervised(self) -> int:
        return int((self.labels != -100).sum())


def row_of(documents: list[tuple[list[int], list[int]]]) -> Row:
    ids = torch.tensor([token for document, _ in documents for token in document])
    trained = torch.tensor([one for _, mask in documents for one in (0, *mask[1:])], dtype=torch.bool)
    position_ids = torch.cat([torch.arange(len(document)) for document, _ in documents])
    return Row(ids[None], ids.where(trained, -100)[None], position_ids[None])


def load_model(folder: Path, rank: int, alpha: int) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    adapter = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter)
    assert isinstance(model, PeftModel)
    return model.train()


def main(folder: Path) -> None:
    mark("imported")
    found = json.loads((folder / "pretokenised.json").read_text())
    settings, steps = found["settings"], found["steps"]
    torch.manual_seed(settings["seed"])
    model = load_model(folder, settings["lora_rank"], settings["lora_alpha"])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings["lr"], weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, len(steps))
    losses, supervised = [], []
    for number, documents_of_rows in enumerate(steps, 1):
        rows = [row_of([found["documents"][document] for document in row]) for row in documents_of_rows]
        supervised.append(sum(row.supervised for row in rows))
        losses.append(0.0)
        for row in rows:
            loss = model(
                input_ids=row.ids, position_ids=row.position_ids, labels=row.labels, use_cache=False,
                num_items_in_batch=supervised[-1],
            ).loss  # fmt: skip
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if number == 1:
            mark("warm")
    mark("trained")
    mark("done", losses=losses, supervised=supervised, trainable=sum(parameter.numel() for parameter in trainable))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
