"""Rows of any container: budgets, tools, turns, templates, and the sides nobody asks for."""

import json
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import UnusableInput
from configs.prompt_sources import DatasetsSource, JsonlSource, ParquetSource, PromptSource
from data.records import Prompt, digest, prompt_identity
from data.split import is_held_out
from generate.digests import DigestTable
from generate.prompts import PromptStream, build_prompt_set, source_hashes

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}}
TURNS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
    {"role": "user", "content": "And one more?"},
]


def write_lines(folder: Path, *lines: object, name: str = "p.jsonl") -> None:
    (folder / name).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))


def built(folder: Path, *lines: object) -> list[Prompt]:
    write_lines(folder, *lines)
    return build_prompt_set([JsonlSource(path="p.jsonl")], [], [folder]).prompts


def refusal(folder: Path, source: PromptSource) -> str:
    with pytest.raises(UnusableInput) as raised:
        build_prompt_set([source], [], [folder])
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_row_may_bound_its_own_tokens(tmp_path: Path) -> None:
    [bounded, free] = built(
        tmp_path,
        {"question": "a", "split": "train", "max_tokens": 900, "reasoning_budget": 300},
        {"question": "b", "split": "train"},
    )
    assert (bounded.max_tokens, bounded.reasoning_budget) == (900, 300)
    assert (free.max_tokens, free.reasoning_budget) == (0, 0)


@pytest.mark.parametrize("value", [0, -1, 1.0, "100", True, None, 2**31, [1]])
@pytest.mark.parametrize("key", ["max_tokens", "reasoning_budget"])
def test_a_budget_that_is_no_positive_whole_number_is_refused_with_its_line(tmp_path: Path, key: str, value: object) -> None:
    write_lines(tmp_path, {"question": "a", "split": "train"}, {"question": "b", key: value})
    assert f"p.jsonl line 2: {key} is {value!r}, expected a positive whole" in refusal(tmp_path, JsonlSource(path="p.jsonl"))


def test_a_reasoning_budget_that_eats_the_answer_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path, {"question": "a", "max_tokens": 100, "reasoning_budget": 100})
    assert "line 1: reasoning_budget 100 leaves no room for an answer" in refusal(tmp_path, JsonlSource(path="p.jsonl"))


def test_rows_that_differ_in_budgets_alone_are_duplicates_and_the_first_wins(tmp_path: Path) -> None:
    write_lines(
        tmp_path, {"question": "a", "split": "train", "max_tokens": 5}, {"question": "a", "split": "train", "max_tokens": 9}
    )
    found = build_prompt_set([JsonlSource(path="p.jsonl")], [], [tmp_path])
    assert [prompt.max_tokens for prompt in found.prompts] == [5] and found.left_out == {"duplicate": 1}


def test_tool_schemas_stay_json_text_whether_written_as_text_or_as_a_list(tmp_path: Path) -> None:
    rows = ({"question": "warm?", "split": "train", "tools": tools} for tools in ([TOOL], json.dumps([TOOL], indent=3)))
    [prompt] = built(tmp_path, *rows)  # the second is the first one again
    assert json.loads(prompt.tools) == [TOOL]
    [bare] = built(tmp_path, {"question": "warm?", "split": "train", "tools": []})
    assert bare.tools == "" and bare.prompt_id != prompt.prompt_id
    assert prompt.prompt_id == prompt_identity(prompt.messages, prompt.prompt_version)


@pytest.mark.parametrize("tools", ["[", "{}", 3, ["weather"], '["\\ud800"]', '[{"a": "\\ud800"}]'])
def test_tools_that_are_no_schemas_are_refused(tmp_path: Path, tools: object) -> None:
    write_lines(tmp_path, {"question": "a", "tools": tools})
    assert "p.jsonl line 1: tools" in refusal(tmp_path, JsonlSource(path="p.jsonl"))


