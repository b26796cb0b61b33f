"""Planted bugs: one line, still a program, the same one every time."""

import ast
from pathlib import Path

import pytest

from generate.planting import apply, find_sites, plant

PYTHON = '''"""a < b"""
import math
from x import *

LIMIT = 10


def f(items, *rest, **options):
    """not a + b"""
    total = 0
    for index in range(1, len(items)):  # index < 3
        if items[index] <= LIMIT and not rest:
            total += items[index] * 2 + index
    while total:
        total = total[1:]
    if not options:
        raise ValueError("a" + str(total))
    return -total
'''


def edits(path: str, text: str) -> set[tuple[int, str, str]]:
    """(line, kind, the line afterwards) of every mutation."""
    lines = text.split("\n")
    return {(site.line, site.kind, apply(lines, site).split("\n")[site.line - 1].strip()) for site in find_sites(path, text)}


def test_python_is_changed_in_code_and_never_in_words() -> None:
    assert edits("a.py", PYTHON) == {
        (11, "off_by_one", "for index in range(2, len(items)):  # index < 3"),
        (12, "comparison", "if items[index] < LIMIT and not rest:"),
        (12, "condition", "if items[index] <= LIMIT or not rest:"),
        (13, "operator", "total += items[index] + 2 + index"),
        (13, "operator", "total += items[index] * 2 - index"),
        (14, "negation", "while not total:"),
        (15, "off_by_one", "total = total[2:]"),
        (16, "negation", "if options:"),
    }


C = """/* if (a < b)
   if (a < b) */
if (a < b && c == 1) { // here
    if (x <= y || z != 0)
        s = "if (a < b)";
    for (i = 0; i < n; i++)
    vector<int> v; a = b < c;
}
"""


def test_other_languages_are_changed_in_plain_conditions_alone() -> None:
    assert edits("a.c", C) == {
        (4, "comparison", "if (x < y || z != 0)"),
        (4, "condition", "if (x <= y && z != 0)"),
        (4, "comparison", "if (x <= y || z == 0)"),
        (6, "comparison", "for (i = 0; i <= n; i++)"),
    }


@pytest.mark.parametrize(
    "text", ["if a <", "x = 1\rif a < b: pass\n", "\f\nif a < b: pass\n", "print 'a' < b\n", "", "\0", "(" * 5000]
)
def test_a_file_whose_lines_or_words_are_unsure_is_spared(text: str) -> None:
    assert find_sites("a.py", text) == []


def test_every_mutation_of_this_project_parses_and_changes_one_line() -> None:
    """Real code: the first dozen modules of generate/."""
    planted = 0
    for path in sorted((Path(__file__).parents[2] / "generate").glob("*.py"))[:12]:
        text, lines = path.read_text(), path.read_text().split("\n")
        for site in find_sites("a.py", text)[::7]:
            changed = apply(lines, site)
            ast.parse(changed)
            different = [row for row, (old, new) in enumerate(zip(lines, changed.split("\n"), strict=True), 1) if old != new]
            assert different == [site.line]
            planted += 1
    assert planted > 20


def test_the_order_of_bugs_is_the_seeds_and_ends() -> None:
    found = [plant("a.py", PYTHON, "7", rank, 100) for rank in range(9)]
    assert found == [plant("a.py", PYTHON, "7", rank, 100) for rank in range(9)]
    assert len({bug.text for bug in found if bug}) == 8 and found[8] is None
    assert [plant("a.py", PYTHON, "8", rank, 100) for rank in range(8)] != found[:8]
    within = [plant("a.py", PYTHON, "7", rank, 12) for rank in range(4)]
    assert {bug.site.line for bug in within if bug} == {11, 12} and within[3] is None
