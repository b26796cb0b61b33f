"""The teacher naming itself: statements about the speaker, and the many texts in which a name means something else."""

import pytest

from configs.filters import SelfNamingFilter
from data.filters import apply
from tests.data.make_run import make_prompt, make_trace


def reason(text: str, question: str = "What is 2 + 2?", **settings: tuple[str, ...]) -> str:
    return apply(make_trace(make_prompt(question), text), SelfNamingFilter.model_validate(settings))


ITSELF = [
    "I am GLM, a large language model trained by Z.ai.",
    "I'm ChatGLM.",
    "Hello! I’m GLM-4.6, how can I help you?",
    "My name is GLM.",
    "You are talking to ChatGLM3.",
    "As an AI language model developed by Zhipu AI, I cannot know that.",
    "As GLM, I have no access to the internet.",
    "I am an AI assistant called GLM and I was built in Beijing.",
    "I was trained by Zhipu.",
    "I was originally developed by the team at Zhipu AI.",
    "i am a helpful assistant created by z.ai",
    "我是智谱AI训练的大语言模型。",
    "你好，我是 ChatGLM，一个人工智能助手。",
    "我叫GLM。",
    "作为智谱开发的人工智能助手，我不能回答。",
    "I am ChatGPT, a large language model trained by OpenAI.",
    "I'm Claude, an AI assistant made by Anthropic.",
    "As an AI model developed by OpenAI, I cannot browse.",
    "I was created by Anthropic.",
    "I am Qwen, a language model from Alibaba.",
    "我是DeepSeek开发的人工智能助手，我是通义。作为DeepSeek大模型，我很乐意帮忙。",
]


@pytest.mark.parametrize("text", ITSELF)
def test_a_statement_about_the_speaker_with_a_model_s_name_is_self_naming(text: str) -> None:
    assert reason(text) == "names_itself"


@pytest.mark.parametrize(
    "text", ["Models such as ChatGLM do this well.", "See https://chat.z.ai for more.", "智谱发布了新的模型。"]
)
def test_a_mention_of_the_vendor_that_nobody_asked_for_is_one_too(text: str) -> None:
    assert reason(text) == "names_vendor"


OTHER_MEANINGS = [
    "fit <- glm(y ~ x, family = binomial(link = 'logit'))",
    "Glm(y ~ x) and glm2 converge to the same estimate.",
    "I am fitting a GLM with a log link.",
    "I'm using GLM to model the counts.",
    "As a GLM has a link function, we choose the logit.",
    "A GLM (generalised linear model) is developed by Nelder and Wedderburn.",
    "A GLM was trained by maximum likelihood.",
    "glm::vec3 position = glm::vec3(0.0f);",
    "#include <glm/glm.hpp>",
    "from statsmodels.api import GLM\nmodel = sm.GLM(y, X)",
    "In this GLM 4 covariates are significant.",
    "I'm a Gemini and my sister is a Leo.",
    "I am Claude, said the painter, and this is my garden.",
    "Claude Shannon was made famous by this paper.",
    "We use Google to search for it, and an assistant sums it up.",
    "The metadata says that the llama lives in Peru.",
    "As an AI language model, I cannot feel the sun.",
    "I am a large language model and have no body.",
    "BERT was developed by Google in 2018.",
    "The library was made by Meta; I am a user of it.",
    "OpenAI released GPT-4 in 2023.",
    "The mistral is a wind.",
    "import openai\nclient = openai.OpenAI()",
    "I am sure that xyz.ai is free, and so is jazz.airlines.",
    "我用 GLM 拟合了数据。",
    "作为一个人工智能语言模型，我没有感情。",
]


@pytest.mark.parametrize("text", OTHER_MEANINGS)
def test_a_name_that_means_something_else_passes(text: str) -> None:
    assert reason(text) == ""


def test_what_the_prompt_names_it_has_asked_for() -> None:
    assert reason("ChatGLM is a model by Zhipu.", "Compare ChatGLM with BERT.") == ""
    assert reason("GLM-4.5 came out in 2025.", "Which models did Zhipu release?") == ""
    play = "I am ChatGPT, a language model."
    assert (reason(play, "Play ChatGPT: say who you are."), reason(play, "Who are you?")) == ("", "names_itself")


def test_the_teacher_s_own_name_counts_even_when_asked_for() -> None:
    assert reason("I am GLM.", "Are you GLM?") == "names_itself"


def test_reasoning_is_read_as_the_answer_is() -> None:
    trace = make_trace(make_prompt("Who are you?"), "An assistant.", reasoning="The user asks who I am. I am GLM, made by Z.ai.")
    assert apply(trace, SelfNamingFilter()) == "names_itself"


def test_the_names_are_the_recipe_s() -> None:
    assert reason("I am Tracy.", names=("Tracy",)) == "names_itself" and reason("I am GLM.", names=("Tracy",), mentions=()) == ""
    assert reason("I am GLM.", names=(), other_names=(), mentions=()) == ""
    assert reason("a (b) c", names=("(b)",)) == ""


def test_a_statement_far_behind_other_mentions_is_found() -> None:
    assert reason("glm(y ~ x)\n" * 5_000 + "I am GLM.") == "names_itself"
    assert reason("I was " + "x" * 300 + "trained by Zhipu", mentions=()) == ""
