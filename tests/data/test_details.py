"""What a verdict says beyond its reason."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from configs.schema import Data
from data.benchmarks import OWN
from data.build import build
from data.details import in_words, of_copies, of_leaks, parsed
from data.panel import CONTAMINATION
from tests.data.make_run import make_prompt, make_run, make_trace

IDS = pa.array(["a", "b", "c", "d"])


def test_a_copy_names_its_original_and_the_others_say_nothing() -> None:
    said = of_copies(IDS, np.array([-1, 3, -1, -1])).to_pylist()
    assert said == ["", '{"original": "d"}', "", ""]


def test_a_near_copy_says_how_similar_it_is() -> None:
    said = of_copies(IDS, np.array([2, -1, -1, 2]), np.array([0.87654, 0, 0, 1.0], np.float32)).to_pylist()
    near, same = {"original": "c", "similarity": 0.877}, {"original": "c", "similarity": 1.0}
    assert [parsed(text) for text in said] == [near, {}, {}, same]
    assert in_words(parsed(said[0])) == "copy of c, similarity 0.88"
    assert in_words(parsed('{"original": "d"}')) == "copy of d"


def test_nothing_to_say_is_a_column_of_empty_texts() -> None:
    assert of_copies(IDS, np.full(4, -1)).to_pylist() == [""] * 4
    assert of_leaks(CONTAMINATION.empty_table()).to_pylist() == []


def test_a_leak_says_which_item_stands_where_whatever_its_words_are() -> None:
    excerpt = 'Say "no" \\ to\n\x1b[2J 東京'
    place = "messages.1.content:3-99"
    rows = [("", "", "", 0.0, "", "", ""), ("contaminated", "bench.jsonl:7:question", "share", 0.91666, place, excerpt, "")]
    found = pa.table([list(column) for column in zip(*rows, strict=True)], schema=CONTAMINATION)
    nothing, leak = of_leaks(found).to_pylist()
    assert nothing == ""
    assert json.loads(leak) == {
        "item": "bench.jsonl:7:question", "rule": "share", "coverage": 0.917, "place": place, "excerpt": excerpt,
    }  # fmt: skip
    assert in_words(parsed(leak)).startswith("bench.jsonl:7:question (share), 92 % of it at messages.1.content:3-99: Say")


def test_every_hit_of_a_trace_is_attributed_to_its_item(tmp_path: Path) -> None:
    questions = [f"Which {metal} do the {people} of the northern {place} valleys trade for salt and dried fish in the winter?"
                 for metal, people, place in (("copper", "herders", "river"), ("silver", "weavers", "lake"))]  # fmt: skip
    items = [make_prompt(question, "tin", split="eval", task="facts") for question in questions]
    asked = make_prompt("Tell me about the valleys.", "4")
    trace = make_trace(asked, "4", reasoning="First. " + " And then: ".join(questions))
    run = make_run(tmp_path, [asked, *items], [[trace, make_trace(asked, "4", sample=1)]])
    build(Data(filters=(), validation_share=0.0), run)
    (path,) = run.verdicts.glob("decontaminate-*.arrow")
    leaks = [parsed(text) for text in pa.ipc.open_file(path).read_all()["detail"].to_pylist() if text]
    assert len(leaks) == 1
    named = [leaks[0]["item"], *(item for item, *_ in leaks[0]["others"])]
    assert sorted(named) == sorted(f"{OWN}:{item.prompt_id}:prompt" for item in items)
    assert "(and 1 more hits)" in in_words(leaks[0])
