"""Which engine a recipe means, opened but not loaded. Back ends are imported only when they are asked for, so that a
teacher behind http needs neither DeepSpeed nor weights on this machine."""

import hashlib
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from configs import schema
from configs.errors import UnusableInput
from data.engine import Engine
from teacher.folders import EMBEDDED, resolve_model


def fingerprint_model(folder: Path) -> str:
    """Hex digest (16 characters) over config.json, tokenizer, template and every safetensors file: what a trace depends on."""
    digest = hashlib.sha256()
    named = ("config.json", "tokenizer.json", "chat_template.jinja")
    for path in sorted([*(folder / name for name in named if (folder / name).is_file()), *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()[:16]


def fingerprint_teacher(teacher: schema.Teacher) -> str:
    """Identity of what answers: weights, tokenizer and compute dtype; for a server, its address and model name, and the
    tokenizer that counts its tokens. Layout and rank count are not in it: they must not change a token."""
    weights = (
        fingerprint_tokenizer_only(teacher.model)
        if isinstance(teacher.engine, schema.HttpEngine)
        else fingerprint_model(resolve_model(teacher.model))
    )
    if isinstance(teacher.engine, schema.HttpEngine):
        how = f"{teacher.engine.base_url} {teacher.engine.model or teacher.model}"
    else:
        how = teacher.engine.dtype
    return hashlib.sha256(f"{weights} {how}".encode()).hexdigest()[:16]


def fingerprint_tokenizer_only(model: str) -> str:
    folder = EMBEDDED if model == "embedded" else Path(model)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnusableInput(
            f"teacher.model {model}: no tokenizer.json; the http engine needs the teacher's tokenizer folder to count tokens"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_tokenizer(teacher: schema.Teacher) -> PreTrainedTokenizerBase:
    """The teacher's own tokenizer with its chat template. Raises UnusableInput when it has none of either."""
    folder = EMBEDDED if teacher.model == "embedded" else Path(teacher.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnusableInput(
            f"teacher.model {teacher.model}: no usable tokenizer in the folder: {str(error).splitlines()[0]}"
        ) from error
    if not tokenizer.chat_template:
        raise UnusableInput(
            f"teacher.model {teacher.model}: the tokenizer has no chat template; add chat_template.jinja to the folder"
        )
    return tokenizer


def open_engine(teacher: schema.Teacher) -> Engine:
    """The recipe's engine for generation. Under torchrun every rank opens the deepspeed one."""
    match teacher.engine:
        case schema.DeepSpeedEngine() as engine:
            from teacher.deepspeed_engine import DeepSpeedEngine, Parallel

            layout = teacher.layout
            parallel = Parallel(layout.expert_parallel, layout.tensor_parallel, layout.zero_stage)
            return DeepSpeedEngine(resolve_model(teacher.model), parallel, dtype=engine.dtype, batch_size=engine.batch_size)
        case schema.LocalEngine() as engine:
            return open_local_engine(resolve_model(teacher.model), dtype=engine.dtype, batch_size=engine.batch_size)
        case schema.HttpEngine() as engine:
            from teacher.http_engine import HttpEngine

            return HttpEngine(engine, engine.model or teacher.model, load_tokenizer(teacher))


def open_evaluation_engine(teacher: schema.Teacher, *, batch_size: int) -> Engine:
    """The teacher for evaluation, in this process: its server, or one local copy in the recipe's dtype."""
    if isinstance(teacher.engine, schema.HttpEngine):
        return open_engine(teacher)
    return open_local_engine(resolve_model(teacher.model), dtype=teacher.engine.dtype, batch_size=batch_size)


def open_local_engine(
    folder: Path, *, dtype: Literal["fp32", "bf16", "fp16"], batch_size: int, adapter: Path | None = None
) -> Engine:
    """Any causal language model in a folder, in this process; `adapter` (PEFT) is merged in memory."""
    from teacher.local_engine import LocalEngine

    return LocalEngine(folder, dtype=dtype, batch_size=batch_size, adapter=adapter)  # type: ignore[arg-type]
