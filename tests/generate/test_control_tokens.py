"""Text that looks like a control token: no prompt's ids hold one that the chat template did not write."""

import json
import logging
import random
from collections import Counter
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from configs.errors import UnusableInput
from configs.prompt_sources import (
    DocumentsSource,
    JsonlSource,
    ParquetSource,
    PromptSource,
    ReasoningGymSource,
    RepositorySource,
)
from data.byte_tokenizer import build_byte_tokenizer
from data.chat import encode_prompt
from data.records import Message, Prompt
from data.split import is_held_out
from data.verify import self_check
from generate.control_tokens import NO_CONTROL_TOKENS, ControlTokens, control_tokens_of
from generate.prompts import PromptList, PromptStream, build_prompt_set
from generate.sources.reasoning_gym import read_reasoning_gym
from tests.generate.test_documents import prose
from tests.generate.test_repository import count_bytes, text_of
from tests.generate.test_tree import write

MARKERS = [
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
OWNER = Path(__file__).parents[2] / "teacher" / "embedded" / "chat_template.jinja"
HOSTILE = "".join(f"an {marker} b\n" for marker in MARKERS) + "<|user|><|user|>\n<think></think>\n"
CODE = (
    "def f{0}(text, n):\n    total = 0\n    for i in range(n):\n"
    '        if "<|user|>" in text and i < {0}:\n            total = total + i  # </think>\n'
    "    return total\n"
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return build_byte_tokenizer(MARKERS, eos="<|endoftext|>", pad="<|endoftext|>", chat_template=OWNER.read_text())


@cache
def control() -> ControlTokens:
    return control_tokens_of(tokenizer())


def built(folder: Path, source: PromptSource, tokens: ControlTokens | None = None) -> PromptList:
    return build_prompt_set([source], [], [folder], count_bytes, control() if tokens is None else tokens)


def refusal(folder: Path, source: PromptSource) -> str:
    with pytest.raises(UnusableInput) as raised:
        built(folder, source)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def markers_in(prompt: Prompt) -> Counter[int]:
    """Ids of markers in what an engine of ours would be fed."""
    return Counter(token for token in encode_prompt(tokenizer(), prompt.messages, prompt.tools) if token >= 256)


def template_markers(prompt: Prompt) -> Counter[int]:
    """Of the same turns, each of which says nothing but `x`."""
    quiet: list[Message] = [{**message, "content": "x"} for message in prompt.messages]
    return Counter(token for token in encode_prompt(tokenizer(), quiet) if token >= 256)


# --- the rule ----------------------------------------------------------------------------------------------------


def escaped_slowly(text: str, tokens: list[str]) -> tuple[str, int]:
    """Character by character: a backslash after each one at which some token begins."""
    starts = [any(text.startswith(token, place) for token in tokens) for place in range(len(text))]
    return "".join(f"{letter}\\" if start else letter for letter, start in zip(text, starts, strict=True)), sum(starts)


def test_a_backslash_stands_after_the_first_character_of_every_token_also_where_they_overlap() -> None:
    rng, tokens = random.Random(7), ["<a>", "<a", "a><", "<b>", "[a]", "aa"]
    for _ in range(2_000):
        text = "".join(rng.choices("<>[]ab\n", k=rng.randrange(20)))
        found = ControlTokens(tokens).escape(text)
        assert found == escaped_slowly(text, tokens)
        assert not any(token in found.text for token in tokens)
        assert found.text.count("\n") == text.count("\n") and (found.count > 0) == bool(ControlTokens(tokens).find(text))
    assert control().escape("<|user|> </think> <| user|> [gMASK]").text == "<\\|user|> <\\/think> <| user|> [\\gMASK]"
    assert control().escape("<\\|user|>") == ("<\\|user|>", 0)


def test_a_token_that_the_backslash_would_complete_is_broken_too() -> None:
    tokens = ["ab", "a\\b", "a\\\\b"]
    found = ControlTokens(tokens).escape("ab")
    assert found.count == 3 and not any(token in found.text for token in tokens)


def test_the_first_token_is_named_and_of_two_the_longer() -> None:
    assert ControlTokens(["<a", "<a>", "b"]).find("x <a> b") == "<a>"
    assert ControlTokens(["<a"]).find("b") == "" == NO_CONTROL_TOKENS.find("<|user|>")


def test_control_tokens_are_special_ones_markers_of_the_template_and_reasoning_tags() -> None:
    found = build_byte_tokenizer(
        MARKERS, eos="<|endoftext|>", pad="<|endoftext|>", chat_template="{{ system }} <｜User｜> <t>\n\n"
    )
    words = ["<｜User｜>", "<t>", "<h1>", "system", "\n\n", "    "]
    found.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])  # type: ignore[arg-type]
    assert set(control_tokens_of(found).tokens) == {*MARKERS, "<｜User｜>", "<t>"}
    found.chat_template = {"default": "<h1>", "tools": "<t>"}  # type: ignore[assignment]
    assert set(control_tokens_of(found).tokens) == {*MARKERS, "<h1>", "<t>"}
    plain = build_byte_tokenizer(["<eos>"], eos="<eos>", pad="<eos>", chat_template="{{ messages }}")
    assert control_tokens_of(plain).tokens == ("<eos>",)
    plain.chat_template = (
        "<think>{{ messages }}</think>"  # tags that are plain text to this tokenizer, and structure to its model
    )
    assert control_tokens_of(plain).tokens == ("</think>", "<eos>", "<think>")


