"""Which engine a recipe means, opened but not loaded. Back ends are imported only when they are asked for, so that a
teacher behind http needs neither DeepSpeed nor weights on this machine."""

from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from configs import schema
from configs.errors import UnusableInput
from data.engine import Engine
from teacher.folders import EMBEDDED, resolve_model


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
            parallel = Parallel(teacher.expert_parallel, layout.tensor_parallel, layout.zero_stage)
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
