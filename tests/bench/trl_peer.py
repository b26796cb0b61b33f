"""TRL's side of train_vs_trl: SFTTrainer with best-fit-decreasing packing. Run with the Python of .bench/trl.

    .bench/trl/bin/python -m tests.bench.trl_peer FOLDER OUTPUT     (the folder that train_set wrote)

What a careful user sets on a CPU: float32, no gradient checkpointing (its default costs a fifth), one row a micro-batch (with
padding-free packing two would be one row of twice the length, and its masked attention pays the square), batches made in the
process itself, nothing saved, evaluated or reported. What cannot be set: without Triton its head scores every position, and top-1
and entropy are computed of each.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from tests.bench.marks import mark


def main(folder: Path, output: Path) -> None:
    import torch
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401  loaded on first use otherwise, and counted as the trainer's memory
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from trl import SFTConfig, SFTTrainer  # type: ignore

    mark("imported")
    found = json.loads((folder / "pretokenised.json").read_text())
    settings, rows_per_step = found["settings"], found["settings"]["rows_per_step"]
    ids, masks = zip(*found["documents"], strict=True)
    dataset = Dataset.from_dict({"input_ids": ids, "completion_mask": masks})

    class Recording(SFTTrainer):
        """Keeps the rows of the first step, and how many labels each micro-batch had."""

        first_rows: ClassVar[list[tuple[list[int], list[int]]]] = []
        supervised: ClassVar[list[int]] = []

        def training_step(
            self, model: torch.nn.Module, inputs: dict, num_items_in_batch: torch.Tensor | None = None
        ) -> torch.Tensor:
            if len(self.first_rows) < rows_per_step:
                self.first_rows.append((inputs["input_ids"][0].tolist(), inputs["position_ids"][0].tolist()))
            self.supervised.append(int((inputs["labels"] != -100).sum()))
            return super().training_step(model, inputs, num_items_in_batch)

    class Marks(TrainerCallback):
        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
            if state.global_step == 1:
                mark("warm")
            if state.global_step == state.max_steps:
                mark("trained")

    trainer = Recording(
        model=AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(output), use_cpu=True, bf16=False, packing=True, packing_strategy="bfd",
            max_length=settings["row_tokens"], completion_only_loss=True, per_device_train_batch_size=1,
            gradient_accumulation_steps=rows_per_step, num_train_epochs=1, learning_rate=settings["lr"],
            lr_scheduler_type="cosine", weight_decay=0.0, max_grad_norm=1.0, gradient_checkpointing=False,
            dataloader_num_workers=0, dataloader_pin_memory=False, save_strategy="no", eval_strategy="no", report_to="none",
            disable_tqdm=True, logging_steps=1, seed=settings["seed"],
        ),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        peft_config=LoraConfig(
            r=settings["lora_rank"], lora_alpha=settings["lora_alpha"], lora_dropout=0.0, target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[Marks()],
    )  # fmt: skip
    trainer.train()
    counts = trainer.supervised
    per_step = [sum(counts[at : at + rows_per_step]) for at in range(0, len(counts), rows_per_step)]
    mark(
        "done",
        losses=[row["loss"] for row in trainer.state.log_history if "loss" in row],
        supervised=per_step,
        first_rows=trainer.first_rows,
        trainable=sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        attention=trainer.model.config._attn_implementation,
        versions={name: version(name) for name in ("trl", "transformers", "peft", "torch")},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
