import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from configs.errors import TracestillError, UnusableInput
from configs.training import Lora
from student import adapter_files
from student.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    load_adapter,
    publish_folder,
    save_adapter,
    starts_at_zero,
    trainable,
)
from student.folders import resolve, weights_sha256
from student.lora import attach, fold_small_layers, linear_names, modules_meant
from student.model import load_base, load_tokenizer
from tests.train.fixtures import save_tiny_base, tiny_tokenizer

EVERY_LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
PAIR = ("embed_tokens", "lm_head")
IDS_BT = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def tiny(kind: str = "qwen3", *, tied: bool = False, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.2, **changes,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # Qwen2's; zero where nobody has trained them
            torch.nn.init.normal_(parameter)
    return model


def moved(model: PeftModel) -> PeftModel:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def noisy(base: Path, lora: Lora | None = None) -> PeftModel:
    return moved(attach(load_base(str(base), "fp32"), lora or Lora(rank=16, alpha=32), seed=0))


# --- which layers ------------------------------------------------------------------------------------------------


def test_every_linear_layer_but_the_head_is_adapted(base: Path) -> None:
    model = load_base(str(base), "fp32")
    assert linear_names(model).names == EVERY_LINEAR
    adapted = trainable(attach(model, Lora(rank=4, alpha=8), seed=0))
    assert len(adapted) == 2 * 7 * 2  # lora_A and lora_B of seven layers in two blocks
    assert not any("lm_head" in name or "embed" in name for name in adapted)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("kind", "changes", "routers"),
    [
        ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 16}, ["mlp.shared_expert_gate"]),
        ("phimoe", {"num_local_experts": 4}, ["mlp.router"]),
        ("afmoe", EXPERTS | {"num_dense_layers": 0}, ["mlp.router.gate"]),
    ],
)
def test_routers_of_experts_are_left_alone_and_gates_of_mlps_and_attention_are_not(
    kind: str, changes: dict[str, int], routers: list[str]
) -> None:
    model = tiny(kind, **changes)  # type: ignore
    every = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    left_out = every - modules_meant(model, linear_names(model))
    assert left_out == {f"model.layers.{layer}.{name}" for layer in range(2) for name in routers}


def test_a_mixture_of_experts_whose_layers_peft_would_exchange_is_refused_with_what_can_be_adapted() -> None:
    changes = EXPERTS | {"num_dense_layers": 1}
    with pytest.raises(
        UnusableInput, match=r"for the type afmoe PEFT adapts other layers.*targets \[q_proj, k_proj, v_proj, o_proj\]"
    ):
        attach(tiny("afmoe", **changes), Lora(rank=4), seed=0)  # type: ignore
    adapted = attach(tiny("afmoe", **changes), Lora(rank=4, targets=("q_proj", "k_proj", "v_proj", "o_proj")), seed=0)  # type: ignore
    assert len(trainable(adapted)) == 2 * 4 * 2
    assert len(trainable(attach(tiny("qwen2_moe", **EXPERTS), Lora(rank=4), seed=0))) == 2 * 7 * 2  # type: ignore


def test_layers_can_be_named_and_the_head_and_the_embedding_only_so() -> None:
    adapted = trainable(attach(tiny(), Lora(rank=4, targets=("q_proj", *PAIR)), seed=0))
    assert {name.partition(".lora_")[0].rpartition(".")[2] for name in adapted} == {"q_proj", *PAIR}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            Lora(targets=("q_proj", "qproj")),
            "targets: no layer qproj in this qwen3; expected any of down_proj, embed_tokens, gate",
        ),
        (Lora(modules_to_save=("head",)), "modules_to_save: no layer head in this qwen3; expected any of down_proj, embed"),
    ],
)
def test_a_name_that_no_layer_has_is_refused_with_those_that_there_are(lora: Lora, message: str) -> None:
    with pytest.raises(UnusableInput, match=message):
        attach(tiny(), lora, seed=0)