def test_reasoning_of_earlier_turns_stays_in_the_record(tmp_path: Path) -> None:
    [prompt] = built(tmp_path, {"messages": [*TURNS[:2], {**TURNS[2], "reasoning_content": None}], "split": "train"})
    assert list(prompt.messages) == TURNS


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "content": "", "tool_calls": []}, "a message has the key 'tool_calls', which would be lost"),
        ({"role": "assistant", "content": "", "reasoning_content": 3}, "reasoning_content is int, expected a string"),
        ({"role": "user", "content": "x", "reasoning_content": "y"}, "a user message has reasoning_content"),
    ],
)
def test_what_a_message_would_lose_is_refused(tmp_path: Path, message: dict[str, object], words: str) -> None:
    write_lines(tmp_path, {"messages": [message, TURNS[0]]})
    assert f"p.jsonl line 1: {words}" in refusal(tmp_path, JsonlSource(path="p.jsonl"))


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"question": ' + "9" * 5_000 + "}", '{"question": "\\ud800"}', '{"question": "a']
)
def test_hostile_json_is_one_line_of_complaint(tmp_path: Path, line: str) -> None:
    write_lines(tmp_path, line)
    said = refusal(tmp_path, JsonlSource(path="p.jsonl"))
    assert said.startswith("p.jsonl line 1: ") and len(said) < 300


def test_rows_of_a_side_that_nobody_asks_for_are_counted(tmp_path: Path) -> None:
    questions = [{"question": f"question {number}"} for number in range(200)]
    write_lines(tmp_path, *questions)
    source = JsonlSource(path="p.jsonl")
    held_out = sum(is_held_out(row["question"]) for row in questions)
    alone = build_prompt_set([source], [], [tmp_path])
    assert len(alone.prompts) == 200 - held_out and alone.left_out == {"held_out": held_out}
    both = build_prompt_set([source], [source.model_copy(update={"licence": "MIT"})], [tmp_path])
    assert len(both.prompts) == 200 and not both.left_out
    write_lines(tmp_path, {"question": "other", "split": "train"}, name="other.jsonl")
    suite = build_prompt_set([JsonlSource(path="other.jsonl")], [source], [tmp_path])
    assert suite.left_out == {"not_held_out": 200 - held_out}


def test_count_keeps_the_prompts_whose_ids_hash_lowest(tmp_path: Path) -> None:
    write_lines(tmp_path, *({"question": f"q{number}", "split": "train"} for number in range(50)))
    everything = build_prompt_set([JsonlSource(path="p.jsonl")], [], [tmp_path]).prompts
    chosen = {prompt.prompt_id for prompt in sorted(everything, key=lambda prompt: digest(prompt.prompt_id))[:7]}
    some = build_prompt_set([JsonlSource(path="p.jsonl", count=7)], [], [tmp_path]).prompts
    assert some == [prompt for prompt in everything if prompt.prompt_id in chosen]


def test_a_template_makes_the_question_of_a_rows_fields(tmp_path: Path) -> None:
    (tmp_path / "ask.md").write_text("Translate {{ phrase }} into {{ language | upper }}.\n")
    write_lines(tmp_path, {"phrase": "{{ 7 * 7 }}", "language": "Latin", "answer": "IL", "split": "train"})
    source = JsonlSource(path="p.jsonl", template="ask.md")
    [prompt] = build_prompt_set([source], [], [tmp_path]).prompts
    assert prompt.messages == ({"role": "user", "content": "Translate {{ 7 * 7 }} into LATIN."},)
    assert prompt.prompt_version.startswith("ask@")
    hashes = source_hashes([source], [tmp_path])
    (tmp_path / "ask.md").write_text("Say {{ phrase }} in {{ language }}.\n")
    [other] = build_prompt_set([source], [], [tmp_path]).prompts
    assert other.prompt_version != prompt.prompt_version and other.prompt_id != prompt.prompt_id
    assert source_hashes([source], [tmp_path]) != hashes
    write_lines(tmp_path, {"phrase": "a", "split": "train"})
    assert refusal(tmp_path, source) == "p.jsonl line 1: no 'language', which template ask needs"
    write_lines(tmp_path, {"phrase": "a", "language": "b", "tongue": "c"})
    assert "line 1: unknown key 'tongue'" in refusal(tmp_path, source)


