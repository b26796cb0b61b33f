"""What the local and the DeepSpeed engine share: a loaded model, wrapped for the decode loop."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from configs.errors import UnusableInput
from data.engine import Completion, ExpertStats, Request
from teacher.cache import SlotCache
from teacher.decode import Limits, decode
from teacher.experts import ExpertWatch
from teacher.score import score_sequences
from teacher.sparse_attention import attention_for, install

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
    any_rank_has_work: Callable[[bool], bool] = bool

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

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        cache = SlotCache(self.limits.num_slots, self.num_layers, self.device)
        collective = self.any_rank_has_work
        yield from decode(
            self.forward, requests, self.watch, cache, self.limits, banned_V=self.banned_V, any_rank_has_work=collective
        )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self.watch.ignore()
        return score_sequences(
            self.forward,
            sequences,
            batch_size=self.limits.num_slots,
            num_layers=self.num_layers,
            vocab_size=self.vocab_size,
            device=self.device,
            any_rank_has_work=self.any_rank_has_work,
        )

    def expert_stats(self) -> ExpertStats | None:
        return self.watch.stats()


def build_runner(
    model: Callable[..., object],
    module: nn.Module,
    config: PretrainedConfig,
    model_dir: Path,
    *,
    num_slots: int,
    max_length: int | None,
    device: torch.device,
    any_rank_has_work: Callable[[bool], bool] = bool,
) -> Runner:
    """module: what holds the routers (the model itself). max_length: at most what the model's positions allow."""
    longest = int(config.max_position_embeddings)
    return Runner(
        model=model,
        watch=ExpertWatch(module, num_slots, device),
        limits=Limits(num_slots, min(max_length or longest, longest), refill_slots=max(1, num_slots // 8)),
        banned_V=banned_ids(model_dir, int(config.vocab_size), device),
        num_layers=int(config.num_hidden_layers),
        vocab_size=int(config.vocab_size),
        device=device,
        any_rank_has_work=any_rank_has_work,
    )


def read_config(model_dir: Path) -> PretrainedConfig:
    """The model's configuration. Raises UnusableInput when the folder holds none that transformers knows."""
    if not (model_dir / "config.json").is_file():
        raise UnusableInput(f"model {model_dir}: no config.json there; expected a checkpoint folder in Hugging Face layout")
    if not any(model_dir.glob("*.safetensors")):
        raise UnusableInput(f"model {model_dir}: no *.safetensors there; convert the checkpoint to safetensors")
    try:
        return AutoConfig.from_pretrained(model_dir)
    except (ValueError, KeyError) as error:
        raise UnusableInput(f"model {model_dir}: config.json is not usable: {str(error).splitlines()[0]}") from error


def read_model(model_dir: Path, config: PretrainedConfig, dtype: Dtype) -> PreTrainedModel:
    """The causal language model of a folder, with the attention of teacher/sparse_attention.py where there is one.

    Experts run as one grouped GEMM, the fastest on CPU for small models (training 11.5 k tokens/s, against 10.0 k eager
    and 1.1 k batched). `generate` of transformers does not know our attention: call the model through a Runner.
    """
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=DTYPES[dtype],
        attn_implementation=attention_for(config.model_type),
        experts_implementation="grouped_mm" if getattr(config, "n_routed_experts", None) else None,
    )
    install(model)
    return model


def banned_ids(model_dir: Path, vocab_size: int, device: torch.device) -> Tensor | None:
    """True on rows of the vocabulary that no token stands for (embedding tables are padded to round sizes); None when
    there are none or the folder has no tokenizer. Their logits are untrained, and a sampled one cannot be decoded."""
    if not (model_dir / "tokenizer.json").is_file():
        return None
    num_tokens = max(AutoTokenizer.from_pretrained(model_dir).get_vocab().values()) + 1
    return torch.arange(vocab_size, device=device) >= num_tokens if num_tokens < vocab_size else None
