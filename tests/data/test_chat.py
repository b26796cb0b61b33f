import itertools
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from data.byte_tokenizer import build_byte_tokenizer
from data.chat import Reason, dialect_of, encode_conversation, encode_prompt, render

ROOT = Path(__file__).parents[2]
GLM_MARKERS = [
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
CHATML_MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def tokenizer_of(owner: str, markers: list[str], **changes: str) -> PreTrainedTokenizerBase:
    template = (ROOT / owner / "embedded" / "chat_template.jinja").read_text()
    return build_byte_tokenizer(markers, eos="<|endoftext|>", pad="<|endoftext|>", **({"chat_template": template} | changes))


@pytest.fixture(scope="module")
def glm() -> PreTrainedTokenizerBase:
    return tokenizer_of("teacher", GLM_MARKERS)


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerBase:
    return tokenizer_of("student", CHATML_MARKERS)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str, reasoning: str) -> dict[str, str]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning}


ONE = [user("2+2?"), assistant("4", "2+2=4.")]
TWO = [*ONE, user("And 4?"), assistant("4", "4 again.")]


def trained(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    encoded = encode_conversation(tokenizer, messages)
    own = [token for token, is_trained in zip(encoded.ids, encoded.mask, strict=True) if is_trained]
    text = tokenizer.decode(own, skip_special_tokens=False)
    assert isinstance(text, str)
    return text


def test_glm_stops_at_the_next_role_marker_and_starts_inside_the_think_block(glm: PreTrainedTokenizerBase) -> None:
    dialect = dialect_of(glm)
    assert dialect.stop_tokens[:2] == ("<|user|>", "<|observation|>") and dialect.prompt_opens_think
    assert [glm.decode([id]) for id in dialect.stop_ids(glm)] == list(dialect.stop_tokens)


def test_chatml_ends_its_turns_with_a_token_of_their_own(chatml: PreTrainedTokenizerBase) -> None:
    dialect = dialect_of(chatml)
    assert dialect.stop_tokens[0] == "<|im_end|>" and "<|im_end|>" in render(chatml, ONE)


def test_a_template_or_eos_token_that_is_changed_in_place_is_read_again() -> None:
    tokenizer = tokenizer_of("teacher", GLM_MARKERS)
    assert dialect_of(tokenizer).prompt_opens_think
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<think>", "")
    assert not dialect_of(tokenizer).prompt_opens_think
    plain = tokenizer_of("teacher", ["<|endoftext|>", "<think>", "</think>"])
    assert dialect_of(plain).stop_tokens == ("<|endoftext|>",)
    plain.eos_token = "</think>"
    assert dialect_of(plain).stop_tokens == ("</think>",)


def test_exactly_what_the_model_says_and_its_stop_are_trained(
    glm: PreTrainedTokenizerBase, chatml: PreTrainedTokenizerBase
) -> None:
    assert trained(glm, ONE) == "2+2=4.</think>4<|user|>"
    assert trained(glm, TWO) == "2+2=4.</think>4<|user|>4 again.</think>4<|user|>"
    opening = "" if dialect_of(chatml).prompt_opens_think else "<think>"
    said = trained(chatml, ONE)
    assert said.startswith(opening) and said.endswith("4<|im_end|>") and said.count("<|im_end|>") == 1
    assert trained(chatml, TWO).count("<|im_end|>") == 2


def test_the_marker_of_a_tool_is_a_stop_that_is_learnt(glm: PreTrainedTokenizerBase) -> None:
    tool = {"role": "tool", "content": "18 degrees"}
    assert trained(glm, [user("Warm?"), assistant("look", "ask."), tool, assistant("no", "18.")]) == (
        "ask.</think>look<|observation|>18.</think>no<|user|>"
    )


def reasons(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    """(reason, text) of each run of tokens."""
    encoded = encode_conversation(tokenizer, messages)
    runs = itertools.groupby(zip(encoded.reasons, encoded.ids, strict=True), key=lambda pair: pair[0])
    return [(Reason(reason).name.lower(), str(tokenizer.decode([token for _, token in run]))) for reason, run in runs]


def test_every_token_has_its_reason(glm: PreTrainedTokenizerBase, chatml: PreTrainedTokenizerBase) -> None:
    tool, system = {"role": "tool", "content": "18"}, {"role": "system", "content": "Be brief."}
    assert reasons(glm, [system, user("Warm?"), assistant("look", "ask"), tool, tool, assistant("no", "")]) == [
        ("first_token", "[gMASK]"), ("system", "<sop><|system|>Be brief."), ("user", "<|user|>Warm?"),
        ("generation_prompt", "<|assistant|><think>"), ("trained", "ask</think>look<|observation|>"),
        ("tool", "18<|observation|>18"), ("generation_prompt", "<|assistant|><think>"), ("trained", "</think>no<|user|>"),
    ]  # fmt: skip
    assert reasons(chatml, [system, *ONE, {"role": "developer", "content": "!"}]) == [
        ("first_token", "<|im_start|>"), ("system", "system\nBe brief.<|im_end|>\n"),
        ("user", "<|im_start|>user\n2+2?<|im_end|>\n"), ("generation_prompt", "<|im_start|>assistant\n"),
        ("trained", "<think>2+2=4.</think>4<|im_end|>"), ("after_stop", "\n"), ("other", "<|im_start|>developer\n!<|im_end|>\n"),
    ]  # fmt: skip


def test_a_template_that_refuses_a_system_turn_alone_gives_it_to_the_turn_that_follows() -> None:
    refusing = "{%- if messages | length == 1 and messages[0].role == 'system' -%}{{ raise_exception('no user') }}{%- endif -%}"
    tokenizer = tokenizer_of("student", CHATML_MARKERS)
    tokenizer.chat_template = refusing + str(tokenizer.chat_template)
    found = reasons(tokenizer, [{"role": "system", "content": "Be brief."}, *ONE])
    assert found[1] == ("user", "system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n")


@pytest.mark.parametrize("name", ["glm", "chatml"])
def test_training_ids_continue_serving_ids(name: str, request: pytest.FixtureRequest) -> None:
    """A stray newline between the two costs 18 nats at the first token; the ids must be equal, not the text alike."""
    tokenizer = request.getfixturevalue(name)
    for messages in (ONE, TWO, [{"role": "system", "content": "Be brief."}, *ONE]):
        encoded = encode_conversation(tokenizer, messages)
        prompt = encode_prompt(tokenizer, messages[:-1])
        assert encoded.ids[: len(prompt)] == prompt
        assert encoded.mask[len(prompt)] and not encoded.mask[len(prompt) - 1]


def test_an_answer_that_also_stands_in_the_question_is_not_confused_with_it(glm: PreTrainedTokenizerBase) -> None:
    said = "4</think>4"
    encoded = encode_conversation(glm, [user("Is 4 the answer 4?"), assistant("4", "4")])
    assert trained(glm, [user("Is 4 the answer 4?"), assistant("4", "4")]) == f"{said}<|user|>"
    assert sum(encoded.mask) == 4 and len(encoded.ids) > 20


def test_text_of_several_bytes_a_letter_is_masked_whole(glm: PreTrainedTokenizerBase) -> None:
    assert trained(glm, [user("Grüße?"), assistant("süß 🙂", "é.")]) == "é.</think>süß 🙂<|user|>"


def test_a_conversation_without_an_assistant_turn_cannot_be_trained(glm: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UnusableInput, match="no assistant token"):
        encode_conversation(glm, [user("2+2?")])


def test_a_template_that_drops_earlier_reasoning_is_refused() -> None:
    forgetful = (
        "{%- for message in messages -%}{%- if message.role == 'assistant' -%}<|assistant|>"
        "{%- if loop.last -%}<think>{{ message.reasoning_content }}</think>{%- endif -%}{{ message.content }}"
        "{%- else -%}<|{{ message.role }}|>{{ message.content }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|assistant|><think>{%- endif -%}"
    )
    tokenizer = tokenizer_of("teacher", GLM_MARKERS, chat_template=forgetful)
    assert trained(tokenizer, ONE) == "2+2=4.</think>4<|user|>"
    with pytest.raises(UnusableInput, match="turn 1 is rendered differently"):
        encode_conversation(tokenizer, TWO)


def test_a_tokenizer_without_any_end_is_refused(glm: PreTrainedTokenizerBase) -> None:
    tokenizer = tokenizer_of("teacher", ["<|endoftext|>", "<think>", "</think>"])
    tokenizer.eos_token = None
    with pytest.raises(UnusableInput, match="no end-of-turn marker"):
        dialect_of(tokenizer)
