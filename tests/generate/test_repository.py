"""Prompts about a source tree: what goes in, in which order, within which budget, and where the planted line is."""

import json
import re
import shutil
from pathlib import Path

import pytest

from configs.errors import UnusableInput
from configs.prompt_sources import RepositorySource
from data.byte_tokenizer import build_byte_tokenizer
from data.chat import encode_prompt
from data.records import Prompt
from data.split import is_held_out
from data.verify import self_check
from generate.packing import CHAT_TOKENS, Piece
from generate.prompts import build_prompt_set, source_hashes
from generate.repository import arrange, folders_between, preamble_rank
from tests.generate.test_tree import write

ROOT = Path(__file__).parents[2]
CODE = (
    "def f{0}(n):\n    total = 0\n    for i in range(n):\n        if i < {0}:\n            total = total + i\n    return total\n"
)
FILES: dict[str, str | bytes] = {
    "README.md": "# A tree\n", "pyproject.toml": "[project]\n", "LICENSE": "MIT\n", "docs/guide.md": "words\n",
    **{f"{folder}/m{number}.py": CODE.format(number) for folder in ("a", "a/b", "c") for number in range(12)},
}  # fmt: skip


def count_bytes(texts: object) -> list[int]:
    """What the embedded pair's byte tokenizer counts."""
    return [len(text.encode()) for text in texts]  # type: ignore[attr-defined]


def about(template: str = "explain-flow", **changes: object) -> RepositorySource:
    fields = {"path": "tree", "budget_tokens": 20_000, "count": 5, "template": template, "licence": "MIT"} | changes
    return RepositorySource.model_validate(fields)


def built(folder: Path, source: RepositorySource, suites: tuple[RepositorySource, ...] = ()) -> list[Prompt]:
    return build_prompt_set([source], suites, [folder], count_bytes).prompts


def text_of(prompt: Prompt) -> str:
    return prompt.messages[0].get("content", "")


