"""Items asked once more in other words: which ones, in which words, and that each has its original in the set."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.errors import UnusableInput
from configs.prompt_sources import TWIN_FRAMES, JsonlSource, OmniscienceSource, PromptSource, ReasoningGymSource, Twins
from configs.schema import Generate
from data.prompt_set import PromptSet, read_prompts, write_prompts
from data.records import Prompt, digest
from data.schema import PROMPT, to_table
from data.split import is_held_out
from data.store import RunFolder, seal
from data.verify import self_check
from generate.control_tokens import ControlTokens
from generate.prompts import PromptStream, build_prompt_set
from generate.twins import framed

SUMS = ReasoningGymSource(task="chain_sum", params={"min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 3}, count=20)


def write(folder: Path, *rows: dict[str, object]) -> JsonlSource:
    (folder / "train.jsonl").write_text('{"question": "2+2?", "answer": "4", "split": "train"}')
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return JsonlSource(path="p.jsonl")


def suite(folder: Path, source: PromptSource) -> list[Prompt]:
    (folder / "train.jsonl").write_text('{"question": "2+2?", "answer": "4", "split": "train"}')
    found = build_prompt_set([JsonlSource(path="train.jsonl")], [source], [folder]).prompts
    return [prompt for prompt in found if prompt.split == "eval"]


def text_of(prompt: Prompt) -> str:
    return prompt.messages[-1].get("content", "")


def row(name: str, question: str = "", **more: object) -> dict[str, object]:
    return {"id": name, "question": question or f"{name}?", "answer": "4", "split": "eval"} | more


# --- frames ------------------------------------------------------------------------------------------------------


def test_a_framed_twin_has_its_originals_words_answer_and_judge(tmp_path: Path) -> None:
    items = suite(tmp_path, SUMS.model_copy(update={"twins": Twins(count=6)}))
    originals = {item.prompt_id: item for item in items if not item.twin_of}
    twins = [item for item in items if item.twin_of]
    assert (len(originals), len(twins)) == (20, 6)
    for twin in twins:
        original = originals[twin.twin_of]
        assert text_of(original) in text_of(twin) and text_of(twin) != text_of(original)
        assert text_of(twin) in {frame.replace("{question}", text_of(original)) for frame in TWIN_FRAMES}
        assert (twin.answer, twin.verifier, twin.details, twin.task) == (
            original.answer, original.verifier, original.details, original.task,
        )  # fmt: skip
        assert self_check(twin)


def test_the_chosen_are_those_whose_ids_hash_lowest_whatever_passes_beside_them(tmp_path: Path) -> None:
    """By an obvious reference: all of them sorted."""
    for count in (1, 3, 19, 50):
        items = suite(tmp_path, SUMS.model_copy(update={"twins": Twins(count=count)}))
        plain = sorted((item for item in items if not item.twin_of), key=lambda item: digest(item.prompt_id, "twin"))
        assert [item.twin_of for item in items if item.twin_of] == [item.prompt_id for item in plain[:count]]


def test_a_share_chooses_each_item_for_itself(tmp_path: Path) -> None:
    """Another seed's items change no choice; half of 20 is 10 give or take five standard deviations of 2.2."""
    few = {item.twin_of for item in suite(tmp_path, SUMS.model_copy(update={"twins": Twins(share=0.5)}))} - {""}
    fewer = SUMS.model_copy(update={"twins": Twins(share=0.5), "count": 10})
    items = suite(tmp_path, fewer)
    assert {item.twin_of for item in items} - {""} == few & {item.prompt_id for item in items} and 0 < len(few) < 20
    all_of_them = suite(tmp_path, SUMS.model_copy(update={"twins": Twins(share=1.0)}))
    assert sum(bool(item.twin_of) for item in all_of_them) == 20


