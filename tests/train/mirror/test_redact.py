import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.mirror.redact import CELL, PATTERNS, TEXT_PATTERNS, WINDOW, machine_words, redact, redact_cell, redact_config

SECRETS = {
    "sk-proj-AbCdEfGhIjKlMnOpQrStUv": "key",
    "ghp_0123456789abcdefghijABCDEFGHIJ012345": "key",
    "github_pat_11AAAAAAA0abcdefghij": "key",
    "glpat-abcdefghij0123456789": "key",
    "hf_abcdefghijklmnopqrstuvwxyz": "key",
    "xoxb-123456789012-abcdefghij": "key",
    "AKIAIOSFODNN7EXAMPLE": "key",
    "AIzaSyA0123456789abcdefghijklmnopqrstuv": "key",
    "0123456789abcdef0123456789abcdef01234567": "key",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U": "token",
    "https://hooks.example.com/services/T00/B00/XXXX": "web hook",
    "alice.smith+x@mail.example.co.uk": "e-mail",
    "10.11.12.213": "address",
    "2001:db8:0:0:0:0:2:1": "address",
    "fe80::1ff:fe23:4567:890a": "address",
    "Zk3vQ9x7Lm2Tn8Rb5Wc1Yd6Hf4Jg0Ps2Ka": "random word",
}
KEPT_BEFORE = {
    "Authorization: Bearer abc.def-123": ("abc.def-123", "Authorization: "),
    "curl -H 'Bearer 0123456789'": ("0123456789", "curl -H 'Bearer "),
    "https://bob:hunter2@example.org/x": ("hunter2", "https://[credentials]@example.org/x"),
    "postgresql://app:p%40ss@db:5432/x": ("p%40ss", "postgresql://[credentials]@db:5432/x"),
    "https://ghs0123456789@example.org/r.git": ("ghs0123456789", "@example.org/r.git"),
    "password = 'correct horse'": ("correct horse", "password = "),
    '{"api_key": "abcdef123"}': ("abcdef123", '{"api_key": '),
    "export WANDB_API_KEY=local0123": ("local0123", "export WANDB_API_KEY="),
    "machine x login y password s3cr3t-1": ("s3cr3t-1", "machine x login y password "),
    "File \"/home/alice/src/a.py\", line 3": ("alice", "[home]/src/a.py"),
    "cd /Users/bob/x": ("bob", "cd [home]/x"),
    r"C:\Users\carol\x": ("carol", "[home]"),
}  # fmt: skip
ORDINARY = (
    "The answer is 42. Let x = 3.14159 and y = 2/7.",
    "for token in tokens: key = table[token]",
    "max_tokens: 4096, learning rate 2.0e-4, 65536 tokens per row",
    "version 5.23.1 of the library, at 10:42:07 on 2026-01-02",
    "the root of the tree is at src/root/main.py",
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "a password is a secret word, a bearer carries things",
    "std::vector<int> v; ratio 1:2:3",
)


@pytest.mark.parametrize(("secret", "name"), SECRETS.items())
def test_a_secret_is_replaced_by_what_it_was(secret: str, name: str) -> None:
    assert redact(f"before {secret} after") == f"before [{name}] after"


@pytest.mark.parametrize(("text", "parts"), KEPT_BEFORE.items())
def test_what_stands_around_a_secret_stays(text: str, parts: tuple[str, str]) -> None:
    secret, kept = parts
    assert secret not in redact(text) and kept in redact(text)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("end", ["\n-----END OPENSSH PRIVATE KEY-----\nafter", ""])
def test_a_private_key_goes_whole_even_when_it_was_cut(end: str) -> None:
    text = f"before\n-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\nAAAA{end}"
    assert redact(text) == "before\n[private key]" + ("\nafter" if end else "")


@given(st.text(), st.sampled_from(sorted(SECRETS)), st.text())
def test_no_secret_survives_between_any_texts(before: str, secret: str, after: str) -> None:
    assert secret not in redact(f"{before} {secret} {after}")


@given(st.text(alphabet="abcAB019 -_:/@.=\n'\"{}"))
def test_redacting_twice_finds_no_more_of_a_key(text: str) -> None:
    once = redact(text)
    assert all(not pattern.regex.search(once) for pattern in (*PATTERNS[5:8], *TEXT_PATTERNS))


def test_this_machines_own_words_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/cluster/people/dave")
    monkeypatch.chdir(tmp_path)
    words = machine_words({"SERVICE_TOKEN": "plain words here", "EDITOR": "ordinary", "PIN_KEY": "12"})
    assert redact(f"{tmp_path}/x /cluster/people/dave/y plain words here ordinary 12", words) == (
        "[private]/x [private]/y [private] ordinary 12"
    )


def test_a_configuration_keeps_its_figures_and_hashes_and_loses_its_secrets() -> None:
    config = {
        "train.lr": 2e-4, "revision": "0123456789abcdef0123456789abcdef01234567", "max_tokens": 5, "nothing": None, "yes": True,
        "engine": {"api_key": "short", "url": "http://u:pw@host/v1"}, "paths": ("/home/erin/x", 3),
    }  # fmt: skip
    assert redact_config(config) == {
        "train.lr": 2e-4, "revision": "0123456789abcdef0123456789abcdef01234567", "max_tokens": 5, "nothing": None, "yes": True,
        "engine": {"api_key": "[secret]", "url": "http://[credentials]@host/v1"}, "paths": ["[home]/x", 3],
    }  # fmt: skip


@pytest.mark.parametrize("offset", range(-40, 41, 4))
def test_no_part_of_a_secret_is_left_where_a_long_text_is_cut(offset: int) -> None:
    secret = "ghp_" + "Q7" * 20
    for place in (CELL, WINDOW):
        cell = redact_cell("x " * ((place + offset) // 2) + secret + " y" * WINDOW)
        assert "Q7" not in cell and cell.endswith(" [cut]") and len(cell) <= CELL + len(" [cut]")


def test_a_short_text_is_not_marked_as_cut() -> None:
    assert redact_cell("2 + 2 = 4") == "2 + 2 = 4"


@pytest.mark.parametrize(
    "piece", ["a", "a:", "/home/", "key=", "1.", "-----BEGIN ", "a@", "token", "a.b-", "sk-a-", "aA-", "eyJaaaaaaaa."]
)
def test_no_text_takes_long(piece: str) -> None:
    started = time.process_time()
    redact((piece * 16_000)[:16_000])
    assert time.process_time() - started < 0.5  # 0.08 s at most when measured
