"""The export behind a real server: `transformers serve`, asked through the openai client."""

from pathlib import Path

import pytest
from openai.types.chat.chat_completion import Choice

from configs.errors import Refused, UnusableInput
from data.records import Message
from student import serve_check
from student.folders import EMBEDDED
from student.formats.transformers_model import TransformersSpeaker
from student.model import load_base, load_tokenizer
from student.serve_check import TRANSFORMERS, check_server, servers_for

PROMPTS: list[list[Message]] = [[{"role": "user", "content": text}] for text in ("What is 30 + 12?", "Spell abcde backwards.")]


@pytest.mark.long
def test_a_real_server_says_what_the_student_says_and_another_student_is_found_out(tmp_path: Path) -> None:
    tokenizer, program = load_tokenizer("embedded"), serve_check._program(TRANSFORMERS)
    assert program is not None
    model, log = load_base("embedded", "fp32"), tmp_path / "logs" / "serve.log"

    def check() -> serve_check.Served:
        speaker = TransformersSpeaker(model)
        return check_server(TRANSFORMERS, program, "merged", EMBEDDED, speaker, tokenizer, PROMPTS, dtype="fp32", log=log)

    found = check()
    assert found[:3] == ("merged", "transformers serve", 2) and found.tokens > 20 and found.near_ties == 0
    embedding = model.get_parameter("model.embed_tokens.weight").data
    embedding[40:90] = embedding[40:90].roll(1, 0)
    with pytest.raises(Refused, match=r"transformers serve serves merged otherwise than it was trained: request 0, token \d+: "):
        check()


def test_a_server_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    speaker, tokenizer, log = (
        TransformersSpeaker(load_base("embedded", "fp32")),
        load_tokenizer("embedded"),
        tmp_path / "serve.log",
    )
    with pytest.raises(UnusableInput, match=r"transformers serve did not start on .*; see .*serve.log"):
        check_server(TRANSFORMERS, "/bin/false", "merged", EMBEDDED, speaker, tokenizer, PROMPTS, dtype="fp32", log=log)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_check, "_program", lambda server: None)
    with pytest.raises(UnusableInput, match="nothing here serves merged; expected vllm serve or transformers serve: pip install"):
        servers_for("merged")
    with pytest.raises(UnusableInput, match="nothing here serves gguf-f16; expected llama-server: put llama.cpp's llama-server"):
        servers_for("gguf-f16")


@pytest.mark.parametrize(
    ("message", "finish", "expected"),
    [
        ({"content": "<think>3</think>7"}, "stop", "<think>3</think>7"),
        ({"content": "7", "reasoning_content": "3"}, "stop", "<think>3</think>7"),
        ({"content": "", "reasoning_content": "3"}, "length", "<think>3"),
        ({"content": None, "reasoning_content": "3"}, "stop", "<think>3</think>"),
        ({"content": None}, "stop", ""),
    ],
)
def test_a_thought_that_a_server_puts_aside_is_put_back(message: dict, finish: str, expected: str) -> None:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", **message}}
    assert serve_check.whole_answer(Choice.model_validate(choice)) == expected
