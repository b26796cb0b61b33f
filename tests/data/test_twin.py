"""What teaches a student something else than what it is served: each fault in a template or a tokenizer that has it."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from configs.errors import UnusableInput
from data.byte_tokenizer import build_byte_tokenizer
from data.chat import Reason, encode_conversation, encode_prompt, ends_with_stop, render
from data.twin import Tokens, served_ids

ROOT = Path(__file__).parents[2]
MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
GLM_MARKERS = (
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<think>",
    "</think>",
)
CHATML, GLM = ((ROOT / owner / "embedded" / "chat_template.jinja").read_text() for owner in ("student", "teacher"))
TEXT = "The sum of two and two is four.\n\nIs it? It is, and the answer is four. Grüße, 4 + 4 = 8.\n" * 20


def byte_tokenizer(template: str = CHATML, *, pad: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    return build_byte_tokenizer(MARKERS, eos="<|im_end|>", pad=pad, chat_template=template)


def merging_tokenizer(
    template: str = CHATML, markers: Sequence[str] = MARKERS, *, merged: Sequence[str] = (), rstrip: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE that has learnt TEXT, and all of `merged`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([*TEXT.split("."), *list(merged) * 100], trainer)
    tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False, rstrip=rstrip) for marker in markers])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=markers[2], pad_token=markers[0], chat_template=template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """It knows a few letters, and <unk>."""
    letters = ["<unk>", *"\n +2?aefinorstuw"]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in MARKERS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", chat_template=CHATML)


def talk(*said: tuple[str, str]) -> list[dict[str, str]]:
    """(reasoning, answer) after the same question, turn by turn."""
    return [
        message
        for reasoning, answer in said
        for message in (
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "reasoning_content": reasoning, "content": answer},
        )
    ]


def trained(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], finish_reason: str | None = "stop") -> str:
    encoded = encode_conversation(tokenizer, messages, finish_reason=finish_reason)
    own = [token for token, reason in zip(encoded.ids, encoded.reasons, strict=True) if reason == Reason.TRAINED]
    return str(tokenizer.decode(own, skip_special_tokens=False))


# --- tools -------------------------------------------------------------------------------------------------------

TOOLS = json.dumps([{"type": "function", "function": {"name": "thermometer", "parameters": {}}}])
WITH_TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML


def test_tools_that_were_served_are_trained_with() -> None:
    tokenizer, messages = byte_tokenizer(WITH_TOOLS), talk(("two", "four"), ("two", "four"))
    encoded = encode_conversation(tokenizer, messages, tools=TOOLS)
    for index in (1, 3):
        served = encode_prompt(tokenizer, messages[:index], TOOLS)
        assert encoded.ids[: len(served)] == served
    assert "thermometer" in str(tokenizer.decode(encoded.ids)) and trained(tokenizer, messages).count("four") == 2


def test_a_template_that_leaves_tools_out_is_refused() -> None:
    with pytest.raises(UnusableInput, match="tool schemas do not appear in it; use a template that renders tools"):
        encode_conversation(byte_tokenizer(), talk(("two", "four")), tools=TOOLS)


# --- the prompt --------------------------------------------------------------------------------------------------


def test_stray_newline_of_the_generation_prompt_is_named_with_both_tokens() -> None:
    stray = CHATML.replace("assistant\\n'", "assistant\\n\\n'")
    expected = (
        r"turn 1 is rendered differently inside the conversation than it was prompted: "
        r"token 23 is trained as 259 '<think>', served as \d+ '\\n'"
    )
    with pytest.raises(UnusableInput, match=expected):
        encode_conversation(byte_tokenizer(stray), talk(("two", "four")))


def test_token_that_spans_the_end_of_the_prompt_is_named_with_both_ids() -> None:
    """The text continues, the ids do not: the newline of the header and the one that the answer begins with are one token."""
    plain = CHATML.replace("'<think>' + (message.reasoning_content or '') + '</think>'", "''")
    tokenizer = merging_tokenizer(plain, merged=["\n\n"])
    newlines = [tokenizer("\n" * count, add_special_tokens=False)["input_ids"] for count in (1, 2)]
    assert [len(ids) for ids in newlines] == [1, 1]  # type: ignore[arg-type]
    good = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]
    assert trained(tokenizer, good) == "four<|im_end|>"
    with pytest.raises(UnusableInput) as caught:
        encode_conversation(tokenizer, [good[0], {"role": "assistant", "content": "\nfour"}])
    [one], [two] = newlines  # type: ignore[misc]
    place = len(encode_prompt(tokenizer, good[:1])) - 1
    assert re.search(rf"turn 1: .* token {place} is trained as {two} '\\n\\n', served as {one} '\\n'", str(caught.value))


@pytest.mark.parametrize("rstrip", [False, True])
@pytest.mark.parametrize("template", ["chatml", "glm"])
def test_prompt_ids_taken_from_the_conversation_are_those_of_the_prompt_alone(template: str, rstrip: bool) -> None:
    """The slow reference: every prefix tokenised again. Where a marker takes blanks with it the fast way is not taken."""
    text_of, markers = (CHATML, MARKERS) if template == "chatml" else (GLM, GLM_MARKERS)
    tokenizer = merging_tokenizer(text_of, markers, merged=["\n\n", ">a", " and"], rstrip=rstrip)
    rng = random.Random(0)
    for _ in range(60):
        pieces = [*markers, "\n", "\n\n", " ", "a", " and", "four", "Grüße", "🙂"]
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 24)))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]  # type: ignore[assignment]
        offsets_T2 = np.array(encoded["offset_mapping"]).reshape(-1, 2)
        tokens = Tokens(text, ids, offsets_T2[:, 0], offsets_T2[:, 1])
        for start in sorted(set(tokens.left_T.tolist()) - {0}):
            begin, behind = served_ids(tokenizer, tokens, start, int(np.searchsorted(tokens.left_T, start)))
            assert ids[:begin] + behind == tokenizer(text[:start], add_special_tokens=False)["input_ids"], (text, start)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), merging_tokenizer(), merging_tokenizer(GLM, GLM_MARKERS)], ids=str)
def test_every_turn_continues_the_ids_that_a_server_feeds_for_it(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = talk(("two", "four"), ("", "Grüße"), ("The sum", "four.\n\n"))
    encoded = encode_conversation(tokenizer, messages)
    for turn in (1, 3, 5):
        served = encode_prompt(tokenizer, messages[:turn])
        assert encoded.ids[: len(served)] == served
        assert encoded.reasons[len(served) - 1] != Reason.TRAINED == encoded.reasons[len(served)]


def test_template_with_bos_and_tokenizer_with_bos_give_one() -> None:  # pitfall 25
    tokenizer = byte_tokenizer("{{ bos_token }}" + CHATML)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    messages = talk(("two", "four"))
    doubled: list[int] = tokenizer(render(tokenizer, messages))["input_ids"]  # type: ignore[assignment]
    assert doubled[:2] == [tokenizer.bos_token_id] * 2, "the fault is there"
    assert encode_conversation(tokenizer, messages).ids == doubled[1:]
    assert encode_prompt(tokenizer, messages[:1]).count(tokenizer.bos_token_id) == 1  # type: ignore[arg-type]


def test_template_that_writes_bos_twice_is_refused() -> None:
    tokenizer = byte_tokenizer("{{ bos_token }}{{ bos_token }}" + CHATML)
    tokenizer.bos_token = "<|endoftext|>"
    with pytest.raises(UnusableInput, match=r"BOS '<\|endoftext\|>' stands twice at tokens 0 and 1"):
        encode_conversation(tokenizer, talk(("two", "four")))


def test_answer_that_nothing_comes_before_is_refused() -> None:
    with pytest.raises(UnusableInput, match="turn 0 is an assistant's: nothing prompts it"):
        encode_conversation(byte_tokenizer(), talk(("two", "four"))[1:])
    bare = (
        "{%- for message in messages if message.role == 'assistant' -%}"
        "{{ message.reasoning_content + message.content + '<|im_end|>' }}{%- endfor -%}"
    )
    with pytest.raises(UnusableInput, match="turn 1: its first token is the conversation's, which nothing predicts"):
        encode_conversation(byte_tokenizer(bare), talk(("two", "four")))


# --- the turn ----------------------------------------------------------------------------------------------------


def test_stop_is_trained_though_it_is_also_what_pads() -> None:  # pitfall 13
    tokenizer = byte_tokenizer(pad="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert trained(tokenizer, talk(("two", "four"), ("2", "4"))) == "<think>two</think>four<|im_end|><think>2</think>4<|im_end|>"


def test_turn_whose_stop_the_template_leaves_out_is_named() -> None:
    endless = CHATML.replace("message.content + '<|im_end|>\\n'", "message.content + '\\n'")
    with pytest.raises(
        UnusableInput, match=r"turn 1: its stop is not trained: it ends with token \d+ \(\d+ '.*'\), expected '<\|im_end"
    ):
        encode_conversation(byte_tokenizer(endless), talk(("two", "four"), ("2", "4")))


def test_reasoning_that_the_template_drops_is_missed_though_its_words_stand_elsewhere() -> None:  # pitfalls 6 and 15
    forgetful = CHATML.replace("(message.reasoning_content or '')", "''")
    for reasoning in ("two and two", "4", "think", "2+2?"):
        with pytest.raises(
            UnusableInput, match="the reasoning of turn 1 is missing: its first token, 23, is followed by '<think></think>4'"
        ):
            encode_conversation(byte_tokenizer(forgetful), talk((reasoning, "4")))
    assert trained(byte_tokenizer(forgetful), talk(("", "4"))) == "<think></think>4<|im_end|>", "nothing was dropped"


@pytest.mark.parametrize("cut", ["message.content[:8]", "message.content.split('</think>')[-1]", "message.content | lower"])
def test_answer_that_the_template_cuts_or_changes_is_named(cut: str) -> None:  # pitfall 16
    template = CHATML.replace("{{- message.content +", f"{{{{- ({cut}) +")
    assert template != CHATML
    with pytest.raises(UnusableInput, match="the content of turn 1, which begins at token 23, is not whole"):
        encode_conversation(byte_tokenizer(template), talk(("two", "Four. </think> is a tag")))


def test_letter_that_the_tokenizer_does_not_know_is_named() -> None:
    tokenizer = letter_tokenizer()
    assert trained(tokenizer, talk(("two", "four"))) == "<think>two</think>four<|im_end|>"
    with pytest.raises(UnusableInput, match=r"turn 1: token \d+ \(0 '<unk>'\) stands for 've<\|im_end\|>' but says '<unk>e"):
        encode_conversation(tokenizer, talk(("two", "five")))


def test_what_the_tokenizers_own_normalizer_makes_equal_is_not_lost() -> None:
    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    said = "Gru\N{COMBINING DIAERESIS}n"
    assert trained(tokenizer, talk(("two", said))) == "<think>two</think>Gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n<|im_end|>"


# --- a generation that was cut -----------------------------------------------------------------------------------


def test_no_stop_is_appended_to_what_was_cut_or_may_have_been() -> None:  # pitfall 16
    glm = merging_tokenizer(GLM, GLM_MARKERS)
    messages = talk(("two", "four"))
    assert trained(glm, messages) == "two</think>four<|user|>"
    for finish_reason in (None, "length", "loop", ""):
        encoded = encode_conversation(glm, messages, finish_reason=finish_reason)
        assert not ends_with_stop(glm, encoded) and trained(glm, messages, finish_reason) == "two</think>four"
    assert ends_with_stop(glm, encode_conversation(glm, messages))
    assert ends_with_stop(byte_tokenizer(), encode_conversation(byte_tokenizer(), messages, finish_reason=None))
    assert encode_conversation(glm, talk(("", "")), finish_reason="length")
