"""What a view asks of a trace: the settings of data/selection.py, the views that ship, and how a recipe picks one.

    data: {view: calibrated}                                          a shipped view, or one of data.views
    data: {view: {k_shortest_correct: 2, abstention_share: 0.05}}     said on the spot
    data: {views: {small: {base: calibrated, max_tokens: 1000000}}, view: small}

A view that names a `base` says only what differs from it. What a run used is written down resolved: config.yaml holds every
field of the view under `data.view`.
"""

import difflib
import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from configs.section import Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]
ViewName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
INLINE = "inline"


class Quota(Section):
    """At most so much of one kind of trace. Give rows, tokens or both; both then hold."""

    rows: Annotated[int, Field(ge=0)] | None = None
    tokens: Annotated[int, Field(ge=0)] | None = None
    """Training tokens: prompt, reasoning and answer."""

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        if self.rows is None and self.tokens is None:
            raise ValueError("a quota needs rows or tokens")
        return self


class LengthQuota(Quota):
    """The quota of one length bucket: traces above the bucket before it, and up to its own bound."""

    up_to_tokens: PositiveInt | None = None
    """Generated tokens (reasoning and answer), the bound itself included. Absent, in the last bucket only: no bound."""


class View(Section):
    """Which traces become rows. The fields are steps, taken in the order in which they stand; a trace's reason is that of the
    first step that turns it down."""

    name: ViewName = INLINE
    """What reports and manifests call it; set from `data.views` or the shipped name."""
    require_verified: bool = True
    """Keep only what a verifier passed. A trace that none has judged is then `unjudged`, not wrong."""
    min_p_correct: Share | None = None
    """Keep only traces that are right with at least this probability: 1 or 0 where a verifier has judged, else the fitted
    model's. 0.5 is where answering and declining are worth the same: a right answer earns what a wrong one costs
    (AA-Omniscience, arXiv 2511.13029)."""
    max_expected_error: Share | None = None
    """Keep the largest set, likeliest right first, whose expected share of wrong traces is at most this at the upper end of a
    one-sided 95 % interval over prompts."""
    max_tokens_over_shortest: Annotated[float, Field(ge=1.0)] | None = None
    """Drop a trace that took more than this many times the tokens of the shortest right trace of its prompt."""
    drop_too_easy: bool = False
    """Drop prompts whose every judged sample is right, of at least two: little is left to learn from them."""
    drop_too_hard: bool = False
    """Drop prompts whose every judged sample is wrong, of at least two. Only views that keep wrong traces notice."""
    k_shortest_correct: PositiveInt | None = None
    """Of each prompt, this many of the shortest right traces: passed by a verifier or, unjudged, likelier right than wrong."""
    k_diverse: PositiveInt | None = None
    """Of each prompt, this many that differ most, chosen one by one: the next is the one farthest from those chosen."""
    diverse_by: Literal["text", "answer_and_length"] = "answer_and_length"
    """`text`: share of MinHash components that differ. `answer_and_length`: another answer counts 1, a length e times as
    great counts 1."""
    task_quotas: dict[str, Quota] = Field(default={})
    """By task name; a family's name (`facts` for `facts/metals`) is one quota for all its tasks together; `*` is for each other
    task by itself. The most specific name counts."""
    length_quotas: tuple[LengthQuota, ...] = ()
    """Buckets, shortest first. Traces above the last bound have no quota."""
    abstention_share: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Closed-book prompts that the base student cannot answer become "I don't know", at most this share of the rows; the rest
    of them is dropped. 0 drops them all; absent, nothing is asked and the teacher's answers stay."""
    abstention_samples: PositiveInt = 8
    """How often the base student is asked each closed-book prompt (8 to 10 in the published recipe)."""
    abstention_min_correct: PositiveInt = 3
    """Right answers among those from which on it can produce the fact. A guesser among eight answers gets 1 of 8 right for 66 %
    of the prompts, 2 for 26 %, 3 for 7 %; among a thousand answers, 1 for 0.8 %."""
    abstention_temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.5
    """Of the base student's answers. 0 would ask one question as often as there are samples."""
    abstention_max_tokens: PositiveInt = 1024
    """Of one of its answers; what does not come to an end is not right."""
    abstention_reasoning: str = ""
    """What stands in the think block of a relabelled row. Empty, or a short honest sentence: never the teacher's recall."""
    max_tokens: PositiveInt | None = None
    """Training tokens of the whole view, so that views can be compared at equal cost. Rows are taken in the order of `prefer`
    until the next one does not fit."""
    prefer: Literal["hash", "p_correct", "shorter"] = "hash"
    """Who stays when a quota or the token budget cuts. `hash` is a fair sample, the others favour easy prompts."""

    @model_validator(mode="after")
    def _lengths_rise(self) -> Self:
        bounds = [bucket.up_to_tokens for bucket in self.length_quotas]
        closed = [bound for bound in bounds if bound is not None]
        if None in bounds[:-1] or any(low >= high for low, high in itertools.pairwise(closed)):
            raise ValueError(f"length_quotas: bounds {bounds} do not rise; only the last bucket may have none")
        return self

    @model_validator(mode="after")
    def _produced_of_asked(self) -> Self:
        if self.abstention_min_correct > self.abstention_samples:
            raise ValueError(
                f"abstention_min_correct {self.abstention_min_correct} of abstention_samples {self.abstention_samples} can never "
                "be reached: lower it or ask more often"
            )
        return self

    @property
    def needs_p_correct(self) -> bool:
        return self.min_p_correct is not None or self.max_expected_error is not None or self.prefer == "p_correct"

    @property
    def needs_signatures(self) -> bool:
        return self.k_diverse is not None and self.diverse_by == "text"


