import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UnusableInput
from data.chat import dialect_of
from student.formats import gptq
from student.formats.compressed import Compressed, CompressedName, linear_layers
from student.formats.weights import empty_copy
from student.model import load_base, load_tokenizer
from tests.student.formats.models import calibration, greedy, make_model, relative_error, trained

pytest.importorskip("compressed_tensors", reason="needs compressed-tensors: pip install '.[compressed]'")

NAMES: tuple[CompressedName, ...] = ("int8", "int4", "fp8")
STOPS = (258, 256)


def tiny(family: str, **others: object) -> PreTrainedModel:
    """More embeddings than tokens, as padded vocabularies have; rows of 64 and of 96 weights."""
    sizes = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "eos_token_id": 258, "bos_token_id": None,
        "initializer_range": 0.1,
    }  # fmt: skip
    return make_model(AutoConfig.for_model(family, **sizes | others))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("embedded")


def export(name: CompressedName, model: PreTrainedModel, folder: Path) -> dict[str, object]:
    return dict(Compressed(name).write(trained(model), folder))


def settings_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# --- the obvious reference -----------------------------------------------------------------------------------------


def nearest_by_loops(weight_OI: torch.Tensor, name: CompressedName) -> torch.Tensor:
    """Every row, every group: the largest weight becomes the end of the grid."""
    columns = weight_OI.shape[1]
    group = next((size for size in (128, 64, 32) if columns % size == 0), columns) if name == "int4" else columns
    half, low, high = {"int8": (127.5, -128, 127), "int4": (7.5, -8, 7), "fp8": (448.0, -448, 448)}[name]
    found_OI = torch.empty_like(weight_OI)
    for row in range(len(weight_OI)):
        for start in range(0, columns, group):
            values = weight_OI[row, start : start + group]
            scale = (values.abs().max() / half).to(torch.bfloat16).float()
            steps = (values / scale).clamp(low, high)
            steps = steps.to(torch.float8_e4m3fn).float() if name == "fp8" else steps.round()
            found_OI[row, start : start + group] = steps * scale
    return found_OI


