"""The decode loop against transformers' own `generate`, one request at a time."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import teacher.score
from data.engine import Completion, Request
from teacher.cache import SlotCache
from teacher.decode import Limits, decode
from teacher.local_engine import LocalEngine
from tests.teacher.models import VOCAB

STOPS = (3, 5)


def make_requests(count: int, *, temperature: float = 0.0, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 40 tokens, outputs of at most 1 to 30."""
    rng = random.Random(seed)
    return [
        Request(
            request_id=f"r{index}",
            prompt_ids=tuple(rng.randrange(6, VOCAB) for _ in range(rng.choice((1, 2, 9, 23, 40)))),
            stop_ids=STOPS,
            max_tokens=rng.choice((1, 7, 30)),
            temperature=temperature,
            top_p=0.9,
            seed=rng.getrandbits(63),
            task="odd" if index % 2 else "even",
        )
        for index in range(count)
    ]


def outputs(completions: Iterator[Completion]) -> dict[str, tuple[int, ...]]:
    return {completion.request_id: completion.token_ids for completion in completions}


def generate_one_by_one(folder: Path, requests: Sequence[Request]) -> dict[str, tuple[int, ...]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = {}
    for request in requests:
        prompt = torch.tensor([request.prompt_ids])
        ids = model.generate(  # type: ignore[attr-defined]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.max_tokens,
            do_sample=False,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )
        answers[request.request_id] = tuple(ids[0, prompt.shape[1] :].tolist())
    return answers


@pytest.fixture(scope="module", params=["glm", "qwen"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, tuple[int, ...]]:
    answers = generate_one_by_one(folder, make_requests(20))
    assert len(set(answers.values())) > 10, "the random model says nearly the same to everything: the test would prove little"
    return answers


def with_limits(engine: LocalEngine, **changes: int) -> LocalEngine:
    engine.runner.limits = engine.runner.limits._replace(**changes)
    return engine


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_greedy_equals_transformers_generate(folder: Path, expected: dict[str, tuple[int, ...]], slots: int) -> None:
    engine = LocalEngine(folder, batch_size=slots)
    assert outputs(engine.generate(make_requests(20))) == expected


@pytest.mark.parametrize(("refill_slots", "prefill_tokens"), [(1, 8192), (5, 8192), (2, 11)])
def test_refill_and_chunked_prefill_change_no_token(
    folder: Path, expected: dict[str, tuple[int, ...]], refill_slots: int, prefill_tokens: int
) -> None:
    engine = with_limits(LocalEngine(folder, batch_size=6), refill_slots=refill_slots, prefill_tokens=prefill_tokens)
    assert outputs(engine.generate(make_requests(20))) == expected


def test_sampled_text_depends_on_the_request_alone(folder: Path) -> None:
    requests = make_requests(12, temperature=1.0)
    alone = outputs(LocalEngine(folder, batch_size=1).generate(requests))
    shuffled = random.Random(4).sample(requests, len(requests))
    assert outputs(LocalEngine(folder, batch_size=9).generate(shuffled)) == alone
    reseeded = outputs(LocalEngine(folder, batch_size=9).generate(make_requests(12, temperature=1.0, seed=9)))
    assert reseeded != alone


def test_logprobs_equal_score(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(folder, batch_size=4)
    requests = {request.request_id: request for request in make_requests(10, temperature=1.0)}
    completions = list(engine.generate(requests.values()))
    sequences = [(*requests[c.request_id].prompt_ids, *c.token_ids) for c in completions]
    for logits_per_pass in (teacher.score.LOGITS_PER_PASS, VOCAB * 4 * 13):  # whole rows, then chunks of 13 columns
        monkeypatch.setattr(teacher.score, "LOGITS_PER_PASS", logits_per_pass)
        for completion, sequence, scores in zip(completions, sequences, engine.score(sequences), strict=True):
            assert len(scores) == len(sequence) and scores[0] == 0.0
            assert scores[-len(completion.token_ids) :] == pytest.approx(
                completion.logprobs, abs=1e-4
            )  # float32, other GEMM shapes


def test_score_equals_one_plain_forward_pass(folder: Path) -> None:
    sequences = [(9,), *(request.prompt_ids for request in make_requests(6))]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for sequence, scores in zip(sequences, LocalEngine(folder, batch_size=3).score(sequences), strict=True):
        ids = torch.tensor([sequence])
        with torch.no_grad():
            logprobs = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        assert scores == pytest.approx([0.0, *logprobs.tolist()], abs=1e-4)


def test_an_empty_score_is_empty(qwen_folder: Path) -> None:
    assert LocalEngine(qwen_folder).score([]) == []


def test_finish_reasons_say_why_a_row_ended(folder: Path) -> None:
    requests = {request.request_id: request for request in make_requests(20)}
    reasons = set()
    for completion in LocalEngine(folder, batch_size=5).generate(requests.values()):
        request = requests[completion.request_id]
        reasons.add(completion.finish_reason)
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] in STOPS)
        assert completion.finish_reason == "stop" or len(completion.token_ids) == request.max_tokens
        assert len(completion.logprobs) == len(completion.token_ids) and max(completion.logprobs) <= 0
        assert completion.seconds > 0
    assert "length" in reasons


def test_a_row_ends_by_length_where_the_context_does(qwen_folder: Path) -> None:
    endless = Request("r", tuple(range(6, 26)), stop_ids=(), max_tokens=1000, temperature=0.0, top_p=1.0, seed=0)
    (completion,) = LocalEngine(qwen_folder, max_length=32).generate([endless])
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 12)


