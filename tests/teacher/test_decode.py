"""The decode loop against transformers' own `generate`, one request at a time."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import teacher.admission
import teacher.row
import teacher.score
from configs.errors import UnusableInput
from data.engine import Completion, Handout, LoopGuard, Partial, Request, Source
from teacher.cache import SlotCache
from teacher.decode import Agreed, Batch, Limits, NotNumbers, compacted, decode
from teacher.local_engine import LocalEngine
from teacher.runner import banned_ids
from tests.teacher.models import VOCAB

STOPS = (3, 5)
reserve = SlotCache.reserve


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


@pytest.mark.parametrize(("refill_idle", "prefill_tokens"), [(1, 8192), (40, 8192), (2, 11)])
def test_refill_and_chunked_prefill_change_no_token(
    folder: Path, expected: dict[str, tuple[int, ...]], refill_idle: int, prefill_tokens: int
) -> None:
    engine = with_limits(LocalEngine(folder, batch_size=6), refill_idle=refill_idle, prefill_tokens=prefill_tokens)
    assert outputs(engine.generate(make_requests(20))) == expected


def test_a_source_that_had_nothing_is_asked_again_while_others_are_answered(
    folder: Path, expected: dict[str, tuple[int, ...]]
) -> None:
    """What a worker that dies leaves comes late; the first request is still being answered then."""
    first, *late = make_requests(20)
    waiting, asked = [first], 0

    def take() -> Request | None:
        nonlocal asked
        asked += 1
        if asked == 4:
            waiting.extend(late)
        return waiting.pop(0) if waiting else None

    found = outputs(LocalEngine(folder, batch_size=6).generate(Source(take)))
    assert found == expected


@pytest.mark.parametrize(("cache_tokens", "prefill_tokens"), [(128, 8192), (300, 11), (700, 8192)])
def test_a_short_cache_budget_changes_no_token_and_is_kept(
    folder: Path, expected: dict[str, tuple[int, ...]], cache_tokens: int, prefill_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are sent back in the middle of their text and read in again; some budgets hold one row, some a few."""
    monkeypatch.setattr(teacher.row, "HEADROOM", 1)
    monkeypatch.setattr(teacher.admission, "FIRST_COLUMNS", 8)
    taken: list[int] = []
    monkeypatch.setattr(
        SlotCache, "reserve", lambda cache, shape: (taken.append(shape.slots * shape.columns), reserve(cache, shape))
    )
    engine = with_limits(LocalEngine(folder, batch_size=12), cache_tokens=cache_tokens, prefill_tokens=prefill_tokens)
    assert outputs(engine.generate(make_requests(20))) == expected
    assert max(taken) <= cache_tokens


