"""Where prepare may write, and what it says of a checkpoint that it cannot use: one line, exit code 2, nothing touched."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import tracestill
from configs.errors import UnusableInput
from teacher.checkpoint.manifest import MANIFEST
from teacher.checkpoint.output import LOCK, RECORDS, check_output
from teacher.checkpoint.partition import Layout
from teacher.checkpoint.shard_plan import SHARDS
from teacher.checkpoint.source import SUMS
from teacher.prepare import prepare
from tests.teacher.checkpoints import declare_fp8
from tests.teacher.models import save_random_model

EP2 = Layout(2, expert=2)
RECIPE = """
name: r
teacher:
  model: src
  engine: {type: deepspeed, dtype: fp32}
  hardware: {gpu: h200, gpus_per_node: 2, nodes: 1}
  layout: {expert_parallel: 2}
generate: {prompts: [{type: jsonl, path: tasks.jsonl}]}
"""
Run = Callable[..., tuple[int, str]]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def desk(glm_folder: Path, tmp_path: Path) -> Path:
    """A recipe beside its teacher, which is FP8 by its config.json, and beside another model."""
    declare_fp8(shutil.copytree(glm_folder, tmp_path / "src"))
    save_random_model(tmp_path / "other", "qwen")
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "afile").write_text("mine")
    (tmp_path / "link").symlink_to("src")
    return tmp_path


@pytest.fixture
def run(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`tracestill prepare` in this process, beside the recipe: (exit code, the error line)."""
    monkeypatch.chdir(desk)

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["tracestill", "prepare", *words])
        code: object = 0
        try:
            tracestill.main()
        except SystemExit as stopped:
            code = stopped.code
        return int(str(code)), capsys.readouterr().err.strip()

    return call