# --- other containers ------------------------------------------------------------------------------------------------

ROWS = [
    {"messages": TURNS, "answer": "5", "tools": json.dumps([TOOL]), "max_tokens": 50, "split": "train", "task": "sums"},
    {"question": "3+3?", "answer": "6", "known": True, "split": "train"},
    {"question": "4+4?", "split": "eval"},
]
COLUMNS = ("question", "messages", "answer", "tools", "max_tokens", "known", "split", "task")


def as_columns(rows: list[dict]) -> pa.Table:
    return pa.table({name: [row.get(name) for row in rows] for name in COLUMNS})


def test_one_row_is_one_prompt_in_whatever_container(tmp_path: Path) -> None:
    write_lines(tmp_path, *ROWS, name="rows.jsonl")
    pq.write_table(as_columns(ROWS), tmp_path / "rows.parquet", row_group_size=2)
    datasets.Dataset(as_columns(ROWS)).save_to_disk(str(tmp_path / "rows"))
    sources = (JsonlSource(path="rows.jsonl"), ParquetSource(path="rows.parquet"), DatasetsSource(path="rows"))
    found = [build_prompt_set([source], [source], [tmp_path]).prompts for source in sources]
    assert len(found[0]) == 3 and found[0][0].messages == tuple(TURNS)  # type: ignore[comparison-overlap]
    ids = [[prompt.prompt_id for prompt in prompts] for prompts in found]
    assert ids[0] == ids[1] == ids[2]
    assert len({(prompt.tools, prompt.max_tokens, prompt.task) for prompts in found for prompt in prompts[:1]}) == 1