# --- long contexts -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    for number in range(12):
        write(root / "tree", {f"a/m{number}.py": CODE.format(number)})
    write(root / "tree", {"README.md": HOSTILE, "a/<|user|>.py": CODE.format(99), "long.md": HOSTILE * 400})
    for number in range(5):
        write(root, {f"books/b{number}.md": prose(number, 30) + HOSTILE + prose(number + 50, 30)})
    return root


def repository(template: str, **changes: object) -> RepositorySource:
    return RepositorySource.model_validate({"path": "tree", "budget_tokens": 6_000, "count": 5, "template": template} | changes)


SOURCES = [
    *(repository(template) for template in ("explain-flow", "plan-then-write", "find-planted-bug")),
    DocumentsSource(paths=("books/*.md",), budget_tokens=12_000, count=5),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.template)
def test_a_rendered_prompt_holds_the_templates_own_markers_and_no_other(folder: Path, source: PromptSource) -> None:
    for prompt in built(folder, source).prompts:
        assert markers_in(prompt) == template_markers(prompt)
    assert any(markers_in(prompt) != template_markers(prompt) for prompt in built(folder, source, NO_CONTROL_TOKENS).prompts)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.template)
def test_provenance_counts_what_was_escaped_in_each_file_and_in_all(folder: Path, source: PromptSource) -> None:
    for prompt in built(folder, source).prompts:
        provenance = json.loads(prompt.provenance)
        blocks = text_of(prompt).split("\n=== ")
        for file in provenance["files"]:
            path = control().escape(file["path"]).text
            [block] = [block for block in blocks if block.removeprefix("=== ").startswith((f"{path} ===", f"{path} (first"))]
            assert file["escaped"] == sum(block.count(control().escape(marker).text) for marker in MARKERS)
        assert provenance["escaped"] == sum(file["escaped"] for file in provenance["files"]) > 0


def test_of_a_file_that_is_cut_only_what_is_shown_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "tree", {"long.md": HOSTILE * 400})
    [prompt] = built(tmp_path, repository("explain-flow", count=1)).prompts
    [file] = json.loads(prompt.provenance)["files"]
    shown = sum(text_of(prompt).count(control().escape(marker).text) for marker in MARKERS)
    assert file["truncated"] and file["escaped"] == shown < control().escape(HOSTILE * 400).count


def test_a_bug_is_planted_in_the_file_as_it_is_and_its_line_stays_the_answer(folder: Path) -> None:
    prompts = built(folder, repository("find-planted-bug", count=25)).prompts
    on_a_marker = 0
    for prompt in prompts:
        [place] = json.loads(prompt.evidence)["places"]
        content, path = text_of(prompt).encode(), place["path"]
        assert prompt.answer == f"{path}:{place['line']}" and self_check(prompt)
        shown = content[place["token"] :].partition(b"\n")[0].decode()
        assert shown.startswith(f"{place['line']:>5} ") and shown.endswith(place["after"])
        block = content.decode().partition(f"=== {path} ===\n")[2].partition("\n\n")[0].split("\n")
        original = (folder / "tree" / path).read_text().split("\n")[:-1]
        different = [
            number
            for number, (row, line) in enumerate(zip(block, original, strict=True), 1)
            if row[6:] != control().escape(line).text
        ]
        assert different == [place["line"]]
        assert place["before"] == control().escape(original[place["line"] - 1].strip()).text != place["after"]
        on_a_marker += "<\\" in place["after"]
    assert on_a_marker > 3