@pytest.mark.parametrize("modules", [("norm",), ("norm", "input_layernorm")])
def test_a_name_that_others_end_in_is_refused(modules: tuple[str, ...]) -> None:
    """PEFT trains them all; the plan counts one."""
    with pytest.raises(UnusableInput, match=r"modules_to_save: norm would train .*post_attention_layernorm.* too"):
        attach(tiny(), Lora(rank=4, modules_to_save=modules), seed=0)


# --- tied heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora",
    [Lora(modules_to_save=("lm_head",)), Lora(modules_to_save=("embed_tokens",)), Lora(targets=("lm_head",)), Lora(targets=PAIR)],
    ids=lambda lora: f"{lora.targets} {lora.modules_to_save}",
)
def test_half_of_a_tied_pair_is_refused_and_so_is_an_adapter_on_either(lora: Lora) -> None:
    with pytest.raises(UnusableInput, match="share one tensor.*expected both in student.lora.modules_to_save, or neither"):
        attach(tiny(tied=True), lora, seed=0)
    attach(tiny(tied=False), lora, seed=0)


def test_a_tied_pair_that_is_trained_whole_stays_one_tensor(tmp_path: Path) -> None:
    model = moved(attach(tiny(tied=True), Lora(rank=4, modules_to_save=PAIR), seed=0))
    assert sum("modules_to_save" in name for name in trainable(model)) == 1
    assert_tied(model.get_base_model())
    save_adapter(tmp_path / "adapter", model, trainable(model))
    stored = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    assert torch.equal(stored["base_model.model.lm_head.weight"], stored["base_model.model.model.embed_tokens.weight"])
    said = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    assert said["modules_to_save"] == [*PAIR] and said["ensure_weight_tying"] is True
    loaded = load_adapter(tiny(tied=True), tmp_path / "adapter")
    assert_tied(loaded.get_base_model())
    assert_same_logits(loaded, model)


def assert_tied(model: torch.nn.Module) -> None:
    assert isinstance(model, PreTrainedModel)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[union-attr]
    assert model.config.tie_word_embeddings is True


def test_a_tied_pair_that_is_not_trained_stays_one_tensor() -> None:
    assert_tied(attach(tiny(tied=True), Lora(rank=4), seed=0).get_base_model())


def assert_same_logits(found: torch.nn.Module, expected: torch.nn.Module, *, share: float = 0.0) -> None:
    """share: of the largest logit that they may differ by."""
    with torch.no_grad():
        left, right = found.eval()(input_ids=IDS_BT).logits, expected.eval()(input_ids=IDS_BT).logits
    torch.testing.assert_close(left, right, rtol=0.0, atol=share * float(right.abs().max()))


# --- how it starts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"dora": True}, {"rslora": True}, {"dropout": 0.5}, {"alpha": 99}, {"targets": ["q_proj"]},
     {"modules_to_save": ["lm_head"]}, {"targets": ["lm_head", "embed_tokens", "v_proj"]}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_start_of_a_layer_depends_on_the_seed_and_on_nothing_else_that_is_set(
    changes: dict[str, Any], dtype: torch.dtype
) -> None:
    plain = trainable(attach(tiny(), Lora(rank=4, alpha=8), seed=5))
    other = trainable(attach(tiny().to(dtype), Lora.model_validate({"rank": 4, "alpha": 8} | changes), seed=5))  # type: ignore[arg-type]
    shared = [name for name in other if "lora_A" in name and name in plain]
    assert shared and all(torch.equal(plain[name], other[name]) for name in shared)
    assert all(not other[name].any() for name in other if starts_at_zero(name))
    assert all(other[name].any() for name in other if not starts_at_zero(name))


def test_a_start_is_as_wide_as_peft_would_draw_it() -> None:
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight"
    drawn = trainable(attach(tiny(), Lora(rank=32), seed=5))[name].detach()
    bound = 48**-0.5  # of its inputs
    assert 0.99 * bound < float(drawn.abs().max()) <= bound
    assert float(drawn.std()) == pytest.approx(bound / 3**0.5, rel=0.05) and abs(float(drawn.mean())) < 0.1 * bound


