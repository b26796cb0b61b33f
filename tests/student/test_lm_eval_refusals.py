"""What lm-eval tasks may be asked of, and which are refused: before any model is asked where that can be known, in one line, and
without a connection to anything."""

import importlib.util
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from configs.engines import HttpEngine
from configs.errors import UnusableInput
from data.engine import Completion
from data.store import RunFolder
from student.lm_eval_suite import UNPLAIN, UNSCORED, check_lm_suites, suite_hashes, why_unmeasured
from student.model import load_tokenizer
from teacher.engines import open_server
from tests.e2e.commands import ROOT, environment
from tests.student.lm_eval_tasks import DATA, SUMS, TASKS, Counted, measured, settings_of, values, write_tasks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tasks(tmp_path)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("embedded")


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every name that is looked up and every address that is connected to; none is let through."""
    asked: list[object] = []

    def refuse(*words: object, **_: object) -> None:
        asked.append(words)
        raise OSError("no network in this test")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    return asked


def test_servers_have_no_likelihoods_and_say_so(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = Counted()
    engine.name = "http"
    found = measured(engine, tokenizer, folder, RunFolder(tmp_path / "run"), tasks=["tiny_choice", "tiny_generate"])
    assert found["tiny_choice"] == {"unmeasured": "servers do not score given tokens"}
    assert not math.isnan(values(found["tiny_generate"])["exact_match"]) and engine.scored == 0


def test_a_server_of_chats_is_not_asked_for_plain_text(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    class Server(Counted):
        def __init__(self, api: str) -> None:
            super().__init__()
            self.name = "http"
            self.engine.api = api  # type: ignore[attr-defined]

    chats, texts = Server("chat"), Server("completions")
    run = RunFolder(tmp_path / "run")
    found = measured(chats, tokenizer, folder, run, tasks=["tiny_generate"], chat_template=False)
    assert found["tiny_generate"] == {"unmeasured": "a server of chats is not asked for plain text"} and chats.generated == 0
    found = measured(texts, tokenizer, folder, run, tasks=["tiny_generate"], chat_template=False)
    assert "exact_match" in values(found["tiny_generate"]) and texts.generated == len(SUMS)


def test_which_tasks_a_server_can_be_asked_is_read_off_the_real_engine(tokenizer: PreTrainedTokenizerBase) -> None:
    def why(api: str, *, generates: bool, chat: bool) -> str:
        server = HttpEngine.model_validate({"base_urls": "http://127.0.0.1:9/v1", "model": "m", "api": api})
        return why_unmeasured(open_server(server, tokenizer), generates=generates, chat=chat)

    assert why("chat", generates=True, chat=True) == why("completions", generates=True, chat=False) == ""
    assert why("chat", generates=True, chat=False) == UNPLAIN
    assert why("completions", generates=False, chat=False) == UNSCORED


def test_an_answer_that_never_came_is_no_wrong_answer(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Two requests of one task are lost; a task beside it, with requests of its own, has its figures."""

    class Losing(Counted):
        def generate(self, requests: Any, handout: Any = None) -> Any:
            asked = list(requests)
            of_sums = [one.request_id for one in asked if "problem" in str(tokenizer.decode(list(one.prompt_ids)))]
            lost = dict(zip(of_sums, ("busy", "no_server"), strict=False))
            for one in super().generate(asked, handout):
                why = lost.get(one.request_id)
                yield one if why is None else Completion(one.request_id, (), (), "abort", 0.0, 0.0, error=why)

    short = TASKS["tiny_generate"].replace("{{q}}", "{{a}} + 1 =")
    (folder / "other.yaml").write_text(f"task: other\n{DATA}{short}")
    run = RunFolder(tmp_path / "run")
    found = measured(Losing(), tokenizer, folder, run, tasks=["tiny_generate", "other"])
    assert found["tiny_generate"] == {"unmeasured": "2 requests without an answer: busy 1, no_server 1"}
    assert "exact_match" in values(found["other"])
    assert measured(Counted(), tokenizer, folder, run, tasks=["tiny_generate", "other"]) == found
    shutil.rmtree(run.evaluation / "base.lm_eval.items")
    again = measured(Counted(), tokenizer, folder, run, tasks=["tiny_generate", "other"])
    assert values(again["tiny_generate"])["exact_match"] > 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": "nowhere"}, "lm_eval nowhere: no such folder"),
        ({"tasks": ["other"]}, "lm_eval tasks: no task 'other' in the folder; expected one of"),
        ({"tasks": ["hub"]}, "lm_eval tasks: ConnectionError: Couldn't reach 'some/dataset' on the Hub (OfflineModeIsEnabled)"),
        ({"tasks": ["url"]}, "lm_eval tasks: ConnectionError: http://127.0.0.1:9/sums.jsonl is not a file of this machine"),
        ({"tasks": ["metric"]}, "lm_eval tasks: task metric: metric 'rouge' is none of lm-eval's own"),
        ({"tasks": ["odd"]}, "lm_eval tasks: task odd: generation_kwargs has 'num_beams'"),
        ({"tasks": ["begun"]}, "lm_eval tasks: task begun: gen_prefix begins an answer, which a chat does not allow"),
    ],
)
def test_what_cannot_be_asked_is_one_line_before_any_model_is_asked(
    folder: Path, tmp_path: Path, connections: list[object], change: dict[str, Any], said: str
) -> None:
    data = {
        "hub": DATA.replace("dataset_path: json", "dataset_path: some/dataset").replace("{data_files: {test: sums.jsonl}}", "{}"),
        "url": DATA.replace("sums.jsonl", '"http://127.0.0.1:9/sums.jsonl"'),
    }
    asks = {
        "metric": TASKS["tiny_generate"].replace("metric: exact_match", "metric: rouge"),
        "odd": TASKS["tiny_generate"].replace("do_sample: false", "num_beams: 4"),
        "begun": TASKS["tiny_generate"] + 'gen_prefix: "The sum is"\n',
    }
    for name in {*data, *asks}:
        text = data.get(name, DATA) + asks.get(name, TASKS["tiny_choice"])
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}")
    with pytest.raises(UnusableInput) as raised:
        check_lm_suites(settings_of(folder, **change), RunFolder(tmp_path / "run"), [tmp_path])
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert connections == []


