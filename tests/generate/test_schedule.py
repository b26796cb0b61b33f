"""Which requests are next, and whose they are."""

from hypothesis import given
from hypothesis import strategies as st

from configs.schema import Sampling
from data.records import Prompt, prompt_identity, trace_identity
from generate.schedule import all_asks, mean_output_tokens, pending_asks, sampling_fingerprint, share


def prompt(text: str, task: str = "t") -> Prompt:
    messages = ({"role": "user", "content": text},)
    return Prompt(prompt_identity(messages, "v"), "s", task, "v", messages, "", "", "train", None, "", "MIT")  # type: ignore[arg-type]


def test_identity_follows_from_what_is_asked() -> None:
    asks = all_asks([prompt("a"), prompt("b")], 2, "teacher", Sampling(), 0)
    fingerprint = sampling_fingerprint(Sampling(), 0)
    assert [ask.trace_id for ask in asks] == [
        trace_identity(prompt(text).prompt_id, index, "teacher", fingerprint) for text in "ab" for index in (0, 1)
    ]
    others = [all_asks([prompt("a")], 1, "teacher", Sampling(), 1), all_asks([prompt("a")], 1, "other", Sampling(), 0),
              all_asks([prompt("a")], 1, "teacher", Sampling(temperature=0.5), 0)]  # fmt: skip
    assert len({asks[0].trace_id, *(other[0].trace_id for other in others)}) == 4


def test_longest_expected_comes_first_and_unseen_tasks_before_all() -> None:
    prompts = [prompt("short", "short"), prompt("long", "long"), prompt("new", "new")]
    ordered = pending_asks(all_asks(prompts, 1, "t", Sampling(), 0), set(), {"short": 10.0, "long": 500.0})
    assert [ask.prompt.task for ask in ordered] == ["new", "long", "short"]


@given(st.integers(1, 5), st.integers(1, 40), st.data())
def test_ranks_share_out_exactly_what_is_pending(world: int, count: int, data: st.DataObject) -> None:
    asks = all_asks([prompt(str(index)) for index in range(count)], 2, "t", Sampling(), 0)
    done = data.draw(st.sets(st.sampled_from([ask.trace_id for ask in asks])))
    pending = pending_asks(asks, done, {})
    shared = [ask.trace_id for rank in range(world) for ask in share(pending, rank, world)]
    assert sorted(shared) == sorted({ask.trace_id for ask in asks} - done)


def test_means_by_task() -> None:
    assert mean_output_tokens(["a", "b", "a"], [1, 10, 2]) == {"a": 1.5, "b": 10.0}
