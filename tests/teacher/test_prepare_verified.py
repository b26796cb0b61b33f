"""What prepared shards say of themselves is verified before anything of them is used: manifest, companions, labels."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from configs import schema
from configs.errors import UnusableInput
from teacher.checkpoint.manifest import FORMAT, MANIFEST, as_json, parse_manifest, read_manifest
from teacher.checkpoint.partition import Layout
from teacher.checkpoint.shards import read_rank
from teacher.folders import fingerprint_teacher, weights_folder
from teacher.prepare import describe_prepared, prepare
from tests.teacher.models import save_random_model

CPU = torch.device("cpu")
EP2 = Layout(2, expert=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer's files, empty as they are."""
    folder = save_random_model(tmp_path_factory.mktemp("model"), "glm")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(model, tmp_path_factory.mktemp("shards"), EP2, "fp32").folder


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "copied")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


# --- companions ----------------------------------------------------------------------------------------------------


def test_one_changed_number_of_the_configuration_is_refused(model: Path, copied: Path) -> None:
    edit(copied / "config.json", lambda said: said.update(routed_scaling_factor=1.6))
    teacher = schema.Teacher(model=str(model), engine=schema.DeepSpeedEngine(dtype="fp32", prepared=str(copied)))
    for use in (weights_folder, fingerprint_teacher):
        with pytest.raises(UnusableInput, match=r"copied/config.json: sha256 .* by the manifest; restore it with: tracestill"):
            use(teacher)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"])
def test_every_companion_is_verified(copied: Path, name: str) -> None:
    (copied / name).write_bytes((copied / name).read_bytes() + b" ")
    with pytest.raises(UnusableInput, match=f"{name}: sha256 .* expected"):
        read_manifest(copied)
    (copied / name).unlink()
    with pytest.raises(UnusableInput, match=f"{name}: missing, expected"):
        read_manifest(copied)


def test_a_companion_that_was_added_is_refused(copied: Path) -> None:
    (copied / "special_tokens_map.json").write_text("{}")
    with pytest.raises(UnusableInput, match=r"special_tokens_map.json: not part of what was prepared; move it away, or run"):
        read_manifest(copied)


def test_preparing_again_restores_companions_and_writes_no_shard(model: Path, shards: Path, copied: Path) -> None:
    """The remedy that is named. The changed file is as long as the right one."""
    content = (copied / "config.json").read_text()
    (copied / "config.json").write_text(content.replace('"routed_scaling_factor": 1.5', '"routed_scaling_factor": 9.5'))
    (copied / "special_tokens_map.json").write_text("{}")
    done = prepare(model, copied, EP2, "fp32")
    assert done.written == 0 and "0 of 8 files written" in describe_prepared(done).text
    assert (copied / "config.json").read_text() == content and not (copied / "special_tokens_map.json").exists()
    assert read_manifest(copied).companions == read_manifest(shards).companions


# --- the manifest --------------------------------------------------------------------------------------------------


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "ranks swapped": lambda said: said["ranks"].reverse(),
    "rank missing": lambda said: said["ranks"].pop(),
    "file of a rank missing": lambda said: said["ranks"][0].pop(),
    "file missing": lambda said: said["files"].pop(said["ranks"][0][0]),
    "companion missing": lambda said: said["companions"].pop("chat_template.jinja"),
    "cut changed": lambda said: said["cuts"].update({"lm_head.weight": "columns"}),
    "fingerprint changed": lambda said: said["source"].update(fingerprint="0" * 16),
    "hash missing": lambda said: said.pop("sha256"),
    "hash of another kind": lambda said: said.update(sha256=7),
    "key added": lambda said: said.update(note="mine"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_manifest_that_was_changed_is_not_believed(copied: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(copied / MANIFEST, change)
    with pytest.raises(
        UnusableInput, match=r"prepared.json: sha256 of its content .* something in it was changed; copy it again"
    ):
        read_manifest(copied)


def test_a_manifest_of_an_older_release_is_refused(copied: Path) -> None:
    edit(copied / MANIFEST, lambda said: said.update(format=FORMAT - 1))
    with pytest.raises(UnusableInput, match=f"format {FORMAT - 1}, expected {FORMAT}; run tracestill prepare CONFIG again"):
        read_manifest(copied)


def test_white_space_and_order_of_the_manifest_do_not_matter(copied: Path) -> None:
    before = parse_manifest(copied)
    path = copied / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert read_manifest(copied) == before


# --- the shards ----------------------------------------------------------------------------------------------------


def test_a_shard_says_for_which_ranks_of_which_layout_it_is(model: Path, shards: Path, tmp_path: Path) -> None:
    def label(folder: Path, name: str) -> object:
        with safe_open(folder / "shards" / name, "pt") as file:
            return file.metadata()

    assert label(shards, "layer-0001-00001.safetensors") == {"layout": "ep2-tp1-zero3-2ranks", "ranks": "1"}
    shared = prepare(model, tmp_path / "out", Layout(2, zero_stage=0), "fp32").folder
    assert label(shared, "top-00000.safetensors") == {"layout": "ep1-tp1-zero0-2ranks", "ranks": "0 1"}
    assert read_rank(shared, read_manifest(shared), 1, CPU)


def test_a_shard_of_another_rank_or_layout_is_refused_whatever_the_manifest_says(shards: Path) -> None:
    """Sealed anew with the wrong entries: every hash is right."""
    manifest = read_manifest(shards)
    swapped = dataclasses.replace(manifest, ranks=manifest.ranks[::-1])
    relabelled = dataclasses.replace(manifest, layout=Layout(2))
    assert as_json(swapped)["sha256"] != as_json(manifest)["sha256"]
    with pytest.raises(UnusableInput, match="made for ranks 1 of ep2-tp1-zero3-2ranks, expected rank 0 of ep2-tp1-zero3-2ranks"):
        read_rank(shards, swapped, 0, CPU)
    with pytest.raises(UnusableInput, match="made for ranks 0 of ep2-tp1-zero3-2ranks, expected rank 0 of ep1-tp1-zero3-2ranks"):
        read_rank(shards, relabelled, 0, CPU)
