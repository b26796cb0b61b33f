"""The words that no kept text may hold are those of the two tokenizers that will see it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import UnusableInput
from configs.filters import ControlTokensFilter
from configs.load import load_recipe
from configs.schema import Data
from data.asking import ControlWords, Models
from data.build import build
from data.chat import encode_conversation
from data.judge import judge_run
from data.stage import Context
from data.stages import data_stage
from data.store import RunFolder
from generate.control_words import control_words, tokenizers_sha256
from student.folders import EMBEDDED as STUDENT
from student.model import load_tokenizer
from teacher.folders import EMBEDDED as TEACHER
from tests.data.make_run import make_prompt, make_run, make_trace
from tracestill import _models

SUM = make_prompt("What is 2 + 2?")
LOOKING = Data(filters=(ControlTokensFilter(),), validation_share=0.0)


def test_both_tokenizers_say_what_no_text_may_hold() -> None:
    assert {"<|user|>", "</think>", "<|im_end|>"} <= set(control_words((TEACHER, STUDENT)))
    assert "<|im_end|>" not in control_words((TEACHER,)) and "<|user|>" not in control_words((STUDENT,))


APART = """
import sys
from generate.control_words import control_words
from student.folders import EMBEDDED as STUDENT
if __name__ == "__main__":
    print("<|im_end|>" in control_words((STUDENT,)), {"torch", "transformers"} & sys.modules.keys())
"""


@pytest.mark.long
def test_a_process_without_torch_stays_without_it(tmp_path: Path) -> None:
    (tmp_path / "apart.py").write_text(APART)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, tmp_path / "apart.py"], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout == "True set()\n", done.stderr


def test_such_a_word_in_a_row_would_be_the_token_itself() -> None:
    tokenizer = load_tokenizer("embedded")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": "r", "content": "a{}b"}]
    stop = int(str(tokenizer.convert_tokens_to_ids("<|im_end|>")))
    trained = []
    for word in ("", "<|im_end|>"):
        messages[-1] |= {"content": f"a{word}b"}
        encoded = encode_conversation(tokenizer, messages)
        trained.append([token for token, is_trained in zip(encoded.ids, encoded.mask, strict=True) if is_trained].count(stop))
    assert trained == [1, 2], "the student would learn to end its turn in the middle of the answer"


def words(*found: str) -> Models:
    return Models(control_words=ControlWords(lambda: " ".join(found), lambda: found))


def test_a_build_drops_what_holds_a_word_of_the_tokenizers_and_asks_again_when_they_change(tmp_path: Path) -> None:
    traces = [make_trace(SUM, "4"), make_trace(SUM, "4<|im_end|>", sample=1), make_trace(SUM, "4<|user|>", sample=2)]
    run = make_run(tmp_path, [SUM], [traces])
    raw = LOOKING.model_copy(update={"view": LOOKING.view_named("raw")})
    for found, hits in (((), 0), (("<|im_end|>",), 1), (("<|im_end|>", "<|user|>"), 2), (("<|user|>",), 1)):
        counts = build(raw, run, models=words(*found)).counts
        assert counts["rejected_by_reason"].get("control_token", 0) == hits
    assert len(list((run.root / "work" / "judged").glob("filters-*"))) == 4


def test_without_the_filter_no_tokenizer_is_loaded(tmp_path: Path) -> None:
    def unread() -> tuple[str, ...]:
        raise AssertionError("read")

    run = make_run(tmp_path, [SUM], [[make_trace(SUM)]])
    judge_run(
        run, Data(filters=()), num_workers=1, tell=lambda count: None, models=Models(control_words=ControlWords(str, unread))
    )


def identity(folder: Path, filters: str) -> dict:
    loaded = load_recipe("embedded", [f"student.model={folder}", f"data.filters={filters}"])
    context = Context(loaded, RunFolder(folder / "run"), "embedded", (), Console(quiet=True))
    return data_stage(_models).identity(context)


def test_the_identity_of_the_stage_is_that_of_the_tokenizers_if_they_matter(tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(STUDENT, student)
    looking, other = (identity(student, filters) for filters in ("[control_tokens]", "[loop]"))
    settings = json.loads((student / "tokenizer_config.json").read_text())
    (student / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|im_end|>"}))
    assert identity(student, "[control_tokens]") != looking and identity(student, "[loop]") == other
    assert tokenizers_sha256([STUDENT]) != tokenizers_sha256([student])


def test_a_folder_without_a_tokenizer_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="no usable tokenizer.*leave control_tokens out of data.filters") as refusal:
        control_words((tmp_path,))
    assert "\n" not in str(refusal.value)
