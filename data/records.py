"""The records that stages hand to each other. Identity is a hash of what makes a thing what it is."""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant", "tool"]
Origin = Literal["given", "generated", "observation"]
FinishReason = Literal["stop", "length", "loop", "abort"]
"""stop: the model ended. length: max_tokens or the context. loop: the guard against repetition. abort: no answer."""
Split = Literal["train", "eval"]


class Message(TypedDict, total=False):
    role: str
    content: str
    reasoning_content: str


def digest(*parts: object, size: int = 16) -> str:
    """Hex blake2b of the JSON form of `parts`: stable over processes, machines and Python versions."""
    text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task put to the teacher, or one evaluation item.

    task: family for per-task figures (`chain_sum`, `facts/metals`). verifier: key of data.verify.VERIFIERS, or "" when
    nothing can judge it. answer: the reference, "" when there is none. known: for closed-book facts, whether the
    teacher is meant to know it; None for other tasks. details: JSON text the verifier needs (reasoning-gym's entry).

    tools: JSON text of a list of tool schemas, or "". max_tokens, reasoning_budget: bounds of this prompt's own; 0 is the
    recipe's, or none. evidence: JSON text, where in a long prompt the answer stands (places with token offset and depth in
    [0, 1]), or "". provenance: JSON text, which files a long prompt is made of (path, sha256, licence, tokens), or "".
    twin_of: prompt_id of the item that this one asks in other words, or ""; no part of its identity.
    """

    prompt_id: str
    source: str
    task: str
    prompt_version: str
    messages: tuple[Message, ...]
    answer: str
    verifier: str
    split: Split
    known: bool | None
    details: str
    licence: str
    tools: str = ""
    max_tokens: int = 0
    reasoning_budget: int = 0
    evidence: str = ""
    provenance: str = ""
    twin_of: str = ""


def prompt_identity(messages: tuple[Message, ...] | list[Message], prompt_version: str) -> str:
    return digest([dict(message) for message in messages], prompt_version)


def trace_identity(prompt_id: str, sample_index: int, teacher_fingerprint: str, sampling_fingerprint: str) -> str:
    return digest(prompt_id, sample_index, teacher_fingerprint, sampling_fingerprint)


def trace_keys(prompt_id: str, samples: int, teacher_fingerprint: str, sampling_fingerprint: str) -> bytes:
    """16 bytes for each sample of a prompt: its trace_identity. `digest` without the JSON encoder, which takes four fifths of
    the time of a million of them."""
    head, tail = f'["{prompt_id}",', f',"{teacher_fingerprint}","{sampling_fingerprint}"]'
    return b"".join(hashlib.blake2b(f"{head}{index}{tail}".encode(), digest_size=16).digest() for index in range(samples))


def request_seed(trace_id: str, run_seed: int) -> int:
    """The 63-bit seed of a request's sampling noise: a function of what it is, never of when it was run."""
    return int(digest(trace_id, run_seed, size=8), 16) >> 1


@dataclass(frozen=True, slots=True)
class Turn:
    """Token-level view of one turn. logprobs: natural log, one per id for generated turns, empty otherwise."""

    role: str
    token_ids: tuple[int, ...]
    origin: Origin
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """What the teacher returned for (prompt, sample), raw and as parsed text.

    raw_text: the decoded generated ids, stop token left out, before anything parsed them. reasoning is the text inside
    the think tags and answer what follows; both are "" when the block never closed. tokens count generated ids
    (reasoning_tokens up to and including `</think>`). seconds: from admission to the last token, batch shared.
    expert_load: JSON text (max_over_mean, entropy, hottest) or "". attempt: holders of the request so far, this one
    included. cost: dollars. error: why it is an `abort`, in one countable word. raw: a server's replies, byte for byte.
    """

    trace_id: str
    prompt_id: str
    sample_index: int
    source: str
    task: str
    prompt_version: str
    model_id: str
    model_revision: str
    teacher_fingerprint: str
    engine: str
    engine_version: str
    turns: tuple[Turn, ...]
    messages: tuple[Message, ...]
    tools: str
    raw_text: str
    finish_reason: FinishReason
    prompt_tokens: int
    reasoning_tokens: int
    answer_tokens: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    expert_load: str
    attempt: int
    worker: str
    started_at: float
    seconds: float
    cost: float
    teacher_licence: str
    source_licence: str
    error: str = ""
    raw: bytes = b""


VerdictName = Literal["pass", "fail", "unjudged"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judgement of one trace. reason is "" for pass and a countable word otherwise (`wrong`, `timed_out`, `length`); detail
    is JSON text, what there is to say beyond it (data/details.py), or ""."""

    trace_id: str
    verdict: VerdictName
    reason: str
    score: float
    detail: str = ""
