"""Single rows of the dataset in the student's tokens, each token with what becomes of it: trained, masked and why, or dropped.

Of a trace that the view kept it is the row of the dataset, which may have been relabelled; of any other, what it would be.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import yaml
from pydantic import ValidationError
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from configs.load import describe
from configs.schema import Recipe
from data.chat import Reason
from data.dataset import SPLITS, load_dataset
from data.run_config import RETIRED, without
from data.store import RunFolder, read_rollup
from data.viewer import Shown, Wanted, printable, show
from student.folders import max_positions, resolve
from student.model import load_tokenizer
from train.batches import Example, TokenCounts, TokenLedger, admit
from train.dataset import encode_row

DROPPED = "dropped"
STYLES: Mapping[str, str] = {
    "trained": "bold green",
    "system": "dim magenta",
    "user": "dim cyan",
    "tool": "dim yellow",
    "generation_prompt": "dim blue",
    "after_stop": "dim red",
    "first_token": "dim reverse",
    "other": "dim",
    DROPPED: "strike red",
}


class Piece(NamedTuple):
    """A run of tokens that share their fate. reason: a key of STYLES."""

    reason: str
    text: str
    tokens: int


class MaskView(NamedTuple):
    """A trace; "" is none. split: of the dataset. dropped: why it is not trained. problem: why it has no tokens to show."""

    trace_id: str
    task: str
    split: str
    pieces: list[Piece]
    ledger: TokenLedger
    dropped: str = ""
    problem: str = ""


def mask_views(run: RunFolder, wanted: Wanted, limit: int | None, *, coloured: bool) -> Iterator[RenderableType]:
    """One page a trace, in log order. coloured: for a terminal; else lines of `reason | text`, newlines written as \\n.

    Raises UnusableInput as data.viewer.show does, and when the run's student has no tokenizer.
    """
    recipe = recipe_of(run)
    tokenizer, longest = load_tokenizer(recipe.student.model), recipe.train.row_lengths[-1]
    rows, positions = _Rows(run), max_positions(resolve(recipe.student.model))
    for shown in show(run, wanted, limit):
        view = mask_view(tokenizer, shown, rows.of(shown.trace.trace_id), longest, positions)
        yield coloured_page(view) if coloured else Text("\n".join(plain_lines(view)))


def recipe_of(run: RunFolder) -> Recipe:
    """The one that made the run. Raises UnusableInput when config.yaml is another release's."""
    try:
        return Recipe.model_validate(without(yaml.safe_load(run.config.read_text())["recipe"], RETIRED))
    except ValidationError as error:
        raise UnusableInput(f"{run.config}: {describe(error)}; use the release that wrote it") from error


class _Rows:
    """The dataset's rows by trace_id; none before it is built."""

    def __init__(self, run: RunFolder) -> None:
        self._splits = {} if read_rollup(run.dataset) is None else load_dataset(run)
        self._places = {
            trace_id: (split, row)
            for split in SPLITS
            if split in self._splits
            for row, trace_id in enumerate(self._splits[split]["trace_id"])
        }

    def of(self, trace_id: str) -> tuple[str, Mapping[str, Any]] | None:
        """(split, row), or None where the view has not kept the trace."""
        if trace_id not in self._places:
            return None
        split, row = self._places[trace_id]
        return split, self._splits[split][row]


def mask_view(
    tokenizer: PreTrainedTokenizerBase,
    shown: Shown,
    row: tuple[str, Mapping[str, Any]] | None,
    max_tokens: int,
    max_positions: int | None = None,
) -> MaskView:
    """row: of the dataset, with its split. max_tokens: of the longest packed row. max_positions: of the student."""
    trace = shown.trace
    split, messages = ("", list(trace.messages)) if row is None else (row[0], row[1]["messages"])
    why = "" if row is not None else _why(shown)
    try:
        example = encode_row(trace.trace_id, messages, tokenizer, trace.finish_reason, trace.tools)  # type: ignore[arg-type]
    except UnusableInput as error:
        return MaskView(trace.trace_id, trace.task, split, [], TokenLedger(), why, str(error))
    example = example._replace(dropped=why or example.dropped)
    ledger = admit(_counts(example), max_tokens, max_positions).ledger
    dropped = next(iter(ledger.dropped), "")
    return MaskView(trace.trace_id, trace.task, split, _pieces(tokenizer, example, dropped), ledger, dropped)


def _why(shown: Shown) -> str:
    """The trace is no row of the dataset."""
    if shown.decision is None:
        return "no dataset yet" if shown.trace.finish_reason != "abort" else "aborted"
    return shown.decision.reason or shown.decision.fate


def _counts(example: Example) -> TokenCounts:
    by_reason = np.bincount(np.frombuffer(bytes(example.encoded.reasons), np.uint8), minlength=len(Reason))
    return TokenCounts(by_reason[None], np.array([example.dropped]))


def _pieces(tokenizer: PreTrainedTokenizerBase, example: Example, dropped: str) -> list[Piece]:
    pairs = zip(example.encoded.reasons, example.encoded.ids, strict=True)
    pieces = []
    for reason, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
        ids = [token for _, token in run]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        pieces.append(Piece(DROPPED if dropped else Reason(reason).name.lower(), text, len(ids)))
    return pieces


# --- as it is shown ----------------------------------------------------------------------------------------------


def plain_lines(view: MaskView) -> list[str]:
    """`reason | text` for each run of tokens, between a heading and what the row adds to the ledger."""
    body = [" | ".join((piece.reason, printable(piece.text).replace("\n", "\\n"))) for piece in view.pieces]
    return [_heading(view), *body, *([view.problem] if view.problem else [view.ledger.sentence()])]


def coloured_page(view: MaskView) -> RenderableType:
    """The text with every token in the colour of its reason, a legend with counts, and the row's line of the ledger."""
    if view.problem:
        return Group(Rule(_heading(view), align="left"), Text(view.problem))
    text = Text()
    for piece in view.pieces:
        text.append(printable(piece.text).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"), STYLES[piece.reason])
    return Group(Rule(_heading(view), align="left"), text, _legend(view.pieces), Text(view.ledger.sentence()), Text())


def _heading(view: MaskView) -> str:
    fate = f"dropped: {view.dropped}" if view.dropped else view.split
    return f"{view.task}  {fate}  {view.trace_id}"


def _legend(pieces: Sequence[Piece]) -> Text:
    counts = {reason: sum(piece.tokens for piece in pieces if piece.reason == reason) for reason in STYLES}
    said = [Text(f"{reason} {count:,}", STYLES[reason]) for reason, count in counts.items() if count]
    return Text("  ").join(said)
