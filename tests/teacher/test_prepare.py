"""tracestill prepare on real files: what it writes, what it refuses, what a kill, a full disk or a flipped bit does to it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

from configs import schema
from configs.errors import UnusableInput
from data.store import sha256_file
from teacher.checkpoint import files as checkpoint_files
from teacher.checkpoint.empty_model import empty_model, named_tensors
from teacher.checkpoint.manifest import MANIFEST, check_layout, read_manifest
from teacher.checkpoint.output import LOCK, RECORDS
from teacher.checkpoint.partition import Layout, part_of, targets_of
from teacher.checkpoint.shard_plan import SHARDS, default_output, layout_of, plan_shards
from teacher.checkpoint.shards import read_rank
from teacher.folders import fingerprint_model, fingerprint_teacher, weights_folder
from teacher.prepare import describe_plan, prepare
from tests.teacher.checkpoints import declare_fp8, fuse, load_all, save_sharded, to_fp8
from tests.teacher.models import GLM, save_random_model

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
EP2 = Layout(2, expert=2)


def shards_of(folder: Path, rank: int) -> dict[str, Tensor]:
    return read_rank(folder, read_manifest(folder), rank, CPU)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def shards(glm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(glm_folder, tmp_path_factory.mktemp("shards"), EP2, "fp32").folder


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "copied")


# --- what it writes ------------------------------------------------------------------------------------------------


def test_both_ranks_together_hold_the_checkpoint(glm_folder: Path, shards: Path) -> None:
    source, ranks = load_all(glm_folder), [shards_of(shards, rank) for rank in (0, 1)]
    head = torch.cat([held["lm_head.weight"] for held in ranks])
    assert torch.equal(head.view(96, 32), source["lm_head.weight"])
    for expert in range(8):
        held = ranks[expert // 4]["model.layers.2.mlp.experts.w3"].view(4, 16, 32)
        assert torch.equal(held[expert % 4], source[f"model.layers.2.mlp.experts.{expert}.up_proj.weight"])
    bias = "e_score_correction_bias"
    for held in ranks:
        assert torch.equal(held[f"model.layers.1.mlp.router.{bias}"], source[f"model.layers.1.mlp.gate.{bias}"])


def test_fused_experts_in_several_files_give_the_same_shards(glm_folder: Path, shards: Path, tmp_path: Path) -> None:
    folder = save_sharded(glm_folder, tmp_path / "fused", fuse(load_all(glm_folder)))
    prepare(folder, tmp_path / "out", EP2, "fp32")
    assert all(same(shards_of(tmp_path / "out", rank), shards_of(shards, rank)) for rank in (0, 1))


def test_the_size_of_a_chunk_changes_nothing(
    glm_folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "CHUNK_BYTES", 3 * 32 * 4)  # three rows
    prepare(glm_folder, tmp_path / "out", EP2, "fp32")
    assert all(same(shards_of(tmp_path / "out", rank), shards_of(shards, rank)) for rank in (0, 1))


def test_float32_becomes_bf16_and_the_selection_bias_stays(glm_folder: Path, tmp_path: Path) -> None:
    prepare(glm_folder, tmp_path / "out", EP2, "bf16")
    held, source = shards_of(tmp_path / "out", 0), load_all(glm_folder)
    assert torch.equal(held["model.norm.weight"], source["model.norm.weight"].bfloat16()[:16])
    assert held["model.layers.1.mlp.router.e_score_correction_bias"].dtype == torch.float32


def test_ranks_with_the_same_numbers_share_a_file(glm_folder: Path, tmp_path: Path) -> None:
    """Stage 0 without experts to spread: one copy on disk, both ranks read it."""
    done = prepare(glm_folder, tmp_path / "out", Layout(2, zero_stage=0), "fp32")
    assert done.manifest.ranks[0] == done.manifest.ranks[1] and len(done.manifest.files) == 4


def test_the_manifest_says_where_the_weights_are_from(glm_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(glm_folder, tmp_path / "model")
    note = model / ".cache/huggingface/download/config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text("0123abcd\netag\n1.0\n")
    manifest = prepare(model, tmp_path / "out", EP2, "fp32").manifest
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest.source.revision == "0123abcd"
    assert manifest.source.files["model.safetensors"].sha256 == sha256_file(model / "model.safetensors")
    assert (manifest.layout, manifest.dtype, manifest.model_type) == (EP2, "fp32", "glm_moe_dsa")
    assert {"torch", "transformers", "deepspeed"} <= manifest.versions.keys()
    assert all(sha256_file(tmp_path / "out" / name) == found.sha256 for name, found in manifest.files.items())


def test_a_dry_run_prices_each_rank_and_writes_nothing(glm_folder: Path, shards: Path, tmp_path: Path) -> None:
    plan = plan_shards(glm_folder, EP2, "fp32")
    said = describe_plan(plan, tmp_path / "out")
    held = sum(value.nbytes for value in shards_of(shards, 0).values())
    assert said.values["bytes_per_rank"] == [held, held] and not (tmp_path / "out").exists()


def test_tensors_that_the_model_does_not_have_are_left_out(glm_folder: Path, tmp_path: Path) -> None:
    """GLM's and DeepSeek's layer for multi-token prediction lies behind the last layer."""
    extra = {"model.layers.3.eh_proj.weight": torch.ones(32, 64)}
    folder = save_sharded(glm_folder, tmp_path / "model", load_all(glm_folder) | extra)
    assert plan_shards(folder, EP2, "fp32").ignored == tuple(extra)


# --- FP8 -----------------------------------------------------------------------------------------------------------

WIDE: dict[str, Any] = GLM | {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128, "kv_lora_rank": 64,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "index_head_dim": 32, "n_routed_experts": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of whole blocks, or of less than one: what lies between, transformers gets wrong (test_prepare_dequantise.py)."""
    folder = tmp_path_factory.mktemp("fp8")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**WIDE, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "plain")
    made = save_sharded(folder / "plain", folder / "fp8", to_fp8(load_all(folder / "plain")))
    declare_fp8(made)
    return made


