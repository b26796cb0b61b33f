import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from configs.errors import UnusableInput
from data.chat import dialect_of
from student.formats import gguf as module
from student.formats.gguf import Gguf, inert_pre_tokenizer, tensor_types
from student.model import load_base, load_tokenizer
from tests.student.formats.models import calibration, greedy, make_model, relative_error, shapes, trained

pytest.importorskip("ik_llama_cpp", reason="needs llama.cpp: pip install '.[gguf]'")


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    assert isinstance(backend, Tokenizer)
    return backend


STOPS = (258, 256)
SHAPES = shapes()


@pytest.fixture(scope="module")
def embedded() -> Iterator[PreTrainedModel]:
    yield load_base("embedded", "fp32").eval()


def test_the_embedded_student_speaks_the_same_through_llama_cpp(embedded: PreTrainedModel, tmp_path: Path) -> None:
    form, tokenizer = Gguf("gguf-f16"), load_tokenizer("embedded")
    said = form.write(trained(embedded), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["student-F16.gguf"]
    assert said == {"tensor_types": {"F16": 37, "F32": 21}, "pre_tokenizer": "gpt-2"}
    speaker, ids = form.open(tmp_path), calibration(tokenizer)[0]
    assert relative_error(speaker.logits(ids), embedded, ids) < 1e-3  # rounded to float16; 2e-4 measured
    prompt = ids[: ids.index(tokenizer.convert_tokens_to_ids("<think>"))]  # type: ignore[arg-type]
    asked: dict[str, Any] = {"max_new_tokens": 24, "stop_ids": STOPS}
    expected = greedy(embedded, prompt, **asked)
    assert speaker.generate(prompt, **asked) == expected == speaker.generate(prompt, **asked)  # nothing of before is left
    assert all(speaker.ends(stop) for stop in dialect_of(tokenizer).stop_ids(tokenizer)) and not speaker.ends(5)
    speaker.close()


@pytest.mark.parametrize(
    ("shape", "name", "error"),
    [
        ("llama", "gguf-q4_k_m", 0.4),
        pytest.param("llama", "gguf-f16", 2e-3, marks=pytest.mark.long),
        pytest.param("qwen2", "gguf-q8_0", 5e-2, marks=pytest.mark.long),
        pytest.param("qwen3, tied", "gguf-f16", 2e-3, marks=pytest.mark.long),
    ],
)
def test_every_shape_is_carried_over(shape: str, name: str, error: float, tmp_path: Path) -> None:
    """Random weights: the relative errors of the logits were 7e-4, 2e-2 and 0.19. A rope that is not permuted gives 1."""
    model, form = make_model(SHAPES[shape]), Gguf(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    form.write(trained(model), tmp_path)
    speaker, ids = form.open(tmp_path), calibration(load_tokenizer("embedded"))[0]
    logits_TV = speaker.logits(ids)
    assert logits_TV.shape == (len(ids), 320) and relative_error(logits_TV, model, ids) < error
    speaker.close()
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())
    kinds = tensor_types(form.file(tmp_path))
    heads = {"llama": 2, "qwen2": 2, "qwen3, tied": 1}[shape]  # tied: the embedding alone
    assert sum(kinds[kind] for kind in ("F16", "Q8_0", "Q4_K", "Q6_K")) == 14 + heads
    assert (kinds["Q4_K"] > 0) == (name == "gguf-q4_k_m")


def test_rows_too_short_for_a_k_quant_are_refused_by_name(embedded: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match=r"no row of this student is a multiple of 256 values \(hidden size 128\).*gguf-q8_0"):
        Gguf("gguf-q4_k_m").write(trained(embedded), tmp_path)


def test_the_template_and_what_stops_stand_in_the_file(embedded: PreTrainedModel, tmp_path: Path) -> None:
    from gguf import GGUFReader

    tokenizer = load_tokenizer("embedded")
    Gguf("gguf-q8_0").write(trained(embedded), tmp_path)
    fields = GGUFReader(tmp_path / "student-Q8_0.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert (fields["tokenizer.ggml.eos_token_id"].contents(), fields["tokenizer.ggml.eot_token_id"].contents()) == STOPS
    assert "tokenizer.ggml.bos_token_id" not in fields


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(
    embedded: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by reading with both, whatever the name of the pre-tokenizer promises."""
    ours = trained(embedded)
    tokenizer = load_tokenizer("embedded")
    changed = json.loads(backend_of(tokenizer).to_str())
    vocabulary = changed["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    swapped = Tokenizer.from_str(json.dumps(changed))
    write_model = module.write_model

    other = PreTrainedTokenizerFast(
        tokenizer_object=swapped, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=tokenizer.chat_template
    )

    def write_other(model: PreTrainedModel, _: object, *rest: Any) -> None:
        write_model(model, other, *rest)

    monkeypatch.setattr(module, "write_model", write_other)
    with pytest.raises(UnusableInput, match="llama.cpp reads a conversation differently from id \\d+ on"):
        Gguf("gguf-f16").write(ours, tmp_path)


@pytest.mark.long
def test_a_pre_tokenizer_that_nobody_registered_has_to_be_named(embedded: PreTrainedModel, tmp_path: Path) -> None:
    """A byte-level BPE with one merge of its own is in nobody's list."""
    tokenizer = load_tokenizer("embedded")
    changed = json.loads(backend_of(tokenizer).to_str())
    changed["model"]["vocab"]["th"] = 264
    changed["model"]["merges"] = [["t", "h"]]
    backend = Tokenizer.from_str(json.dumps(changed))
    other = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=tokenizer.chat_template
    )
    assert inert_pre_tokenizer(tokenizer) == "gpt-2" and inert_pre_tokenizer(other) == ""
    model = make_model(SHAPES["llama"])
    with pytest.raises(UnusableInput, match="does not know this tokenizer's pre-tokenizer; set export.gguf_pre_tokenizer"):
        Gguf("gguf-f16").write(trained(model, other), tmp_path)
    assert not list(tmp_path.iterdir())
    Gguf("gguf-f16", pre_tokenizer="gpt-2").write(trained(model, other), tmp_path)


def test_what_crashes_inside_llama_cpp_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"no model at all")
    with pytest.raises(UnusableInput, match="llama.cpp could not quantize the student .exit code"):
        module._run("quantize", tmp_path / "broken.gguf", tmp_path / "out.gguf", {"ftype": 7, "threads": 1})
    with pytest.raises(UnusableInput, match="broken.gguf: llama.cpp cannot load it"):
        module.LlamaSpeaker(tmp_path / "broken.gguf")