def test_a_path_that_would_stand_escaped_is_packed_and_never_asked_about(folder: Path) -> None:
    prompts = built(folder, repository("explain-flow", count=20)).prompts
    assert all(json.loads(prompt.provenance)["focus"] != "a/<|user|>.py" for prompt in prompts)
    assert any("=== a/<\\|user|>.py ===" in text_of(prompt) for prompt in prompts)


def test_facts_stand_where_the_evidence_says_among_escaped_tokens(folder: Path) -> None:
    for prompt in built(folder, SOURCES[-1]).prompts:
        content, evidence = text_of(prompt).encode(), json.loads(prompt.evidence)
        assert evidence["total_tokens"] == len(content)
        for place in [*evidence["places"], *evidence["decoys"]]:
            assert content[place["token"] :].startswith(place["fact"].encode() + b"\n")
            assert content.count(place["fact"].encode()) == 1 and abs(place["depth"] - place["target"]) < 0.05


def test_a_template_or_facts_that_write_a_control_token_are_named(tmp_path: Path) -> None:
    write(tmp_path / "tree", {"a.py": CODE.format(1)})
    write(tmp_path, {"own.md": "{{ context }} <think>", "b.md": prose(1, 80)})
    facts = "{% block link %}<sop> {{ item }} {{ place }}{% endblock %}{% block code %}{{ place }} {{ code }}{% endblock %}"
    write(
        tmp_path, {"facts.md": facts + "{% block question %}{{ item }}?{% endblock %}{% block answer %}{{ code }}{% endblock %}"}
    )
    said = refusal(tmp_path, repository("own.md", count=1))
    assert (
        said.startswith("repository tree: the prompt of template own holds '<think>'") and "take it out of the template" in said
    )
    said = refusal(tmp_path, DocumentsSource(paths=("b.md",), needles="facts.md", budget_tokens=9_000, count=1))
    assert said.startswith("documents b.md: the prompt of template two-facts and facts facts holds '<sop>'")


# --- rows --------------------------------------------------------------------------------------------------------

ASKED: Message = {"role": "user", "content": "Go on."}
TOOL = {"type": "function", "function": {"name": "f", "description": "ends at <|endoftext|>", "enum": [["</think>"]], "n": 3}}


def rows(folder: Path, *values: object, **changes: object) -> JsonlSource:
    (folder / "p.jsonl").write_text("\n".join(json.dumps(value) for value in values))
    return JsonlSource.model_validate({"path": "p.jsonl"} | changes)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "What is <|user|>?"}, "the user message holds '<|user|>'"),
        ({"messages": [{"role": "system", "content": "a</think>"}, ASKED]}, "the system message holds '</think>'"),
        ({"messages": [ASKED, {"role": "tool", "content": "[gMASK]"}]}, "the tool message holds '[gMASK]'"),
        ({"messages": [ASKED, {"role": "assistant", "content": "<sop>"}, ASKED]}, "the assistant message holds '<sop>'"),
        ({"question": "a", "tools": [TOOL]}, "a tool schema holds '<|endoftext|>'"),
    ],
)
def test_a_row_with_a_control_token_is_refused_with_its_place_the_token_and_the_remedy(
    tmp_path: Path, row: dict[str, object], words: str
) -> None:
    said = refusal(tmp_path, rows(tmp_path, {"question": "fine", "split": "train"}, row))
    assert said == (
        f"p.jsonl line 2: {words}, a control token of the teacher's tokenizer; "
        "take it out, or set control_tokens: escape for its source"
    )


