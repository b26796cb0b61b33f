import json
import math
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from configs.errors import UnusableInput
from configs.exports import Export
from configs.training import Lora
from data.byte_tokenizer import build_byte_tokenizer
from data.chat import dialect_of, encode_conversation, encode_prompt
from data.records import Message
from data.store import RunFolder, sha256_file
from student import parity
from student.adapter_files import save_adapter, trainable
from student.export import Exported, Material, export_formats, exported_files, load_adapted
from student.lora import attach
from student.matrix import agreed, divergence, retention
from student.model import load_base
from student.targets import stored_dtype
from tests.student.test_evaluate import CHATML, embedded_template

PAIR = ("embed_tokens", "lm_head")
PROMPTS: list[list[Message]] = [
    [{"role": "user", "content": text}] for text in ("12 + 30?", "Spell abc backwards.", "Which metal?")
]
TRACES: list[list[Message]] = [
    [*prompt, {"role": "assistant", "content": "42", "reasoning_content": "1+3, 2+0."}] for prompt in PROMPTS
]


def make_base(folder: Path, *, tied: bool) -> Path:
    """A random two-layer Qwen3 with the embedded student's tokenizer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    build_byte_tokenizer(
        CHATML, eos="<|im_end|>", pad="<|endoftext|>", chat_template=embedded_template("student")
    ).save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, *, std: float = 0.05, targets: str | list[str] = "all-linear") -> Path:
    """A LoRA adapter with a random lora_B, as if trained; std 0 is one that never took a step."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), tied=request.param)


def export_all(base: Path, adapter: Path, run: RunFolder, **settings: object) -> list[Exported]:
    material = Material(PROMPTS, TRACES, TRACES)
    chosen = Export.model_validate(settings)

    def card(made: Sequence[Exported]) -> str:
        return f"card of {', '.join(one.name for one in made)}"

    return export_formats(str(base), adapter, chosen, run, material, card, lambda files: {"files": dict(files)})


def export(base: Path, adapter: Path, run: RunFolder, dtype: str = "fp32") -> Exported:
    [exported] = export_all(base, adapter, run, dtype=dtype)
    return exported


