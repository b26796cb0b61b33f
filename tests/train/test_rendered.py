"""Rendered once, whatever is resumed, killed or damaged; and equal to encoding every row by hand."""

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from configs.errors import UnusableInput
from data import chat
from data.byte_tokenizer import build_byte_tokenizer
from data.chat import Encoded, Reason, rendering_identity
from tests.train.fixtures import conversation, save_dataset, tiny_tokenizer
from train.batches import Example, admit, num_trained
from train.cached_table import KEPT
from train.dataset import Examples, encode_row, load_examples
from train.rendered import Rendered, read_or_render

ROWS = [
    Example(
        f"t{number}",
        Encoded(
            [number, 7, 8 + number][: 1 + number % 3], bytes([Reason.TRAINED, Reason.USER, Reason.TRAINED][: 1 + number % 3])
        ),
        "unfinished" if number % 7 == 0 else "",
    )
    for number in range(40)
]
SPLITS = {"train": ROWS[:33], "validation": ROWS[33:]}
IDENTITY = {"dataset": "d", "tokenizer": "t"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    """A folder with ROWS in it."""
    read_or_render(tmp_path / "rendered", IDENTITY, SPLITS, is_writer=True)
    return tmp_path / "rendered"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every call of a chat template."""
    counted, plain = [], chat.render

    def render(*arguments: object, **named: object) -> str:
        counted.append(1)
        return plain(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(chat, "render", render)
    return counted


def never() -> Iterator[Example]:
    raise AssertionError("rendered again")
    yield


def read(folder: Path) -> dict[str, Rendered]:
    return read_or_render(folder, IDENTITY, {"train": never(), "validation": never()}, is_writer=True)


def names(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


def by_hand(dataset: Path, tokenizer: PreTrainedTokenizerBase, split: str) -> list[Example]:
    """The slow reference: every row encoded, nothing kept."""
    rows = datasets.DatasetDict.load_from_disk(str(dataset))[split].to_list()
    return [encode_row(row["trace_id"], row["messages"], tokenizer) for row in rows]


def test_what_is_read_is_what_encoding_every_row_gives(dataset: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for _ in ("rendered", "read"):
        found = load_examples(dataset, tokenizer, tmp_path)
        for split, rows in zip(Examples._fields, found, strict=True):
            expected = by_hand(dataset, tokenizer, split)
            assert list(rows.examples()) == expected and list(rows) == [example.encoded for example in expected]
            assert rows.lengths().tolist() == [len(example.encoded.ids) for example in expected]
            assert rows.trained().tolist() == [num_trained(example.encoded) for example in expected]
            assert rows.sha256() == sha256_of(expected)


def sha256_of(examples: Sequence[Example]) -> str:
    """What Rendered.sha256 says it is, an example at a time."""
    columns = (
        "".join(f"{example.trace_id}\n" for example in examples).encode(),
        np.array([len(example.encoded.ids) for example in examples], np.int64).tobytes(),
        np.array([token for example in examples for token in example.encoded.ids], np.int32).tobytes(),
        np.array([trained for example in examples for trained in example.encoded.mask], np.bool_).tobytes(),
    )
    return hashlib.sha256(b"".join(hashlib.sha256(column).digest() for column in columns)).hexdigest()


def test_identity_is_of_the_chosen_rows_and_changes_with_each_of_their_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.rendered.BATCH_TOKENS", 8)  # several batches in the file
    rows = [Example(f"t{number}", Encoded([number, 5, 6, 7], b"\2\1\1\6")) for number in range(9)]
    found = read_or_render(tmp_path, IDENTITY, {"validation": rows[:2], "train": rows[2:]}, is_writer=True)["train"]
    assert found.sha256() == sha256_of(rows[2:])
    chosen = [0, 3, 4, 6]
    assert found.select(np.array(chosen)).sha256() == sha256_of([rows[2 + row] for row in chosen])
    trace_id, encoded, _ = rows[2]
    others = [
        Example("x", encoded),
        Example(trace_id, Encoded([9, 5, 6, 7], encoded.reasons)),
        Example(trace_id, Encoded(encoded.ids, b"\2\2\1\6")),
    ]
    assert len({sha256_of([other, *rows[3:]]) for other in (rows[2], *others)}) == 4


def test_rows_of_every_shape_come_back_and_can_be_chosen(rendered: Path) -> None:
    found = read(rendered)
    assert {split: list(rows.examples()) for split, rows in found.items()} == SPLITS
    for split, rows in found.items():
        assert rows.lengths().tolist() == [len(row.encoded.ids) for row in SPLITS[split]]
        assert rows.trained().tolist() == [num_trained(row.encoded) for row in SPLITS[split]]
    some = found["train"].select(found["train"].lengths().nonzero()[0][[5, 3, 32]])
    assert list(some.examples()) == [ROWS[5], ROWS[3], ROWS[32]] and some.lengths().tolist() == [3, 1, 3]
    assert some[-1] == ROWS[32].encoded and some[:2] == [ROWS[5].encoded, ROWS[3].encoded]
    with pytest.raises(IndexError):
        some[3]


def test_rows_stay_on_disk(tmp_path: Path) -> None:
    rows = [Example(str(number), Encoded(list(range(10_000)), b"\1" * 10_000)) for number in range(300)]  # 12 MB of ids
    read_or_render(tmp_path, IDENTITY, {"train": rows}, is_writer=True)
    before = pa.total_allocated_bytes()
    found = read_or_render(tmp_path, IDENTITY, {}, is_writer=False)["train"]
    assert list(found.examples()) == rows and pa.total_allocated_bytes() - before < 100_000


# --- exactly once ------------------------------------------------------------------------------------------------


def test_a_change_of_template_tokenizer_code_or_rows_renders_again_and_what_is_kept_is_bounded(
    dataset: Path, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def renders(tokenizer: PreTrainedTokenizerBase, folder: Path = dataset) -> bool:
        before = len(calls)
        found = load_examples(folder, tokenizer, tmp_path / "rendered")
        assert list(found.train.examples()) == by_hand(folder, tokenizer, "train")
        return len(calls) - before > 2 * 3 * 22  # by_hand calls it too

    assert renders(tiny_tokenizer()) and not renders(tiny_tokenizer())
    changed = tiny_tokenizer()
    assert isinstance(changed.chat_template, str)
    changed.chat_template = "{{ '' }}" + changed.chat_template
    assert renders(changed) and not renders(changed) and not renders(tiny_tokenizer())
    changed.add_tokens(["+++"])
    assert renders(changed)
    changed.pad_token = "<think>"
    assert renders(changed)
    assert renders(tiny_tokenizer(), save_dataset(tmp_path / "other", num_train=23))
    monkeypatch.setattr(chat, "RENDERER_VERSION", 0)
    assert renders(changed)
    assert names(tmp_path / "rendered") == [".arrow"] * KEPT + [".json"] * KEPT


def test_a_tokenizer_is_known_by_what_it_is_not_by_where_it_lies_or_what_it_did(tmp_path: Path) -> None:
    known = rendering_identity(tiny_tokenizer())
    for folder in (tmp_path / "a", tmp_path / "b"):
        tiny_tokenizer().save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        before = rendering_identity(tokenizer)
        tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
        assert rendering_identity(tokenizer) == before
        assert {name for name in known if known[name] != before[name]} <= {"tokenizer"}, "saved and loaded"
    assert rendering_identity(AutoTokenizer.from_pretrained(tmp_path / "a")) == before
    assert {"chat_template", "special_tokens", "renderer", "transformers"} <= known.keys()


def test_the_key_does_not_follow_the_fingerprint_that_datasets_draws(dataset: Path, tmp_path: Path, calls: list[int]) -> None:
    load_examples(dataset, tiny_tokenizer(), tmp_path / "rendered")
    state = dataset / "train" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_fingerprint": "0"}))
    once = len(calls)
    load_examples(dataset, tiny_tokenizer(), tmp_path / "rendered")
    assert len(calls) == once


# --- damage and death --------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "a bit in the ids": lambda data, commit: flip(data, data.stat().st_size // 2),
    "the first byte": lambda data, commit: flip(data, 0),
    "cut short": lambda data, commit: os.truncate(data, data.stat().st_size - 64),
    "gone": lambda data, commit: data.unlink(),
    "a bit in the commit": lambda data, commit: flip(commit, 20),
    "an empty commit": lambda data, commit: commit.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_rendered_again_with_a_warning(rendered: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    [data], [commit] = rendered.glob("*.arrow"), rendered.glob("*.json")
    whole = data.read_bytes(), commit.read_bytes()
    DAMAGES[damage](data, commit)
    with caplog.at_level(logging.WARNING):
        found = read_or_render(rendered, IDENTITY, SPLITS, is_writer=True)
    assert {split: list(rows.examples()) for split, rows in found.items()} == SPLITS
    assert [record.message for record in caplog.records if record.message.endswith("; the dataset is rendered again")]
    assert (data.read_bytes(), commit.read_bytes()) == whole
    read(rendered)


def is_change(event: str, arguments: tuple) -> bool:
    return event in ("os.rename", "os.remove", "os.mkdir") or (
        event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    )


def render_and_die_at(moment: int, folder: Path) -> None:
    """As a SIGKILL at the moment-th change of the file system leaves things; in a child."""
    left = [moment]

    def hook(event: str, arguments: tuple) -> None:
        if is_change(event, arguments):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)

    sys.addaudithook(hook)
    read_or_render(folder, IDENTITY, SPLITS, is_writer=True)


def in_child(act: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_writer_killed_at_any_change_loses_nothing(tmp_path: Path) -> None:
    moment = 0
    while True:
        folder = tmp_path / str(moment)
        code = in_child(lambda: render_and_die_at(moment, folder))  # noqa: B023
        found = read_or_render(folder, IDENTITY, SPLITS, is_writer=True)
        assert {split: list(rows.examples()) for split, rows in found.items()} == SPLITS, moment
        assert names(folder) == [".arrow", ".json"], moment
        if code == 0:
            break
        moment += 1
    assert moment >= 5


def slowly(seconds: float) -> dict[str, Iterator[Example]]:
    def pausing(rows: list[Example]) -> Iterator[Example]:
        for row in rows:
            time.sleep(seconds / len(ROWS))
            yield row

    return {split: pausing(rows) for split, rows in SPLITS.items()}


def test_ranks_wait_for_the_writer_even_for_one_that_is_killed_and_started_again(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")

    def wait() -> None:
        found = read_or_render(tmp_path, IDENTITY, {"train": never()}, is_writer=False)
        assert {split: list(rows.examples()) for split, rows in found.items()} == SPLITS

    waiting = [fork.Process(target=wait) for _ in range(2)]
    for rank in waiting:
        rank.start()
    writer = fork.Process(target=lambda: read_or_render(tmp_path, IDENTITY, slowly(60), is_writer=True))
    writer.start()
    while not list(tmp_path.glob(".*.tmp")):
        time.sleep(0.01)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert all(rank.is_alive() for rank in waiting) and not list(tmp_path.glob("*.json"))
    read_or_render(tmp_path, IDENTITY, slowly(0.2), is_writer=True)
    for rank in waiting:
        rank.join(30)
        assert rank.exitcode == 0
    assert names(tmp_path) == [".arrow", ".json"]


def test_a_trace_that_the_template_cannot_render_is_named_and_nothing_is_kept(tmp_path: Path) -> None:
    forgetful = tiny_tokenizer()
    forgetful.chat_template = (
        "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
        "{%- if message.role == 'assistant' and loop.last -%}<think>{{ message.reasoning_content }}</think>{%- endif -%}"
        "{{ message.content }}<|im_end|>{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
    )
    two_turns = [*conversation("1+1?", "two", "2"), *conversation("2+2?", "four", "4")]
    rows = [{"trace_id": f"t{number}", "messages": two_turns if number == 3 else two_turns[:2]} for number in range(5)]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "dataset"))
    with pytest.raises(UnusableInput, match=r"^trace t3: chat template: turn 1 is rendered differently"):
        load_examples(tmp_path / "dataset", forgetful, tmp_path / "rendered")
    assert list((tmp_path / "rendered").iterdir()) == []


# --- where every token goes --------------------------------------------------------------------------------------


def test_counts_by_reason_are_those_of_the_rows(rendered: Path) -> None:
    for split, rows in read(rendered).items():
        chosen = rows.select(np.arange(len(rows))[::-2])
        counts = chosen.counts()
        assert counts.dropped_N.tolist() == [row.dropped for row in SPLITS[split][::-2]]
        for found, row in zip(counts.by_reason_NR.tolist(), SPLITS[split][::-2], strict=True):
            assert found == [[Reason.FIRST_TOKEN, *row.encoded.reasons[1:]].count(reason) for reason in Reason]


def test_what_was_cut_is_dropped_as_unfinished_and_never_given_a_stop(tmp_path: Path) -> None:
    """finish_reason of every kind, against a dataset that does not say; of the same conversations, for two dialects."""
    messages = conversation("1+1?", "two", "2")
    rows = [{"trace_id": end, "messages": messages, "finish_reason": end} for end in ("stop", "length", "loop", "", "tool_calls")]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "known"))
    bare = [{"trace_id": row["trace_id"], "messages": messages} for row in rows]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(bare)}).save_to_disk(str(tmp_path / "unknown"))
    chatml, glm = tiny_tokenizer(), open_ended_tokenizer()
    for tokenizer in (chatml, glm):
        train = load_examples(tmp_path / "known", tokenizer, tmp_path / "rendered").train
        assert [example.dropped for example in train.examples()] == ["", *["unfinished"] * 4]
        kept, ledger = admit(train.counts(), 1000)
        assert kept.tolist() == [0] and ledger.balances and ledger.dropped_traces == {"unfinished": 4}
        assert ledger.dropped["unfinished"] == int(train.lengths()[1:].sum()) and ledger.truncated == 0
    unknown = [list(load_examples(tmp_path / "unknown", one, tmp_path / "rendered").train.examples()) for one in (chatml, glm)]
    assert {row.dropped for row in unknown[0]} == {""} and {row.dropped for row in unknown[1]} == {"unfinished"}
    assert glm.convert_tokens_to_ids("<|user|>") not in unknown[1][0].encoded.trained


def test_over_length_trace_is_dropped_whole_never_cut(tmp_path: Path) -> None:
    train = load_examples(save_dataset(tmp_path / "dataset", long_traces=4), tiny_tokenizer(), tmp_path / "rendered").train
    kept_R, ledger = admit(train.counts(), 100)
    assert ledger.dropped_traces == {"over_length": 4} and ledger.truncated == 0
    assert ledger.dropped["over_length"] == int(np.sort(train.lengths())[-4:].sum())
    stop = tiny_tokenizer().eos_token_id
    assert all(document.trained[-1] == stop for document in train.select(kept_R)), "every trained trace ends as it ended"


def open_ended_tokenizer() -> PreTrainedTokenizerBase:
    """GLM's dialect: an assistant turn has no stop of its own."""
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
    template = (Path(chat.__file__).parents[1] / "teacher" / "embedded" / "chat_template.jinja").read_text()
    return build_byte_tokenizer(markers, eos="<|endoftext|>", pad="<|endoftext|>", chat_template=template)