def test_rows_are_sent_back_when_the_budget_is_short(glm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof that the test above proves something; and a row that was sent back is counted once by the watch."""
    monkeypatch.setattr(teacher.row, "HEADROOM", 1)
    monkeypatch.setattr(teacher.admission, "FIRST_COLUMNS", 8)
    back: list[str] = []
    send_back = Batch._send_back
    monkeypatch.setattr(Batch, "_send_back", lambda batch: (back.append("sent"), send_back(batch)))
    short = with_limits(LocalEngine(glm_folder, batch_size=12), cache_tokens=200)
    plain = LocalEngine(glm_folder, batch_size=12)
    requests = changed(make_requests(20), prompt_ids=(7, 8), max_tokens=30, stop_ids=(), temperature=1.0)
    assert outputs(short.generate(requests)) == outputs(plain.generate(requests))
    assert len(back) > 3
    assert short.expert_stats() == plain.expert_stats()


def test_a_long_prompt_does_not_hold_up_rows_that_speak(glm_folder: Path) -> None:
    """Chunks of a prompt and decode steps take turns, and a short prompt speaks before a long one of its group is loaded."""
    passes: list[tuple[int, ...]] = []
    engine = with_limits(LocalEngine(glm_folder, batch_size=2), prefill_tokens=8)
    runner = engine.runner

    def forward(ids_BS: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        passes.append(tuple(ids_BS.shape))
        return type(runner).forward(runner, ids_BS, *rest, **named)  # type: ignore[arg-type]

    cache = SlotCache(2, runner.num_layers, runner.device)
    short = Request("short", (7, 8, 9), (), max_tokens=6, temperature=0.0, top_p=1.0, seed=0)
    long = Request("long", tuple(range(6, 36)), (), max_tokens=3, temperature=0.0, top_p=1.0, seed=0)
    found = [c.request_id for c in decode(forward, [short, long], runner.watch, cache, runner.limits)]
    assert found == ["short", "long"]
    # both load 4 columns; then the short one speaks between the chunks of the long one's other 25 columns
    assert passes == [(2, 4), (1, 1), (1, 8), (1, 1), (1, 8), (1, 1), (1, 8), (1, 1), (1, 1), *[(2, 1)] * 2, (1, 1)]


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
            assert len(scores.logprobs) == len(sequence) and scores.logprobs[0] == 0.0
            assert scores.logprobs[-len(completion.token_ids) :] == pytest.approx(
                completion.logprobs, abs=1e-4
            )  # float32, other GEMM shapes


def test_score_equals_one_plain_forward_pass(folder: Path) -> None:
    sequences = [(9,), *(request.prompt_ids for request in make_requests(6))]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for sequence, scores in zip(sequences, LocalEngine(folder, batch_size=3).score(sequences), strict=True):
        ids = torch.tensor([sequence])
        with torch.no_grad():
            logprobs = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        assert scores.logprobs == pytest.approx([0.0, *logprobs.tolist()], abs=1e-4)


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
    asked: list[int] = []
    passes: list[tuple[int, ...]] = []

    def forward(ids_BS: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        passes.append(tuple(ids_BS.shape))
        return runner.forward(ids_BS, *rest, **named)  # type: ignore[arg-type]

    def agree(mine: int) -> int:
        asked.append(mine)
        return max(mine, Agreed.WORK if len(asked) < 20 else Agreed.DONE)

    cache = SlotCache(2, runner.num_layers, runner.device)
    request = Request("r", (8, 9, 10), (), max_tokens=4, temperature=0.0, top_p=1.0, seed=0)
    found = list(decode(forward, [request], runner.watch, cache, Limits(2, 64), agree=agree))
    assert len(found) == 1
    assert asked == [Agreed.WORK] * 5 + [Agreed.DONE] * 15  # a prefill, four tokens, then waiting
    assert passes == [(1, 2), *[(1, 1)] * 18]


def test_ids_above_the_tokenizer_are_never_emitted(qwen_folder: Path) -> None:
    engine = LocalEngine(qwen_folder, batch_size=4)
    engine.runner.banned_V = torch.arange(VOCAB) >= 10
    for completion in engine.generate(make_requests(6, temperature=1.0)):
        assert max(completion.token_ids) < 10


# --- requests' own wishes ----------------------------------------------------------------------------------------


def changed(requests: Sequence[Request], **changes: object) -> list[Request]:
    return [dataclasses.replace(request, **changes) for request in requests]  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prefix_goes_on_as_it_would_have_with_the_budget_that_remains(folder: Path, temperature: float) -> None:
    whole = {c.request_id: c for c in LocalEngine(folder, batch_size=5).generate(make_requests(12, temperature=temperature))}
    continued = [
        dataclasses.replace(
            request,
            prefix_ids=whole[request.request_id].token_ids[:cut],
            prefix_logprobs=whole[request.request_id].logprobs[:cut],
        )
        for cut, request in enumerate(make_requests(12, temperature=temperature))
    ]
    for completion in LocalEngine(folder, batch_size=4).generate(continued):
        expected = whole[completion.request_id]
        assert completion.token_ids == expected.token_ids and completion.finish_reason == expected.finish_reason
        assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_partial_outputs_are_handed_out_every_few_tokens_and_when_it_stops(folder: Path) -> None:
    requests = changed(make_requests(6, temperature=1.0), max_tokens=30, stop_ids=())
    whole = outputs(LocalEngine(folder, batch_size=3).generate(requests))
    taken: list[Partial] = []
    asked = iter(range(1000))
    handout = Handout(every_tokens=4, take=taken.append, stop=lambda: next(asked) >= 12)
    assert list(LocalEngine(folder, batch_size=3).generate(requests, handout)) == []
    assert {len(partial.token_ids) for partial in taken} == {4, 8, len(taken[-1].token_ids)} and len(taken) == 9
    for partial in taken:
        assert whole[partial.request_id][: len(partial.token_ids)] == partial.token_ids
    last = {partial.request_id: partial for partial in taken}
    rest = []
    for request in requests:
        _, ids, logprobs, _ = last.get(request.request_id, Partial("", (), ()))
        rest.append(dataclasses.replace(request, prefix_ids=ids, prefix_logprobs=logprobs))
    assert outputs(LocalEngine(folder, batch_size=6).generate(rest)) == whole


def test_a_prefix_that_is_already_the_answer_costs_no_pass(glm_folder: Path) -> None:
    ended = Request("stop", (7, 8), STOPS, 9, 0.0, 1.0, 0, prefix_ids=(9, 3), prefix_logprobs=(-1.0, -2.0))
    full = Request("length", (7, 8), STOPS, 2, 0.0, 1.0, 0, prefix_ids=(9, 9), prefix_logprobs=(-1.0, -2.0))
    engine = LocalEngine(glm_folder)
    engine.runner.model = lambda **_: pytest.fail("a pass was made")
    found = {c.request_id: (c.finish_reason, c.token_ids, c.logprobs) for c in engine.generate([ended, full])}
    assert found == {"stop": ("stop", (9, 3), (-1.0, -2.0)), "length": ("length", (9, 9), (-1.0, -2.0))}


def test_reasoning_that_has_spent_its_budget_is_closed_and_goes_on_from_there(folder: Path) -> None:
    """The closing tag stands last in the budget, with the log-probability that the model gave it; what was said before is what
    would have been said, and what follows is what a continued prefix says. A block that closed by itself is left alone."""
    engine, end = LocalEngine(folder, batch_size=5), 17
    requests = changed([one for one in make_requests(20) if one.max_tokens == 30], stop_ids=())
    free, budget = outputs(engine.generate(requests)), 9
    closed = {one.request_id: one for one in engine.generate(changed(requests, reasoning_budget=budget, reasoning_end=end))}
    for request in requests:
        said, before = closed[request.request_id].token_ids, free[request.request_id]
        if end in before[:budget]:
            assert said == before
            continue
        assert said[: budget - 1] == before[: budget - 1] and said[budget - 1] == end and len(said) == 30
        (whole,) = engine.score([request.prompt_ids + said])
        recorded = closed[request.request_id].logprobs
        assert recorded == pytest.approx(whole.logprobs[len(request.prompt_ids) :], abs=1e-4)
        prefix = dataclasses.replace(request, prefix_ids=said[:budget], prefix_logprobs=recorded[:budget])
        assert next(iter(engine.generate([prefix]))).token_ids == said


def test_nothing_ends_before_min_tokens(folder: Path) -> None:
    requests = changed(make_requests(16, temperature=1.0), max_tokens=30, stop_ids=tuple(range(6, 40)))
    assert any(len(ids) < 5 for ids in outputs(LocalEngine(folder, batch_size=5).generate(requests)).values())
    for completion in LocalEngine(folder, batch_size=5).generate(changed(requests, min_tokens=5)):
        assert len(completion.token_ids) >= 5 and not set(completion.token_ids[:4]) & set(range(6, 40))


def spell(ids: Sequence[int]) -> str:
    return "".join(f"<{token_id}>" for token_id in ids)


def test_a_stop_string_ends_the_output_at_the_token_that_completes_it(qwen_folder: Path) -> None:
    engine = LocalEngine(qwen_folder, batch_size=4)
    engine.runner.detokenize = spell
    requests = changed(make_requests(8, temperature=1.0), max_tokens=30, stop_ids=())
    whole = outputs(engine.generate(requests))
    wanted = {name: f"{ids[9]}><{ids[10]}" for name, ids in whole.items()}  # across a border of two tokens
    stopping = [dataclasses.replace(r, stop_strings=("never", wanted[r.request_id])) for r in requests]
    for completion in engine.generate(stopping):
        ids = whole[completion.request_id]
        first = next(end for end in range(1, len(ids) + 1) if wanted[completion.request_id] in spell(ids[:end]))
        assert (completion.finish_reason, completion.token_ids) == ("stop", ids[:first])
    late = next(iter(engine.generate([dataclasses.replace(stopping[0], min_tokens=20)])))
    assert len(late.token_ids) >= 20  # one that was complete before min_tokens does not count


def test_stop_strings_without_a_tokenizer_are_refused(qwen_folder: Path) -> None:
    with pytest.raises(UnusableInput, match="stop_strings"):
        list(LocalEngine(qwen_folder).generate(changed(make_requests(1), stop_strings=("x",))))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([1, 2] * 4, True), ([5, 6, 7, *[1, 2] * 4], True), ([1, 2] * 3, False), ([1, 2, 3] * 4, True), ([1, 2, 3, 4] * 4, False),
        ([9] * 4, True), ([1, 2, 1, 2, 1, 2, 1, 3], False), ([], False), ([*[1, 2] * 4, 1], True),
    ],
)  # fmt: skip
def test_a_loop_is_a_cycle_at_the_end(said: list[int], expected: bool) -> None:
    assert teacher.row.is_looping(said, LoopGuard(longest_period=3, repeats=4)) == expected


def test_a_looping_output_is_ended_and_says_so(folder: Path) -> None:
    """With one id left to say, every output is a loop; the guard looks every 32 tokens, whoever the neighbours are."""
    engine = LocalEngine(folder, batch_size=3)
    engine.runner.banned_V = torch.arange(VOCAB) != 7
    guarded = changed(make_requests(6), max_tokens=100, stop_ids=(), loop_guard=LoopGuard(24, 40))
    for completion in engine.generate(guarded):
        assert (completion.finish_reason, completion.token_ids) == ("loop", (7,) * 2 * teacher.row.LOOP_CHECK_TOKENS)
    (unguarded,) = engine.generate(changed(guarded[:1], loop_guard=None))
    assert (unguarded.finish_reason, len(unguarded.token_ids)) == ("length", 100)


def test_kept_logits_are_those_of_one_plain_forward_pass(folder: Path) -> None:
    requests = make_requests(8, temperature=1.0)
    asking = [dataclasses.replace(r, top_logits=3 + i, log_z_temperatures=(2.0, 1.0)[i % 2 :]) for i, r in enumerate(requests)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = {request.request_id: request for request in asking}
    engine = LocalEngine(folder, batch_size=3)
    for completion in engine.generate(asking):
        request, top = prompts[completion.request_id], completion.top
        sequence = (*request.prompt_ids, *completion.token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([sequence])).logits[0, len(request.prompt_ids) - 1 : -1].double()
        assert top is not None and top.ids_TK.shape == (len(completion.token_ids), request.top_logits)
        assert torch.tensor(top.logits_TK).double() == pytest.approx(logits.topk(request.top_logits).values, abs=1e-4)
        log_z = torch.stack([(logits / temperature).logsumexp(-1) for temperature in request.log_z_temperatures], -1)
        assert torch.tensor(top.log_z_TC) == pytest.approx(log_z, abs=1e-4)
        (scores,) = engine.score([sequence], request.top_logits, request.log_z_temperatures)
        assert scores.top is not None and len(scores.top.ids_TK) == len(sequence) - 1
        assert scores.top.log_z_TC[-len(completion.token_ids) :] == pytest.approx(top.log_z_TC, abs=1e-4)


@pytest.mark.parametrize(("slots", "first"), [([0, 2, 3], 0), ([4, 5, 6], 2), ([3, 4, 7], 3), ([], 3), ([1], 1)])
def test_compaction_moves_as_few_rows_as_it_can(slots: list[int], first: int) -> None:
    found = compacted(slots, first)
    assert sorted(found) == sorted(slots)
    places = range(first, first + len(slots))
    assert sum(old != new for old, new in zip(found, places, strict=True)) == sum(slot not in places for slot in slots)


def test_padding_is_never_said_unless_it_ends_an_output(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen3", vocab_size=20, pad_token_id=4, eos_token_id=[5, 6])
    banned = banned_ids(tmp_path, config, torch.device("cpu"))
    assert banned is not None and banned.nonzero().flatten().tolist() == [4]
    assert (
        banned_ids(tmp_path, AutoConfig.for_model("qwen3", vocab_size=20, pad_token_id=5, eos_token_id=[5]), torch.device("cpu"))
        is None
    )


def test_a_request_that_the_budget_could_never_hold_is_refused_and_not_cut(qwen_folder: Path) -> None:
    engine = with_limits(LocalEngine(qwen_folder, batch_size=2), cache_tokens=128)
    too_long = Request("r", (7,) * 84, STOPS, max_tokens=100, temperature=0.0, top_p=1.0, seed=0)
    with pytest.raises(UnusableInput, match="may take 184 tokens of cache, the budget holds 128"):
        list(engine.generate([too_long]))
    with pytest.raises(UnusableInput, match="a sequence of 200 tokens, expected at most 128"):
        engine.score([(7,) * 200])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_say_nothing(qwen_folder: Path, temperature: float) -> None:
    engine = LocalEngine(qwen_folder, batch_size=2)
    engine.runner.model.model.norm.weight.data.fill_(float("nan"))  # type: ignore[attr-defined]
    with pytest.raises(NotNumbers, match="not numbers for 2 of 2 rows"):
        list(engine.generate(make_requests(2, temperature=temperature)))


def test_a_stop_string_that_was_complete_before_min_tokens_does_not_hide_the_next() -> None:
    spoken = "ab.ab."
    assert [
        teacher.row.ends_with_stop_string(range(end), ("ab",), lambda ids: "".join(spoken[i] for i in ids))
        for end in range(1, len(spoken) + 1)
    ] == [False, True, False, False, True, False]


def test_ranks_of_one_group_go_on_with_what_the_first_has_sampled(qwen_folder: Path) -> None:
    """`share` replaces ids and log-probabilities of every step; whatever this rank sampled itself is forgotten."""
    engine = LocalEngine(qwen_folder, batch_size=2)
    runner = engine.runner
    said = iter([[9.0], [9.0], [3.0]])
    runner.share = lambda sampled: torch.tensor([next(said), [-0.5]], dtype=torch.float64)
    (found,) = runner.generate([Request("r", (7, 8), STOPS, 9, 0.0, 1.0, 0)])
    assert (found.token_ids, found.logprobs, found.finish_reason) == ((9, 9, 3), (-0.5,) * 3, "stop")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stop_ids": (VOCAB,)}, "beyond the model's vocabulary"),
        ({"prompt_ids": (-1, 2)}, "token -1 is beyond"),
        ({"prefix_ids": (7, 8)}, "2 prefix ids with 0 logprobs"),
        ({"temperature": 1e-308}, "temperature 1e-308; expected 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p in"),
        ({"seed": 1 << 63}, "63 bits"),
    ],
)
def test_a_request_that_is_not_of_this_model_is_refused(qwen_folder: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(UnusableInput, match=said):
        list(LocalEngine(qwen_folder).generate(changed(make_requests(1), **changes)))