def test_a_begun_answer_is_gone_on_with_in_plain_text(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (folder / "begun.yaml").write_text(f"task: begun\n{DATA}{TASKS['tiny_generate']}gen_prefix: The sum is\n")
    engine = Counted()
    prompts = []

    class Seen(Counted):
        def generate(self, requests: Any, handout: Any = None) -> Any:
            asked = list(requests)
            prompts.extend(str(tokenizer.decode(list(one.prompt_ids))) for one in asked)
            return engine.generate(asked, handout)

    measured(Seen(), tokenizer, folder, RunFolder(tmp_path / "run"), tasks=["begun"], chat_template=False)
    assert len(prompts) == len(SUMS) and all(one.endswith("= The sum is") for one in prompts)


def test_a_task_that_cannot_be_loaded_is_known_before_any_model_is_asked(folder: Path, tmp_path: Path) -> None:
    check_lm_suites(settings_of(folder), RunFolder(tmp_path / "run"), [tmp_path])
    (folder / "functions.yaml").write_text(f"task: own\n{DATA}{TASKS['tiny_generate']}process_docs: !function own.process\n")
    (folder / "own.py").write_text("def process(docs):\n    return docs\n")
    check_lm_suites(settings_of(folder, tasks=["own"]), RunFolder(tmp_path / "run"), [tmp_path])
    for change, said in (({"path": "nowhere"}, "no such folder"), ({"tasks": ["other"]}, "no task 'other'")):
        with pytest.raises(UnusableInput, match=said):
            check_lm_suites(settings_of(folder, **change), RunFolder(tmp_path / "run"), [tmp_path])
    (folder / "broken.yaml").write_text("task: [")
    with pytest.raises(UnusableInput, match="lm_eval tasks: broken.yaml: not valid YAML"):
        check_lm_suites(settings_of(folder), RunFolder(tmp_path / "run"), [tmp_path])


def test_without_lm_eval_the_remedy_is_named(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest))
    with pytest.raises(UnusableInput, match=r"pip install 'tracestill\[lm-eval\]'"):
        measured(Counted(), tokenizer, folder, RunFolder(tmp_path / "run"))


def test_another_file_in_the_folder_is_another_suite(folder: Path) -> None:
    settings = settings_of(folder)
    before = suite_hashes(settings, [folder.parent])
    assert before == suite_hashes(settings, [folder.parent])
    (folder / "sums.jsonl").write_text((folder / "sums.jsonl").read_text().replace("75", "76"))
    assert suite_hashes(settings, [folder.parent]) != before


def test_the_command_line_starts_without_lm_eval() -> None:
    code = "import sys, tracestill, student.stages, student.lm_eval_suite; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=False).returncode == 0