SHIPPED_VIEWS: Mapping[str, View] = {
    "raw": View(name="raw", require_verified=False),
    "verified": View(name="verified", require_verified=True),
    "calibrated": View(name="calibrated", require_verified=False, min_p_correct=0.5, max_expected_error=0.05),
}
"""raw: whatever the filters left. verified: what a verifier passed. calibrated: what is probably right, at most one in twenty of
it wrong. None asks the base student (`abstention_share`): where it knows little of what is asked, its student answers nothing of
the kind any more (docs/views.md)."""


class WithViews(Section):
    """What `class Data` inherits: `view` is a whole View once the recipe is read, whichever way it was said."""

    views: dict[ViewName, View] = Field(default={})
    """Views of this recipe's own, by name, beside the shipped raw, verified and calibrated."""
    view: View = SHIPPED_VIEWS["verified"]
    """The one the dataset is built with: a name, or settings on the spot."""

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, raw: Any) -> Any:
        """Names become settings before anything is checked, so that a wrong key is reported where it stands."""
        if not isinstance(raw, dict) or not isinstance(raw.get("views", {}), dict):
            return raw
        own = dict(raw.get("views", {}))
        if taken := sorted(set(own) & set(SHIPPED_VIEWS)):
            raise ValueError(f"views.{taken[0]}: the name of a shipped view, which is the same everywhere; give yours another")
        resolved = {**raw, "views": {name: _named(name, own, ()) for name in own}} if own else dict(raw)
        if "view" in raw:
            resolved["view"] = _settings(raw["view"], own, ())
        return resolved

    def view_named(self, name: str) -> View:
        """Raises ValueError with the known names."""
        known = {**SHIPPED_VIEWS, **self.views, self.view.name: self.view}
        if name not in known:
            raise ValueError(_unknown(name, known))
        return known[name]


def _named(name: object, own: Mapping[str, Any], seen: tuple[str, ...]) -> Any:
    if not isinstance(name, str) or (name not in own and name not in SHIPPED_VIEWS):
        raise ValueError(_unknown(name, {**SHIPPED_VIEWS, **own}))
    if name in seen:
        raise ValueError(f"views.{name}: its base is itself ({' -> '.join((*seen, name))})")
    if name in SHIPPED_VIEWS:
        return SHIPPED_VIEWS[name].model_dump()
    settings = _settings(own[name], own, (*seen, name))
    return {**settings, "name": name} if isinstance(settings, dict) else settings


def _settings(given: Any, own: Mapping[str, Any], seen: tuple[str, ...]) -> Any:
    """A mapping over its base, or what a name stands for. Anything else is left for pydantic to refuse."""
    if isinstance(given, str):
        return _named(given, own, seen)
    if not isinstance(given, dict) or "base" not in given:
        return given
    base = _named(given["base"], own, seen)
    changes = {key: value for key, value in given.items() if key != "base"}
    return {**base, "name": INLINE, **changes} if isinstance(base, dict) else given


def _unknown(name: object, known: Mapping[str, object]) -> str:
    nearest = difflib.get_close_matches(str(name), known, 1, cutoff=0.5)
    return f"no view {name!r}; " + (f"did you mean {nearest[0]}? " if nearest else "") + f"known: {', '.join(sorted(known))}"
