"""Identity, schemas and the split: whatever other stages recognise each other by."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UnusableInput
from data.records import Prompt, Trace, Turn, Verdict, digest, prompt_identity, request_seed, trace_identity, trace_keys
from data.schema import PROMPT, TRACE, VERDICT, concat, from_table, schema_hash, to_table
from data.split import HELD_OUT_SHARE, is_held_out
from tests.data.make_run import make_prompt, make_trace

PROMPT_A = make_prompt("What is 2 + 2?")


def test_identities_are_the_same_on_every_machine() -> None:
    assert digest("a", 1, [True, None]) == "fe6e9dd7a824a282a49b5e08ed510ea2"
    assert prompt_identity([{"role": "user", "content": "é"}], "v1") == prompt_identity(({"content": "é", "role": "user"},), "v1")


def test_whatever_makes_a_trace_another_trace_changes_its_identity() -> None:
    parts = ("prompt", 0, "teacher", "sampling")
    others = [
        ("other", 0, "teacher", "sampling"),
        ("prompt", 1, "teacher", "sampling"),
        ("prompt", 0, "x", "sampling"),
        ("prompt", 0, "teacher", "x"),
    ]
    assert len({trace_identity(*each) for each in (parts, *others)}) == 5


def test_seeds_are_sixty_three_bits_and_depend_on_the_run() -> None:
    seeds = {request_seed(f"t{number}", run_seed) for number in range(100) for run_seed in range(2)}
    assert len(seeds) == 200 and all(0 <= seed < 2**63 for seed in seeds)


def test_records_survive_arrow_unchanged() -> None:
    traces = [make_trace(PROMPT_A), dataclasses.replace(make_trace(PROMPT_A, sample=1), turns=(), messages=())]
    assert from_table(to_table(traces, Trace), Trace) == traces
    prompts = [PROMPT_A, dataclasses.replace(PROMPT_A, known=True), make_prompt("é\n", "", verifier="")]
    assert from_table(to_table(prompts, Prompt), Prompt) == prompts
    verdicts = [Verdict("t", "unjudged", "timed_out", 0.0)]
    assert from_table(to_table(verdicts, Verdict), Verdict) == verdicts


def test_schemas_name_every_field_of_their_record_in_order() -> None:
    for record, schema in ((Prompt, PROMPT), (Trace, TRACE), (Verdict, VERDICT)):
        assert schema.names == [field.name for field in dataclasses.fields(record)]


def test_a_table_of_another_schema_is_refused() -> None:
    with pytest.raises(UnusableInput, match="Verdict table: schema"):
        from_table(pa.table({"trace_id": ["t"]}), Verdict)
    assert schema_hash(VERDICT) != schema_hash(VERDICT.remove(0))


def test_tables_are_concatenated_even_when_there_are_none() -> None:
    assert concat([], Verdict).num_rows == 0
    table = to_table([Verdict("t", "pass", "", 1.0)], Verdict)
    assert concat([table, table], Verdict).num_rows == 2


def test_long_traces_are_written_without_copying_their_ids_one_by_one() -> None:
    ids = tuple(range(100_000))
    trace = dataclasses.replace(make_trace(PROMPT_A), turns=(Turn("assistant", ids, "generated", (0.5,) * len(ids)),))
    assert from_table(to_table([trace], Trace), Trace)[0].turns == trace.turns


@given(st.text(), st.sampled_from([" ", "\n", "\t  "]))
def test_rewrapping_never_moves_a_prompt_across_the_split(text: str, space: str) -> None:
    assert is_held_out(text) == is_held_out(space.join(text.split())) == is_held_out(f"{space}{text}{space}")


def test_about_the_stated_share_is_held_out_and_the_share_only_grows_the_set() -> None:
    texts = [f"question {number}" for number in range(4000)]
    held = {text for text in texts if is_held_out(text)}
    assert abs(len(held) / len(texts) - HELD_OUT_SHARE) < 0.02  # 4 standard deviations
    assert held <= {text for text in texts if is_held_out(text, share=0.2)}
    assert not any(is_held_out(text, share=0.0) for text in texts) and all(is_held_out(text, share=1.0) for text in texts)


def test_the_split_is_the_same_in_every_process() -> None:
    code = "from data.split import is_held_out; print([is_held_out(str(n)) for n in range(40)])"
    root = str(Path(__file__).parents[2])
    for seed in "12":
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": root}
        told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
        assert told == f"{[is_held_out(str(number)) for number in range(40)]}\n"


def test_keys_of_traces_are_their_identities() -> None:
    prompt_id = digest("a prompt")
    keys = trace_keys(prompt_id, 12, "0123abcd", "s" * 32)
    assert [keys[start : start + 16].hex() for start in range(0, len(keys), 16)] == [
        trace_identity(prompt_id, index, "0123abcd", "s" * 32) for index in range(12)
    ]