def activations_by_loops(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    """Every token of fp8's inputs on a grid of its own."""
    (inputs_1TI,) = given
    found_1TI = torch.empty_like(inputs_1TI)
    for token in range(inputs_1TI.shape[1]):
        scale = inputs_1TI[0, token].abs().max() / 448.0
        found_1TI[0, token] = (inputs_1TI[0, token] / scale).to(torch.float8_e4m3fn).float() * scale
    return (found_1TI,)


@torch.no_grad()
def plain_model(
    model: PreTrainedModel, name: CompressedName, weight_of: Callable[[str, torch.Tensor], torch.Tensor]
) -> PreTrainedModel:
    """`model` in float32 with the linear layers' weights replaced, and all others rounded to bf16."""
    plain = empty_copy(model)
    linears = linear_layers(model)
    weights = {
        key: weight_of(key, tensor) if key.removesuffix(".weight") in linears else tensor.to(torch.bfloat16).float()
        for key, tensor in model.state_dict().items()
    }
    rotary = {key: module for key, module in model.named_modules() if key.endswith("rotary_emb")}
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    for key, module in rotary.items():
        plain.set_submodule(key, module)
    if name == "fp8":
        for module in linear_layers(plain).values():
            module.register_forward_pre_hook(activations_by_loops)
    return plain.eval()


def unpacked_by_loops(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of int4, four bits after four bits, the lowest first, 8 too large."""
    stored, found = load_file(folder / "model.safetensors"), {}
    for key, words_OW in stored.items():
        if key.endswith(".weight_packed"):
            name = key.removesuffix("_packed")
            rows, columns = stored[f"{name}_shape"].tolist()
            scale_OG = stored[f"{name}_scale"].float()
            found[name] = torch.empty(rows, columns)
            for column in range(columns):
                steps_O = (words_OW[:, column // 8] >> (4 * (column % 8)) & 15) - 8
                found[name][:, column] = steps_O * scale_OG[:, column * scale_OG.shape[1] // columns]
    return found


# --- what is served ------------------------------------------------------------------------------------------------

FAMILIES = [
    ("llama", {}),
    ("qwen3", {"tie_word_embeddings": True}),
    pytest.param("qwen2", {}, marks=pytest.mark.long),
    pytest.param("mistral", {"sliding_window": 8}, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("family", "others"), FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_reloaded_folder_is_the_model_whose_weights_were_rounded_by_loops(
    name: CompressedName, family: str, others: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerBase,
) -> None:  # fmt: skip
    monkeypatch.setattr(gptq, "compensate", lambda weight_OI, _, scale_OG, grid: gptq.round_to_nearest(weight_OI, scale_OG, grid))
    model = tiny(family, **others)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    export(name, model, tmp_path)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    speaker, ids = Compressed(name).open(tmp_path), calibration(tokenizer)[0]
    plain = plain_model(model, name, lambda _, weight_OI: nearest_by_loops(weight_OI, name))
    logits_TV = speaker.logits(ids)
    assert logits_TV.shape == (len(ids), 320) and logits_TV.dtype == torch.float32
    assert relative_error(logits_TV, plain, ids) < 1e-5  # sums in another order
    assert relative_error(logits_TV, model, ids) > 1e-3  # something was rounded
    prompt = ids[:20]
    assert speaker.generate(prompt, max_new_tokens=8, stop_ids=STOPS) == greedy(plain, prompt, 8, STOPS)
    speaker.close()


@pytest.mark.parametrize(("family", "others"), FAMILIES)
def test_int4_is_read_back_as_it_was_packed_and_is_nearer_than_round_to_nearest(
    family: str, others: dict[str, object], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, ids = tiny(family, **others), calibration(tokenizer)[0]
    notes = export("int4", model, tmp_path)
    assert notes["group_sizes"] == {"32": 2, "64": 12} and notes["calibration_tokens"] == sum(map(len, calibration(tokenizer)))
    assert float(str(notes["output_error"])) < 0.6 * float(str(notes["output_error_round_to_nearest"]))
    speaker, stored = Compressed("int4").open(tmp_path), unpacked_by_loops(tmp_path)
    found_TV = speaker.logits(ids)
    assert relative_error(found_TV, plain_model(model, "int4", lambda key, _: stored[key]), ids) < 1e-5
    nearest = plain_model(model, "int4", lambda _, weight_OI: nearest_by_loops(weight_OI, "int4"))
    with torch.no_grad():
        nearest_TV = nearest(torch.tensor([ids])).logits[0]
    assert relative_error(found_TV, model, ids) < relative_error(nearest_TV, model, ids)
    speaker.close()


@pytest.mark.parametrize("name", NAMES)
def test_the_embedded_student_speaks_on(name: CompressedName, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Errors of its logits on a conversation that int4 is calibrated on: 0.006, 0.023, 0.022."""
    model = load_base("embedded", "fp32").eval()
    export(name, model, tmp_path)
    speaker, ids = Compressed(name).open(tmp_path), calibration(tokenizer)[0]
    assert relative_error(speaker.logits(ids), model, ids) < {"int8": 0.01, "int4": 0.05, "fp8": 0.04}[name]
    prompt = ids[: ids.index(tokenizer.convert_tokens_to_ids("<think>"))]  # type: ignore[arg-type]
    said = speaker.generate(prompt, max_new_tokens=64, stop_ids=STOPS)
    assert said == speaker.generate(prompt, max_new_tokens=64, stop_ids=STOPS) and len(said) <= 64
    assert speaker.generate(prompt, max_new_tokens=64, stop_ids=said[2:3]) == said[: said.index(said[2]) + 1]
    speaker.close()


# --- what is on disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_config_says_what_vllm_asks_for(name: CompressedName, tmp_path: Path) -> None:
    export(name, tiny("llama", intermediate_size=128), tmp_path)
    said = settings_of(tmp_path)
    weights = {
        "int8": {"num_bits": 8, "type": "int", "strategy": "channel", "group_size": None},
        "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64},
        "fp8": {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None},
    }[name]
    groups = said["config_groups"]
    assert isinstance(groups, dict)
    endings = ("gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    by_ending = [["re:.*[.]down_proj$"], [f"re:.*[.]{ending}$" for ending in endings]]  # groups of 128, groups of 64
    assert [one["targets"] for one in groups.values()] == (by_ending if name == "int4" else [["Linear"]])
    last = list(groups.values())[-1]
    assert last["weights"] == weights | {"symmetric": True, "dynamic": False}
    assert (last["input_activations"] is None) == (name != "fp8")
    if name == "fp8":
        a_token = {"strategy": "token", "group_size": None, "symmetric": True, "dynamic": True}
        assert last["input_activations"] == {"num_bits": 8, "type": "float"} | a_token
    assert (said["quant_method"], said["quantization_status"]) == ("compressed-tensors", "compressed")
    assert said["format"] == {"int8": "pack-quantized", "int4": "pack-quantized", "fp8": "float-quantized"}[name]
    assert said["ignore"] == ["lm_head"] and said["kv_cache_scheme"] is None


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_have_their_names_and_dtypes_and_all_others_are_bf16(name: CompressedName, tied: bool, tmp_path: Path) -> None:
    model = tiny("qwen2", tie_word_embeddings=tied)
    export(name, model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    linear = "model.layers.1.mlp.down_proj"
    mine = {key.removeprefix(linear): (tensor.dtype, tuple(tensor.shape)) for key, tensor in stored.items() if linear in key}
    scale, shape = (torch.bfloat16, (64, 3 if name == "int4" else 1)), (torch.int64, (2,))
    words = {"int8": 24, "int4": 12, "fp8": 0}[name]  # four and eight weights in an int32
    packed = {".weight_packed": (torch.int32, (64, words)), ".weight_scale": scale, ".weight_shape": shape}
    assert mine == (packed if words else {".weight": (torch.float8_e4m3fn, (64, 96)), ".weight_scale": scale})
    plain = {key: tensor for key, tensor in stored.items() if key.rpartition(".")[0] not in linear_layers(model)}
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in stored) is not tied and stored["model.embed_tokens.weight"].shape == (320, 64)
    biases = {key: tensor for key, tensor in stored.items() if key.endswith(".bias")}
    assert len(biases) == 6 and {tensor.dtype for tensor in biases.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["dtype"], config["vocab_size"], config["tie_word_embeddings"]) == ("bfloat16", 320, tied)


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_holds_what_a_server_needs(name: CompressedName, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    export(name, tiny("llama"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(dialect_of(tokenizer).stop_ids(tokenizer)) == list(STOPS)
    assert generation["pad_token_id"] == tokenizer.pad_token_id and "temperature" not in generation
    served = load_tokenizer(str(tmp_path))
    assert served.chat_template == tokenizer.chat_template and served.get_vocab() == tokenizer.get_vocab()
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) & 0o044


# --- shapes and values that do not fit -----------------------------------------------------------------------------


def test_rows_that_no_group_divides_have_one_scale(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model, ids = tiny("llama", intermediate_size=72), calibration(tokenizer)[0]
    assert export("int4", model, tmp_path)["group_sizes"] == {"64": 12, "72": 2}
    groups = settings_of(tmp_path)["config_groups"]
    assert isinstance(groups, dict)
    assert [(one["weights"]["strategy"], one["weights"]["group_size"]) for one in groups.values()] == [
        ("group", 64),
        ("channel", None),
    ]
    stored, speaker = unpacked_by_loops(tmp_path), Compressed("int4").open(tmp_path)
    assert relative_error(speaker.logits(ids), plain_model(model, "int4", lambda key, _: stored[key]), ids) < 1e-5


@pytest.mark.parametrize(("name", "mlp"), [("int4", 68), ("int8", 66)])
def test_rows_that_leave_an_int32_half_full_stay_in_bf16_by_name(
    name: CompressedName, mlp: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, ids = tiny("llama", intermediate_size=mlp), calibration(tokenizer)[0]
    left = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    assert export(name, model, tmp_path)["unquantised"] == left
    assert settings_of(tmp_path)["ignore"] == [*left, "lm_head"]
    stored = load_file(tmp_path / "model.safetensors")
    assert all(stored[f"{one}.weight"].dtype == torch.bfloat16 for one in left)
    speaker = Compressed(name).open(tmp_path)
    assert relative_error(speaker.logits(ids), model, ids) < 0.3


def test_a_student_that_has_no_row_that_fits_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=36, num_attention_heads=6, head_dim=10, intermediate_size=50)
    with pytest.raises(
        UnusableInput, match=r"int4: no linear layer has rows of a multiple of 8.*\(rows of 36, 50, 60\); export fp8"
    ):
        export("int4", model, tmp_path)
    assert not list(tmp_path.iterdir())
    export("fp8", model, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_zeros_and_dead_columns_leave_no_nan(
    name: CompressedName, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, ids = tiny("qwen3"), calibration(tokenizer)[0]
    with torch.no_grad():
        layers = linear_layers(model)
        layers["model.layers.0.mlp.up_proj"].weight[:7] = 0.0  # so that seven columns of down_proj are never reached
        layers["model.layers.1.self_attn.q_proj"].weight.zero_()
    export(name, model, tmp_path)
    speaker = Compressed(name).open(tmp_path)
    logits_TV = speaker.logits(ids)
    assert bool(logits_TV.isfinite().all()) and relative_error(logits_TV, model, ids) < 0.3


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_no_numbers_are_refused_by_name(name: CompressedName, tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        linear_layers(model)["model.layers.1.mlp.up_proj"].weight[3, 4] = float("nan")
    with pytest.raises(UnusableInput, match=rf"{name}: model.layers.1.mlp.up_proj holds values that are no numbers"):
        export(name, model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_calibration_int4_is_refused_and_the_others_need_none(tmp_path: Path) -> None:
    uncalibrated = trained(tiny("llama"))._replace(calibration=[])
    with pytest.raises(UnusableInput, match="no training conversation to calibrate on"):
        Compressed("int4").write(uncalibrated, tmp_path)
    assert not list(tmp_path.iterdir())
    Compressed("int8").write(uncalibrated, tmp_path)


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    model.resize_token_embeddings(200)
    with pytest.raises(UnusableInput, match="the tokenizer has 261 ids, the embedding 200 rows"):
        export("int8", model, tmp_path)


def test_a_missing_package_and_a_broken_folder_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export("int8", tiny("llama"), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UnusableInput, match="not a causal language model that loads"):
        Compressed("int8").open(tmp_path)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UnusableInput, match=r"compressed-tensors is missing.*pip install 'tracestill\[compressed\]'"):
        Compressed("int8").write(trained(tiny("llama")), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_drawn_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export("int4", tiny("llama"), tmp_path)
    Compressed("int4").open(tmp_path)
    assert "ompressing model" not in capsys.readouterr().err
