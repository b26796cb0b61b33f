"""Does the teacher say who it is, or who made it?

A name alone proves nothing: `glm(y ~ x)` is R, "I am Claude" a character in a story, "I'm a Gemini" a birthday. So there are
three rules, from sure to careful: the teacher's own name in a statement about the speaker; somebody else's name there, in a
sentence that also speaks of a model; and bare mentions of names that mean nothing else. What the prompt names it has asked for;
only the first rule holds even then.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

from configs.filters import SelfNamingFilter
from data.filters.texts import Filtered, asked, in_lower_case, said

_IN_SENTENCE = r"[^.!?\n。！？]"
_MODEL = r"(?:language model|model|llm|chatbot|assistant|ai)"
_MODEL_ZH = "(?:人工智能|语言模型|大模型|助手)"
_MADE = r"(?:developed|trained|created|built|made|designed|released) by (?:[a-z]+ ){0,4}?"
# What may stand between "I am" and the name; "I am fitting a GLM" and "I'm a Gemini" hold something else.
_BETWEEN = (
    r"(?:(?:an?|the|your|ai|artificial|intelligence|large|helpful|language|models?|assistant|chatbot|llm|called|named|known as|"
    r"based on|powered by|from|by|developed|trained|created|built|made)[ ,]+){0,10}(?<!\ba )(?<!\ban )"
)
# "As GLM, I have no body", not "models such as ChatGLM".
_AS = rf"(?<!such )as(?={_IN_SENTENCE}{{0,120}}?,? i(?![a-z]))"
_SPEAKER = (
    r"(?:(?<![a-z])(?:i am|i['’]m|my name is|call me|(?:talking|chatting|speaking) (?:to|with)|" + _AS + ")[ ,]+" + _BETWEEN + ")"
)
_SPEAKER_ZH = (
    r"(?:(?:我是|我叫|我的名字是|我的名字叫|我名叫|我由|作为(?=[^。！？\n]{0,40}我))"
    r"(?:一个|一款|一名|由|来自|基于|大|语言|模型|人工智能|智能|助手|ai|名为|叫做|叫|的|[，,\s]){0,12})"
)
_A_MODEL = rf"an? {_IN_SENTENCE}{{0,40}}?\b{_MODEL}\b{_IN_SENTENCE}{{0,40}}?"
_MADE_SPEAKER = rf"(?<![a-z])(?:(?:i am|i['’]m|{_AS}) {_A_MODEL}|i was (?:[a-z]+ )?){_MADE}"

_BEFORE, _AFTER = 240, 160
"""Characters around a name: the longest statement that ends in it, and the rest of its sentence as far as it is read."""


class Rules(NamedTuple):
    """Of one set of names, in lower case. names: for `in`, before the pattern runs; its last group is the name it found."""

    names: tuple[str, ...]
    pattern: re.Pattern[str]


class Compiled(NamedTuple):
    own: Rules
    others: Rules
    mentions: Rules


def self_naming(trace: Filtered, settings: SelfNamingFilter) -> str:
    """`names_itself` for a statement about the speaker, `names_vendor` for a bare mention."""
    rules = _compiled(settings.names, settings.other_names, settings.mentions)
    for text in said(trace):
        lowered = in_lower_case(text)
        if next(_named(rules.own, lowered), ""):
            return "names_itself"
        others, mentions = set(_named(rules.others, lowered)), set(_named(rules.mentions, lowered))
        if others or mentions:
            prompt = "\n".join(asked(trace)).lower()
            if any(name not in prompt for name in others):
                return "names_itself"
            if mentions and not any(name in prompt for name in rules.own.names + rules.mentions.names):
                return "names_vendor"
    return ""


def _named(rules: Rules, text: str) -> Iterator[str]:
    """The names that the rules find in `text`, without their versions. Both are in lower case."""
    for start, end in _windows(rules.names, text):
        for match in rules.pattern.finditer(text, start, end):
            yield match[match.lastgroup or 0]


def _windows(names: tuple[str, ...], text: str) -> list[tuple[int, int]]:
    """Where the names stand, with as much around them as a statement may take; overlapping ones are one. Most texts have none."""
    places: list[int] = []
    for name in names:
        at = text.find(name)
        while at >= 0:
            places.append(at)
            at = text.find(name, at + len(name))
    windows: list[tuple[int, int]] = []
    for at in sorted(places):
        start, end = max(0, at - _BEFORE), at + _AFTER
        if windows and start <= windows[-1][1]:
            windows[-1] = windows[-1][0], end
        else:
            windows.append((start, end))
    return windows


@lru_cache(maxsize=16)
def _compiled(names: tuple[str, ...], others: tuple[str, ...], mentions: tuple[str, ...]) -> Compiled:
    speaker = f"(?:{_SPEAKER}|{_SPEAKER_ZH}|{_MADE_SPEAKER})"
    of_a_model = rf"(?={_IN_SENTENCE}{{0,80}}?(?:\b{_MODEL}\b|{_MODEL_ZH}))"
    return Compiled(
        own=_rules(names, lambda name: speaker + name("name")),
        others=_rules(others, lambda name: f"{speaker}{name('name')}{of_a_model}|{_MADE_SPEAKER}{name('maker')}"),
        mentions=_rules(mentions, lambda name: name("name")),
    )


def _rules(names: tuple[str, ...], pattern: Callable[[Callable[[str], str]], str]) -> Rules:
    """pattern: makes the rule of a function that gives the names' own pattern, in a group called as it is told."""
    lowered = sorted({name.lower() for name in names}, key=lambda name: (-len(name), name))
    return Rules(tuple(lowered), re.compile(pattern(lambda group: _any_of(lowered, group))))


def _any_of(names: list[str], group: str) -> str:
    """A name as a word of its own, a version behind it allowed (`glm-5.2`, `gpt-4o`); `glm(`, `glm::vec3` and `glm =` are code.
    Chinese has no blanks between words, so no boundary either."""
    latin = "|".join(re.escape(name) for name in names if name.isascii()) or r"(?!)"
    others = "|".join(re.escape(name) for name in names if not name.isascii()) or r"(?!)"
    version = r"(?:[ -]?[0-9][a-z0-9.]{0,8})?"
    return rf"(?:(?<![a-z0-9_])(?P<{group}>{latin}){version}(?![a-z0-9_(=]|::| =)|(?P<{group}_zh>{others}))"