def test_the_same_recipe_has_the_same_twins_and_other_frames_other_ones(tmp_path: Path) -> None:
    asked = SUMS.model_copy(update={"twins": Twins(count=5)})
    assert suite(tmp_path, asked) == suite(tmp_path, asked)
    other = suite(tmp_path, SUMS.model_copy(update={"twins": Twins(count=5, frames=("Do this {now}: {question}",))}))
    assert not {item.prompt_id for item in suite(tmp_path, asked) if item.twin_of} & {item.prompt_id for item in other}
    assert all(text_of(item).startswith("Do this {now}: ") for item in other if item.twin_of)


def test_a_question_with_braces_stands_in_the_frame_as_it_is(tmp_path: Path) -> None:
    [item] = suite(tmp_path, write(tmp_path, row("a", "Is {question} or {0} code?")))
    assert text_of(framed(item, "Well: {question}")) == "Well: Is {question} or {0} code?"


def test_of_several_turns_the_last_question_is_framed(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}, {"role": "user", "content": "+1?"}]
    [item] = suite(tmp_path, write(tmp_path, {"messages": turns, "answer": "5", "split": "eval"}))
    twin = framed(item, "Then: {question}")
    assert [message.get("content") for message in twin.messages] == ["2+2?", "4", "Then: +1?"] and item.messages[2] == turns[2]


def test_facts_that_nobody_knows_have_twins_too(tmp_path: Path) -> None:
    facts = [{"question": f"Who is {name}?", "answer": "", "domain": "d", "answerable": False} for name in "abc"]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, facts)))
    items = suite(tmp_path, OmniscienceSource(path="f.jsonl", twins=Twins(count=2)))
    assert [item.known for item in items] == [False] * 5 and sum(bool(item.twin_of) for item in items) == 2


@pytest.mark.parametrize(
    "twins",
    [{}, {"count": 1, "share": 0.5}, {"count": 0}, {"share": 0.0}, {"count": 1, "frames": []}, {"count": 1, "frames": ["no"]},
     {"count": 1, "frames": ["{question}"]}, {"count": 1, "frames": ["{question} {question}"]}],
)  # fmt: skip
def test_settings_that_make_no_twins_are_refused(twins: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Twins.model_validate(twins)


def test_twins_never_teach() -> None:
    with pytest.raises(ValidationError, match=r"prompts 0: twins measure, they do not teach"):
        Generate(prompts=(SUMS.model_copy(update={"twins": Twins(count=1)}),))


def test_a_frame_with_a_control_token_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, row("a")).model_copy(update={"twins": Twins(count=1, frames=("<|user|>{question}",))})
    stream = PromptStream([JsonlSource(path="train.jsonl")], [source], [tmp_path], control=ControlTokens(["<|user|>"]))
    with pytest.raises(UnusableInput, match=r"the frame '<\|user\|>\{question\}' holds '<\|user\|>'"):
        list(stream)


def test_a_source_without_twins_is_dumped_as_before() -> None:
    """What a run's fingerprint is made of: a new setting that nobody uses must not make finished runs unfinished."""
    assert "twins" not in SUMS.model_dump(mode="json") and "twins" not in JsonlSource(path="p").model_dump(mode="json")
    assert SUMS.model_copy(update={"twins": Twins(count=1)}).model_dump(mode="json")["twins"]["count"] == 1


# --- rows --------------------------------------------------------------------------------------------------------


def test_rows_say_whose_twins_they_are_before_or_behind_their_original(tmp_path: Path) -> None:
    source = write(tmp_path, row("b", twin_of="a"), row("a"), row("c", twin_of="a"), row("7"), row("d", twin_of=7))
    items = {text_of(item): item for item in suite(tmp_path, source)}
    assert [items[name].twin_of for name in ("b?", "a?", "c?", "7?", "d?")] == [
        items["a?"].prompt_id, "", items["a?"].prompt_id, "", items["7?"].prompt_id,
    ]  # fmt: skip


def test_an_id_is_no_part_of_what_is_asked(tmp_path: Path) -> None:
    [named] = suite(tmp_path, write(tmp_path, row("a")))
    [plain] = suite(tmp_path, write(tmp_path, {"question": "a?", "answer": "4", "split": "eval"}))
    assert named == plain


