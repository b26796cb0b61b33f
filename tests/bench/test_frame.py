"""The frame itself: pairs, medians, one JSON line."""

import json
import sys

import pytest

from tests.bench.frame import Result, interleave, main


def test_sides_are_interleaved_and_compared_pair_by_pair() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return 1.0

    result = interleave("x", "things", lambda: side("a"), lambda: side("b"), repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4 and result.repeats == 3
    assert result.ratio_min <= result.ratio <= result.ratio_max


def test_the_last_line_is_one_json_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--json", "--repeats", "2"])
    main("a test", lambda repeats: Result("x", "things", 2.0, 1.0, 2.0, 1.9, 2.1, repeats, "here"))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ratio"] == 2.0 and found["repeats"] == 2 and found["ours"] == 2.0 and found["machine"] == "here"