def found_by(exported: Exported) -> parity.Parity:
    assert exported.parity is not None
    return exported.parity


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_exported_folder_is_base_plus_adapter(base: Path, tmp_path: Path, dtype: str) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    exported = export(base, adapter, RunFolder(tmp_path), dtype)
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)).eval()
    reloaded = AutoModelForCausalLM.from_pretrained(exported.folder, dtype="auto")
    assert {parameter.dtype for parameter in reloaded.parameters()} == {parity_dtype(dtype)}
    ids = torch.tensor([encode_prompt(tokenizer_of(base), PROMPTS[0])])  # type: ignore[arg-type]
    with torch.no_grad():
        ours, theirs = reloaded.float()(ids).logits, reference(ids).logits
    # logits are of order 1; weights were rounded once to 24, 11 or 8 bits
    assert torch.allclose(ours, theirs, atol={"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-1}[dtype])
    assert found_by(exported).logit_error < parity.LOGIT_BOUND[dtype] and found_by(exported).tokens > 0
    assert found_by(exported).adapter_kept > 0.9 and found_by(exported).twins == len(PROMPTS) + len(TRACES)


def parity_dtype(dtype: str) -> torch.dtype:
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]


def test_the_folder_holds_what_a_server_needs(base: Path, tmp_path: Path) -> None:
    exported = export(base, make_adapter(base, tmp_path / "adapter"), RunFolder(tmp_path))
    names = {path.name for path in exported_files(exported.folder)}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    } <= names
    assert exported.folder == tmp_path / "export" / "merged" and [path.name for path in (tmp_path / "export").iterdir()] == [
        "merged"
    ]
    assert (exported.folder / "README.md").read_text() == "card of merged"
    tokenizer = tokenizer_of(base)
    generation = json.loads((exported.folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(dialect_of(tokenizer).stop_ids(tokenizer))
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    assert stat.S_IMODE((exported.folder / "model.safetensors").stat().st_mode) & 0o044  # others may read the weights


def test_tied_heads_stay_tied_when_the_adapter_leaves_them_alone(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    exported = export(base, make_adapter(base, tmp_path / "adapter"), RunFolder(tmp_path))
    before, after = load_file(base / "model.safetensors"), load_file(exported.folder / "model.safetensors")
    assert "lm_head.weight" not in after
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_a_tied_head_is_kept_and_the_embedding_is_not_touched(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(base, tmp_path / "adapter", targets=["lm_head", "q_proj"])
    exported = export(base, adapter, RunFolder(tmp_path))
    before, after = load_file(base / "model.safetensors"), load_file(exported.folder / "model.safetensors")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert json.loads((exported.folder / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    "lora",
    [
        *(pytest.param(one, marks=pytest.mark.long) for one in (Lora(rslora=True), Lora(dora=True), Lora(modules_to_save=PAIR))),
        Lora(dora=True, rslora=True, modules_to_save=PAIR),
    ],
    ids=["rslora", "dora", "whole pair", "all of them"],
)
def test_every_kind_of_adapter_keeps_its_logits_and_its_ties_in_the_export(base: Path, tmp_path: Path, lora: Lora) -> None:
    model = attach(load_base(str(base), "fp32"), lora.model_copy(update={"rank": 4, "alpha": 8}), seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    save_adapter(tmp_path / "adapter", model, trainable(model))
    exported = export(base, tmp_path / "adapter", RunFolder(tmp_path))
    reloaded = AutoModelForCausalLM.from_pretrained(exported.folder, dtype=torch.float32)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.allclose(reloaded(ids).logits, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))
    is_tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert json.loads((exported.folder / "config.json").read_text())["tie_word_embeddings"] is is_tied
    assert ("lm_head.weight" in load_file(exported.folder / "model.safetensors")) is not is_tied


def test_an_adapter_that_never_learnt_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="adapter changes no logit"):
        export(base, make_adapter(base, tmp_path / "adapter", std=0.0), RunFolder(tmp_path))
    assert not list((tmp_path / "export").iterdir())


def test_a_bf16_merge_that_would_lose_the_adapter_is_stored_in_fp32_and_says_why(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})  # a base that bf16 holds exactly
    adapter = make_adapter(base, tmp_path / "adapter", std=1e-5)
    exported = export(base, adapter, RunFolder(tmp_path), "bf16")
    assert exported.notes["dtype"] == "fp32" and exported.notes["instead_of"] == "bf16"
    assert re.fullmatch(r"bf16 keeps -?[\d.]+% of the adapter, at least 98% were to be kept", str(exported.notes["because"]))
    assert exported.row.retention > 0.999 and found_by(exported).adapter_kept > 0.9
    assert json.loads((exported.folder / "config.json").read_text())["dtype"] == "float32"
    assert stored_dtype(exported.folder) == "fp32"  # evaluated as it is stored: in bf16 the adapter would be gone after all
    large = export(base, make_adapter(base, tmp_path / "large"), RunFolder(tmp_path / "b"), "bf16")
    assert large.notes == {"dtype": "bf16"} and 0.98 <= large.row.retention < 1.0


def observed_and_folder(base: Path, tmp_path: Path) -> tuple[list[parity.Observed], Path]:
    adapter = make_adapter(base, tmp_path / "adapter")
    folder = export(base, adapter, RunFolder(tmp_path)).folder
    return parity.observe(load_adapted(str(base), adapter), tokenizer_of(base), PROMPTS), folder


def check(folder: Path, base: Path, observed: list[parity.Observed]) -> parity.Parity:
    return parity.check(folder, observed, tokenizer_of(base), PROMPTS, TRACES, dtype="fp32")


def test_parity_finds_altered_weights_a_lost_layer_and_a_broken_file(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    observed, folder = observed_and_folder(base, tmp_path)
    assert check(folder, base, observed).near_ties == 0
    file = folder / "model.safetensors"
    good = load_file(file)
    for name, wrong in {
        "one row of one matrix": good
        | {"model.layers.1.mlp.down_proj.weight": rolled(good["model.layers.1.mlp.down_proj.weight"])},
        "the base's own weights": load_file(base / "model.safetensors"),
        "not a number": good | {"model.norm.weight": good["model.norm.weight"] * float("nan")},
    }.items():
        save_file(wrong, file, metadata={"format": "pt"})
        with pytest.raises(UnusableInput, match="logits are off by"):
            check(folder, base, observed)
            pytest.fail(f"passed with {name}")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UnusableInput, match="not a causal language model that loads"):
        check(folder, base, observed)


def rolled(weight: torch.Tensor) -> torch.Tensor:
    changed = weight.clone()
    changed[0] = changed[0].roll(1)
    return changed


def test_parity_finds_a_template_that_drifted_by_one_newline(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    observed, folder = observed_and_folder(base, tmp_path)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n\\n"))
    with pytest.raises(UnusableInput, match="served prompt differs from the trained one at id"):
        check(folder, base, observed)


def test_a_failed_check_leaves_the_earlier_export_and_no_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", tied=False)
    adapter, run = make_adapter(base, tmp_path / "adapter"), RunFolder(tmp_path)
    first = (export(base, adapter, run).folder / "model.safetensors").read_bytes()
    (run.export / ".merged.dead.tmp").mkdir()  # as a killed attempt leaves it
    monkeypatch.setitem(parity.LOGIT_BOUND, "bf16", 1e-9)
    with pytest.raises(UnusableInput, match="logits are off"):
        export(base, adapter, run, "bf16")
    assert [path.name for path in run.export.iterdir()] == ["merged"]
    assert (run.export / "merged" / "model.safetensors").read_bytes() == first


def test_a_near_tie_may_fall_either_way_and_a_clear_lead_may_not() -> None:
    adapted = torch.tensor([[0.0, 1.0, 0.9], [0.0, 3.0, 1.0], [0.0, 0.0, 0.0]])
    one = parity.Observed(torch.tensor([0, 1, 1]), 1, adapted, torch.zeros_like(adapted))
    tied, clear = adapted.clone(), adapted.clone()
    tied[0, 2] = 1.05
    clear[1, 2] = 3.5
    assert parity.compare_greedy([tied], [one], slack=0.2) == (2, 1)
    with pytest.raises(UnusableInput, match="writes id 2, the trained one id 1 with a lead of 2 logits"):
        parity.compare_greedy([clear], [one], slack=0.2)


def test_a_missing_adapter_is_one_clear_line(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match=r"adapter_config.json"):
        export(base, tmp_path / "nothing", RunFolder(tmp_path))


# --- several formats, and what is left of the student in each ------------------------------------------------------


def test_the_parity_matrix_equals_one_written_out(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    adapter = make_adapter(base, tmp_path / "adapter")
    merged, alone = export_all(base, adapter, RunFolder(tmp_path), formats=["merged", "adapter"], dtype="bf16")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)).eval()
    served = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.bfloat16).eval()
    kl_export = kl_base = positions = 0.0
    for trace in TRACES:
        encoded = encode_conversation(tokenizer_of(base), trace)  # type: ignore[arg-type]
        ids = torch.tensor([encoded.ids])
        with torch.no_grad():
            ours, theirs = adapted(ids).logits[0].double(), served(ids).logits[0].double()
            with adapted.disable_adapter():
                before = adapted(ids).logits[0].double()
        for at, is_said in enumerate(encoded.mask):
            if is_said:
                p, q, b = (torch.log_softmax(logits[at - 1], 0) for logits in (ours, theirs, before))
                kl_export += float((p.exp() * (p - q)).sum())
                kl_base += float((p.exp() * (p - b)).sum())
                positions += 1
    assert merged.row.positions == positions and merged.row.traces == len(TRACES)
    assert merged.row.kl_base == alone.row.kl_base == pytest.approx(kl_base / positions, rel=1e-4)
    assert merged.row.kl_adapter == pytest.approx(kl_export / positions, rel=1e-2)
    assert merged.row.retention == pytest.approx(1 - merged.row.kl_adapter / merged.row.kl_base, abs=1e-12)
    assert 0.98 <= alone.row.retention <= 1.0 and merged.row.tokens_per_second > 0
    assert merged.row.size_bytes == sum(
        path.stat().st_size for path in merged.folder.iterdir() if path.name not in ("README.md", "provenance.json")
    )  # which state it
    assert {path.name for path in (tmp_path / "export").iterdir()} == {"merged", "adapter"}
    assert (alone.folder / "README.md").read_text() == "card of merged, adapter"


def test_rates_and_divergence_are_those_of_the_continuations() -> None:
    assert [agreed([1, 2, 3], other) for other in ([1, 2, 3], [1, 9, 3], [9], [], [1, 2, 3, 4])] == [3, 1, 0, 0, 3]
    first, second = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5, 0.0]]).log()
    assert divergence(first, second) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-6)  # padding is left out
    assert retention(0.25, 1.0) == 0.75
    with pytest.raises(UnusableInput, match="the adapter changes no logit"):
        retention(0.0, 0.0)


