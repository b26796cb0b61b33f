"""One process, plain transformers: the oracle that every other engine must match token for token, and the way a
student or an export is asked."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from configs.progress import expect_loading
from data.engine import Completion, ExpertStats, Handout, Request, Scores
from teacher.runner import DTYPES, Dtype, Runner, build_runner, read_config, read_model

log = logging.getLogger(__name__)

Adapt = Callable[[PreTrainedModel], PreTrainedModel]


class LocalEngine:
    """A causal language model from a folder. batch_size: decode slots. max_length: prompt and output tokens a request
    may hold, at most the model's positions. cache_bytes: most that the cache may take. adapt: what becomes of
    the weights, in float32, before anything is computed."""

    name = "local"
    version = f"transformers {transformers.__version__}"

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: Dtype = "fp32",
        batch_size: int = 64,
        max_length: int | None = None,
        adapt: Adapt | None = None,
        device: str | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self.model_dir, self.batch_size, self.max_length, self.adapt = model_dir, batch_size, max_length, adapt
        self.dtype: Dtype = dtype
        self.cache_bytes = cache_bytes
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._runner: Runner | None = None

    @property
    def runner(self) -> Runner:
        self.load()
        assert self._runner is not None
        return self._runner

    def load(self) -> None:
        """Reads the weights; a second call does nothing. Raises UnusableInput for a folder that holds no model."""
        if self._runner is None:
            expect_loading()
            model = load_model(self.model_dir, self.dtype, self.device, self.adapt)
            self._runner = build_runner(
                model,
                model,
                model.config,
                self.model_dir,
                num_slots=self.batch_size,
                max_length=self.max_length,
                device=self.device,
                cache_bytes=self.cache_bytes,
            )

    def generate(self, requests: Iterable[Request], handout: Handout | None = None) -> Iterator[Completion]:
        yield from self.runner.generate(requests, handout)

    def score(
        self, sequences: Sequence[Sequence[int]], top_logits: int = 0, log_z_temperatures: Sequence[float] = (1.0,)
    ) -> list[Scores]:
        return self.runner.score(sequences, top_logits, log_z_temperatures)

    def expert_stats(self) -> ExpertStats | None:
        return self.runner.expert_stats()

    def close(self) -> None:
        if self._runner is not None:
            self._runner.watch.detach()
            self._runner = None


def load_model(model_dir: Path, dtype: Dtype, device: torch.device, adapt: Adapt | None = None) -> PreTrainedModel:
    """The model on the device, in evaluation mode. It is adapted in float32 and rounded once: in bf16 an adapter whose lora_B has
    a standard deviation of 1e-4 loses half its effect."""
    config = read_config(model_dir)
    if adapt is None:
        model = read_model(model_dir, config, dtype)
    else:
        model = adapt(read_model(model_dir, config, "fp32"))
        for parameter in model.parameters():  # not `model.to(dtype)`: rotary frequencies are buffers, and stay in float32
            parameter.data = parameter.data.to(DTYPES[dtype])
    model.to(device)  # type: ignore[arg-type]  (transformers' decorated `to` hides its self)
    return model.eval()