def headers(prompt: Prompt) -> list[str]:
    return re.findall(r"^=== (.+) ===$", text_of(prompt), re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    write(root / "tree", FILES)
    return root


@pytest.mark.parametrize("template", ["explain-flow", "plan-then-write", "find-planted-bug"])
@pytest.mark.parametrize("budget", [1_600, 3_000, 6_000, 100_000])
def test_the_rendered_prompt_fits_its_budget_template_words_included(folder: Path, template: str, budget: int) -> None:
    owner = (ROOT / "teacher" / "embedded" / "chat_template.jinja").read_text()
    markers = [
        "<|endoftext|>",
        "[gMASK]",
        "<sop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
        "<think>",
        "</think>",
    ]
    tokenizer = build_byte_tokenizer(markers, eos="<|endoftext|>", pad="<|endoftext|>", chat_template=owner)
    prompts = built(folder, about(template, budget_tokens=budget))
    assert len({prompt.prompt_id for prompt in prompts}) == 5
    for prompt in prompts:
        assert len(encode_prompt(tokenizer, prompt.messages)) <= budget  # type: ignore[arg-type]
        assert len(encode_prompt(tokenizer, prompt.messages)) > min(0.6 * budget, 5_000)  # type: ignore[arg-type]
        assert "licence" in json.loads(prompt.provenance)["files"][0] and prompt.licence == "MIT"


def test_files_are_taken_by_proximity_to_the_focus(folder: Path) -> None:
    """Packed once more: one file after another, as long as it fits."""
    for prompt in built(folder, about(budget_tokens=3_000)):
        provenance = json.loads(prompt.provenance)
        focus, shown = provenance["focus"], headers(prompt)
        tokens = {file["path"]: file["tokens"] for file in provenance["files"]}
        left = 3_000 - CHAT_TOKENS - (len(text_of(prompt)) - sum(tokens.values()) - len(str(len(shown))) + len(str(len(FILES))))
        expected, left_out = [], []
        for path in [
            focus,
            *sorted(FILES.keys() - {focus}, key=lambda path: (preamble_rank(path), folders_between(path, focus), path)),
        ]:
            size = len(f"=== {path} ===\n{FILES[path]}\n")
            fits = size <= left and left >= 14
            (expected if fits else left_out).append(path)
            left -= size * fits
        assert shown == list(tokens) and shown[:2] == ["README.md", "pyproject.toml"]
        assert set(shown) == set(expected) and sorted(shown[2:]) in [
            shown[turn:] + shown[2:turn] for turn in range(2, len(shown))
        ]
        assert provenance["left_out"] == left_out[:20] and provenance["num_left_out"] == len(left_out)
        assert f"`{focus}`" in text_of(prompt)


def test_the_others_are_turned_until_the_focus_stands_at_its_depth() -> None:
    pieces = [Piece(name, "", tokens, 1, False) for name, tokens in (("d", 10), ("a", 30), ("README", 9), ("b", 20), ("c", 40))]
    for depth, expected in ((0.0, "bcda"), (0.29, "bcda"), (0.31, "abcd"), (0.41, "dabc"), (0.81, "cdab"), (0.99, "cdab")):
        assert [piece.name for piece in arrange(pieces, "b", depth)] == ["README", *expected]
    assert [piece.name for piece in arrange(pieces, "README", 0.5)] == ["README", *"abcd"]
    assert arrange(pieces[:1], "d", 0.9) == pieces[:1]


def test_distance_is_counted_in_folders_and_only_the_root_has_a_preamble() -> None:
    assert [folders_between("a/b/c.py", other) for other in ("a/b/x.py", "a/x.py", "x.py", "a/d/x.py", "e/f/g/x.py")] == [
        0,
        1,
        2,
        2,
        5,
    ]
    ranks = [preamble_rank(path) for path in ("README.rst", "readme", "Makefile", "Makefile.am", "docs/README.md", "a.py")]
    assert ranks[0] == ranks[1] == 0 and 0 < ranks[2] < ranks[3] == ranks[4] == ranks[5]


def test_a_file_that_no_budget_holds_is_cut_at_a_line_end_and_marked(tmp_path: Path) -> None:
    long = "".join(f"x{number} = {number}\n" for number in range(2_000))
    write(tmp_path / "tree", {"long.py": long})
    [prompt] = built(tmp_path, about(count=1, budget_tokens=5_000))
    [file] = json.loads(prompt.provenance)["files"]
    [header] = headers(prompt)
    found = re.fullmatch(r"long\.py \(first (\d+) of 2000 lines\)", header)
    assert found and file["truncated"] and file["tokens"] <= 5_000
    kept = text_of(prompt).partition(" ===\n")[2].partition("\n\n")[0].split("\n")
    assert kept == long.split("\n")[: int(found.group(1))]
    assert 4_900 < len(text_of(prompt)) + CHAT_TOKENS <= 5_000


def test_a_planted_bug_is_one_changed_line_at_the_place_of_the_answer(folder: Path) -> None:
    prompts = built(folder, about("find-planted-bug", count=40, budget_tokens=8_000))
    for prompt in prompts:
        path, _, line = prompt.answer.rpartition(":")
        [place] = json.loads(prompt.evidence)["places"]
        assert (place["path"], place["line"]) == (path, int(line))
        block = text_of(prompt).partition(f"=== {path} ===\n")[2].partition("\n\n")[0]
        shown = [row[6:] for row in block.split("\n")]
        original = str(FILES[path]).split("\n")[:-1]
        different = [number for number, pair in enumerate(zip(shown, original, strict=True), 1) if pair[0] != pair[1]]
        assert different == [int(line)] and place["before"] == original[int(line) - 1].strip() != place["after"]
        assert prompt.verifier == "exact" and self_check(prompt)
    depths = [json.loads(prompt.evidence)["places"][0]["depth"] for prompt in prompts]
    assert all(any(tenth <= 10 * depth < tenth + 2 for depth in depths) for tenth in range(0, 10, 2))


def test_the_evidence_is_where_it_is_said_to_be(folder: Path) -> None:
    """Counted once more, byte by byte, from the text alone."""
    for prompt in built(folder, about("find-planted-bug")):
        evidence = json.loads(prompt.evidence)
        [place] = evidence["places"]
        content = text_of(prompt).encode()
        assert evidence["total_tokens"] == len(content)
        assert content[place["token"] :].startswith(f"{place['line']:>5} ".encode())
        assert content[place["token"] :].partition(b"\n")[0].endswith(place["after"].encode())
        assert content[: place["token"]].count(f"=== {place['path']} ===".encode()) == 1
        assert place["depth"] == pytest.approx(place["token"] / len(content), abs=1e-4)


def test_the_same_tree_and_seed_give_the_same_bytes_whatever_the_directory_order(tmp_path: Path) -> None:
    write(tmp_path / "one" / "tree", FILES)
    write(tmp_path / "two" / "tree", dict(reversed(FILES.items())))  # this and its name change how a file system lists it
    source = about("find-planted-bug")
    assert built(tmp_path / "one", source) == built(tmp_path / "two", source)
    assert source_hashes([source], [tmp_path / "one"]) == source_hashes([source], [tmp_path / "two"])
    other = built(tmp_path / "one", about("find-planted-bug", seed=1))
    assert {prompt.answer for prompt in other} != {prompt.answer for prompt in built(tmp_path / "one", source)}
    (tmp_path / "two" / "tree" / "docs" / "guide.md").write_text("other words\n")
    assert source_hashes([source], [tmp_path / "one"]) != source_hashes([source], [tmp_path / "two"])


def test_where_a_checkout_lies_changes_no_prompt(folder: Path, tmp_path: Path) -> None:
    source = about(path=".", count=2)
    shutil.copytree(folder / "tree", tmp_path / "elsewhere")
    assert built(folder / "tree", source) == built(tmp_path / "elsewhere", source)


def test_no_file_is_the_focus_of_both_training_and_evaluation(folder: Path) -> None:
    source = about("find-planted-bug", count=8)
    prompts = built(folder, source, (source.model_copy(update={"count": 3}),))
    for prompt in prompts:
        assert is_held_out(json.loads(prompt.provenance)["focus"]) == (prompt.split == "eval")
    assert sum(prompt.split == "eval" for prompt in prompts) == 3


def test_a_file_is_asked_about_again_only_after_every_other(folder: Path) -> None:
    files = sum(path.endswith(".py") and not is_held_out(path) for path in FILES)
    prompts = built(folder, about("find-planted-bug", count=files + 5, budget_tokens=2_000))
    focuses = [json.loads(prompt.provenance)["focus"] for prompt in prompts]
    assert len(set(focuses[:files])) == files and focuses[files:] == focuses[:5]
    assert len({prompt.answer for prompt in prompts}) > files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 2_000}, "repository tree: only 12 different train prompts about"),
        ({"budget_tokens": 50}, "only 0 different train prompts"),
        ({"template": "mine.md"}, "template mine: it never uses {{ context }}"),
        ({"template": "wrong.md"}, "template wrong: unknown variable 'files'; known variables: context, focus"),
        ({"template": "shouts.md", "plant_bug": True}, "template shouts: it changes {{ context }}"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    shutil.copytree(ROOT / "slurm", tmp_path / "tree", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "mine.md").write_text("{{ focus }}")
    (tmp_path / "wrong.md").write_text("{{ context }}{{ files }}")
    (tmp_path / "shouts.md").write_text("{{ context | upper }}")
    with pytest.raises(UnusableInput) as raised:
        built(tmp_path, about(**changes))  # type: ignore[arg-type]
    assert message.partition("only 12")[0] in str(raised.value) and "\n" not in str(raised.value)


def test_an_own_template_is_not_judged_unless_it_says_so(folder: Path) -> None:
    (folder / "spot.md").write_text("{{ context }}\nWhat is odd here?")
    spot = about("spot.md", plant_bug=True, count=1)
    [quiet], [judged] = built(folder, spot), built(folder, spot.model_copy(update={"verifier": "exact"}))
    assert (quiet.verifier, judged.verifier) == ("", "exact") and quiet.answer == judged.answer != ""
    with pytest.raises(ValueError, match="only a planted bug has one"):
        about(verifier="exact")


def test_what_looks_like_a_template_in_a_file_stays_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "tree", {"a.py": "x = '{{ focus }} {% raw %}'\n"})
    [prompt] = built(tmp_path, about(count=1))
    assert "x = '{{ focus }} {% raw %}'" in text_of(prompt)
