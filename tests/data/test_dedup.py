from hypothesis import given
from hypothesis import strategies as st

from data.decontaminate import contaminated
from data.dedup import Keyed, conversation_key, duplicates
from tests.data.make_run import make_prompt


def key(answer: str, reasoning: str = "r", question: str = "q") -> str:
    return conversation_key(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "reasoning_content": reasoning}]
    )


def test_whitespace_makes_no_difference_and_everything_else_does() -> None:
    assert key("a  b\n", " r") == key("a b", "r ")
    assert len({key("a"), key("A"), key("a."), key("a", "s"), key("a", question="p")}) == 5


def test_text_cannot_move_between_reasoning_and_answer_unseen() -> None:
    assert key("a b", "c") != key("b", "c a") != key("a b c", "")


def test_the_first_eligible_copy_is_the_one_that_stays() -> None:
    log = [Keyed("t1", "x"), Keyed("t2", "x"), Keyed("t3", "y"), Keyed("t4", "x")]
    assert duplicates(log, {"t1", "t2", "t3", "t4"}) == {"t2", "t4"}
    assert duplicates(log, {"t2", "t3", "t4"}) == {"t4"}
    assert duplicates(log, set()) == set()


logs = st.lists(st.sampled_from("abcd"), max_size=20).map(
    lambda keys: [Keyed(f"t{index}", key) for index, key in enumerate(keys)]
)


@given(logs, st.sets(st.integers(0, 19)))
def test_deduplication_is_idempotent_and_loses_no_key(log: list[Keyed], chosen: set[int]) -> None:
    eligible = {f"t{index}" for index in chosen}
    repeated = duplicates(log, eligible)
    survivors = [row for row in log if row.trace_id in eligible - repeated]
    assert duplicates(survivors, eligible - repeated) == set()
    assert [row.key for row in survivors] == list(dict.fromkeys(row.key for row in log if row.trace_id in eligible))


def test_a_rewrapped_evaluation_item_is_found_and_attributed() -> None:
    item = make_prompt("What is\n the metal of  Fasosur?", split="eval")
    leak, clean = make_prompt("what is the METAL of Fasosur?"), make_prompt("What is the metal of Bado?")
    assert contaminated([leak, clean], [item]) == {leak.prompt_id: item.prompt_id}
