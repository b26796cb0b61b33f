"""Templates: versions that follow the content, variables that are never left empty, and texts that stay texts."""

from pathlib import Path

import pytest

from configs.errors import UnusableInput
from generate.documents import VARIABLES as DOCUMENT_VARIABLES
from generate.needles import VARIABLES as NEEDLE_VARIABLES
from generate.repository import VARIABLES as REPOSITORY_VARIABLES
from generate.templates import SHIPPED, Template, load_template, template_path

VARIABLES = {"two-facts": DOCUMENT_VARIABLES, "vault-codes": NEEDLE_VARIABLES, "answer-or-decline": ("question",)}


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.md")), ids=lambda path: path.stem)
def test_every_shipped_template_asks_for_nothing_unknown(path: Path) -> None:
    template = load_template(path.stem, [])
    assert template.require(VARIABLES.get(path.stem, REPOSITORY_VARIABLES)) is template
    assert template.version.startswith(f"{path.stem}@") and template_path(path.stem, []) == path


def test_the_version_follows_the_content_and_nothing_else() -> None:
    assert Template("a", "x").version == Template("a", "x").version == "a@" + Template("b", "x").version.partition("@")[2]
    assert Template("a", "x").version != Template("a", "x ").version


def test_an_own_template_is_named_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text("Say {{ word }}.\n")
    template = load_template("mine.md", [tmp_path / "elsewhere", tmp_path])
    assert template.name == "mine" and template.render({"word": "{{ word }}"}) == "Say {{ word }}."
    with pytest.raises(UnusableInput, match=r"template yours\.md: no such file"):
        load_template("yours.md", [tmp_path])
    with pytest.raises(UnusableInput, match=r"template mine: no shipped template .*explain-flow"):
        load_template("mine", [tmp_path])
    (tmp_path / "mine.md").write_bytes(b"\xff")
    with pytest.raises(UnusableInput, match=r"template mine\.md: .*expected a readable UTF-8 file"):
        load_template("mine.md", [tmp_path])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ nobody }}", "template t: unknown variable 'nobody'; known variables: word"),
        ("a\n{% if %}", "template t line 2: "),
    ],
)
def test_what_a_template_cannot_have_is_refused_before_anything_is_built(text: str, message: str) -> None:
    with pytest.raises(UnusableInput) as raised:
        Template("t", text).require(["word"])
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text", ["{{ word.missing }}", "{{ word.__class__.__mro__ }}", "{{ 1 / 0 }}", "{{ range(10**9) | list }}"]
)
def test_what_goes_wrong_while_rendering_is_one_line(text: str) -> None:
    with pytest.raises(UnusableInput) as raised:
        Template("t", text).render({"word": "w"})
    assert str(raised.value).startswith("template t: ") and "\n" not in str(raised.value)


def test_a_missing_block_is_named() -> None:
    facts = Template("facts", "{% block link %} {{ item }} {% endblock %}")
    assert facts.render_block("link", {"item": "x"}) == "x"
    with pytest.raises(UnusableInput, match=r"template facts: no block 'code'; expected {% block code %}"):
        facts.render_block("code", {})
