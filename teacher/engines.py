"""Which engine a recipe means, opened but not loaded. Back ends are imported only when they are asked for, so that a
teacher behind http needs neither DeepSpeed nor weights on this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from configs import schema
from configs.errors import UnusableInput
from data.engine import Engine
from teacher.folders import EMBEDDED, prepared_folder, resolve_model, weights_folder

if TYPE_CHECKING:
    from teacher.ranked_engine import RankedTeacher


def load_tokenizer(teacher: schema.Teacher) -> PreTrainedTokenizerBase:
    """The teacher's own tokenizer with its chat template. Raises UnusableInput when it has none of either."""
    folder = prepared_folder(teacher) or (EMBEDDED if teacher.model == "embedded" else Path(teacher.model))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnusableInput(
            f"teacher.model {teacher.model}: no usable tokenizer in the folder; copy the model's tokenizer.json and "
            "tokenizer_config.json there"
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
            from teacher.deepspeed_engine import DeepSpeedEngine
            from teacher.parallel import Parallel

            check_cache(teacher)
            layout = teacher.layout
            parallel = Parallel(teacher.expert_parallel, layout.tensor_parallel, layout.zero_stage)
            folder, timeout_s = weights_folder(teacher), engine.timeout_s
            return DeepSpeedEngine(
                folder,
                parallel,
                dtype=engine.dtype,
                batch_size=engine.batch_size,
                cache_bytes=cache_budget(teacher),
                timeout_s=timeout_s,
            )
        case schema.LocalEngine() as engine:
            folder, budget = resolve_model(teacher.model), cache_budget(teacher)
            return open_local_engine(folder, dtype=engine.dtype, batch_size=engine.batch_size, cache_bytes=budget)
        case schema.HttpEngine() as engine:
            return open_server(engine.model_copy(update={"model": engine.model or teacher.model}), load_tokenizer(teacher))


def cache_budget(teacher: schema.Teacher) -> int | None:
    """Bytes that a rank's cache may take: the recipe's figure, else what the plan leaves free; None on a CPU, where memory
    is the machine's to share."""
    assert not isinstance(teacher.engine, schema.HttpEngine)
    if teacher.engine.cache_bytes is not None or teacher.hardware.gpu == "cpu":
        return teacher.engine.cache_bytes
    from teacher.plan import kv_budget_bytes

    return kv_budget_bytes(teacher)


def check_cache(teacher: schema.Teacher) -> None:
    """Raises UnusableInput when the recipe asks for a cache that only a plan, or a server, can have."""
    engine, layout = teacher.engine, teacher.layout
    if layout.kv_cache != "replicated":
        raise UnusableInput(
            f"teacher.layout.kv_cache {layout.kv_cache}: the {engine.type} engine keeps each request's cache whole; "
            "plan with it, run with replicated, or put a server behind the http engine"
        )
    if isinstance(engine, schema.DeepSpeedEngine) and engine.kv_dtype not in (None, engine.dtype):
        raise UnusableInput(
            f"teacher.engine.kv_dtype {engine.kv_dtype}: the deepspeed engine keeps its cache in the compute dtype "
            f"{engine.dtype}; leave it out, or put a server behind the http engine"
        )


def open_evaluation_engine(
    teacher: schema.Teacher, folder: Path, launch: Callable[[Callable[[], None]], None], *, batch_size: int
) -> Engine:
    """The teacher for evaluation: its server, its ranks (started by `launch`, given work through `folder`), or one local copy in
    the recipe's dtype."""
    match teacher.engine:
        case schema.HttpEngine():
            return open_engine(teacher)
        case schema.DeepSpeedEngine():
            return ranked_teacher(teacher, folder, launch)
    return open_local_engine(resolve_model(teacher.model), dtype=teacher.engine.dtype, batch_size=batch_size)


def ranked_teacher(teacher: schema.Teacher, folder: Path, launch: Callable[[Callable[[], None]], None]) -> "RankedTeacher":
    """Not started yet."""
    from teacher.ranked_engine import RankedTeacher

    check_cache(teacher)
    return RankedTeacher(folder, teacher.world // teacher.layout.tensor_parallel, launch)


def open_server(engine: schema.HttpEngine, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """A model behind an OpenAI-compatible server. tokenizer: the model's, for counting."""
    from teacher.http_engine import HttpEngine

    return HttpEngine(engine, engine.model, tokenizer)


def open_local_engine(
    folder: Path,
    *,
    dtype: Literal["fp32", "bf16", "fp16"],
    batch_size: int,
    adapt: Callable[[PreTrainedModel], PreTrainedModel] | None = None,
    cache_bytes: int | None = None,
) -> Engine:
    """Any causal language model in a folder, in this process; `adapt` changes its weights first."""
    from teacher.local_engine import LocalEngine

    return LocalEngine(folder, dtype=dtype, batch_size=batch_size, adapt=adapt, cache_bytes=cache_bytes)  # type: ignore[arg-type]
