"""Rows that say "I don't know" where their trace said something else.

N traces    L completed rows of a segment
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data.abstention import Grades, provenance, relabel
from data.selection import Selection, SelfAsk


class Relabelling(NamedTuple):
    """What relabelled rows have in common. reasoning: their think block. tokens: (reasoning, answer), by the student's tokenizer.
    grades: the different ones that there are."""

    reasoning: str = ""
    tokens: tuple[int, int] = (0, 0)
    min_correct: int = 0
    grades: tuple[Grades, ...] = ()


def codes_of(chosen: Selection, asked: SelfAsk | None) -> tuple[np.ndarray, tuple[Grades, ...]]:
    """int16 [N], -1 for a row that stays as it is, else the position of its prompt's grades in what is returned with them."""
    codes_N = np.full(len(chosen.codes_N), -1, np.int16)
    if asked is None:
        return codes_N, ()
    rows = np.flatnonzero(chosen.relabelled_N)
    pairs = np.stack([asked.num_correct_N[rows], asked.num_graded_N[rows]], axis=1)
    different, codes = np.unique(pairs, axis=0, return_inverse=True)
    codes_N[rows] = codes.reshape(-1)
    return codes_N, tuple(Grades(*pair) for pair in different.tolist())


def with_relabelled(rows: pa.Table, codes_L: np.ndarray, how: Relabelling) -> pa.Table:
    """The rows of a dataset, in their order, those with a code made anew."""
    wanted = np.flatnonzero(codes_L >= 0)
    if not len(wanted):
        return rows
    said = rows.take(pa.array(wanted)).to_pylist()
    made = [_row(row, how.grades[code], how) for row, code in zip(said, codes_L[wanted].tolist(), strict=True)]
    place_L = np.arange(len(rows))
    place_L[wanted] = len(rows) + np.arange(len(wanted))
    return pa.concat_tables([rows, pa.Table.from_pylist(made, schema=rows.schema)]).take(pa.array(place_L))


def _row(row: dict, grades: Grades, how: Relabelling) -> dict:
    messages = [{key: text for key, text in message.items() if text is not None} for message in row["messages"]]
    return row | {
        "messages": relabel(messages, reasoning=how.reasoning),  # type: ignore[arg-type]
        "reasoning_tokens": how.tokens[0],
        "answer_tokens": how.tokens[1],
        "provenance": provenance(grades, how.min_correct),
    }


def with_row_tokens(facts: pa.Table, relabelled_N: np.ndarray, tokens: Sequence[int]) -> pa.Table:
    """data.facts with the tokens of relabelled rows as the rows have them: (reasoning, answer)."""
    for name, number in zip(("reasoning_tokens", "answer_tokens"), tokens, strict=True):
        values = np.where(relabelled_N, number, facts[name].to_numpy())
        facts = facts.set_column(facts.schema.get_field_index(name), facts.schema.field(name), [pa.array(values, pa.int32())])
    return facts