def test_a_folder_of_parquet_files_is_read_in_order_and_errors_name_file_and_row(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for number in range(2):
        rows = [{"question": f"{number} {row}", "split": "train"} for row in range(3)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parts" / f"{number}.parquet")
    source = ParquetSource(path="parts")
    asked = [prompt.messages[0].get("content") for prompt in build_prompt_set([source], [], [tmp_path]).prompts]
    assert asked == ["0 0", "0 1", "0 2", "1 0", "1 1", "1 2"]
    pq.write_table(pa.table({"question": ["fine", " "]}), tmp_path / "parts" / "1.parquet")
    assert refusal(tmp_path, source) == "1.parquet row 2: empty question"
    pq.write_table(pa.table({"question": ["fine"], "label": [1]}), tmp_path / "parts" / "1.parquet")
    assert "1.parquet row 1: unknown key 'label'" in refusal(tmp_path, source)
    (tmp_path / "parts" / "1.parquet").write_bytes(b"PAR1 torn")
    assert "1.parquet: no readable Parquet after row 0" in refusal(tmp_path, source)


def test_tool_schemas_as_structs_are_refused_because_arrow_merges_them(tmp_path: Path) -> None:
    """Two tools with different parameters: each comes back with the other's keys as nulls."""
    table = pa.table({"question": ["a", "b"], "tools": [[{"name": "x", "city": "s"}], [{"name": "y", "mail": "t"}]]})
    pq.write_table(table, tmp_path / "p.parquet")
    assert "p.parquet: column tools is list<" in refusal(tmp_path, ParquetSource(path="p.parquet"))
    datasets.Dataset(table).save_to_disk(str(tmp_path / "d"))
    assert "d: column tools is" in refusal(tmp_path, DatasetsSource(path="d"))


def test_a_dict_of_datasets_needs_a_split_name(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"question": [f"{name}?"], "split": ["train"]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))  # type: ignore[arg-type]
    [prompt] = build_prompt_set([DatasetsSource(path="d", split_name="test")], [], [tmp_path]).prompts
    assert prompt.messages[0].get("content") == "test?"
    assert "expected split_name to be one of train, test" in refusal(tmp_path, DatasetsSource(path="d"))
    assert "it has no split 'dev'" in refusal(tmp_path, DatasetsSource(path="d", split_name="dev"))
    parts["train"].save_to_disk(str(tmp_path / "single"))
    assert "leave out split_name" in refusal(tmp_path, DatasetsSource(path="single", split_name="train"))


def test_a_damaged_or_foreign_folder_is_one_line_of_complaint(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    datasets.Dataset.from_dict({"question": ["a"] * 9}).save_to_disk(str(folder))
    (folder / "state.json").write_text("{")
    assert "datasets folder d: " in refusal(tmp_path, DatasetsSource(path="d"))
    (tmp_path / "empty").mkdir()
    assert "datasets folder empty: " in refusal(tmp_path, DatasetsSource(path="empty"))
    assert "no such folder" in refusal(tmp_path, DatasetsSource(path="nowhere"))


def test_a_folder_whose_stream_was_cut_between_batches_is_refused(tmp_path: Path) -> None:
    """`datasets` itself reads it as a shorter dataset, without a word."""
    datasets.Dataset.from_dict({"question": [f"{number}?" for number in range(3_000)]}).save_to_disk(str(tmp_path / "d"))
    [file] = (tmp_path / "d").glob("*.arrow")
    with pa.OSFile(str(file)) as opened, pa.ipc.open_stream(opened) as stream:
        stream.read_next_batch()
        cut = opened.tell()
    file.write_bytes(file.read_bytes()[:cut])
    assert 0 < len(datasets.load_from_disk(str(tmp_path / "d"))) < 3_000
    assert f"{file.name} is cut short" in refusal(tmp_path, DatasetsSource(path="d"))


def test_a_change_anywhere_in_a_source_changes_its_hash(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["a"]}), tmp_path / "p.parquet")
    datasets.Dataset.from_dict({"question": ["a"]}).save_to_disk(str(tmp_path / "d"))
    sources = [ParquetSource(path="p.parquet"), DatasetsSource(path="d")]
    before = source_hashes(sources, [tmp_path])
    assert set(before) == {"p.parquet", "d"} and before == source_hashes(sources, [tmp_path])
    pq.write_table(pa.table({"question": ["b"]}), tmp_path / "p.parquet")
    datasets.Dataset.from_dict({"question": ["b"]}).save_to_disk(str(tmp_path / "d"))
    assert not set(before.values()) & set(source_hashes(sources, [tmp_path]).values())


# --- streaming -------------------------------------------------------------------------------------------------------


def test_a_stream_counts_what_it_lets_pass_and_can_be_run_again(tmp_path: Path) -> None:
    write_lines(tmp_path, *({"question": f"q{number % 40}", "task": "even"[number % 2 :]} for number in range(60)))
    source = JsonlSource(path="p.jsonl")
    stream = PromptStream([source], [source], [tmp_path])
    first, tally = list(stream), stream.tally
    assert (tally.train, tally.eval) == (sum(p.split == "train" for p in first), sum(p.split == "eval" for p in first))
    assert sum(tally.by_task.values()) == tally.train and tally.left_out == {"duplicate": 20} and len(first) == 40
    assert list(stream) == first and stream.tally == tally


def test_digests_are_remembered_as_a_dict_would() -> None:
    rng = random.Random(3)
    table, reference = DigestTable(slots=4), {}
    for _ in range(5_000):
        key = bytes([rng.randrange(1, 256), *rng.randbytes(14), rng.randrange(4)])
        label = rng.randrange(65_536)
        for _ in range(rng.randrange(1, 3)):
            assert table.add(key, label) == reference.get(key)
            reference.setdefault(key, label)
    assert len(table) == len(reference)
    assert all(table.find(key) == label for key, label in reference.items()) and table.find(b"\1" * 16) is None
