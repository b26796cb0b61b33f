"""What the local and the DeepSpeed engine share: a loaded model, wrapped for the decode loop."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from configs.errors import UnusableInput
from data.chat import dialect_of
from data.engine import Completion, ExpertStats, Handout, Request, Scores, Source
from teacher.admission import FIRST_COLUMNS
from teacher.cache import SlotCache
from teacher.checkpoint.manifest import is_prepared
from teacher.decode import Limits, as_it_is, decode, dummy_pass
from teacher.experts import ExpertWatch
from teacher.row import Detokenize
from teacher.score import Wanted, score_sequences
from teacher.sparse_attention import attention_for, install

FREE_SHARE = 0.8
"""Of a GPU's free memory, what the cache may take when neither the recipe nor the plan says: passes need the rest."""
MESSAGE_CHARACTERS = 240
"""Of an error of transformers: some of its messages list every class it knows."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(slots=True)
class Runner:
    """A model that can be called, and what the loop needs to know of it. model: the top-level callable; under DeepSpeed
    the engine, whose hooks gather the weights."""

    model: Callable[..., object]
    watch: ExpertWatch
    limits: Limits
    banned_V: Tensor | None
    num_layers: int
    vocab_size: int
    device: torch.device
    detokenize: Detokenize | None = None
    agree: Callable[[int], int] = int
    share: Callable[[Tensor], Tensor] = as_it_is

    @torch.no_grad()
    def forward(self, ids_BS: Tensor, positions_BS: Tensor, mask_B1ST: Tensor, cache: SlotCache | None, keep: int) -> Tensor:
        output = self.model(
            input_ids=ids_BS,
            position_ids=positions_BS,
            attention_mask=mask_B1ST,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
        )
        return output.logits  # type: ignore[attr-defined]

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        yield from decode(
            self.forward, self._checked(requests), self.watch, SlotCache(self.limits.num_slots, self.num_layers, self.device),
            self.limits, banned_V=self.banned_V, detokenize=self.detokenize, handout=handout, agree=self.agree, share=self.share,
        )  # fmt: skip

    def score(
        self, sequences: Sequence[Sequence[int]], top_logits: int = 0, log_z_temperatures: Sequence[float] = (1.0,)
    ) -> list[Scores]:
        self.watch.ignore()
        for number, sequence in enumerate(sequences):
            self._check_ids(f"score: sequence {number}", sequence)
        if top_logits < 0 or not log_z_temperatures or not all(temperature > 0 for temperature in log_z_temperatures):
            raise UnusableInput(
                f"score: top_logits {top_logits}, log_z_temperatures {tuple(log_z_temperatures)}; expected 0 or more logits, and "
                "at least one temperature above 0"
            )
        return score_sequences(
            self.forward,
            sequences,
            Wanted(top_logits, log_z_temperatures),
            self.limits,
            num_layers=self.num_layers,
            vocab_size=self.vocab_size,
            device=self.device,
            agree=self.agree,
        )

    def _checked(self, requests: Iterable[Request]) -> Source:
        source = iter(requests)

        def take() -> Request | None:
            if (request := next(source, None)) is not None:
                self._check(request)
            return request

        return Source(take)

    def _check(self, request: Request) -> None:
        if request.stop_strings and self.detokenize is None:
            raise UnusableInput("sampling.stop_strings: the model's folder has no tokenizer.json; add it, or stop by ids")
        self._check_ids(f"request {request.request_id}", (*request.stop_ids, *request.prompt_ids, *request.prefix_ids))
        check_numbers(request)
        if len(request.prefix_ids) != len(request.prefix_logprobs):
            raise UnusableInput(
                f"request {request.request_id}: {len(request.prefix_ids)} prefix ids with "
                f"{len(request.prefix_logprobs)} logprobs; expected one each"
            )

    def _check_ids(self, what: str, ids: Sequence[int]) -> None:
        """On a GPU an id out of range is a device assert, after which the process is of no use."""
        wrong = next((one for one in (min(ids, default=0), max(ids, default=0)) if not 0 <= one < self.vocab_size), None)
        if wrong is not None:
            raise UnusableInput(
                f"{what}: token {wrong} is beyond the model's vocabulary of {self.vocab_size}; "
                "expected ids by this model's own tokenizer"
            )

    def expert_stats(self) -> ExpertStats | None:
        return self.watch.stats()


LEAST_TEMPERATURE = 1e-3
"""Below it, but not 0, logits divided by the temperature leave float64 before they say anything that greedy would not."""


def check_numbers(request: Request) -> None:
    """Raises UnusableInput for numbers that no distribution can be made of."""
    sampling = {"temperature": request.temperature, "top_p": request.top_p, "min_p": request.min_p}
    if not (request.temperature == 0 or LEAST_TEMPERATURE <= request.temperature < float("inf")):
        raise UnusableInput(
            f"request {request.request_id}: temperature {request.temperature}; expected 0 (greedy) or at least "
            f"{LEAST_TEMPERATURE}"
        )
    if not (0 < request.top_p <= 1 and 0 <= request.min_p < 1 and request.top_k >= 0 and request.top_logits >= 0):
        raise UnusableInput(
            f"request {request.request_id}: {sampling | {'top_k': request.top_k, 'top_logits': request.top_logits}}; expected "
            "top_p in (0, 1], min_p in [0, 1), and counts of 0 or more"
        )
    if not 0 <= request.seed < 1 << 63:
        raise UnusableInput(f"request {request.request_id}: seed {request.seed}; expected 63 bits, as request_seed gives them")


def build_runner(
    model: Callable[..., object],
    module: nn.Module,
    config: PretrainedConfig,
    model_dir: Path,
    *,
    num_slots: int,
    max_length: int | None,
    device: torch.device,
    cache_bytes: int | None = None,
    agree: Callable[[int], int] = int,
    share: Callable[[Tensor], Tensor] = as_it_is,
) -> Runner:
    """module: what holds the routers (the model itself). max_length: at most what the model's positions allow.
    cache_bytes: what the cache may take on this rank; None is no bound on a CPU, and most of a GPU's free memory.
    Collective where there is one: a token is fed to see what a token costs, which depends on the architecture, the dtype
    and the ranks that share a layer."""
    longest = int(config.max_position_embeddings)
    runner = Runner(
        model=model,
        watch=ExpertWatch(module, num_slots, device),
        limits=Limits(num_slots, min(max_length or longest, longest), refill_idle=max(1, num_slots // 4)),
        banned_V=banned_ids(model_dir, config, device),
        num_layers=int(config.num_hidden_layers),
        vocab_size=int(config.vocab_size),
        device=device,
        detokenize=read_detokenizer(model_dir),
        agree=agree,
        share=share,
    )
    if cache_bytes is None and device.type == "cuda":
        cache_bytes = int(FREE_SHARE * torch.cuda.mem_get_info(device)[0])
    if cache_bytes is not None:
        runner.limits = runner.limits._replace(cache_tokens=affordable_tokens(runner, cache_bytes))
    return runner


def affordable_tokens(runner: Runner, cache_bytes: int) -> int:
    """Raises UnusableInput when the budget holds less than the shortest cache."""
    cache, zero_11 = SlotCache(1, runner.num_layers, runner.device), torch.zeros(1, 1, dtype=torch.long, device=runner.device)
    cache.select_next(zero_11, 1)
    runner.watch.ignore()
    dummy_pass(runner.forward, runner.device, cache)
    bytes_per_token = cache.num_bytes() // cache.num_columns
    if cache_bytes < FIRST_COLUMNS * bytes_per_token:
        raise UnusableInput(
            f"teacher.engine.cache_bytes {cache_bytes}: a cached token takes {bytes_per_token} bytes; "
            f"expected room for at least {FIRST_COLUMNS} tokens: give it {FIRST_COLUMNS * bytes_per_token} or more"
        )
    return cache_bytes // bytes_per_token


def read_config(model_dir: Path) -> PretrainedConfig:
    """The model's configuration. Raises UnusableInput when the folder holds none that transformers knows."""
    if not (model_dir / "config.json").is_file():
        raise UnusableInput(f"model {model_dir}: no config.json there; expected a checkpoint folder in Hugging Face layout")
    if not (any(model_dir.glob("*.safetensors")) or is_prepared(model_dir)):
        raise UnusableInput(f"model {model_dir}: no *.safetensors there; convert the checkpoint to safetensors")
    try:
        return AutoConfig.from_pretrained(model_dir)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, StrictDataclassError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:MESSAGE_CHARACTERS]
        raise UnusableInput(
            f"{model_dir / 'config.json'}: not usable: {said}; restore the checkpoint's own config.json"
        ) from error


