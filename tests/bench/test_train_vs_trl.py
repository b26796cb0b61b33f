"""What train_vs_trl stands on: conversations of the drawn length, rows told apart, a tree's processor time and memory."""

import subprocess
import sys

import numpy as np
import pytest

from data.chat import encode_conversation
from tests.bench.train_set import Document, Settings, TrainSet, conversation, draw_lengths, words_tokenizer
from tests.bench.train_vs_trl import Turn, await_mark, cpu_seconds, first_documents, peak_mib, proceed, resident_mib, start

SPENDER = """
import subprocess, sys
from tests.bench.marks import mark
mark("imported")
subprocess.run([sys.executable, "-c", "sum(range(8_000_000))"], check=True)
held = b"1" * (64 << 20)
del held
print("a library's line")
mark("warm", answer=42)
"""


def test_a_conversation_has_the_drawn_tokens_and_three_fifths_of_them_are_trained() -> None:
    tokenizer, rng = words_tokenizer(), np.random.default_rng(0)
    for length in (52, 241, 1_000):
        encoded = encode_conversation(tokenizer, [
            {key: value for key, value in message.items() if value is not None} for message in conversation(length, rng)
        ])  # fmt: skip
        assert len(encoded.ids) == length
        assert sum(encoded.mask) == pytest.approx(0.6 * length, abs=2)
        assert tokenizer.unk_token_id not in encoded.ids and 0 not in encoded.ids  # 0 is the word for unknown ones


def test_the_drawn_conversations_fit_the_rows_and_fill_nearly_all_of_them() -> None:
    settings = Settings()
    tokens = sum(draw_lengths(settings, np.random.default_rng(settings.seed)))
    capacity = settings.row_tokens * settings.rows_per_step * settings.num_steps
    assert 0.95 * capacity < tokens <= capacity


def test_documents_of_rows_that_trl_packed_are_found_again() -> None:
    documents = [Document([1, 2, 3], [0, 1, 1]), Document([4, 5], [0, 1]), Document([6], [0])]
    rows = [([4, 5, 1, 2, 3], [0, 1, 0, 1, 2]), ([6], [0])]
    turn = Turn(1.0, 1, 1.0, 1.0, [1.0], {"first_rows": rows})
    found = TrainSet(Settings(), documents, [[[0, 1], [2]]])
    assert first_documents("trl", turn, found) == [1, 0, 2] and first_documents("ours", turn, found) == [0, 1, 2]


def test_time_of_a_child_that_ended_and_memory_that_was_given_back_are_counted() -> None:
    process: subprocess.Popen[str] = start([sys.executable, "-c", SPENDER])
    await_mark(process, "imported")
    before, base = cpu_seconds(process.pid), resident_mib(process.pid)
    proceed(process)
    assert await_mark(process, "warm") == {"answer": 42}
    assert cpu_seconds(process.pid) - before > 0.05
    assert peak_mib(process.pid) - base > 60 > resident_mib(process.pid) - base
    proceed(process)
    assert process.wait() == 0


def test_a_side_that_ends_before_its_mark_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="before it was imported"):
        await_mark(start([sys.executable, "-c", "raise SystemExit(3)"]), "imported")