def test_a_shape_on_the_meta_device_can_be_adapted() -> None:
    with torch.device("meta"):
        model = tiny()
    adapted = trainable(attach(model, Lora(rank=4), seed=0))
    assert adapted.keys() == trainable(attach(tiny(), Lora(rank=4), seed=0)).keys()
    assert all(parameter.is_meta for parameter in adapted.values())


def test_fresh_adapter_depends_on_its_seed_alone_and_changes_nothing(base: Path) -> None:
    torch.manual_seed(99)
    first = trainable(attach(load_base(str(base), "fp32"), Lora(rank=4, alpha=8), seed=5))
    torch.manual_seed(1)
    second = trainable(attach(load_base(str(base), "fp32"), Lora(rank=4, alpha=8), seed=5))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(not tensor.any() for name, tensor in first.items() if "lora_B" in name)


# --- folding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_folded_layers_have_the_same_output_and_gradients(base: Path, rslora: bool) -> None:
    lora = Lora(rank=16, alpha=32, rslora=rslora)
    plain, folded = noisy(base, lora), noisy(base, lora)
    assert fold_small_layers(folded) == 14
    expected, found = plain(input_ids=IDS_BT).logits, folded(input_ids=IDS_BT).logits
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
    assert fold_small_layers(attach(load_base(str(base), "fp32"), Lora(rank=16, alpha=2, dora=True), seed=0)) == 0


def test_a_folded_model_whose_adapter_is_disabled_is_the_base(base: Path) -> None:
    model = noisy(base).eval()
    fold_small_layers(model)
    with torch.no_grad(), model.disable_adapter():
        found = model(input_ids=IDS_BT).logits
    torch.testing.assert_close(found, load_base(str(base), "fp32")(input_ids=IDS_BT).logits, rtol=0, atol=0)


# --- on disk -----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "whole": {"modules_to_save": PAIR},
    "head": {"targets": ("q_proj", *PAIR)}, "dora, whole": {"dora": True, "modules_to_save": PAIR},
}  # fmt: skip


COMBINATIONS = [
    (kind, tied, option)
    for kind in ("llama", "qwen2", "qwen3") for tied in (False, True) for option in OPTIONS if not (tied and option == "head")
]  # fmt: skip
QUICK = {("qwen3", True, "dora, whole"), ("qwen3", False, "head"), ("qwen2", False, "dora"), ("llama", True, "rslora")}


@pytest.mark.parametrize(
    ("kind", "tied", "option"),
    [pytest.param(*one, marks=() if one in QUICK else pytest.mark.long) for one in COMBINATIONS],
)
def test_an_adapter_loads_with_plain_peft_and_merged_it_is_the_same_model(
    tmp_path: Path, kind: str, tied: bool, option: str
) -> None:
    model = moved(attach(tiny(kind, tied=tied), Lora.model_validate({"rank": 4, "alpha": 8} | OPTIONS[option]), seed=0))
    save_adapter(tmp_path / "adapter", model, trainable(model))
    stored = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    assert len(stored) == len(trainable(model)) + (tied and "whole" in option)
    assert all(tensor.dtype == torch.float32 and tensor.numel() for tensor in stored.values())
    plain = PeftModel.from_pretrained(tiny(kind, tied=tied), str(tmp_path / "adapter"))
    assert_same_logits(plain, model)
    merged = load_adapter(tiny(kind, tied=tied), tmp_path / "adapter").merge_and_unload(safe_merge=True)
    assert_same_logits(merged, model, share=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32), model, share=1e-5)


