from hypothesis import given
from hypothesis import strategies as st

from data.ledger import Ledger, with_view
from data.records import Verdict
from data.select import Decision, Judgement, kept, reasons, select, view_table

PASS, FAIL, UNJUDGED = "pass", "fail", "unjudged"


def judgement(name: str, verdicts: dict[str, tuple[str, str]], *, decides: bool = True) -> Judgement:
    return Judgement(name, {identity: Verdict(identity, *said, 0.0) for identity, said in verdicts.items()}, decides)  # type: ignore[arg-type]


def test_the_first_judgement_that_does_not_pass_decides() -> None:
    tags = judgement("think_tags", {"a": (PASS, ""), "b": (FAIL, "think_unclosed"), "c": (PASS, "")})
    verifier = judgement("verifier", {"a": (PASS, ""), "b": (FAIL, "wrong"), "c": (UNJUDGED, "timed_out")})
    decisions = select(["a", "b", "c"], [tags, verifier])
    assert decisions == [
        Decision("a", "kept"),
        Decision("b", "rejected", "think_unclosed", "think_tags"),
        Decision("c", "unjudged", "timed_out", "verifier"),
    ]
    assert kept(decisions) == {"a"}


def test_a_judgement_that_does_not_decide_changes_nothing() -> None:
    verifier = judgement("verifier", {"a": (FAIL, "wrong")}, decides=False)
    assert select(["a"], [verifier]) == [Decision("a", "kept")]


def test_the_view_is_sorted_and_says_who_decided() -> None:
    table = view_table([Decision("b", "kept"), Decision("a", "rejected", "wrong", "verifier")])
    assert table.to_pylist() == [
        {"trace_id": "a", "fate": "rejected", "reason": "wrong", "judgement": "verifier"},
        {"trace_id": "b", "fate": "kept", "reason": "", "judgement": ""},
    ]


said = st.sampled_from(
    [(PASS, ""), (PASS, ""), (FAIL, "wrong"), (FAIL, "length"), (UNJUDGED, "timed_out"), (UNJUDGED, "crashed")]
)


@given(st.integers(0, 12).flatmap(lambda n: st.lists(st.lists(said, min_size=n, max_size=n), min_size=1, max_size=4)))
def test_reasons_always_add_up_to_the_traces(columns: list[list[tuple[str, str]]]) -> None:
    identities = [f"t{index}" for index in range(len(columns[0]))]
    judgements = [judgement(str(number), dict(zip(identities, column, strict=True))) for number, column in enumerate(columns)]
    decisions = select(identities, judgements)
    counts = {
        "kept": len(kept(decisions)),
        "rejected_by_reason": reasons(decisions, "rejected"),
        "unjudged_by_reason": reasons(decisions, "unjudged"),
    }
    with_view(Ledger(requested=len(identities), completed=len(identities)), counts).check(viewed=True)
    assert kept(decisions) == {
        identity for row, identity in enumerate(identities) if all(column[row][0] == PASS for column in columns)
    }