def test_an_fp8_checkpoint_equals_transformers_dequantisation_bit_for_bit(fp8: Path, tmp_path: Path) -> None:
    prepare(fp8, tmp_path / "out", Layout(1, zero_stage=0), "bf16")
    held = shards_of(tmp_path / "out", 0)
    theirs = AutoModelForCausalLM.from_pretrained(
        fp8, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=(128, 128))
    ).state_dict()
    assert held.keys() == theirs.keys()
    assert not [name for name in held if not torch.equal(held[name], theirs[name].to(held[name].dtype))]
    assert not (held["model.layers.1.mlp.experts.gate_up_proj"] == 0).all()


def test_fused_fp8_experts_give_the_same_shards(fp8: Path, tmp_path: Path) -> None:
    plain = {name: value for name, value in load_all(fp8).items() if not name.endswith("_scale_inv")}
    scales = {name.removesuffix("_scale_inv"): value for name, value in load_all(fp8).items() if name.endswith("_scale_inv")}
    fused = fuse(plain) | {f"{name}_scale_inv": value for name, value in fuse(scales).items()}
    prepare(save_sharded(fp8, tmp_path / "fused", fused), tmp_path / "one", EP2, "bf16")
    prepare(fp8, tmp_path / "other", EP2, "bf16")
    assert all(same(shards_of(tmp_path / "one", rank), shards_of(tmp_path / "other", rank)) for rank in (0, 1))


def test_the_shards_of_fp8_are_configured_as_what_they_are(fp8: Path, tmp_path: Path) -> None:
    prepare(fp8, tmp_path / "out", EP2, "bf16")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_fp8_without_scales_is_refused(fp8: Path, tmp_path: Path) -> None:
    tensors = {name: value for name, value in load_all(fp8).items() if not name.endswith("o_proj.weight_scale_inv")}
    with pytest.raises(UnusableInput, match=r"o_proj.weight is FP8 without .*_scale_inv"):
        plan_shards(save_sharded(fp8, tmp_path / "model", tensors), EP2, "bf16")


# --- again, after a change, after a kill ---------------------------------------------------------------------------


def test_a_second_run_does_nothing(glm_folder: Path, copied: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in (copied / SHARDS).iterdir()}
    assert prepare(glm_folder, copied, EP2, "fp32").written == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (copied / SHARDS).iterdir()}