# --- the folder of the shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["", "dry-run"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "src"], "src: is, holds or lies in the checkpoint's folder"),
        (["-s", "teacher.engine.prepared=src"], "src: is, holds or lies in the checkpoint's folder"),
        (["--output", "link"], "link: is, holds or lies in the checkpoint's folder"),
        (["--output", "src/shards/here"], "is, holds or lies in the checkpoint's folder"),
        (["--output", "."], "is, holds or lies in the checkpoint's folder"),
        (["--output", "other"], "other: holds config.json and 2 more, which prepare did not make"),
        (["--output", "notes"], "notes: holds a.txt, which prepare did not make"),
        (["--output", "afile"], "afile is a file, expected a folder"),
        (["--output", "afile/x"], "afile is a file, expected a folder"),
        (["--output", "n" * 300], "File name too long; expected a folder that can be written"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_an_output_with_something_to_lose_is_refused_untouched(
    run: Run, desk: Path, words: list[str], message: str, dry: tuple[str, ...]
) -> None:
    before = contents(desk)
    code, line = run("r.yaml", *words, *dry)
    assert code == 2 and message in line and line.endswith("give another --output") and "\n" not in line
    assert contents(desk) == before


def test_a_folder_that_cannot_be_made_is_one_line(run: Run) -> None:
    code, line = run("r.yaml", "--output", "/proc/xx")
    assert code == 2 and "\n" not in line and "/proc/xx: No such file or directory; expected a folder" in line


def test_new_empty_and_interrupted_folders_are_taken(glm_folder: Path, tmp_path: Path) -> None:
    """Of an interrupted one: whatever a kill leaves, up to the moment before the manifest."""
    check_output(tmp_path / "a" / "b", glm_folder)
    check_output(tmp_path, glm_folder)
    early = tmp_path / "early"
    early.mkdir()
    for name in (LOCK, SUMS, f".{SUMS}.{'0' * 32}.tmp"):
        (early / name).touch()
        check_output(early, glm_folder)
    late = prepare(glm_folder, tmp_path / "late", EP2, "fp32").folder
    (late / MANIFEST).unlink()
    check_output(late, glm_folder)


@pytest.mark.parametrize("lost", [MANIFEST, SUMS, RECORDS])
def test_a_model_saved_among_unfinished_shards_is_not_overwritten(glm_folder: Path, tmp_path: Path, lost: str) -> None:
    output = prepare(glm_folder, tmp_path / "out", EP2, "fp32").folder
    (output / MANIFEST).unlink()
    shutil.rmtree(output / lost) if lost == RECORDS else (output / lost).unlink(missing_ok=True)
    shutil.copy(glm_folder / "model.safetensors", output)
    with pytest.raises(UnusableInput, match="which prepare did not make"):
        prepare(glm_folder, output, EP2, "fp32")


def test_finished_shards_without_their_hidden_files_are_still_ours(glm_folder: Path, tmp_path: Path) -> None:
    """`cp -r shards/* elsewhere` leaves them behind."""
    output = prepare(glm_folder, tmp_path / "out", EP2, "fp32").folder
    shutil.rmtree(output / RECORDS)
    (output / LOCK).unlink()
    assert not prepare(glm_folder, output, EP2, "fp32").is_new


@pytest.mark.parametrize("layout", [Layout(2), EP2], ids=str)
def test_shards_under_a_damaged_manifest_are_replaced_by_their_like_alone(
    glm_folder: Path, tmp_path: Path, layout: Layout
) -> None:
    output = prepare(glm_folder, tmp_path / "out", EP2, "fp32").folder
    (output / MANIFEST).write_text("{")
    before = contents(output / SHARDS)
    if layout == EP2:
        done = prepare(glm_folder, output, layout, "fp32")
        assert done.is_new and done.written == 0
    else:
        with pytest.raises(UnusableInput, match=r"is damaged or of another release.* or delete .*prepared.json to replace"):
            prepare(glm_folder, output, layout, "fp32")
    assert contents(output / SHARDS) == before


# --- the checkpoint ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"{nope", "not valid JSON at line 1"),
        (b'{"a": "\xff"}', "not valid UTF-8 at byte 7"),
        (b"[]", "a JSON list"),
        ({"num_hidden_layers": "three"}, "'num_hidden_layers' expected int, got str (value: 'three')"),
        ({"num_hidden_layers": 9}, "`num_hidden_layers` (9) must be equal to the number of `layer_types` (3)"),
        ({"hidden_size": -4}, "negative dimension -4"),
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"pad_token_id": 1000}, "Padding_idx must be within num_embeddings"),
        ({"dtype": "nope"}, "AttributeError"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8', expected an object"),
        ({"quantization_config": {"weight_block_size": [0, 0]}}, "weight_block_size is [0, 0], expected two whole numbers"),
        ({"quantization_config": {"weight_block_size": "x"}}, "weight_block_size is 'x', expected two whole numbers"),
        ({"quantization_config": {"weight_block_size": [128]}}, "weight_block_size is [128], expected two whole numbers"),
        ({"quantization_config": {"weight_block_size": [True, 1]}}, "weight_block_size is [True, 1], expected two whole"),
    ],
    ids=str,
)
def test_a_damaged_config_json_is_one_line(run: Run, desk: Path, damage: bytes | dict[str, object], message: str) -> None:
    path = desk / "src" / "config.json"
    path.write_bytes(damage if isinstance(damage, bytes) else json.dumps(json.loads(path.read_bytes()) | damage).encode())
    code, line = run("r.yaml", "--output", "out")
    assert code == 2 and "\n" not in line and line.startswith("error: src/config.json: ") and message in line
    assert not (desk / "out").exists()


@pytest.mark.parametrize("recipe", ["glm52-bf16-16xh200", "glm52-bf16-32xh200"])
def test_a_recipe_that_names_an_architecture_says_what_to_set(run: Run, recipe: str) -> None:
    """The same from anywhere: plan finds the architecture from anywhere."""
    expected = (2, "architecture without weights, enough to plan by; set the checkpoint's folder: -s teacher.model=FOLDER")
    for _ in range(2):
        code, line = run(recipe, "--dry-run")
        assert (code, line.partition("an ")[2]) == expected
        os.chdir(Path(__file__).parents[2])  # monkeypatch.chdir of `run` goes back


def test_a_recipe_behind_a_server_is_told_that_it_needs_no_shards(run: Run) -> None:
    code, line = run("glm52-fp8-8xh200", "--dry-run")
    assert code == 2 and "only the deepspeed engine loads shards" in line
