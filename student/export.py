"""What a server loads: the adapter merged into its base, as one safetensors folder with tokenizer, template and card.

The merge is done in float32 whatever the export's dtype. Adding the adapter to bf16 weights rounds it away: 53 % of its
effect at a lora_B of 1e-4, 0.1 % at 5e-3 (measured); one rounding of the finished sum is what remains here, and parity.py
checks how much of the adapter survived it.
"""

import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from configs.exports import Export
from data.records import Message
from data.store import RunFolder
from student import parity
from student.adapter_files import ADAPTER_CONFIG, load_adapter, publish_folder
from student.formats.weights import write_model
from student.model import load_base, load_tokenizer

MERGED = "merged"


class Exported(NamedTuple):
    """The folder a server loads, and what its reload check found."""

    folder: Path
    parity: parity.Parity


def export_merged(
    base: str,
    adapter_dir: Path,
    settings: Export,
    run: RunFolder,
    *,
    prompts: Sequence[Sequence[Message]],
    conversations: Sequence[Sequence[Message]],
    card: Callable[[parity.Parity], str],
) -> Exported:
    """run.export/merged holds a model that was reloaded and found equal to base + adapter; an earlier one is replaced.

    base: a checkpoint folder or `embedded`. prompts: held-out conversations for the reload check, each ending with a user
    turn. conversations: whole training conversations for the template check. card: the text of README.md, from the findings.

    Raises:
        UnusableInput: a missing folder, an adapter that does nothing, or a folder that fails its reload check. Nothing
            stands under the final name then.
    """
    tokenizer = load_tokenizer(base)
    adapted = load_adapted(base, adapter_dir)
    reference = parity.observe(adapted, tokenizer, prompts)
    run.export.mkdir(parents=True, exist_ok=True)
    remove_leftovers(run)
    temporary = run.export / f".{MERGED}.{uuid.uuid4().hex}.tmp"
    try:
        write_model(merge(adapted), tokenizer, temporary, settings.dtype)
        findings = parity.check(temporary, reference, tokenizer, prompts, conversations, dtype=settings.dtype)
        (temporary / "README.md").write_text(card(findings))
        publish_folder(temporary, run.export / MERGED)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(run.export / MERGED, findings)


def remove_leftovers(run: RunFolder) -> None:
    """Unfinished exports of killed attempts are as large as the model; only one export writes here at a time."""
    for leftover in run.export.glob(f".{MERGED}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def exported_files(folder: Path) -> list[Path]:
    """Every file of the exported folder: what the stage's manifest hashes."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def load_adapted(base: str, adapter_dir: Path) -> PeftModel:
    """Base and adapter in float32, unmerged. Raises UnusableInput for a folder that is not what it should be."""
    model = load_base(base, "fp32")
    if (adapter_dir / ADAPTER_CONFIG).is_file():
        untie_if_adapted(model, PeftConfig.from_pretrained(str(adapter_dir)))
    return load_adapter(model, adapter_dir)


def untie_if_adapted(model: PreTrainedModel, config: PeftConfig) -> None:
    """Gives the head a copy of its own when the adapter changes it (or the embedding) and the two share one tensor.

    Merged in place, a change meant for the head would change the embedding as well; and a config that still says `tied`
    makes from_pretrained throw the merged head away without a word. An adapter with ensure_weight_tying has trained both as one
    tensor (student/lora.py), which PEFT puts back in both places: those stay tied.
    """
    if getattr(config, "ensure_weight_tying", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not (isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding)) or head.weight is not embedding.weight:
        return
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if module is head or module is embedding}
    wanted = {*(getattr(config, "target_modules", None) or ()), *(getattr(config, "modules_to_save", None) or ())}
    if names & {name.rpartition(".")[2] for name in wanted}:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
        model.config.tie_word_embeddings = False


def merge(adapted: PeftModel) -> PreTrainedModel:
    """The plain model whose weights are base + adapter, in float32. `adapted` is used up."""
    for name, parameter in adapted.named_parameters():
        if parameter.dtype != torch.float32:
            raise AssertionError(f"{name} is {parameter.dtype}; a merge below float32 loses the adapter")
    merged = adapted.merge_and_unload(safe_merge=True)
    assert isinstance(merged, PreTrainedModel)
    return merged
