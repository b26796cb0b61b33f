"""`tracestill data show --mask`: any trace in the student's tokens, with what becomes of each."""

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console, RenderableType

from configs.errors import UnusableInput
from configs.schema import Data
from data.store import RunFolder
from data.viewer import Wanted
from tests.data.make_run import build_and_seal, make_prompt, make_run, make_trace
from tests.train.fixtures import tiny_recipe
from train.batches import TokenLedger
from train.mask_view import STYLES, MaskView, Piece, coloured_page, mask_views, plain_lines

SUM = make_prompt("What is 2 + 2?")
LONG = make_trace(SUM, "4", sample=3, reasoning="2+2=4. " * 60)
ASKED = r"user | user\nWhat is 2 + 2?<|im_end|>\n"
HEADER = [r"first_token | <|im_start|>", ASKED, r"generation_prompt | <|im_start|>assistant\n"]


def run_of(folder: Path, **data: object) -> RunFolder:
    traces = [make_trace(SUM), make_trace(SUM, "5", sample=1), make_trace(SUM, "", sample=2, finish="length"), LONG]
    run = make_run(folder, [SUM], [traces])
    recipe = tiny_recipe(Path("embedded"), max_tokens_per_row=200).model_dump(mode="json")
    run.config.write_text(yaml.safe_dump({"recipe": recipe}))
    build_and_seal(run, Data.model_validate({"validation_share": 0.0, "filters": [], "dedup": "none", **data}))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_of(tmp_path_factory.mktemp("run"))


def printed(page: RenderableType, *, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=400, force_terminal=terminal, color_system="truecolor" if terminal else None)
    console.print(page, soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(run: RunFolder, sample: int) -> list[str]:
    trace = make_trace(SUM, sample=sample)
    [page] = mask_views(run, Wanted(trace_id=trace.trace_id), None, coloured=False)
    return printed(page).splitlines()


def test_every_run_of_tokens_is_a_line_with_its_reason_and_the_row_balances(run: RunFolder) -> None:
    heading, *body, ledger = lines(run, 0)
    assert heading == f"sums  train  {make_trace(SUM).trace_id}"
    assert body == [*HEADER, "trained | <think>2+2=4.</think>4<|im_end|>", r"after_stop | \n"]
    assert ledger == (
        "44 tokens = 10 trained + 34 masked (21 user, 11 generation_prompt, 1 after_stop, 1 first_token) + 0 truncated + "
        "0 dropped"
    )


def test_what_the_view_rejected_and_what_no_row_holds_is_dropped_whole_with_the_reason(run: RunFolder) -> None:
    for sample, split, why in ((1, "wrong", "wrong"), (3, "over_length", "over_length")):
        heading, *body, ledger = lines(run, sample)
        assert heading.startswith(f"sums  dropped: {split}  ")
        assert {line.split(" | ")[0] for line in body} == {"dropped"} and len(body) == 5
        assert ledger.endswith(f" dropped ({ledger.split(' tokens')[0]} {why})") and " 0 trained " in ledger


def test_trace_that_was_cut_is_unfinished_where_the_view_keeps_it(tmp_path: Path) -> None:
    run = run_of(tmp_path, view={"base": "raw"})
    heading, *_, ledger = lines(run, 2)
    assert heading.startswith("sums  dropped: unfinished  ") and ledger.endswith(" unfinished)")
    assert lines(run, 1)[0].startswith("sums  train  "), "the raw view keeps wrong answers"


def test_traces_are_shown_before_there_is_a_dataset_as_what_they_would_be(tmp_path: Path) -> None:
    run = make_run(tmp_path, [SUM], [[make_trace(SUM)]])
    run.config.write_text(yaml.safe_dump({"recipe": tiny_recipe(Path("embedded")).model_dump(mode="json")}))
    assert lines(run, 0)[0].startswith("sums  dropped: no dataset yet  ")
    run.config.write_text(yaml.safe_dump({"recipe": {"name": "x", "flavour": 1}}))
    with pytest.raises(UnusableInput, match=r"config.yaml: flavour: unknown key"):
        lines(run, 0)


def test_every_reason_has_a_colour_of_its_own_and_stands_in_the_legend(run: RunFolder) -> None:
    assert len(set(STYLES.values())) == len(STYLES)
    pieces = [Piece(reason, f"{reason}\n\x1b[31m", number) for number, reason in enumerate(STYLES, start=1)]
    page = printed(coloured_page(MaskView("t", "sums", "train", pieces, TokenLedger())), terminal=True)
    assert "\x1b[31m" not in page.replace("\x1b[9;31m", "").replace("\x1b[2;31m", ""), "what a model said colours nothing"
    plain = printed(coloured_page(MaskView("t", "sums", "train", pieces, TokenLedger())))
    for number, reason in enumerate(STYLES, start=1):
        assert f"{reason} {number}" in plain and f"{reason}\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n" in plain
    [whole] = mask_views(run, Wanted(trace_id=make_trace(SUM).trace_id), None, coloured=True)
    assert "\x1b[1;32m<think>2+2=4.</think>4<|im_end|>\x1b[0m" in printed(whole, terminal=True)


def test_trace_that_cannot_be_rendered_says_why() -> None:
    view = MaskView("t", "sums", "", [], TokenLedger(), "wrong", "trace t: turn 1: its stop is not trained")
    assert plain_lines(view) == ["sums  dropped: wrong  t", "trace t: turn 1: its stop is not trained"]
    assert "its stop is not trained" in printed(coloured_page(view))
