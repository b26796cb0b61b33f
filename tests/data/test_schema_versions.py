"""Run folders of earlier and later releases: what is read, what is made again, and what is one line.

version_2_run/ was made by the release before version 3 (revision e302640), with tests/data/make_run.py: three sums and an
evaluation item, two segments with a wrong answer, an abort and a superseded copy, built under two settings that differ from
the embedded recipe. No later release can make it again; it stays as it is.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console
from typer.testing import CliRunner

from configs.errors import UnusableInput
from configs.load import load_recipe
from data import schema
from data.dataset import load_dataset
from data.prompt_set import read_prompts
from data.records import Prompt, Trace, Verdict
from data.schema import CHANGES, OLDEST_VERSION, SCHEMA_VERSION, TRACE, Change, earlier_schemas, filled, from_table, to_table
from data.shards import ROW
from data.stage import Context, run_stage
from data.stages import DATA
from data.stats import dataset_stats
from data.store import ROLLUP, RunFolder, commit_segment, read_first_copies, read_rollup, read_segment, read_table, segments
from data.verification import verify_run
from data.viewer import show
from tests.data.make_run import make_prompt, make_trace, rewrite, snapshot
from tracestill import application

GOLDEN = Path(__file__).parent / "version_2_run"
SETTINGS = ("data.validation_share=0.0", "data.parquet=false")
RECORDS: Mapping[str, list[str]] = {
    "Prompt": schema.PROMPT.names,
    "Trace": TRACE.names,
    "Verdict": schema.VERDICT.names,
    "Row": ROW.names,
}


@pytest.fixture
def old(tmp_path: Path) -> RunFolder:
    shutil.copytree(GOLDEN, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def build(run: RunFolder) -> None:
    run_stage(DATA, Context(load_recipe("embedded", list(SETTINGS)), run, "embedded", SETTINGS, Console(quiet=True)))


def test_a_run_of_version_2_is_looked_at_as_it_is(old: RunFolder) -> None:
    verified = verify_run(old)
    assert (verified.stages, verified.strays) == (3, ()) and verified.ledger.failed_by_reason == {"abort": 1}
    assert (verified.ledger.kept, verified.ledger.rejected, verified.ledger.superseded) == (3, 1, 1)
    with pytest.raises(
        UnusableInput, match=r"evidence\.arrow: not made by the build that stands; run tracestill data build again"
    ):
        dataset_stats(old)
    assert [prompt.answer for prompt in read_prompts(old)] == ["1", "2", "3", "3"]
    traces = [trace for table in read_first_copies(old.traces) for trace in from_table(table, Trace)]
    assert sorted(trace.finish_reason for trace in traces) == ["abort", *["stop"] * 4]
    assert load_dataset(old)["train"].num_rows == 3


def test_what_an_old_verdict_lacks_has_its_default(old: RunFolder) -> None:
    rollup = read_rollup(old.dataset)
    assert rollup is not None
    name = "verdicts/verifier-exact-v1.arrow"
    found = from_table(read_table(old.root / name, sha256=rollup.files[name]), Verdict)
    assert len(found) == 4 and {verdict.detail for verdict in found} == {""}
    assert [
        dict(shown.verdicts)["verifier-exact-v1"].reason for shown in show(old) if shown.decision and shown.decision.reason
    ] == ["wrong"]


def test_a_build_makes_verdicts_and_dataset_anew_and_leaves_what_was_paid_for(old: RunFolder) -> None:
    paid = {path: path.read_bytes() for folder in (old.prompts, old.traces) for path in folder.iterdir()}
    rows_before = load_dataset(old)["train"].to_list()
    build(old)
    rollup = read_rollup(old.dataset)
    assert rollup is not None and rollup.schema_version == SCHEMA_VERSION
    rows = load_dataset(old)["train"]
    assert rows.column_names == ROW.names
    added = {column: value for change in CHANGES.values() for column, value in change.added.get("Row", {}).items()}
    assert rows.to_list() == [row | added for row in rows_before]
    assert {path: path.read_bytes() for folder in (old.prompts, old.traces) for path in folder.iterdir()} == paid
    assert dataset_stats(old).total["rejected_by_reason"] == {"wrong": 1}
    made = snapshot(old)
    build(old)
    assert snapshot(old) == made
    verify_run(old)


def test_the_columns_that_a_version_added_are_those_that_its_files_have_more_than_earlier_ones() -> None:
    dataset = pa.ipc.open_stream(GOLDEN / "dataset" / "train" / "data-00000-of-00001.arrow").schema
    verdicts = pa.ipc.open_file(GOLDEN / "verdicts" / "dedup-v2.arrow").schema
    for name, found in (("Row", dataset), ("Verdict", verdicts)):
        added = {column for version, change in CHANGES.items() if version > 2 for column in change.added.get(name, {})}
        assert [column for column in RECORDS[name] if column not in added] == found.names
    assert all(column in RECORDS[name] for change in CHANGES.values() for name, added in change.added.items() for column in added)
    assert list(CHANGES) == list(range(OLDEST_VERSION, SCHEMA_VERSION + 1))


# --- columns to come ---------------------------------------------------------------------------------------------

TO_COME = {2: Change(""), 3: Change("", {"Trace": {"raw": b""}}), 4: Change("", {"Trace": {"error": "", "attempt": 1}})}
"""As if these columns of today had been added one version after another."""


def test_an_older_table_gets_every_column_added_since_whatever_its_place() -> None:
    trace = make_trace(make_prompt("2+2?"))
    today = to_table([trace, trace], Trace)
    newest_first = earlier_schemas("Trace", TRACE, TO_COME)
    assert [len(TRACE) - len(earlier.schema) for earlier in newest_first] == [2, 3]
    for earlier in newest_first:
        old = today.select(earlier.schema.names)
        assert filled(old, TRACE, earlier.defaults).equals(today)
    assert earlier_schemas("Prompt", schema.PROMPT, TO_COME) == []


def test_a_segment_of_an_older_version_is_read_under_the_current_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = make_trace(make_prompt("2+2?"))
    oldest = earlier_schemas("Trace", TRACE, TO_COME)[-1]
    facts = {"trace_ids": [trace.trace_id], "finish_reasons": ["stop"]}
    commit_segment(tmp_path, to_table([trace], Trace).select(oldest.schema.names), worker="w", facts=facts)
    [segment] = segments(tmp_path)
    with pytest.raises(UnusableInput, match=r"Trace table: schema \w+, expected \w+ \(version \d+\); use the release"):
        from_table(read_segment(segment), Trace)
    monkeypatch.setattr(schema, "_EARLIER", [(TRACE, oldest)])
    assert from_table(read_segment(segment), Trace) == [trace]


# --- releases that cannot read each other --------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", ["prompts/manifest.json", "traces/manifest.json", "dataset/manifest.json", "segment"])
def test_a_folder_of_a_later_release_is_one_line_for_every_command(old: RunFolder, manifest: str) -> None:
    path = old.root / manifest
    if manifest == "segment":
        path = next(old.traces.glob("0*.json"))
        (old.traces / ROLLUP).unlink()
    rewrite(path, schema_version=SCHEMA_VERSION + 1)
    for name in ("verify", "stats", "show"):
        error = CliRunner().invoke(application(), ["data", name, str(old.root)]).exception
        if manifest == "prompts/manifest.json" and name == "show":
            continue  # it reads no prompts
        assert isinstance(error, UnusableInput) and error.exit_code == 2, (name, error)
        assert f"schema version {SCHEMA_VERSION + 1}, this release reads {OLDEST_VERSION} to {SCHEMA_VERSION}; " in str(error)
        assert str(error).endswith(
            "update tracestill to that one (revision " + json.loads(path.read_bytes())["code_revision"] + ")"
        )


def test_a_manifest_of_version_1_is_told_from_a_damaged_one(old: RunFolder) -> None:
    path = old.prompts / ROLLUP
    said = json.loads(path.read_bytes())
    del said["checksum"]
    path.write_text(json.dumps(said | {"schema_version": 1}))
    with pytest.raises(UnusableInput, match=r"schema version 1, this release reads 2 to \d+; use the release that wrote it"):
        read_rollup(old.prompts)
    path.write_text(json.dumps(said))
    with pytest.raises(UnusableInput, match="checksum does not hold"):
        read_rollup(old.prompts)


def test_records_of_today_are_of_no_earlier_version() -> None:
    for kind, record in (
        (Prompt, make_prompt("a")),
        (Trace, make_trace(make_prompt("a"))),
        (Verdict, Verdict("t", "pass", "", 1.0)),
    ):
        table = to_table([record], kind)  # type: ignore[type-var]
        assert schema.upgraded(table) is table
