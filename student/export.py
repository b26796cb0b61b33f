"""What a server loads: each format of the recipe, written, opened again and held against base + adapter.

The merge is done in float32 whatever the export's dtype. Adding the adapter to bf16 weights rounds it away: 53 % of its
effect at a lora_B of 1e-4, 0.1 % at 5e-3 (measured); one rounding of the finished sum is what remains here, and the parity matrix
says how much of the adapter survived it.
"""

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from configs.exports import Export
from data.chat import encode_conversation
from data.records import Message
from data.store import RunFolder, sha256_file, write_json
from student import parity
from student.adapter_files import ADAPTER_CONFIG, load_adapter, publish_folder
from student.folders import resolve
from student.formats.base import Format, Trained
from student.formats.compressed import Compressed
from student.formats.gguf import Gguf
from student.formats.transformers_model import Adapter, Merged
from student.matrix import Held, ParityRow, measure_format, observe_traces
from student.model import load_base, load_tokenizer
from student.provenance import PROVENANCE_FILE

MERGED = "merged"
FALLBACK_RETENTION = 0.98
"""A merge that keeps less of the adapter than this is stored in float32 instead."""


class Exported(NamedTuple):
    """One format, published. row: its line in the parity matrix. notes: what it says of itself. parity: of merged weights, what
    the reload check found."""

    name: str
    folder: Path
    row: ParityRow
    notes: Mapping[str, object]
    parity: parity.Parity | None


class Material(NamedTuple):
    """What exports are held against. prompts: held-out conversations, each ending with a user turn. conversations: whole training
    conversations, for the template check and calibration. traces: teacher traces, whole conversations; held-out ones where the
    dataset has any."""

    prompts: Sequence[Sequence[Message]]
    conversations: Sequence[Sequence[Message]]
    traces: Sequence[Sequence[Message]]


def export_formats(
    base: str,
    adapter_dir: Path,
    settings: Export,
    run: RunFolder,
    material: Material,
    card: Callable[[Sequence[Exported]], str],
    provenance: Callable[[Mapping[str, str]], Mapping[str, Any]],
) -> list[Exported]:
    """run.export/FORMAT holds every format of the settings, each opened again as it will be served and held against base +
    adapter; earlier ones are replaced. All are written and measured before the first is published.

    base: a checkpoint folder or `embedded`. card: the text of each folder's README.md. provenance: of a folder's files, by
    their path relative to the run folder, with sha256; JSON values.

    Raises:
        UnusableInput: a missing folder, an adapter that does nothing, a student that cannot be had in a format, or a folder that
            fails its check. Nothing new stands under a final name then.
    """
    tokenizer = load_tokenizer(base)
    adapted = load_adapted(base, adapter_dir)
    reference = parity.observe(adapted, tokenizer, material.prompts)
    held = observe_traces(adapted, tokenizer, material.traces, reference)
    calibration = [encode_conversation(tokenizer, messages).ids for messages in material.conversations]  # type: ignore[arg-type]
    trained = Trained(resolve(base), adapter_dir, tokenizer, merge(adapted), calibration)
    run.export.mkdir(parents=True, exist_ok=True)
    remove_leftovers(run)
    made: list[Exported] = []
    try:
        for name in settings.formats:
            temporary = run.export / f".{name}.{uuid.uuid4().hex}.tmp"
            made.append(_make(name, base, settings, trained, held, temporary))
            if name == MERGED:
                dtype = str(made[-1].notes["dtype"])
                found = parity.check(temporary, reference, tokenizer, material.prompts, material.conversations, dtype=dtype)
                made[-1] = made[-1]._replace(parity=found)
        for one in made:
            (one.folder / "README.md").write_text(card(made))
            here = exported_files(one.folder)
            files = {f"export/{one.name}/{path.relative_to(one.folder)}": sha256_file(path) for path in here}
            write_json(one.folder / PROVENANCE_FILE, dict(provenance(files)))
        published = [one._replace(folder=run.export / one.name) for one in made]
        for one, final in zip(made, published, strict=True):
            publish_folder(one.folder, final.folder)
    finally:
        remove_leftovers(run)
    return published


def _make(name: str, base: str, settings: Export, trained: Trained, held: Held, folder: Path) -> Exported:
    """One format in its temporary folder, measured."""
    form = format_of(name, base, settings)
    folder.mkdir()
    notes = form.write(trained, folder)
    row = measure_format(form, folder, held)
    if isinstance(form, Merged) and form.dtype != "fp32" and row.retention < FALLBACK_RETENTION:
        shutil.rmtree(folder)
        folder.mkdir()
        form = Merged("fp32")
        why = f"{settings.dtype} keeps {row.retention:.1%} of the adapter, at least {FALLBACK_RETENTION:.0%} were to be kept"
        notes = {**form.write(trained, folder), "instead_of": settings.dtype, "because": why}
        row = measure_format(form, folder, held)
    return Exported(name, folder, row, notes, None)


def format_of(name: str, base: str, settings: Export) -> Format:
    match name:
        case "merged":
            return Merged(settings.dtype)
        case "adapter":
            return Adapter(base, settings.dtype)
        case "int8" | "int4" | "fp8":
            return Compressed(name)
        case _:
            return Gguf(name, pre_tokenizer=settings.gguf_pre_tokenizer)


def remove_leftovers(run: RunFolder) -> None:
    """Unfinished exports of killed attempts are as large as the model; only one export writes here at a time."""
    for leftover in run.export.glob(".*.tmp*"):  # `.tmp.replaced`: an older export that a newer one was about to replace
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


def merged_with(adapter: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The float32 model with an adapter's weights in its own, as the export has them. Raises UnusableInput for an adapter that is
    damaged, or of another base."""
    if (adapter / ADAPTER_CONFIG).is_file():
        untie_if_adapted(model, PeftConfig.from_pretrained(str(adapter)))
    return merge(load_adapter(model, adapter))


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
