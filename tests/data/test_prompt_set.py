"""The prompt file: what is written is read back, from any place, and nothing unverified is believed."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from configs.errors import UnusableInput
from data.prompt_set import BATCH_BYTES, BATCH_ROWS, PromptSet, in_batches, prompt_file, read_prompts, write_prompts
from data.records import Message, Prompt, Split, prompt_identity
from data.store import RunFolder, seal

ROOT = Path(__file__).parents[2]


def made(number: int, *, text: str = "", split: Split = "train") -> Prompt:
    messages: tuple[Message, ...] = (
        {"role": "user", "content": text or f"Grüße {number}"},
        {"role": "assistant", "content": "ja", "reasoning_content": "hm"},
    )
    asked = messages[: 1 + number % 2]
    return Prompt(
        prompt_identity(asked, "v"), "s", f"t{number % 3}", "v", asked, "a", "exact", split, None, "", "MIT",
        max_tokens=number, tools="[]", evidence="{}", provenance="",
    )  # fmt: skip


def sealed(root: Path, prompts: list[Prompt]) -> RunFolder:
    run = RunFolder(root)
    path = write_prompts(run, iter(prompts))
    seal(run, run.prompts, stage="prompts", fingerprint="f", inputs={}, files=[path], counts={}, seconds=0.0)
    return run


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [made(number, split="eval" if number % 10 == 0 else "train") for number in range(5_000)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, prompts: list[Prompt]) -> RunFolder:
    return sealed(tmp_path_factory.mktemp("set"), prompts)


def test_what_is_written_is_read_back_in_order(run: RunFolder, prompts: list[Prompt]) -> None:
    assert read_prompts(run) == prompts
    assert read_prompts(run, "eval") == [prompt for prompt in prompts if prompt.split == "eval"]
    with PromptSet.open(run) as found:
        assert len(found) == 5_000 and list(found.iterate("train")) == [p for p in prompts if p.split == "train"]


@pytest.mark.parametrize("split", ["train", "eval", None])
def test_the_index_says_of_every_prompt_what_the_prompt_says(run: RunFolder, prompts: list[Prompt], split: Split | None) -> None:
    with PromptSet.open(run) as found:
        index = found.index(split)
    wanted = [(row, prompt) for row, prompt in enumerate(prompts) if split in (None, prompt.split)]
    assert len(index) == len(wanted) and index.positions_N.tolist() == [row for row, _ in wanted]
    assert [index.prompt_id(row) for row in range(len(index))] == [prompt.prompt_id for _, prompt in wanted]
    assert [index.tasks[code] for code in index.task_codes_N] == [prompt.task for _, prompt in wanted]
    assert index.characters_N.tolist() == [sum(len(m.get("content", "")) for m in prompt.messages) for _, prompt in wanted]
    assert (index.prompt_ids_ND.dtype, index.task_codes_N.dtype, index.characters_N.dtype) == (np.uint8, np.int32, np.int64)


def test_prompts_are_found_at_any_positions_in_the_order_asked_for(run: RunFolder, prompts: list[Prompt]) -> None:
    rng = random.Random(0)
    with PromptSet.open(run) as found:
        for _ in range(20):
            positions = [rng.randrange(len(prompts)) for _ in range(30)]
            assert found.prompts(positions) == [prompts[position] for position in positions]
        assert found.prompts(np.array([4_999, 0, 0])) == [prompts[-1], prompts[0], prompts[0]]
        assert found.prompts([]) == []
        for outside in (-1, 5_000):
            with pytest.raises(IndexError):
                found.prompts([outside])


def test_batches_are_bounded_by_rows_and_bytes(tmp_path: Path) -> None:
    sizes = [10, 600_000, 600_000, 3_000_000, 5, *[9] * 200, 2**20, 2**20 - 30, 30, 30]
    prompts = [
        made(2 * number, text=f"{number:x}".ljust(size, "ü" if size == 3_000_000 else "x")) for number, size in enumerate(sizes)
    ]
    batches = list(in_batches(prompts))
    assert [prompt for batch in batches for prompt in batch] == prompts
    for batch in batches:
        num_bytes = [len(prompt.messages[0].get("content", "").encode()) for prompt in batch]
        assert len(batch) <= BATCH_ROWS and (len(batch) == 1 or sum(num_bytes) <= BATCH_BYTES)
    run = sealed(tmp_path, prompts)
    with pa.OSFile(str(prompt_file(run))) as file, pa.ipc.open_file(file) as reader:
        assert [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)] == list(map(len, batches))
    assert read_prompts(run) == prompts


def test_an_empty_set_is_a_set(tmp_path: Path) -> None:
    with PromptSet.open(sealed(tmp_path, [])) as found:
        assert len(found) == len(found.index()) == 0 and found.prompts([]) == [] and not list(found.iterate())


def test_a_source_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    run = sealed(tmp_path, [made(1)])

    def failing() -> Iterator[Prompt]:
        yield from (made(number) for number in range(500))
        raise UnusableInput("line 501")

    with pytest.raises(UnusableInput, match="line 501"):
        write_prompts(run, failing())
    assert read_prompts(run) == [made(1)]
    assert sorted(os.listdir(run.prompts)) == ["manifest.json", "prompts.arrow"]  # noqa: PTH208


def test_bytes_that_are_not_the_sealed_ones_are_refused(tmp_path: Path) -> None:
    run = sealed(tmp_path, [made(number) for number in range(300)])
    path, content = prompt_file(run), prompt_file(run).read_bytes()
    for place in range(0, len(content), 997):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UnusableInput, match="the file changed after it was committed"):
            PromptSet.open(run)
    path.unlink()
    with pytest.raises(UnusableInput, match="missing, though its manifest names it"):
        PromptSet.open(run)
    with pytest.raises(UnusableInput, match="no prompt set yet"):
        PromptSet.open(RunFolder(tmp_path / "other"))


def test_a_file_of_another_schema_or_with_other_ids_is_refused(tmp_path: Path) -> None:
    run = sealed(tmp_path, [made(1)])
    with pa.OSFile(str(prompt_file(run)), "wb") as file, pa.ipc.new_file(file, pa.schema([("prompt_id", pa.string())])):
        pass
    seal(run, run.prompts, stage="prompts", fingerprint="f", inputs={}, files=[prompt_file(run)], counts={}, seconds=0.0)
    with pytest.raises(UnusableInput, match="schema .*, expected"):
        PromptSet.open(run)
    odd = sealed(tmp_path / "odd", [Prompt("xyz", "s", "t", "v", (), "", "", "train", None, "", "MIT")])
    with PromptSet.open(odd) as found, pytest.raises(UnusableInput, match="prompt_id is not 16 bytes in hex"):
        found.index()


# --- a million prompts -----------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, time
from pathlib import Path
import pyarrow.compute
from configs.prompt_sources import JsonlSource
from data.prompt_set import PromptSet, write_prompts
from data.store import RunFolder, seal
from generate.prompts import PromptStream

folder, count = Path(sys.argv[1]), int(sys.argv[2])
with (folder / "p.jsonl").open("w") as file:
    for number in range(count):
        question = f"{number} ".ljust(200, "abcdefgh"[number % 8])
        file.write(json.dumps({"question": question, "task": f"t{number % 50}", "split": "train"}) + "\\n")
(folder / "e.jsonl").write_text(json.dumps({"question": "other", "split": "eval"}))

def resident(key):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024

start, figures = resident("VmRSS"), {}

def measured(name, act):
    before, processor = time.perf_counter(), time.process_time()
    result = act()
    figures[name + "_s"] = round(time.perf_counter() - before, 2)
    figures[name + "_cpu_s"] = round(time.process_time() - processor, 2)
    figures[name + "_peak_bytes"] = resident("VmHWM") - start
    return result

run = RunFolder(folder / "run")
stream = PromptStream([JsonlSource(path="p.jsonl")], [JsonlSource(path="e.jsonl")], [folder])
path = measured("build", lambda: write_prompts(run, stream))
seal(run, run.prompts, stage="prompts", fingerprint="f", inputs={}, files=[path], counts={}, seconds=0.0)
prompts = measured("open", lambda: PromptSet.open(run))
index = measured("index", lambda: prompts.index("train"))
assert len(index) == count == stream.tally.train
measured("read", lambda: [prompts.prompts(index.positions_N[row :: count // 16]) for row in range(64)])
measured("iterate", lambda: sum(1 for _ in prompts.iterate("train")))
print(json.dumps(figures))
"""


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_memory_stays_flat_however_many_prompts_there_are(tmp_path: Path, count: int) -> None:
    """Build, index, 1,000 look-ups and a full pass, in a process of their own: at most 300 MB above its start."""
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    figures = dict(pair.split(": ") for pair in done.stdout.strip()[1:-1].replace('"', "").split(", "))
    print(done.stdout)
    assert float(figures["iterate_peak_bytes"]) < 300e6
