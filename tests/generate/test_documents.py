"""Prompts of long documents: two facts, far apart, at depths that are what the record says."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from configs.errors import UnusableInput
from configs.prompt_sources import DocumentsSource
from data.records import Prompt
from data.verify import VERIFIERS, self_check
from generate.hiding import tokens_before
from generate.needles import DISTANT, GRID, depth_pairs
from generate.packing import CHAT_TOKENS
from generate.prompts import build_prompt_set, source_hashes
from tests.generate.test_repository import count_bytes, text_of

WORDS = "the river keeps its own slow counsel and every mill on it grinds what the season brings".split()  # noqa: SIM905


def prose(seed: int, lines: int) -> str:
    rng = random.Random(seed)
    return "".join(" ".join(rng.choices(WORDS, k=rng.randrange(3, 14))) + ".\n" for _ in range(lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("documents")
    (root / "books").mkdir()
    for number in range(6):
        (root / "books" / f"b{number}.md").write_text(prose(number, 60))
    (root / "more.jsonl").write_text("\n".join(json.dumps({"text": prose(50 + number, 30), "id": number}) for number in range(4)))
    return root


def asking(**changes: object) -> DocumentsSource:
    fields = {"paths": ("books/*.md", "more.jsonl"), "budget_tokens": 12_000, "count": 6} | changes
    return DocumentsSource.model_validate(fields)


def built(folder: Path, source: DocumentsSource, suites: tuple[DocumentsSource, ...] = ()) -> list[Prompt]:
    return build_prompt_set([source], suites, [folder], count_bytes).prompts


def test_the_prompt_fits_its_budget_and_uses_it(folder: Path) -> None:
    for budget in (3_000, 9_000, 500_000):
        for prompt in built(folder, asking(budget_tokens=budget, count=2)):
            size = len(text_of(prompt).encode())
            assert size + CHAT_TOKENS <= budget and (size > 0.5 * budget or budget == 500_000)


def test_both_facts_stand_where_the_evidence_says_and_far_apart(folder: Path) -> None:
    """Counted once more, byte by byte, from the text alone."""
    for prompt in built(folder, asking(count=20)):
        content, evidence = text_of(prompt).encode(), json.loads(prompt.evidence)
        assert evidence["total_tokens"] == len(content)
        for place in [*evidence["places"], *evidence["decoys"]]:
            assert content.count(place["fact"].encode()) == 1
            assert content.index(place["fact"].encode()) == place["token"]
            assert place["depth"] == pytest.approx(place["token"] / len(content), abs=1e-4)
            assert abs(place["depth"] - place["target"]) < 0.02
            assert content[: place["token"]].endswith(b"\n") and content[place["token"] :].startswith(
                place["fact"].encode() + b"\n"
            )
            assert content[: place["token"]].rpartition(b"=== ")[0].count(place["path"].encode()) <= 1
        link, code = evidence["places"]
        assert abs(link["depth"] - code["depth"]) >= DISTANT - 1e-4


def test_the_question_needs_both_facts(folder: Path) -> None:
    for prompt in built(folder, asking(count=5)):
        link, code = (place["fact"] for place in json.loads(prompt.evidence)["places"])
        item, place = link.removeprefix("Crate ").partition(" ")[0], link.rpartition(" at ")[2].rstrip(".")
        assert (
            f"crate {item}" in text_of(prompt).rpartition("Which code")[2]
            and place not in text_of(prompt).rpartition("Which code")[2]
        )
        assert place in code and prompt.answer in code and prompt.answer not in link
        others = [decoy["fact"] for decoy in json.loads(prompt.evidence)["decoys"]]
        assert len(others) == 6 and not any(place in other or prompt.answer in other for other in others)
        assert self_check(prompt) and VERIFIERS["exact"].score(prompt, f" {prompt.answer}.") == 1.0


def test_depths_follow_the_grid_in_strata(folder: Path) -> None:
    pairs = depth_pairs(3)
    assert len(set(pairs)) == 42 and pairs != depth_pairs(4) and set(pairs) == set(depth_pairs(4))
    assert all(abs(first - second) > DISTANT + 0.09 for first, second in pairs)
    assert {depth for pair in pairs for depth in pair} == set(GRID)
    found = [
        tuple(p["target"] for p in json.loads(prompt.evidence)["places"]) for prompt in built(folder, asking(count=84, decoys=0))
    ]
    assert set(Counter(found).values()) == {2}


def test_the_same_documents_and_seed_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for path in sorted((folder / "books").iterdir(), reverse=True):
        (tmp_path / "books" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "more.jsonl").write_bytes((folder / "more.jsonl").read_bytes())
    assert built(folder, asking()) == built(tmp_path, asking())
    assert source_hashes([asking()], [folder]) == source_hashes([asking()], [tmp_path])
    assert {prompt.answer for prompt in built(folder, asking(seed=1))} != {prompt.answer for prompt in built(folder, asking())}
    (tmp_path / "books" / "b0.md").write_text("other")
    assert source_hashes([asking()], [folder]) != source_hashes([asking()], [tmp_path])


def test_provenance_names_every_document_and_marks_the_cut_one(folder: Path) -> None:
    [prompt] = built(folder, asking(paths=("books/b0.md",), budget_tokens=2_000, count=1))
    [file] = json.loads(prompt.provenance)["files"]
    assert file["path"] == "books/b0.md" and file["truncated"] and len(file["sha256"]) == 64
    [prompt] = built(folder, asking(budget_tokens=10**6, count=1))
    names = {file["path"] for file in json.loads(prompt.provenance)["files"]}
    assert names == {f"books/b{number}.md" for number in range(6)} | {f"more.jsonl line {number}" for number in range(1, 5)}


def test_evaluation_asks_other_questions(folder: Path) -> None:
    prompts = built(folder, asking(count=4), (asking(count=3),))
    assert [prompt.split for prompt in prompts] == ["train"] * 4 + ["eval"] * 3
    assert len({text_of(prompt).rpartition("Which code")[2] for prompt in prompts}) == 7


def test_facts_of_ones_own_come_from_a_file_of_blocks(folder: Path) -> None:
    (folder / "keys.md").write_text(
        "{% block link %}Guest {{ item }} sleeps in {{ place }}.{% endblock %}"
        "{% block code %}{{ place }} has key {{ code }}.{% endblock %}"
        "{% block question %}Which key has guest {{ item }}?{% endblock %}{% block answer %}key {{ code }}{% endblock %}"
    )
    [prompt] = built(folder, asking(needles="keys.md", count=1))
    assert "Which key has guest" in text_of(prompt) and prompt.answer.startswith("key ")
    assert prompt.prompt_version.startswith("two-facts+keys@")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.md", b"\xff\xfe", "document x.md: 'utf-8' codec"),
        ("x.md", b"a\0b", "document x.md: it holds NUL bytes"),
        ("x.md", b" \n", "documents x.*: no text in them"),
        ("x.md", b"short", "documents x.*: only 0 different train prompts"),
        ("x.jsonl", b'{"text": "a"}\n{"txt": "a"}', "x.jsonl line 2: text is NoneType, expected a string"),
        ("x.jsonl", b'{"text": ', "x.jsonl line 1: not valid JSON"),
        ("y.md", b"", "documents x.*: no such file"),
        ("x\n.md", b"a", "its name is no printable UTF-8"),
    ],
)
def test_unusable_documents_are_named_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnusableInput) as raised:
        built(tmp_path, asking(paths=("x*" if "\n" in name else "x.*",), count=1, decoys=0))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_loop_of_links_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.md").write_text(prose(1, 80))
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    [prompt] = built(tmp_path, asking(paths=("**/*.md",), count=1))
    assert [file["path"] for file in json.loads(prompt.provenance)["files"]] == ["a/x.md"]


def test_tokens_before_places_add_up() -> None:
    text = "one\ntwo\nthree\n"
    assert tokens_before(text, [8, 0, 4, 8], count_bytes) == [8, 0, 4, 8]