def test_a_prompt_without_room_comes_back_as_abort_and_holds_nobody_up(qwen_folder: Path) -> None:
    requests = make_requests(3)
    hopeless = [
        Request("long", (7,) * 32, STOPS, max_tokens=5, temperature=0.0, top_p=1.0, seed=0),
        Request("empty", (), STOPS, max_tokens=5, temperature=0.0, top_p=1.0, seed=0),
    ]
    completions = {
        c.request_id: c for c in LocalEngine(qwen_folder, max_length=32, batch_size=1).generate([*hopeless, *requests])
    }
    assert len(completions) == 5
    assert all(completions[name].finish_reason == "abort" and completions[name].token_ids == () for name in ("long", "empty"))


def test_requests_are_drawn_only_as_slots_fall_free(qwen_folder: Path) -> None:
    drawn: list[str] = []

    def source() -> Iterator[Request]:
        for request in make_requests(12):
            drawn.append(request.request_id)
            yield request

    completions = LocalEngine(qwen_folder, batch_size=2).generate(source())
    next(completions)
    assert len(drawn) <= 4


def test_a_rank_without_work_keeps_stepping_until_nobody_has_any(glm_folder: Path) -> None:
    """The other rank's part is a list of answers; every answer of `some rank has work` must cost exactly one pass."""
    engine = LocalEngine(glm_folder, batch_size=2)
    runner = engine.runner
    asked: list[bool] = []
    passes: list[tuple[int, ...]] = []

    def forward(ids_BS: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        passes.append(tuple(ids_BS.shape))
        return runner.forward(ids_BS, *rest, **named)  # type: ignore[arg-type]

    def any_rank_has_work(mine: bool) -> bool:
        asked.append(mine)
        return mine or len(asked) < 20

    cache = SlotCache(2, runner.num_layers, runner.device)
    request = Request("r", (8, 9, 10), (), max_tokens=4, temperature=0.0, top_p=1.0, seed=0)
    found = list(decode(forward, [request], runner.watch, cache, Limits(2, 64), any_rank_has_work=any_rank_has_work))
    assert len(found) == 1
    assert asked == [True] * 5 + [False] * 15  # a prefill, four tokens, then waiting
    assert passes == [(1, 2), *[(1, 1)] * 18]


def test_ids_above_the_tokenizer_are_never_emitted(qwen_folder: Path) -> None:
    engine = LocalEngine(qwen_folder, batch_size=4)
    engine.runner.banned_V = torch.arange(VOCAB) >= 10
    for completion in engine.generate(make_requests(6, temperature=1.0)):
        assert max(completion.token_ids) < 10
