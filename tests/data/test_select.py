import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from data.ledger import Ledger, with_view
from data.select import VERDICTS, Judgement, coded, judgement, reasons, select, verdict_table, view_table

PASS, FAIL, UNJUDGED = "pass", "fail", "unjudged"


def said(name: str, *verdicts: tuple[str, str], decides: bool = True) -> Judgement:
    reasons_N, words = coded([reason for _, reason in verdicts])
    codes = np.array([VERDICTS.index(verdict) for verdict, _ in verdicts], np.uint8)  # type: ignore[arg-type]
    return Judgement(name, codes, reasons_N, words, np.zeros(len(verdicts)), decides)


def view(judgements: list[Judgement], identities: list[str]) -> list[tuple[str, str, str, str]]:
    decisions = select(judgements, len(identities))
    table = view_table(pa.array(identities, pa.string()), decisions, np.argsort(identities))
    return [tuple(row.values()) for row in table.to_pylist()]  # type: ignore[misc]


def test_the_first_judgement_that_does_not_pass_decides() -> None:
    tags = said("think_tags", (PASS, ""), (FAIL, "think_unclosed"), (PASS, ""))
    verifier = said("verifier", (PASS, ""), (FAIL, "wrong"), (UNJUDGED, "timed_out"))
    assert view([tags, verifier], ["a", "b", "c"]) == [
        ("a", "kept", "", ""),
        ("b", "rejected", "think_unclosed", "think_tags"),
        ("c", "unjudged", "timed_out", "verifier"),
    ]


def test_a_judgement_that_does_not_decide_changes_nothing() -> None:
    assert view([said("verifier", (FAIL, "wrong"), decides=False)], ["a"]) == [("a", "kept", "", "")]


def test_the_view_is_sorted_by_identity() -> None:
    assert view([said("verifier", (PASS, ""), (FAIL, "wrong"))], ["b", "a"]) == [
        ("a", "rejected", "wrong", "verifier"),
        ("b", "kept", "", ""),
    ]


def test_a_column_of_reasons_is_a_judgement_and_a_file() -> None:
    one = judgement("length", ["", "too_long", ""])
    table = verdict_table(pa.array(["c", "b", "a"]), one, np.array([2, 1]))
    assert table.to_pylist() == [
        {"trace_id": "a", "verdict": "pass", "reason": "", "score": 1.0, "detail": ""},
        {"trace_id": "b", "verdict": "fail", "reason": "too_long", "score": 0.0, "detail": ""},
    ]


def test_a_detail_follows_its_trace_into_the_file() -> None:
    one = judgement("dedup", ["", "duplicate", ""], detail=pa.array(["", '{"original": "c"}', ""]))
    table = verdict_table(pa.array(["c", "b", "a"]), one, np.array([2, 1, 0]))
    assert table["detail"].to_pylist() == ["", '{"original": "c"}', ""]
    assert table["trace_id"].to_pylist() == ["a", "b", "c"]


verdict = st.sampled_from(
    [(PASS, ""), (PASS, ""), (FAIL, "wrong"), (FAIL, "length"), (UNJUDGED, "timed_out"), (UNJUDGED, "crashed")]
)


@given(st.integers(0, 12).flatmap(lambda n: st.lists(st.lists(verdict, min_size=n, max_size=n), min_size=1, max_size=4)))
def test_fates_and_reasons_are_those_of_a_plain_loop(columns: list[list[tuple[str, str]]]) -> None:
    num_traces = len(columns[0])
    judgements = [said(str(number), *column) for number, column in enumerate(columns)]
    identities = [f"t{row:02d}" for row in range(num_traces)]
    expected = []
    for row, identity in enumerate(identities):
        first = next(((number, column[row]) for number, column in enumerate(columns) if column[row][0] != PASS), None)
        if first is None:
            expected.append((identity, "kept", "", ""))
        else:
            expected.append((identity, "rejected" if first[1][0] == FAIL else "unjudged", first[1][1], str(first[0])))
    assert view(judgements, identities) == expected
    decisions = select(judgements, num_traces)
    counts = {
        "kept": int(decisions.kept_N.sum()),
        "rejected_by_reason": reasons(decisions, "rejected"),
        "unjudged_by_reason": reasons(decisions, "unjudged"),
    }
    with_view(Ledger(requested=num_traces, completed=num_traces), counts).check(viewed=True)
