from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UnusableInput
from configs.schema import Lora
from student.folders import resolve, weights_sha256
from student.lora import ADAPTER_WEIGHTS, attach, fold_small_layers, linear_names, load_adapter, save_adapter, trainable
from student.model import load_base, load_tokenizer
from tests.train.fixtures import save_tiny_base, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def noisy(base: Path, lora: Lora | None = None) -> torch.nn.Module:
    model = attach(load_base(str(base), "fp32"), lora or Lora(rank=16, alpha=32), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def test_every_linear_layer_but_the_head_is_adapted(base: Path) -> None:
    model = load_base(str(base), "fp32")
    assert linear_names(model) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    adapted = trainable(attach(model, Lora(rank=4, alpha=8), seed=0))
    assert len(adapted) == 2 * 7 * 2  # lora_A and lora_B of seven layers in two blocks
    assert not any("lm_head" in name or "embed" in name for name in adapted)


def test_fresh_adapter_depends_on_its_seed_alone_and_changes_nothing(base: Path) -> None:
    torch.manual_seed(99)
    first = trainable(attach(load_base(str(base), "fp32"), Lora(rank=4, alpha=8), seed=5))
    torch.manual_seed(1)
    second = trainable(attach(load_base(str(base), "fp32"), Lora(rank=4, alpha=8), seed=5))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(not tensor.any() for name, tensor in first.items() if "lora_B" in name)


def test_folded_layers_have_the_same_output_and_gradients(base: Path) -> None:
    ids_BT = torch.arange(24).reshape(2, 12)
    plain, folded = noisy(base), noisy(base)
    assert fold_small_layers(folded) == 14  # type: ignore[arg-type]
    expected, found = plain(input_ids=ids_BT).logits, folded(input_ids=ids_BT).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.square().mean().backward()
    found.square().mean().backward()
    for (name, left), right in zip(trainable(plain).items(), trainable(folded).values(), strict=True):
        assert left.grad is not None and right.grad is not None
        # float32: the folded product sums over the weight's inputs, PEFT's over the rank first
        assert (left.grad - right.grad).norm() < 1e-4 * left.grad.norm(), name


def test_layers_are_folded_only_where_it_is_cheaper_and_exact(base: Path) -> None:
    assert fold_small_layers(attach(load_base(str(base), "fp32"), Lora(rank=1, alpha=2), seed=0)) == 0
    assert fold_small_layers(attach(load_base(str(base), "bf16"), Lora(rank=16, alpha=2), seed=0)) == 0
    assert fold_small_layers(attach(load_base(str(base), "fp32"), Lora(rank=16, alpha=2, dropout=0.1), seed=0)) == 0


def test_saved_adapter_gives_the_same_logits_after_loading(base: Path, tmp_path: Path) -> None:
    model = noisy(base)
    save_adapter(tmp_path / "adapter", model, trainable(model), tiny_tokenizer())  # type: ignore[arg-type]
    ids_BT = torch.arange(12)[None]
    loaded = load_adapter(load_base(str(base), "fp32"), tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=ids_BT).logits, model.eval()(input_ids=ids_BT).logits, rtol=0, atol=0)
    assert load_tokenizer(str(base)).chat_template == tiny_tokenizer().chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]  # nothing temporary stays


def test_partitioned_parameters_never_reach_a_file(base: Path, tmp_path: Path) -> None:
    model = noisy(base)
    empty = {name: torch.empty(0) for name in trainable(model)}
    with pytest.raises(AssertionError, match="partitioned"):
        save_adapter(tmp_path / "adapter", model, empty)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_adapter_with_another_key_prefix_is_refused(base: Path, tmp_path: Path) -> None:
    model = noisy(base)
    save_adapter(tmp_path / "adapter", model, trainable(model))  # type: ignore[arg-type]
    weights = tmp_path / "adapter" / ADAPTER_WEIGHTS
    save_file({name.replace("base_model.model.", "module."): tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(UnusableInput, match="do not fit this base"):
        load_adapter(load_base(str(base), "fp32"), tmp_path / "adapter")


def test_incomplete_adapter_folder_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match=r"no adapter_config\.json"):
        load_adapter(load_base(str(base), "fp32"), tmp_path)


@pytest.mark.parametrize(
    ("files", "message"), [(None, "no such folder"), ([], "no config.json"), (["config.json"], r"no \*\.safetensors")]
)
def test_unusable_base_folder_is_one_line(tmp_path: Path, files: list[str] | None, message: str) -> None:
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    with pytest.raises(UnusableInput, match=message) as error:
        resolve(str(folder))
    assert "\n" not in str(error.value)


def test_base_is_cast_to_the_dtype_asked_for(base: Path) -> None:
    assert {parameter.dtype for parameter in load_base(str(base), "bf16").parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in load_base(str(base), "fp32").parameters()} == {torch.float32}


def test_weights_hash_changes_with_a_single_bit(base: Path, tmp_path: Path) -> None:
    copy = save_tiny_base(tmp_path / "copy")
    assert weights_sha256(copy) == weights_sha256(base)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weights_sha256(copy) != weights_sha256(base)
