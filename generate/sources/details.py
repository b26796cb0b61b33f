"""What a row says about how answers to it are judged: `details` as JSON text, and whether its verifier can use it at all."""

import json
from collections.abc import Callable

from configs.errors import UnusableInput
from data.records import Prompt
from data.verify import VERIFIERS, code, exact, json_schema
from data.verify.runner import LLM_JUDGE

JUDGES = (*VERIFIERS, LLM_JUDGE)
"""What a row may name. The model that grades is no function of prompt and answer, so it is not among VERIFIERS."""
_MOST_WORDS = 300
"""Characters of what somebody else's parser says: a line that holds a schema is read by nobody."""


# --- details -----------------------------------------------------------------------------------------------------


def details_text(value: object, where: str) -> str:
    """Canonical JSON text of an object or a list, given as such or as JSON text; "" for a blank text. Without blanks, Unicode as
    it is, and keys in the order written: the tests of a function that walks over its argument's keys depend on it.

    Raises:
        UnusableInput: one line with the row's place.
    """
    expected = "expected a JSON object or list, or its JSON text"
    if isinstance(value, str):
        if not value.strip():
            return ""
        try:
            value = json_schema.strict(value)
        except (ValueError, RecursionError) as error:
            raise UnusableInput(f"{where}: details is not valid JSON ({error}); {expected}") from error
    if not isinstance(value, dict | list):
        raise UnusableInput(f"{where}: details is {'null' if value is None else type(value).__name__}, {expected}")
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableInput(f"{where}: details hold text that is no valid Unicode ({error.reason}); {expected}") from error
    except (ValueError, RecursionError) as error:  # NaN and 1e999, which Python's JSON reads
        raise UnusableInput(f"{where}: details hold what JSON has no form for ({error}); {expected}") from error
    return text


# --- is it enough? -----------------------------------------------------------------------------------------------


def require_judgeable(prompt: Prompt, where: str) -> None:
    """Returns when the prompt's verifier has what it needs to judge answers. Runs nothing: whether the reference passes is held
    against it later, in a process that can be killed (generate/references.py).

    Raises:
        UnusableInput: one line with the row's place and what the verifier misses.
    """
    verifier = prompt.verifier
    if verifier in ("", LLM_JUDGE):
        return
    try:
        if (need := _NEEDS.get(verifier)) is not None:
            need(prompt)
        if not prompt.answer and not _judges_without_reference(prompt):
            raise ValueError("no answer to compare with; expected answer to be a non-empty string")
    except (ValueError, RecursionError, MemoryError) as error:  # the last two: brackets too deep for Python's parser
        said = " ".join(str(error).split())[:_MOST_WORDS] or type(error).__name__
        raise UnusableInput(f"{where}: verifier {verifier}: {said}") from error


def _judges_without_reference(prompt: Prompt) -> bool:
    check = VERIFIERS[prompt.verifier].check
    return check is not None and check(prompt)


def _require_tests(prompt: Prompt) -> None:
    if not prompt.details:
        raise ValueError("no details; expected tests under the key details, as docs/verifiers.md has them")
    code.read_tests(prompt)


def _require_schema(prompt: Prompt) -> None:
    if not prompt.details:
        raise ValueError('no details; expected {"schema": {...}} under the key details')
    json_schema.check(prompt)


def _require_entry(prompt: Prompt) -> None:
    """The scorer meets the entry itself in a worker, because it takes the generator's import of 1.5 s."""
    details = json.loads(prompt.details or "{}")
    if not isinstance(details, dict) or not isinstance(details.get("task"), str) or not isinstance(details.get("entry"), dict):
        raise ValueError('details hold no reasoning-gym entry; expected {"task": "...", "params": {...}, "entry": {...}}')


def _require_aliases(prompt: Prompt) -> None:
    """Other details than aliases are not read."""
    details = json.loads(prompt.details or "{}")
    if not isinstance(details, dict) or "aliases" not in details:
        return
    aliases = details["aliases"]
    if not isinstance(aliases, list) or not all(isinstance(alias, str) and exact.normalise(alias) for alias in aliases):
        raise ValueError('details hold aliases that are no list of texts; expected {"aliases": ["...", ...]}')
    if exact.is_abstention(prompt.answer) or any(map(exact.is_abstention, aliases)):
        raise ValueError("an alias stands beside or is a way to decline; expected aliases of an answer alone")


_NEEDS: dict[str, Callable[[Prompt], None]] = {
    "exact": _require_aliases,
    "code": _require_tests,
    "json_schema": _require_schema,
    "reasoning_gym": _require_entry,
}
"""Raise ValueError. Of the others the reference is all that they need."""