def read_model(model_dir: Path, config: PretrainedConfig, dtype: Dtype) -> PreTrainedModel:
    """The causal language model of a folder, with the attention of teacher/sparse_attention.py where there is one.

    Experts run as one grouped GEMM, the fastest on CPU for small models (training 11.5 k tokens/s, against 10.0 k eager
    and 1.1 k batched).

    Raises UnusableInput for weights that are cut short.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=DTYPES[dtype],
            attn_implementation=attention_for(config.model_type),
            experts_implementation="grouped_mm" if getattr(config, "num_local_experts", None) else None,
        )
    except SafetensorError as error:
        raise UnusableInput(f"model {model_dir}: a damaged *.safetensors ({error}); restore it or export again") from error
    install(model)
    return model


def banned_ids(model_dir: Path, config: PretrainedConfig, device: torch.device) -> Tensor | None:
    """True on ids that are never emitted: rows of the vocabulary that no token stands for (embedding tables are padded to
    round sizes; their logits are untrained, and a sampled one cannot be decoded), and padding, unless it also ends an
    output (its embedding is zero: said once, it ties all index scores of the first layer). None when there are none."""
    vocab_size, ends, stops = int(config.vocab_size), config.eos_token_id, tuple[int, ...]()
    banned_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    if (model_dir / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        banned_V[max(tokenizer.get_vocab().values()) + 1 :] = True
        if tokenizer.chat_template:
            stops = dialect_of(tokenizer).stop_ids(tokenizer)
    pad = config.pad_token_id
    if pad is not None and 0 <= pad < vocab_size and pad not in {*(ends if isinstance(ends, list) else [ends]), *stops}:
        banned_V[pad] = True
    return banned_V if bool(banned_V.any()) else None


def read_detokenizer(model_dir: Path) -> Detokenize | None:
    """ids -> text with special tokens spelled out; None without a tokenizer in the folder."""
    if not (model_dir / "tokenizer.json").is_file():
        return None
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))