def test_the_adapter_is_exported_as_vllm_loads_it(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    [exported] = export_all(base, adapter, RunFolder(tmp_path), formats=["adapter"])
    config = json.loads((exported.folder / "adapter_config.json").read_text())
    names = set(load_file(exported.folder / "adapter_model.safetensors"))
    assert config["r"] == 4 and not config["use_dora"] and config["bias"] == "none" and not config["modules_to_save"]
    assert all(re.fullmatch(r"base_model\.model\.model\.layers\.\d\..*\.lora_[AB]\.weight", name) for name in names) and names
    assert exported.notes["vllm"] == "--enable-lora --max-lora-rank 4"
    assert (exported.folder / "chat_template.jinja").is_file()


@pytest.mark.parametrize(("lora", "what"), [(Lora(dora=True), "DoRA"), (Lora(modules_to_save=PAIR), "modules_to_save")])
def test_an_adapter_that_vllm_refuses_is_refused_here(tmp_path: Path, lora: Lora, what: str) -> None:
    base = make_base(tmp_path / "base", tied=False)
    model = attach(load_base(str(base), "fp32"), lora, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(tmp_path / "adapter", model, trainable(model))
    with pytest.raises(UnusableInput, match=f"vLLM's LoRA loader does not take {what}.*export merged instead"):
        export_all(base, tmp_path / "adapter", RunFolder(tmp_path), formats=["merged", "adapter"])
    assert not list((tmp_path / "export").iterdir())


@pytest.mark.long
def test_a_gguf_of_the_trained_student_keeps_the_adapter(tmp_path: Path) -> None:
    pytest.importorskip("ik_llama_cpp", reason="needs llama.cpp: pip install '.[gguf]'")
    base = make_base(tmp_path / "base", tied=False)
    adapter = make_adapter(base, tmp_path / "adapter")
    half, eight = export_all(base, adapter, RunFolder(tmp_path), formats=["gguf-f16", "gguf-q8_0"])
    assert half.row.retention > 0.999 and eight.row.retention > 0.9 and eight.row.size_bytes < half.row.size_bytes
    assert half.row.stop_rate == half.row.adapter_stop_rate


def export_two(base: Path, adapter: Path, run: RunFolder) -> dict[str, str]:
    """Hashes of what a server loads."""
    made = export_all(base, adapter, run, formats=["merged", "adapter"], dtype="fp32")
    paths = [path for one in made for path in exported_files(one.folder) if path.suffix == ".safetensors"]
    return {str(path.relative_to(run.export)): sha256_file(path) for path in paths}


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
from data.store import RunFolder
from student import export
from tests.student.test_export import export_two

publish, seen = export.publish_folder, itertools.count()

def publish_or_die(temporary, final):
    if next(seen) == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    publish(temporary, final)

export.publish_folder = publish_or_die
export_two(Path(sys.argv[1]), Path(sys.argv[2]), RunFolder(Path(sys.argv[3])))
"""


@pytest.mark.long
@pytest.mark.parametrize("published", [0, 1])
def test_a_kill_while_formats_are_published_costs_the_export_and_nothing_else(tmp_path: Path, published: int) -> None:
    """SIGKILL before the first format is published, and between the two; the next export has both and leaves nothing over."""
    base = make_base(tmp_path / "base", tied=False)
    adapter, run = make_adapter(base, tmp_path / "adapter"), RunFolder(tmp_path / "run")
    whole = export_two(base, adapter, RunFolder(tmp_path / "other"))
    words = [sys.executable, "-c", KILLED, str(base), str(adapter), str(run.root), str(published)]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert len(list(run.export.glob("[!.]*"))) == published
    (run.export / ".merged.7-ab.tmp.replaced").mkdir()  # as one that was killed between its two renames leaves it
    assert export_two(base, adapter, run) == whole
    assert sorted(path.name for path in run.export.iterdir()) == ["adapter", "merged"]
