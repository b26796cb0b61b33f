import errno
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from configs.errors import UnusableInput
from data.checksum import checked_json
from data.schema import SCHEMA_VERSION
from data.store import (
    RunFolder,
    commit_segment,
    input_hashes,
    is_complete,
    read_first_copies,
    read_json,
    read_rollup,
    read_segment,
    read_table,
    seal,
    segments,
    sha256_file,
    table_bytes,
    verify_files,
    write_bytes,
    write_json,
)  # fmt: skip
from tests.data.make_run import rewrite


def rows(*identities: str, said: str = "x") -> pa.Table:
    return pa.table({"trace_id": list(identities), "said": [said] * len(identities)})


def commit(folder: Path, *identities: str, said: str = "x") -> Path:
    return commit_segment(folder, rows(*identities, said=said), worker="w", facts={"trace_ids": list(identities)}).path


def test_a_link_that_the_file_server_repeated_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS the answer to a link may get lost; the client asks again and hears EEXIST of its own doing."""
    real_link = os.link

    def link(source: Path, target: Path) -> None:
        real_link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr("data.store.os.link", link)
    write_bytes(tmp_path / "file", b"one", replace=False)
    assert (tmp_path / "file").read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 1


def test_a_written_file_is_whole_and_leaves_no_temporary_one(tmp_path: Path) -> None:
    write_bytes(tmp_path / "deep" / "file", b"one")
    write_bytes(tmp_path / "deep" / "file", b"two")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]
    assert (tmp_path / "deep" / "file").read_bytes() == b"two"


def test_without_replace_the_file_that_was_there_first_wins(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"one")
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "file", b"two", replace=False)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"one"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "no such file"), (b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (b"[]", "expected a JSON object")],
)
def test_json_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "facts.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnusableInput, match=f"facts.json: {complaint}"):
        read_json(path)


def test_a_table_comes_back_only_when_every_bit_is_as_committed(tmp_path: Path) -> None:
    path = tmp_path / "table.arrow"
    content = table_bytes(rows("a", "b"))
    write_bytes(path, content)
    sha256 = sha256_file(path)
    assert read_table(path, sha256=sha256).equals(rows("a", "b"))
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(UnusableInput, match=r"table\.arrow: sha256"):
            read_table(path, sha256=sha256)
    path.unlink()
    with pytest.raises(UnusableInput, match=r"table\.arrow: missing"):
        read_table(path, sha256=sha256)


# --- segments ----------------------------------------------------------------------------------------------------


def test_segments_stand_in_the_order_of_their_commits(tmp_path: Path) -> None:
    paths = [commit(tmp_path, f"t{number}") for number in range(5)]
    assert [segment.path for segment in segments(tmp_path)] == paths
    assert [segment.facts["trace_ids"] for segment in segments(tmp_path)] == [[f"t{number}"] for number in range(5)]


def test_a_data_file_without_its_manifest_does_not_exist(tmp_path: Path) -> None:
    commit(tmp_path, "a").with_suffix(".json").unlink()
    assert segments(tmp_path) == [] and list(read_first_copies(tmp_path)) == []


def test_a_manifest_without_its_data_is_named(tmp_path: Path) -> None:
    path = commit(tmp_path, "a")
    path.unlink()
    with pytest.raises(UnusableInput, match=f"segment {path.stem}: {path.name} is missing"):
        segments(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("schema_version", 0, r"schema version 0, this release reads 2 to \d+; use the release that wrote it \(revision \w+"),
        ("schema_version", 99, r"schema version 99, .*; a later release wrote it: update tracestill to that one \(revision \w+"),
        ("schema_version", None, "schema version None"),
        ("rows", None, "no 'rows'"),
    ],
)
def test_a_manifest_of_another_version_or_with_a_hole_is_named(tmp_path: Path, key: str, value: object, complaint: str) -> None:
    sidecar = commit(tmp_path, "a").with_suffix(".json")
    rewrite(sidecar, **{key: value})
    with pytest.raises(UnusableInput, match=complaint):
        segments(tmp_path)


def test_a_manifest_that_is_not_about_its_rows_is_named(tmp_path: Path) -> None:
    path = commit(tmp_path, "a", "b")
    sidecar = path.with_suffix(".json")
    good = sidecar.read_bytes()
    for wrong in ({"rows": 3}, {"schema_hash": "0"}, {"facts": {"trace_ids": ["a", "c"]}}):
        sidecar.write_bytes(good)
        rewrite(sidecar, **wrong)
        with pytest.raises(UnusableInput, match=f"segment {path.stem}"):
            read_segment(segments(tmp_path)[0])


def test_only_the_first_copy_of_a_row_counts(tmp_path: Path) -> None:
    commit(tmp_path, "a", "b", said="first")
    commit(tmp_path, "b", "c", "c", said="second")
    found = [row for table in read_first_copies(tmp_path) for row in table.to_pylist()]
    assert [(row["trace_id"], row["said"]) for row in found] == [("a", "first"), ("b", "first"), ("c", "second")]


# --- roll-ups ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    write_json(run.prompts / "manifest.json", {"stage": "prompts"})
    write_bytes(run.verdicts / "a.arrow", b"verdicts")
    return run


def seal_data(run: RunFolder) -> dict[str, str]:
    inputs, files = input_hashes(run, [run.prompts / "manifest.json"]), [run.verdicts / "a.arrow"]
    seal(run, run.verdicts, stage="data", fingerprint="f", inputs=inputs, files=files, counts={"kept": 1}, seconds=1.0)
    return inputs


def test_a_sealed_stage_is_complete_until_its_inputs_configuration_or_files_change(run: RunFolder) -> None:
    assert read_rollup(run.verdicts) is None and not is_complete(run, run.verdicts, fingerprint="f", inputs={})
    inputs = seal_data(run)
    assert list(inputs) == ["prompts/manifest.json"]
    assert is_complete(run, run.verdicts, fingerprint="f", inputs=inputs)
    assert not is_complete(run, run.verdicts, fingerprint="g", inputs=inputs)
    assert not is_complete(run, run.verdicts, fingerprint="f", inputs={"prompts/manifest.json": "0"})
    (run.verdicts / "a.arrow").write_bytes(b"verdict")
    assert not is_complete(run, run.verdicts, fingerprint="f", inputs=inputs)


def test_verification_names_the_file_whose_bytes_changed_or_that_is_gone(run: RunFolder) -> None:
    seal_data(run)
    rollup = read_rollup(run.verdicts)
    assert rollup is not None and rollup.files == {"verdicts/a.arrow": sha256_file(run.verdicts / "a.arrow")}
    verify_files(run, rollup)
    (run.verdicts / "a.arrow").write_bytes(b"verdictz")
    with pytest.raises(UnusableInput, match=r"a\.arrow: sha256"):
        verify_files(run, rollup)
    (run.verdicts / "a.arrow").unlink()
    with pytest.raises(UnusableInput, match=r"a\.arrow: missing"):
        verify_files(run, rollup)


def test_a_manifest_of_another_shape_is_named(run: RunFolder) -> None:
    write_bytes(run.verdicts / "manifest.json", checked_json({"stage": "data", "schema_version": SCHEMA_VERSION}))
    with pytest.raises(UnusableInput, match="fingerprint is missing or damaged"):
        read_rollup(run.verdicts)


def test_store_and_ledger_need_no_torch() -> None:
    root = Path(__file__).parents[2]
    code = "import sys, data.store, data.ledger; sys.exit(bool({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}).returncode == 0


def test_a_full_disk_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system names none when a write fails, and a node has several disks."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left on device") as refused:
        write_bytes(tmp_path / "manifest.json", b"{}")
    assert refused.value.filename == str(tmp_path / "manifest.json") and not list(tmp_path.iterdir())