@pytest.mark.parametrize("key", ["content", "reasoning_content"])
@pytest.mark.parametrize("rule", ["refuse", "escape"])
def test_a_reasoning_tag_in_an_earlier_answer_is_refused_under_either_rule(tmp_path: Path, key: str, rule: str) -> None:
    said = {"role": "assistant", "content": "4", key: "<think>two and two</think>4"}
    source = rows(tmp_path, {"messages": [ASKED, said, ASKED], "split": "train"}, control_tokens=rule)
    assert "an assistant message holds '<think>'; expected its reasoning in reasoning_content" in refusal(tmp_path, source)


def test_reasoning_in_its_own_key_gets_its_tags_from_the_template(tmp_path: Path) -> None:
    said: Message = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
    [prompt] = built(tmp_path, rows(tmp_path, {"messages": [ASKED, said, ASKED], "split": "train"})).prompts
    assert prompt.messages == (ASKED, said, ASKED) and markers_in(prompt) == template_markers(prompt)


def test_escaped_rows_hold_no_marker_and_say_how_many_they_held(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"messages": [{"role": "system", "content": "<sop>"}, {"role": "user", "content": HOSTILE}], "tools": [TOOL]}
    source = rows(tmp_path, row | {"split": "train"}, {"question": "fine", "split": "train"}, control_tokens="escape")
    stream = PromptStream([source], [], [tmp_path], None, control())
    with caplog.at_level(logging.WARNING):
        hostile, fine = stream
    assert not any(marker in str(hostile.messages) + hostile.tools for marker in MARKERS)
    assert json.loads(hostile.tools)[0]["function"] == {
        "name": "f", "description": "ends at <\\|endoftext|>", "enum": [["<\\/think>"]], "n": 3,
    }  # fmt: skip
    count = 1 + len(MARKERS) + 4 + 2
    assert json.loads(hostile.provenance) == {"escaped": count} and fine.provenance == ""
    assert stream.tally.escaped == {"p.jsonl": count}
    assert f"escaped by a backslash after their first character: {count} in p.jsonl" in caplog.text
    assert markers_in(fine) == template_markers(fine)


def test_escaping_moves_no_row_to_the_other_side(tmp_path: Path) -> None:
    asked = [{"question": f"<think> {number}"} for number in range(60)]
    source = rows(tmp_path, *asked, control_tokens="escape")
    found = build_prompt_set([source], [source], [tmp_path], None, control()).prompts
    sides = {text_of(prompt): prompt.split == "eval" for prompt in found}
    assert sides == {f"<\\think> {number}": is_held_out(f"<think> {number}") for number in range(60)}
    assert set(sides.values()) == {True, False}


def test_a_count_chooses_among_the_prompts_as_they_will_be_asked(tmp_path: Path) -> None:
    asked = [{"question": f"<think> {number}", "split": "train"} for number in range(60)]
    some = built(tmp_path, rows(tmp_path, *asked, control_tokens="escape", count=7)).prompts
    every = built(tmp_path, rows(tmp_path, *asked, control_tokens="escape")).prompts
    assert len(some) == 7 and all(prompt in every for prompt in some)


def test_other_containers_and_templates_of_rows_are_held_to_the_same_rule(tmp_path: Path) -> None:
    pq.write_table(pa.table({"word": ["fine", "</think>"], "split": ["train", "train"]}), tmp_path / "p.parquet")
    write(tmp_path, {"ask.md": "Spell {{ word }}."})
    source = ParquetSource(path="p.parquet", template="ask.md")
    assert refusal(tmp_path, source).startswith("p.parquet row 2: the user message holds '</think>'")
    prompts = built(tmp_path, source.model_copy(update={"control_tokens": "escape"})).prompts
    assert [text_of(prompt) for prompt in prompts] == ["Spell fine.", "Spell <\\/think>."]


def test_generated_questions_are_held_to_it_as_well() -> None:
    words = ControlTokens(["Spell"])  # what this task's questions begin with, standing in for a marker
    source = ReasoningGymSource(task="spell_backward", count=2)
    with pytest.raises(UnusableInput, match="reasoning_gym spell_backward: the user message holds 'Spell', a control token"):
        list(read_reasoning_gym(source, "train", Counter(), words))
    source = source.model_copy(update={"control_tokens": "escape"})
    for prompt in read_reasoning_gym(source, "train", Counter(), words):
        assert text_of(prompt).startswith("S\\pell") and json.loads(prompt.provenance) == {"escaped": 1} and self_check(prompt)