def test_a_twin_without_a_side_stands_on_its_originals(tmp_path: Path) -> None:
    """One in ten rephrasings of a training prompt would be an evaluation item otherwise, and the other way round."""
    asked = [{"id": n, "question": f"What is {n} and {n}?", "answer": "x"} for n in range(60)]
    twins = [{"question": f"Add {n} to {n}.", "answer": "x", "twin_of": n} for n in range(60)]
    source = write(tmp_path, *asked, *twins)
    found = build_prompt_set([source], [source], [tmp_path]).prompts
    by_id = {item.prompt_id: item for item in found}
    assert all(item.split == by_id[item.twin_of].split for item in found if item.twin_of) and len(found) == 120
    assert any(is_held_out(text_of(item)) != (item.split == "eval") for item in found if item.twin_of)


def test_twins_come_with_their_originals_and_are_not_counted(tmp_path: Path) -> None:
    rows = [row(f"o{n}") for n in range(12)] + [row(f"t{n}", twin_of=f"o{n}") for n in range(12)]
    items = suite(tmp_path, write(tmp_path, *rows).model_copy(update={"count": 5}))
    originals = {item.prompt_id for item in items if not item.twin_of}
    assert len(originals) == 5 and {item.twin_of for item in items if item.twin_of} == originals


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row("a"), row("b", twin_of="x")], "p.jsonl line 2: twin_of 'x': no row of the file has this id"),
        ([row("a"), row("b", twin_of="a"), row("c", twin_of="b")], "line 3: twin_of 'b': p.jsonl line 2 is a twin itself"),
        ([row("a"), row("a", "z?"), row("b", twin_of="a")], "p.jsonl line 2: id 'a' is also that of p.jsonl line 1"),
        (
            [row("a"), row("b", twin_of="a", split="train")],
            "line 2: split train, but its original, p.jsonl line 1, is on the side",
        ),
        ([row("a"), row("b", "a?", twin_of="a")], "p.jsonl line 2: it asks in the same words as its original"),
        ([row("a"), row("b", twin_of=None)], "p.jsonl line 2: twin_of is None, expected a text or a whole number"),
        ([row("a"), row("b", twin_of=True)], "p.jsonl line 2: twin_of is True"),
        (
            [row("a", answer="..."), row("b", twin_of="a")],  # normalised it is empty, and fails its self-check
            "the original of this twin is not in the set",
        ),
    ],
)
def test_a_twin_without_its_original_is_refused_with_its_line(tmp_path: Path, rows: list[dict[str, object]], said: str) -> None:
    with pytest.raises(UnusableInput) as raised:
        suite(tmp_path, write(tmp_path, *rows))
    assert said in str(raised.value) and "\n" not in str(raised.value)


# --- on disk -----------------------------------------------------------------------------------------------------


def test_a_prompt_set_of_before_twins_is_read_as_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = suite(tmp_path, write(tmp_path, row("a"), row("b", twin_of="a")))
    assert to_table(items, Prompt).schema == PROMPT
    old_schema = PROMPT.remove(PROMPT.get_field_index("twin_of"))
    with monkeypatch.context() as patched:
        patched.setattr("data.prompt_set.PROMPT", old_schema)
        patched.setattr("data.prompt_set.to_table", lambda batch, kind: to_table(batch, kind).select(old_schema.names))
        run = RunFolder(tmp_path / "old")
        path = write_prompts(run, items)
        seal(run, run.prompts, stage="prompts", fingerprint="f", inputs={}, files=[path], counts={}, seconds=0.0)
    assert [(item.prompt_id, item.twin_of) for item in read_prompts(run)] == [(item.prompt_id, "") for item in items]
    with PromptSet.open(run) as found:
        assert found.prompts(found.positions_of([items[1].prompt_id]))[0].answer == "4" and len(found.index("eval")) == 2
        assert found.verifiers() == {"exact"}