def test_a_changed_source_is_noticed_and_replaces_nothing_unasked(glm_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(glm_folder, tmp_path / "model")
    before = prepare(model, tmp_path / "out", EP2, "fp32").manifest
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = 7.0
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(UnusableInput, match="finished shards of another checkpoint .* delete .*prepared.json to"):
        prepare(model, tmp_path / "out", EP2, "fp32")
    assert shards_of(tmp_path / "out", 0)["model.norm.weight"][3] != 7.0
    (tmp_path / "out" / "prepared.json").unlink()
    after = prepare(model, tmp_path / "out", EP2, "fp32")
    assert after.written == len(after.manifest.files)
    assert after.manifest.source.fingerprint != before.source.fingerprint
    assert shards_of(tmp_path / "out", 0)["model.norm.weight"][3] == 7.0


def test_a_touched_source_with_the_same_bytes_is_still_the_same(glm_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(glm_folder, tmp_path / "model")
    prepare(model, tmp_path / "out", EP2, "fp32")
    (model / "model.safetensors").touch()
    assert prepare(model, tmp_path / "out", EP2, "fp32").written == 0


def test_a_lost_file_is_made_again_and_no_other(glm_folder: Path, copied: Path) -> None:
    (copied / SHARDS / "layer-0001-00001.safetensors").unlink()
    assert prepare(glm_folder, copied, EP2, "fp32").written == 1
    assert shards_of(copied, 1).keys() == shards_of(copied, 0).keys()


def test_shards_of_another_layout_are_not_overwritten(glm_folder: Path, copied: Path) -> None:
    with pytest.raises(UnusableInput, match="holds shards for ep2-tp1-zero3-2ranks in fp32, not .*--output"):
        prepare(glm_folder, copied, Layout(2), "fp32")


KILLED = """
import sys
from pathlib import Path
from teacher.checkpoint.partition import Layout
from teacher.prepare import prepare
print("ready", flush=True)
prepare(Path(sys.argv[1]), Path(sys.argv[2]), Layout(2, expert=2), "fp32", lambda count: print(count.note, flush=True))
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


def test_a_killed_run_goes_on_with_the_files_it_had_not_committed(glm_folder: Path, shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(KILLED, glm_folder, output)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(SHARDS):  # the first file is committed: the others are in the making
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    kept = len(list((output / RECORDS).glob("*.json")))
    assert 0 < kept < 8 and not (output / MANIFEST).exists()
    with pytest.raises(UnusableInput, match="no finished shards"):
        read_manifest(output)
    assert prepare(glm_folder, output, EP2, "fp32").written == 8 - kept
    assert not list((output / SHARDS).glob(".*"))
    assert all(same(shards_of(output, rank), shards_of(shards, rank)) for rank in (0, 1))


def test_a_file_without_its_record_does_not_count(glm_folder: Path, copied: Path) -> None:
    """Killed between the rename of the file and the one of its record."""
    (copied / MANIFEST).unlink()
    (copied / RECORDS / "top-00000.json").unlink()
    (copied / SHARDS / ".top-00000.safetensors.abc.tmp").write_bytes(b"half")
    assert prepare(glm_folder, copied, EP2, "fp32").written == 1


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(glm_folder: Path, shards: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk: the same write fails, with EFBIG for ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UnusableInput, match="make room and give the same command: finished files are kept") as found:
            prepare(glm_folder, tmp_path / "out", EP2, "fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(found.value)
    assert not list((tmp_path / "out" / SHARDS).glob(".*")) and not (tmp_path / "out" / MANIFEST).exists()
    prepare(glm_folder, tmp_path / "out", EP2, "fp32")
    assert same(shards_of(tmp_path / "out", 1), shards_of(shards, 1))


# --- memory --------------------------------------------------------------------------------------------------------

MEASURED = """
import sys, torch
from pathlib import Path
from teacher.checkpoint.partition import Layout
from teacher.prepare import prepare
def high():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line) * 1024
torch.ones(64, 64) @ torch.ones(64, 64)
before = high()
prepare(Path(sys.argv[1]), Path(sys.argv[2]), Layout(2, expert=2), "bf16")
print(high() - before)
"""


def test_memory_does_not_follow_the_largest_tensor(tmp_path: Path) -> None:
    """A tensor of 64 MB, experts fused and in FP8, the greediest way: 8 MB of float32 rows at a time, with their scales and
    results, took 29 MB, and as much for a tensor of 128 MB."""
    changes: dict[str, Any] = {
        "num_hidden_layers": 1, "first_k_dense_replace": 0, "indexer_types": ["full"], "n_routed_experts": 32,
        "hidden_size": 512, "moe_intermediate_size": 2048,
    }  # fmt: skip
    config = AutoConfig.for_model(**GLM | changes)
    config.save_pretrained(tmp_path / "model")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    tensors = {name: torch.zeros(value.shape, dtype=torch.bfloat16) for name, value in empty.state_dict().items()}
    for name in [name for name in tensors if ".experts." in name]:
        experts, rows, columns = tensors[name].shape
        tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(experts, rows // 128, columns // 128)
    largest = max(value.nbytes for value in tensors.values())
    save_file(tensors, tmp_path / "model/model.safetensors")
    said, trouble = start(MEASURED, tmp_path / "model", tmp_path / "out").communicate()
    assert largest == 64 << 20 and int(said) < largest * 0.75, (said, trouble)


# --- what loading refuses ------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_before_a_number_is_used(copied: Path) -> None:
    path = copied / read_manifest(copied).ranks[1][2]
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UnusableInput, match=f"{path.name}: sha256 .*or delete it and run: tracestill prepare CONFIG"):
        shards_of(copied, 1)
    assert shards_of(copied, 0), "the other rank does not read it"


def test_a_truncated_shard_is_refused(copied: Path) -> None:
    path = copied / read_manifest(copied).ranks[0][0]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UnusableInput, match=r"expected \d+ bytes by the manifest"):
        shards_of(copied, 0)


def test_another_layout_is_refused_with_the_command_that_makes_it(shards: Path) -> None:
    with pytest.raises(UnusableInput, match="is ep2-tp1-zero3-4ranks in bf16; .*: tracestill prepare CONFIG --output"):
        check_layout(shards, read_manifest(shards), Layout(4, expert=2), "bf16")


def test_shards_of_another_checkpoint_are_refused(glm_folder: Path, shards: Path, tmp_path: Path) -> None:
    other = save_random_model(tmp_path / "other", "qwen")
    teacher = schema.Teacher(model=str(other), engine=schema.DeepSpeedEngine(prepared=str(shards)))
    with pytest.raises(UnusableInput, match=r"prepared from another checkpoint than teacher.model .*config.json differs"):
        weights_folder(teacher)


def test_a_trace_carries_the_checkpoints_fingerprint_whichever_is_loaded(glm_folder: Path, shards: Path) -> None:
    plain = schema.Teacher(model=str(glm_folder), engine=schema.DeepSpeedEngine(dtype="fp32"))
    cut = schema.Teacher(model=str(glm_folder), engine=schema.DeepSpeedEngine(dtype="fp32", prepared=str(shards)))
    moved = schema.Teacher(model="gone", engine=schema.DeepSpeedEngine(dtype="fp32", prepared=str(shards)))
    assert fingerprint_model(shards) == fingerprint_model(glm_folder)
    assert fingerprint_teacher(plain) == fingerprint_teacher(cut) == fingerprint_teacher(moved)


@pytest.mark.parametrize("damage", ["missing", "truncated", "no-header"])
def test_a_checkpoint_that_is_not_whole_is_refused(glm_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = save_sharded(glm_folder, tmp_path / "model", load_all(glm_folder))
    path = folder / "model-00002-of-00003.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size - 7)
    else:
        path.write_bytes(b"<html>not found</html>")
    with pytest.raises(UnusableInput, match="model-00002-of-00003.*download it"):
        plan_shards(folder, EP2, "fp32")


def test_two_writers_exclude_each_other(glm_folder: Path, copied: Path) -> None:
    import fcntl

    with (copied / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UnusableInput, match="another tracestill prepare"):
            prepare(glm_folder, copied, EP2, "fp32")


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_default_folder_lies_beside_the_model_and_names_the_layout(glm_folder: Path) -> None:
    teacher = schema.Teacher(model=str(glm_folder), layout=schema.Layout(expert_parallel="all"))
    layout, dtype = layout_of(teacher)
    assert default_output(teacher, layout, dtype).name == f"{glm_folder.name}-ep8-tp1-zero3-8ranks-bf16"
    assert default_output(schema.Teacher(), *layout_of(schema.Teacher())).parent == Path("runs")


def test_only_the_deepspeed_engine_loads_shards() -> None:
    with pytest.raises(UnusableInput, match="only the deepspeed engine loads shards"):
        layout_of(schema.Teacher(engine=schema.LocalEngine()))


def test_no_room_is_said_before_a_byte_is_written(glm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(UnusableInput, match=r"needs 0.3 MB, 0.0 MB are free; make room or give another --output"):
        prepare(glm_folder, tmp_path / "out", EP2, "fp32")
    assert not list((tmp_path / "out" / SHARDS).iterdir())


class _Everything(dict[str, object]):
    """A checkpoint that has every tensor."""

    def __contains__(self, name: object) -> bool:
        return True


def test_glm_5_2_on_16_gpus_is_what_the_plan_calculates() -> None:
    """BF16, EP 16 and ZeRO-3: 92.9 GB a rank, by counting the pieces one by one."""
    config = AutoConfig.from_pretrained(REPOSITORY / "configs/architectures/glm-5.2")
    layout = Layout(16, expert=16)
    targets = targets_of(config.model_type, named_tensors(empty_model(config, torch.bfloat16)), _Everything(), layout)
    held = sum(part_of(target, layout, 3).length * (4 if target.cut == "buffer" else 2) for target in targets)
    assert held / 1e9 == pytest.approx(92.9, rel=1e-3)
