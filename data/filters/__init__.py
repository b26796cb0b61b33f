"""Filters: what makes one trace unfit to be trained on, whatever its answer. Pure, versioned, one countable reason each.

A filter writes a verdict and deletes nothing: a dataset is a view, and another recipe may look again. The defaults find broken
records only and are four; no answer filter helped significantly in 1,000 ablations (OpenThoughts3, arXiv 2506.04178). The
others are for what a student must not learn however right the answer is: its teacher's name, somebody's key, a loop.

A filter takes values and returns "" or a reason of a bounded set: never a part of the text, so that no secret reaches a verdict,
a count or a log. It reads nothing but COLUMNS of a trace.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from configs.filters import FilterSettings
from data.filters.control_tokens import control_tokens
from data.filters.language import language
from data.filters.length import length
from data.filters.loop import loop
from data.filters.personal_data import personal_data
from data.filters.record import answer_present, finish_reason, think_tags
from data.filters.repetition import repetition
from data.filters.restarts import restarts
from data.filters.secrets import secrets
from data.filters.self_naming import self_naming
from data.filters.texts import COLUMNS as COLUMNS
from data.filters.texts import Filtered


class Filter(NamedTuple):
    """apply(trace, settings of its own type) returns "" for a trace that may stay and the reason otherwise. version goes into
    the verdict file's name: raise it when a change of the code may change a verdict."""

    apply: Callable[[Filtered, Any], str]
    version: int


# By type, in the order in which they decide a trace's reason: what is broken, then what it costs least to see.
FILTERS: dict[str, Filter] = {
    "finish_reason": Filter(finish_reason, 1),
    "think_tags": Filter(think_tags, 1),
    "answer_present": Filter(answer_present, 1),
    "length": Filter(length, 2),
    "control_tokens": Filter(control_tokens, 1),
    "loop": Filter(loop, 1),
    "repetition": Filter(repetition, 1),
    "restarts": Filter(restarts, 1),
    "language": Filter(language, 1),
    "self_naming": Filter(self_naming, 1),
    "secrets": Filter(secrets, 1),
    "personal_data": Filter(personal_data, 1),
}


def in_order(chosen: Sequence[FilterSettings]) -> list[FilterSettings]:
    """The same settings in the order in which they decide, whatever the recipe's."""
    order = list(FILTERS)
    return sorted(chosen, key=lambda settings: order.index(settings.type))


def apply(trace: Filtered, settings: FilterSettings) -> str:
    """ "" for a trace that passes this filter, else the reason."""
    return FILTERS[settings.type].apply(trace, settings)
