from typing import Any

import pytest
from pydantic import ValidationError

from configs.views import INLINE, SHIPPED_VIEWS, View, WithViews


def chosen(**settings: Any) -> View:
    return WithViews.model_validate(settings).view


def test_the_view_is_verified_unless_the_recipe_says_otherwise() -> None:
    assert chosen() == SHIPPED_VIEWS["verified"] == View(name="verified")


@pytest.mark.parametrize("name", SHIPPED_VIEWS)
def test_a_shipped_name_means_its_whole_settings(name: str) -> None:
    assert chosen(view=name) == SHIPPED_VIEWS[name] and SHIPPED_VIEWS[name].name == name


def test_an_inline_mapping_is_a_view_with_the_defaults_for_the_rest() -> None:
    view = chosen(view={"k_shortest_correct": 2, "abstention_share": 0.05})
    assert view == View(k_shortest_correct=2, abstention_share=0.05) and view.name == INLINE and view.require_verified


def test_a_view_of_the_recipes_own_says_what_differs_from_its_base() -> None:
    views = {"small": {"base": "calibrated", "max_tokens": 1000}, "smaller": {"base": "small", "max_tokens": 10}}
    view = chosen(views=views, view="smaller")
    assert view == SHIPPED_VIEWS["calibrated"].model_copy(update={"name": "smaller", "max_tokens": 10})
    assert chosen(views=views, view={"base": "small", "k_diverse": 2}).max_tokens == 1000


def test_the_resolved_section_reads_back_as_itself() -> None:
    section = WithViews.model_validate({"views": {"small": {"base": "raw", "max_tokens": 9}}, "view": "small"})
    assert WithViews.model_validate(section.model_dump(mode="json")) == section
    assert section.view_named("small") == section.view and section.view_named("raw") == SHIPPED_VIEWS["raw"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"view": "calibratd"}, "no view 'calibratd'; did you mean calibrated? known: calibrated, raw, verified"),
        ({"views": {"mine": {}}, "view": "other"}, "known: calibrated, mine, raw, verified"),
        ({"views": {"mine": {"base": "nope"}}}, "no view 'nope'"),
        ({"views": {"a": {"base": "b"}, "b": {"base": "a"}}}, "its base is itself (a -> b -> a)"),
        ({"views": {"raw": {}}}, "views.raw: the name of a shipped view"),
        ({"view": {"k_shortest": 2}}, "view.k_shortest"),
        ({"view": {"task_quotas": {"*": {}}}}, "a quota needs rows or tokens"),
        ({"view": {"length_quotas": [{"up_to_tokens": 9, "rows": 1}, {"up_to_tokens": 9, "rows": 1}]}}, "[9, 9] do not rise"),
        ({"view": {"length_quotas": [{"rows": 1}, {"up_to_tokens": 9, "rows": 1}]}}, "only the last bucket may have none"),
        ({"view": {"abstention_samples": 2}}, "abstention_min_correct 3 of abstention_samples 2 can never be reached"),
        ({"view": {"abstention_share": 1.0}}, "less than 1"),
        ({"view": 3}, "view"),
    ],
)
def test_a_wrong_view_is_refused_with_words_that_help(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        WithViews.model_validate(settings)
    assert message in str(raised.value)


def test_every_field_says_what_it_means() -> None:
    assert all(field.description for field in View.model_fields.values())
    assert all(field.description for field in WithViews.model_fields.values())


def test_an_unknown_name_at_run_time_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known: calibrated, raw, verified"):
        WithViews().view_named("rwa")
