"""Earlier turns' reasoning and tool schemas reach the teacher, or the prompt is refused."""

import json

import pytest

from configs.errors import UnusableInput
from data.byte_tokenizer import build_byte_tokenizer
from data.chat import encode_prompt, render

MARKERS = ["<|endoftext|>", "<|user|>", "<|observation|>", "<|assistant|>", "<think>", "</think>"]
KEEPS = (
    "{%- if tools -%}<|user|>{{ tools | tojson }}{%- endif -%}"
    "{%- for message in messages -%}<|{{ message.role }}|>"
    "{%- if message.reasoning_content -%}<think>{{ message.reasoning_content | trim }}</think>{%- endif -%}{{ message.content }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|><think>{%- endif -%}"
)
FORGETS = KEEPS.replace("if message.reasoning_content", "if message.reasoning_content and loop.last")
BLIND = KEEPS.replace("{%- if tools -%}<|user|>{{ tools | tojson }}{%- endif -%}", "")
TOOLS = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}])


def tokenizer_of(template: str):  # noqa: ANN201
    return build_byte_tokenizer(MARKERS, eos="<|endoftext|>", pad="<|endoftext|>", chat_template=template)


def turns(reasoning: str) -> list[dict[str, str]]:
    said = {"role": "assistant", "content": "4", "reasoning_content": reasoning}
    return [{"role": "user", "content": "2+2?"}, said, {"role": "user", "content": "Why?"}]


def test_a_prompt_holds_the_reasoning_of_every_earlier_turn() -> None:
    tokenizer = tokenizer_of(KEEPS)
    ids = encode_prompt(tokenizer, turns(" two and two\n"))
    assert tokenizer.decode(ids) == "<|user|>2+2?<|assistant|><think>two and two</think>4<|user|>Why?<|assistant|><think>"


@pytest.mark.parametrize("reasoning", ["two and two", "4", "Why?"])
def test_a_template_that_drops_it_is_refused_even_where_the_words_stand_elsewhere(reasoning: str) -> None:
    with pytest.raises(UnusableInput, match="the reasoning of turn 1 is missing from the prompt"):
        encode_prompt(tokenizer_of(FORGETS), turns(reasoning))


def test_a_turn_that_reasoned_nothing_needs_no_place_for_it() -> None:
    assert encode_prompt(tokenizer_of(FORGETS), turns(" ")) == encode_prompt(tokenizer_of(FORGETS), turns(""))


def test_tool_schemas_are_given_to_the_template_that_shows_them() -> None:
    tokenizer = tokenizer_of(KEEPS)
    text = tokenizer.decode(encode_prompt(tokenizer, turns(""), TOOLS))
    assert TOOLS in text and text == render(tokenizer, turns(""), add_generation_prompt=True, tools=TOOLS)
    with pytest.raises(UnusableInput, match="tool schemas do not appear"):
        encode_prompt(tokenizer_of(BLIND), turns(""), TOOLS)
