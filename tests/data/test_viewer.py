"""Traces in the terminal: found by what is asked, folded, and harmless whatever is in them."""

from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import UnusableInput
from configs.schema import Data
from data.store import RunFolder
from data.viewer import Shown, Wanted, folded, rendered, show
from tests.data.make_run import build_and_seal, make_prompt, make_run, make_trace

SUM, FACT = make_prompt("What is 2 + 2?"), make_prompt("Which metal is mined in Fasosur?", "iron", task="facts")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    first = [make_trace(SUM), make_trace(SUM, "5", sample=1), make_trace(SUM, sample=2, finish="abort")]
    run = make_run(tmp_path, [SUM, FACT], [first, [make_trace(FACT, "iron"), make_trace(FACT, "gold", sample=1)]])
    build_and_seal(run, Data(validation_share=0.0))
    return run


def test_a_trace_is_shown_with_its_fate_and_every_verdict(run: RunFolder) -> None:
    (shown,) = show(run, Wanted(trace_id=make_trace(FACT, sample=1).trace_id[:12]))
    assert shown.trace == make_trace(FACT, "gold", sample=1)
    assert shown.decision is not None
    assert (shown.decision.fate, shown.decision.reason, shown.decision.judgement) == ("rejected", "wrong", "verifier")
    assert {name: verdict.verdict for name, verdict in shown.verdicts.items()} == {
        "answer_present-v1": "pass", "control_tokens-v1": "pass", "decontaminate-v2": "pass", "dedup-v2": "pass",
        "finish_reason-v1": "pass", "think_tags-v1": "pass", "verifier-exact-v2": "fail",
    }  # fmt: skip


def test_traces_are_found_by_task_fate_and_reason_up_to_a_limit(run: RunFolder) -> None:
    assert [shown.trace.task for shown in show(run)] == ["sums", "sums", "sums", "facts", "facts"]
    assert [shown.trace.sample_index for shown in show(run, Wanted(finish="abort"))] == [2]
    assert [shown.trace.task for shown in show(run, Wanted(), 3)] == ["sums", "sums", "sums"]
    assert [shown.trace.task for shown in show(run, Wanted(fate="kept"))] == ["sums", "facts"]
    assert [shown.trace.messages[-1].get("content") for shown in show(run, Wanted(task="fac", reason="wrong"))] == ["gold"]
    assert list(show(run, Wanted(reason="timed_out"))) == []


def test_changed_verdicts_are_not_shown(run: RunFolder) -> None:
    path = run.verdicts / "verifier-exact-v2.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnusableInput, match=r"verifier-exact-v2\.arrow: sha256"):
        list(show(run))


def test_traces_are_shown_before_there_is_a_dataset_and_fates_are_not(tmp_path: Path) -> None:
    run = make_run(tmp_path, [SUM], [[make_trace(SUM)]])
    (shown,) = show(run)
    assert shown.decision is None and not shown.verdicts
    with pytest.raises(UnusableInput, match="no dataset yet, so no fates"):
        show(run, Wanted(fate="kept"))
    with pytest.raises(UnusableInput, match="no traces yet"):
        show(RunFolder(tmp_path / "nowhere"))


def test_outputs_are_found_by_their_length(run: RunFolder) -> None:
    lengths = [shown.trace.reasoning_tokens + shown.trace.answer_tokens for shown in show(run)]
    assert len(list(show(run, Wanted(min_tokens=max(lengths))))) == lengths.count(max(lengths))
    assert not list(show(run, Wanted(max_tokens=min(lengths) - 1)))


def test_verdicts_say_where_and_what_is_known_stands_beside_them(tmp_path: Path) -> None:
    leaked = "How many marbles of either colour does the third of the seven boxes hold"
    item, leak = make_prompt(leaked, "11", split="eval"), make_prompt(f"They asked: {leaked}? Tell.", "11")
    same = [make_trace(SUM), make_trace(SUM, sample=1)]
    run = make_run(tmp_path, [SUM, item, leak], [[*same, make_trace(leak, "11")]])
    build_and_seal(run, Data(validation_share=0.0))
    copy, original = sorted(same, key=lambda trace: trace.trace_id, reverse=True)
    (shown,) = show(run, Wanted(trace_id=copy.trace_id))
    said = " ".join(text_of(shown, unfold=False).split())
    assert f"dedup-v2: copy of {original.trace_id}" in said
    assert shown.known is not None and shown.known.p_correct == 1.0 and "p(correct) 1.000, agreement 1.00" in said
    (shown,) = show(run, Wanted(reason="contaminated"))
    said = " ".join(text_of(shown, unfold=False).split())
    assert f"{item.prompt_id}:prompt (core), 100 % of it at messages.0.content:12-{12 + len(leaked)}: {leaked}" in said


def text_of(shown: Shown, *, unfold: bool) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(rendered(shown, unfold=unfold))
    return console.export_text()


def test_reasoning_is_folded_until_asked_for(run: RunFolder) -> None:
    trace = make_trace(SUM, reasoning="first " + "middle " * 200 + "last")
    shown = Shown(trace, None, {})
    assert "middle characters" not in text_of(shown, unfold=False) and "characters ...]" in text_of(shown, unfold=False)
    assert text_of(shown, unfold=True).count("middle") == 200
    assert folded("x" * 10, 10) == "x" * 10 and len(folded("x" * 1000, 100)) < 140


def test_what_a_model_said_cannot_talk_to_the_terminal(run: RunFolder) -> None:
    trace = make_trace(SUM, "[red]4[/red]\x1b[2J\x07")
    said = text_of(Shown(trace, None, {}), unfold=True)
    assert "[red]4[/red]" in said and "\x1b" not in said and "\x07" not in said
