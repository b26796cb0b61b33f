"""References of rows held against themselves, once, when a prompt set is made.

A row's reference that its own verifier does not score 1.0 would make every answer wrong: it is dropped and counted, as
reasoning-gym's are. Verifiers hang, crash and need a sandbox, so they run in processes with a deadline; what is total and quick
(`exact`) is asked here. That keeps a million such rows at seconds and starts no process for them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from data.records import Prompt
from data.verify import VERIFIERS, self_check
from data.verify.runner import Item, Pool, key_of
from generate.digests import DigestTable
from generate.sources.rows import Candidate

TIMEOUT_S = 30.0
"""Wall seconds for one reference, three times what an answer gets by default: which rows a set has must depend neither on
data.verify_timeout_s, which may be changed between two builds, nor on how busy the machine is. `code` has 20 s of its own."""
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 1024, 1 << 24
"""Most rows that wait for the slowest of them, and most text that they hold in memory meanwhile. A longer row waits alone."""


class References:
    """Asks the verifiers of a pool, once for equal work: a million short answers are a few thousand references."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self._asked = pool, DigestTable()

    def passing(self, candidates: Iterable[Candidate], leave_out: Callable[[str], None]) -> Iterator[Candidate]:
        """Those whose reference passes its own verifier or who have none, in order. `leave_out` is told the others' places.

        Raises:
            TracestillError: this machine cannot judge at all (no sandbox for `code`); that says nothing about any row.
        """
        for group in in_groups(candidates):
            for candidate, passed in zip(group, self._passed([candidate.prompt for candidate in group]), strict=True):
                if passed:
                    yield candidate
                else:
                    leave_out(f"{candidate.where} ({candidate.prompt.verifier})")

    def _passed(self, prompts: Sequence[Prompt]) -> list[bool]:
        """One word a prompt. Without a reference there is nothing to hold: reading the row has found what its verifier needs."""
        keys = [key_of(Item(prompt, prompt.answer)) if _needs_worker(prompt) else b"" for prompt in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key and self._asked.find(key) is None}
        for key, passed in zip(new, self._pool.self_check(list(new.values())), strict=True):
            self._asked.add(key, passed)
        return [bool(self._asked.find(key)) if key else _passes_here(prompt) for key, prompt in zip(keys, prompts, strict=True)]


def _has_reference(prompt: Prompt) -> bool:
    return bool(prompt.answer) and prompt.verifier in VERIFIERS


def _needs_worker(prompt: Prompt) -> bool:
    return _has_reference(prompt) and not VERIFIERS[prompt.verifier].inline


def _passes_here(prompt: Prompt) -> bool:
    return not _has_reference(prompt) or self_check(prompt)


def in_groups(candidates: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    """Runs of at most ROWS_AT_ONCE rows and CHARACTERS_AT_ONCE of text; a longer row is a run of its own."""
    group: list[Candidate] = []
    held = 0
    for candidate in candidates:
        size = _characters(candidate.prompt)
        if group and (len(group) == ROWS_AT_ONCE or held + size > CHARACTERS_AT_ONCE):
            yield group
            group, held = [], 0
        group.append(candidate)
        held += size
    if group:
        yield group


def _characters(prompt: Prompt) -> int:
    return len(prompt.details) + len(prompt.answer) + sum(len(message.get("content", "")) for message in prompt.messages)
