"""Loading: folders, adapters, vocabularies."""

import functools
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from configs.errors import UnusableInput
from data.byte_tokenizer import build_byte_tokenizer
from data.engine import Engine, Request
from student.export import merged_with
from teacher.local_engine import LocalEngine
from teacher.runner import banned_ids
from tests.teacher.models import save_random_model
from tests.teacher.test_decode import make_requests

CPU = torch.device("cpu")


def test_it_is_an_engine(qwen_folder: Path) -> None:
    engine: Engine = LocalEngine(qwen_folder)
    engine.load()
    engine.load()
    assert len(list(engine.generate(make_requests(2)))) == 2
    engine.close()
    engine.close()


def test_an_adapter_is_merged_before_the_weights_are_rounded(qwen_folder: Path) -> None:
    """A change of 1e-4 to the weights is less than half a unit of bf16 where it is added to a rounded one."""
    seen: list[torch.dtype] = []

    def adapt(model: PreTrainedModel) -> PreTrainedModel:
        seen.extend(parameter.dtype for parameter in model.parameters())
        return model

    adapted = LocalEngine(qwen_folder, dtype="bf16", adapt=adapt).score([tuple(range(6, 30))])
    assert set(seen) == {torch.float32}
    assert adapted == LocalEngine(qwen_folder, dtype="bf16").score([tuple(range(6, 30))])


def test_an_adapter_that_fits_nothing_is_refused(qwen_folder: Path, tmp_path: Path) -> None:
    """Its keys renamed, PEFT loads none of them, and the base would be measured as the student; a torn file is one line too."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(qwen_folder, dtype=torch.float32), config)
    adapted.save_pretrained(str(tmp_path))
    weights = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("base_model", "other"): tensor for name, tensor in load_file(weights).items()}, weights)
    engine = LocalEngine(qwen_folder, adapt=functools.partial(merged_with, tmp_path))
    with pytest.raises(UnusableInput, match="its tensors do not fit this base"):
        engine.load()
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UnusableInput, match="its tensors do not fit this base"):
        engine.load()


def test_an_adapter_is_merged_in_memory(qwen_folder: Path, tmp_path: Path) -> None:
    """Scores equal those of the model with the adapter beside its weights; the folder's weights are untouched."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(qwen_folder, dtype=torch.float32), config)
    adapted.save_pretrained(str(tmp_path))
    sequence = tuple(range(6, 30))
    ids = torch.tensor([sequence])
    with torch.no_grad():
        logprobs = adapted(ids).logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    engine = LocalEngine(qwen_folder, adapt=functools.partial(merged_with, tmp_path))
    (scores,) = engine.score([sequence])
    (plain,) = LocalEngine(qwen_folder).score([sequence])
    assert scores.logprobs[1:] == pytest.approx(logprobs.tolist(), abs=1e-4)
    assert plain.logprobs[1:] != pytest.approx(scores.logprobs[1:], abs=1e-2)


def test_bf16_answers_too(glm_folder: Path) -> None:
    assert len(list(LocalEngine(glm_folder, dtype="bf16", batch_size=3).generate(make_requests(4)))) == 4


def test_vocabulary_rows_above_the_tokenizer_are_banned(tmp_path: Path) -> None:
    tokenizer = build_byte_tokenizer(["<|endoftext|>", "<think>"], eos="<|endoftext|>", pad="<|endoftext|>", chat_template="")
    tokenizer.save_pretrained(tmp_path)
    wide, exact = (AutoConfig.for_model("qwen3", vocab_size=size) for size in (264, 258))
    banned = banned_ids(tmp_path, wide, CPU)
    assert banned is not None and banned.nonzero().flatten().tolist() == [258, 259, 260, 261, 262, 263]
    assert banned_ids(tmp_path, exact, CPU) is None
    assert banned_ids(tmp_path / "nowhere", wide, CPU) is None


def test_folders_without_a_model_are_refused_in_one_line(tmp_path: Path, qwen_folder: Path) -> None:
    with pytest.raises(UnusableInput, match=r"no config\.json"):
        LocalEngine(tmp_path).load()
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(UnusableInput, match=r"no \*.safetensors"):
        LocalEngine(tmp_path).load()
    (tmp_path / "config.json").write_text('{"model_type": "no_such_architecture"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnusableInput, match=r"config\.json: not usable") as raised:
        LocalEngine(tmp_path).load()
    assert "\n" not in str(raised.value)


def test_two_runs_of_one_request_are_the_same_text(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, "qwen", seed=2)
    request = Request("r", (8, 9), (), max_tokens=20, temperature=1.2, top_p=1.0, seed=11)
    engine = LocalEngine(folder, batch_size=2)
    (first,), (second,) = list(engine.generate([request])), list(engine.generate([request]))
    assert first.token_ids == second.token_ids


@pytest.mark.parametrize("ids", [(96, 1), (-1, 1)])
def test_ids_beyond_the_vocabulary_are_not_scored(qwen_folder: Path, ids: tuple[int, ...]) -> None:
    with pytest.raises(UnusableInput, match=rf"score: sequence 1: token {ids[0]} is beyond the model's vocabulary of 96"):
        LocalEngine(qwen_folder).score([(1, 2), ids])


def test_logits_that_cannot_be_kept_are_refused(qwen_folder: Path) -> None:
    for top, temperatures in ((-1, (1.0,)), (2, ()), (2, (0.0,))):
        with pytest.raises(UnusableInput, match="at least one temperature above 0"):
            LocalEngine(qwen_folder).score([(1, 2)], top, temperatures)
