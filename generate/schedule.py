"""What to ask next: the requests that are not done, longest expected first, so that no long trace starts last."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from configs.schema import Sampling
from data.records import Prompt, digest, trace_identity


@dataclass(frozen=True, slots=True)
class Ask:
    """One (prompt, sample) still to be answered."""

    trace_id: str
    prompt: Prompt
    sample_index: int


def sampling_fingerprint(sampling: Sampling, seed: int) -> str:
    return digest(sampling.model_dump(mode="json"), seed)


def all_asks(prompts: Sequence[Prompt], samples: int, teacher_fingerprint: str, sampling: Sampling, seed: int) -> list[Ask]:
    """Every request of a run: its identity follows from what it asks, so each process computes the same list."""
    fingerprint = sampling_fingerprint(sampling, seed)
    return [
        Ask(trace_identity(prompt.prompt_id, index, teacher_fingerprint, fingerprint), prompt, index)
        for prompt in prompts
        for index in range(samples)
    ]


def pending_asks(asks: Sequence[Ask], done: Collection[str], mean_tokens: Mapping[str, float]) -> list[Ask]:
    """The asks without a trace, longest expected output first. mean_tokens: output tokens per task as observed so far;
    tasks not seen yet are expected to be the longest, so that surprises come early. Ties fall by trace_id."""
    unseen = max(mean_tokens.values(), default=0.0) + 1.0
    left = [ask for ask in asks if ask.trace_id not in done]
    return sorted(
        left, key=lambda ask: (-mean_tokens.get(ask.prompt.task, unseen), -_prompt_characters(ask.prompt), ask.trace_id)
    )


def share(asks: Sequence[Ask], rank: int, world: int) -> list[Ask]:
    """This rank's part: every world-th ask, so that each rank gets the same mix of long and short."""
    return list(asks[rank::world])


def mean_output_tokens(tasks: Sequence[str], tokens: Sequence[int]) -> dict[str, float]:
    """Mean output tokens per task, from finished traces."""
    sums: dict[str, list[int]] = defaultdict(list)
    for task, count in zip(tasks, tokens, strict=True):
        sums[task].append(count)
    return {task: sum(counts) / len(counts) for task, counts in sums.items()}


def _prompt_characters(prompt: Prompt) -> int:
    return sum(len(message.get("content", "")) for message in prompt.messages)
