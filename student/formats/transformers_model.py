"""A folder that transformers loads: merged weights, and the adapter beside its base."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from configs.errors import UnusableInput
from configs.exports import DtypeName
from student.adapter_files import ADAPTER_CONFIG, load_adapter
from student.formats.base import Trained
from student.formats.weights import write_model
from student.model import DTYPES, load_base


class TransformersSpeaker:
    """Any causal language model of transformers', in the dtype that it has."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model: PreTrainedModel | PeftModel | None = model.eval()

    @torch.no_grad()
    def logits(self, ids_T: Sequence[int]) -> torch.Tensor:
        """float32 [T, V]."""
        assert self.model is not None
        return self.model(input_ids=torch.tensor([list(ids_T)]), use_cache=False).logits[0].float()

    @torch.no_grad()
    def generate(self, ids: Sequence[int], *, max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
        """The greedy continuation; ends with the stop token when there is one."""
        assert self.model is not None
        prompt, generate = torch.tensor([list(ids)]), cast(Any, self.model).generate
        found = generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids), pad_token_id=stop_ids[0],
        )  # fmt: skip
        assert isinstance(found, torch.Tensor)
        return found[0, len(ids) :].tolist()

    def close(self) -> None:
        self.model = None


class Merged:
    """Base + adapter in one set of weights, rounded once to `dtype`."""

    name = "merged"

    def __init__(self, dtype: DtypeName) -> None:
        self.dtype: DtypeName = dtype

    def write(self, trained: Trained, folder: Path) -> Mapping[str, object]:
        write_model(trained.merged, trained.tokenizer, folder, self.dtype)
        return {"dtype": self.dtype}

    def open(self, folder: Path) -> TransformersSpeaker:
        return TransformersSpeaker(load_base(str(folder), self.dtype))


class Adapter:
    """The adapter alone, for a server that has the base: many students on one copy of it. dtype: what the base is served in."""

    name = "adapter"

    def __init__(self, base: str, dtype: DtypeName) -> None:
        self.base, self.dtype = base, dtype

    def write(self, trained: Trained, folder: Path) -> Mapping[str, object]:
        config = PeftConfig.from_pretrained(str(trained.adapter))
        if problem := unservable(config):
            raise UnusableInput(f"export.formats adapter: vLLM's LoRA loader does not take {problem}; export merged instead")
        for path in sorted(trained.adapter.iterdir()):
            if path.suffix in (".json", ".safetensors"):
                shutil.copy2(path, folder / path.name)
        assert (folder / ADAPTER_CONFIG).is_file()
        trained.tokenizer.save_pretrained(folder)
        rank = int(getattr(config, "r", 0))
        return {"rank": rank, "base": self.base, "vllm": f"--enable-lora --max-lora-rank {rank}"}

    def open(self, folder: Path) -> TransformersSpeaker:
        base = load_base(self.base, "fp32")
        return TransformersSpeaker(load_adapter(base, folder).to(DTYPES[self.dtype]))


def unservable(config: PeftConfig) -> str:
    """What of this adapter vLLM refuses (its PEFTHelper), or ""."""
    if getattr(config, "use_dora", False):
        return "DoRA"
    if saved := getattr(config, "modules_to_save", None):
        return f"modules_to_save ({', '.join(sorted(saved))})"
    return f"bias {config.bias}" if getattr(config, "bias", "none") != "none" else ""  # type: ignore[attr-defined]
