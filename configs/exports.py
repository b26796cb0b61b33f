"""What a server is given."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.section import Section

FormatName = Literal["merged", "adapter", "gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "int8", "int4", "fp8"]
DtypeName = Literal["fp32", "bf16", "fp16"]


class Export(Section):
    formats: Annotated[tuple[FormatName, ...], Field(min_length=1)] = ("merged",)
    """merged: one set of weights, for vLLM, SGLang, transformers. adapter: for a server that has the base (vLLM --enable-lora).
    gguf-*: one file for llama.cpp. int8, int4 (weights alone), fp8: compressed-tensors, for vLLM. Each is opened again and held
    against base + adapter before it is published."""
    dtype: DtypeName = "bf16"
    """Of merged weights, and what an adapter's base is served in. A merge that would lose more than 2 % of the adapter is stored
    in fp32, and says so."""
    gguf_pre_tokenizer: str = ""
    """llama.cpp's name of the pre-tokenizer, for tokenizers that its converter does not know."""

    @model_validator(mode="after")
    def _each_format_once(self) -> "Export":
        if twice := sorted({name for name in self.formats if self.formats.count(name) > 1}):
            raise ValueError(f"formats name {twice[0]} twice; expected each once")
        return self
