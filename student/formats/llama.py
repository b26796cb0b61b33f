"""A GGUF file as llama.cpp runs it, through the C interface that ik-llama-cpp-python binds."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.errors import UnusableInput

_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silent = _LOG(lambda level, text, data: None)


def llama_api() -> Any:
    """The bindings, quiet. Raises UnusableInput where they are not installed."""
    try:
        from ik_llama_cpp import _ctypes_api as llama
    except ImportError as error:
        raise UnusableInput(f"llama.cpp is not installed ({error}); expected: pip install 'tracestill[gguf]'") from error
    llama._lib.llama_log_set.argtypes = [_LOG, ctypes.c_void_p]
    llama._lib.llama_log_set(_silent, None)
    return llama


class LlamaSpeaker:
    """One context of `max_tokens` positions on `threads` threads. Not for several threads at a time."""

    def __init__(self, file: Path, *, max_tokens: int = 4096, threads: int = 2) -> None:
        self.llama = llama_api()
        self.llama.llama_backend_init()
        self._model = self.llama.llama_model_load_from_file(bytes(file), self.llama.llama_model_default_params())
        if not self._model:
            raise UnusableInput(
                f"{file}: llama.cpp cannot load it; correct export.gguf_pre_tokenizer, where it is set, or export again"
            )
        settings = self.llama.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_threads, settings.n_threads_batch = max_tokens, max_tokens, threads, threads
        settings.flash_attn = False  # its float16 accumulation is no part of the format
        self.max_tokens = max_tokens
        self._context = self.llama.llama_init_from_model(self._model, settings)
        if not self._context:
            raise UnusableInput(f"{file}: llama.cpp has no room for a context of {max_tokens} tokens")
        self.vocabulary = int(self.llama.llama_vocab_n_tokens(self.llama.llama_model_get_vocab(self._model)))

    def logits(self, ids_T: Sequence[int]) -> torch.Tensor:
        """float32 [T, V]."""
        self.llama.llama_kv_cache_clear(self._context)
        return torch.from_numpy(self._decode(ids_T, 0, all_logits=True))

    def generate(self, ids: Sequence[int], *, max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
        """The greedy continuation; ends with the stop token when there is one."""
        self.llama.llama_kv_cache_clear(self._context)
        said: list[int] = []
        logits_V = self._decode(ids, 0, all_logits=False)[-1]
        while len(said) < max_new_tokens:
            said.append(int(logits_V.argmax()))
            if said[-1] in stop_ids or len(said) == max_new_tokens:
                break
            logits_V = self._decode(said[-1:], len(ids) + len(said) - 1, all_logits=False)[-1]
        return said

    def tokenize(self, text: str) -> list[int]:
        """llama.cpp's own ids of a rendered conversation: control tokens are read, nothing is put before it."""
        written = text.encode()
        room = (ctypes.c_int32 * (len(written) + 8))()
        count = self.llama.llama_tokenize(self._model, written, len(written), room, len(room), False, True)
        return list(room[:count])

    def ends(self, token: int) -> bool:
        """Whether llama.cpp takes it for the end of an output."""
        return bool(self.llama.llama_token_is_eog(self._model, token))

    def close(self) -> None:
        if self._context:
            self.llama.llama_free(self._context)
            self.llama.llama_free_model(self._model)
            self._context = self._model = None

    def _decode(self, ids_T: Sequence[int], start: int, *, all_logits: bool) -> np.ndarray:
        """float32 [T or 1, V]."""
        if start + len(ids_T) > self.max_tokens:
            raise ValueError(f"{start + len(ids_T)} tokens in a context of {self.max_tokens}")
        batch = self.llama.llama_batch_init(len(ids_T), 0, 1)
        try:
            batch.n_tokens = len(ids_T)
            for index, token in enumerate(ids_T):
                batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, start + index, 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = all_logits or index == len(ids_T) - 1
            if code := self.llama.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode returned {code}")
            wanted = range(len(ids_T)) if all_logits else [len(ids_T) - 1]
            rows = [np.ctypeslib.as_array(self._logits_of(index), (self.vocabulary,)).copy() for index in wanted]
        finally:
            self.llama.llama_batch_free(batch)
        return np.stack(rows)

    def _logits_of(self, index: int) -> Any:
        return self.llama.llama_get_logits_ith(self._context, index)