def test_keys_are_those_that_a_server_looks_for(base: Path, tmp_path: Path) -> None:
    model = noisy(base)
    save_adapter(tmp_path / "adapter", model, trainable(model))
    modules = dict(load_base(str(base), "fp32").named_modules())
    for name, tensor in load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS).items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert found is not None, name
        layer = modules[found[1]]
        assert isinstance(layer, torch.nn.Linear)
        assert tensor.shape == ((16, layer.in_features) if found[2] == "A" else (layer.out_features, 16))
    said = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    assert sorted(said["target_modules"]) == EVERY_LINEAR and (said["r"], said["lora_alpha"]) == (16, 32)
    assert said["peft_type"] == "LORA" and said["inference_mode"] is True and said["modules_to_save"] is None


def test_saved_adapter_gives_the_same_logits_after_loading(base: Path, tmp_path: Path) -> None:
    model = noisy(base)
    save_adapter(tmp_path / "adapter", model, trainable(model), tiny_tokenizer())
    ids_BT = torch.arange(12)[None]
    loaded = load_adapter(load_base(str(base), "fp32"), tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=ids_BT).logits, model.eval()(input_ids=ids_BT).logits, rtol=0, atol=0)
    assert load_tokenizer(str(base)).chat_template == tiny_tokenizer().chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]  # nothing temporary stays


def test_partitioned_parameters_never_reach_a_file(base: Path, tmp_path: Path) -> None:
    model = noisy(base)
    empty = {name: torch.empty(0) for name in trainable(model)}
    with pytest.raises(AssertionError, match="partitioned"):
        save_adapter(tmp_path / "adapter", model, empty)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_learnt_nothing_somewhere_or_something_impossible_is_not_written(base: Path, tmp_path: Path) -> None:
    model = noisy(base)
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.default.weight"
    for value, message in [(0.0, "is all zero after training"), (float("nan"), "not finite"), (float("inf"), "not finite")]:
        wrong = dict(trainable(model)) | {name: torch.full_like(trainable(model)[name], value)}
        with pytest.raises(TracestillError, match=f"layers.1.self_attn.k_proj.lora_B.default.weight.*{message}") as error:
            save_adapter(tmp_path / "adapter", model, wrong)
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    fresh = attach(load_base(str(base), "fp32"), Lora(rank=4), seed=0)
    with pytest.raises(TracestillError, match="all zero"):
        save_adapter(tmp_path / "adapter", fresh, trainable(fresh))
    save_adapter(tmp_path / "adapter", fresh, trainable(fresh), may_be_untrained=True)
    assert_same_logits(load_adapter(load_base(str(base), "fp32"), tmp_path / "adapter"), load_base(str(base), "fp32"))


@pytest.mark.parametrize("place", ["syncing", "renaming"])
def test_a_kill_before_the_new_adapter_is_durable_leaves_the_old_one(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("adapter", ".adapter.new", ".adapter.again"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    child = os.fork()
    if not child:
        patched = (adapter_files, "_fsync") if place == "syncing" else (Path, "rename")
        monkeypatch.setattr(*patched, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        try:
            publish_folder(tmp_path / ".adapter.new", tmp_path / "adapter")
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (tmp_path / "adapter" / "weights").read_text() == "adapter"
    publish_folder(tmp_path / ".adapter.again", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "weights").read_text() == ".adapter.again"


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"intermediate_size": 96}], ids=str)
def test_an_adapter_of_another_shape_is_refused_in_one_line(base: Path, tmp_path: Path, change: dict[str, int]) -> None:
    model = noisy(base)
    save_adapter(tmp_path / "adapter", model, trainable(model))
    config = AutoConfig.from_pretrained(base)
    for key, value in change.items():
        setattr(config, key, value)
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    with pytest.raises(UnusableInput, match="do not fit this base") as error:
        load_adapter(AutoModelForCausalLM.from_config(config), tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_adapter_with_another_key_prefix_is_refused(base: Path, tmp_path: Path) -> None:
    model = noisy(base)
    save_adapter(tmp_path / "adapter", model, trainable(model))
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
