"""The sharded teacher behind files: the same words as one local copy says, and whoever waits is told when its ranks end."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from configs.errors import Interrupted, Stopped
from configs.launch import StageFailed, run_ranks
from data.engine import Completion, ExpertStats, Handout, LoopGuard, Partial, Request, Scores
from data.invocation import Invocation
from student.folders import resolve
from teacher import ranked_engine
from teacher.engines import open_local_engine
from teacher.ranked_engine import Place, RankedTeacher, deepspeed_version, request_of

REQUEST = Request(
    "a", (1, 2, 3), (9,), 8, 0.5, 0.9, 7, messages=({"role": "user", "content": "hello"},), stop_strings=("x", "y"),
    loop_guard=LoopGuard(4, 5), prefix_ids=(4,), prefix_logprobs=(-0.5,), log_z_temperatures=(1.0, 2.0),
)  # fmt: skip


class Echo:
    """Says the prompt again, one partial output before; scores are the ids."""

    name, version = "echo", "1"

    def load(self) -> None: ...

    def generate(self, requests: Sequence[Request], handout: Handout | None = None) -> Iterator[Completion]:
        for request in requests:
            assert handout is not None and handout.every_tokens == 2
            handout.take(Partial(request.request_id, request.prompt_ids[:1], (float("nan"),)))
            yield Completion(request.request_id, request.prompt_ids, (-1.5,) * len(request.prompt_ids), "stop", 1.0, 2.0)

    def score(self, sequences: Sequence[Sequence[int]], top: int = 0, z: Sequence[float] = (1.0,)) -> list[Scores]:
        return [Scores(tuple(map(float, one))) for one in sequences]

    def expert_stats(self) -> ExpertStats | None:
        return None

    def close(self) -> None: ...


def in_threads(folder: Path, groups: int) -> Callable[[Callable[[], None]], None]:
    """A launch whose ranks are threads that answer with Echo."""

    def rank(number: int) -> None:
        for job_number in range(100):
            path = folder / f"job-{job_number}.json"
            while not path.is_file():
                time.sleep(0.01)
            job = json.loads(path.read_bytes())
            if job["kind"] == ranked_engine.CLOSE:
                return
            if job["kind"] == ranked_engine.LOAD:
                (folder / ranked_engine.READY).touch()
                continue
            place = Place(number, groups, True)
            ranked_engine._answer(Echo(), job, folder / f"out-{job_number}.{number}.jsonl", place)  # type: ignore[arg-type]

    def launch(poll: Callable[[], None]) -> None:
        threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(groups)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            poll()
            time.sleep(0.01)

    return launch


@pytest.mark.parametrize("groups", [1, 3])
def test_every_request_is_answered_once_by_some_group(tmp_path: Path, groups: int) -> None:
    engine, taken = RankedTeacher(tmp_path / "r", groups, in_threads(tmp_path / "r", groups)), list[Partial]()
    requests = [replace(REQUEST, request_id=f"r{number}", prompt_ids=(number, 5)) for number in range(7)]
    found = list(engine.generate(requests, Handout(2, taken.append)))
    assert sorted((one.request_id, one.token_ids) for one in found) == [(f"r{number}", (number, 5)) for number in range(7)]
    assert all(one.logprobs == (-1.5, -1.5) and one.seconds == 2.0 for one in found)
    assert sorted(one.request_id for one in taken) == [f"r{number}" for number in range(7)]
    assert [one.logprobs for one in engine.score([[1, 2], [3], [4, 5, 6]])] == [(1.0, 2.0), (3.0,), (4.0, 5.0, 6.0)]
    assert list(engine.generate([], Handout(2))) == []
    engine.close()
    assert not (tmp_path / "r").exists()


def test_ranks_that_are_asked_nothing_load_nothing(tmp_path: Path) -> None:
    engine = RankedTeacher(tmp_path / "r", 2, in_threads(tmp_path / "r", 2))
    engine.start()
    engine.start()
    assert (tmp_path / "r").is_dir()
    engine.close()
    assert not (tmp_path / "r").exists()


def test_a_signal_waits_for_no_rendezvous(tmp_path: Path) -> None:
    """The other node has heard it too, and is gone."""
    ended = threading.Event()

    def launch(poll: Callable[[], None]) -> None:
        with suppress(Interrupted):
            while True:
                poll()
                time.sleep(0.01)
        ended.set()

    engine = RankedTeacher(tmp_path / "r", 1, launch)
    engine.start()
    with pytest.raises(Stopped):
        try:
            raise Stopped("stopped by SIGUSR2")
        finally:
            engine.close()
    assert ended.is_set()


def test_a_request_goes_through_json_as_it_is() -> None:
    assert request_of(json.loads(json.dumps(asdict(REQUEST)))) == REQUEST
    plain = replace(REQUEST, loop_guard=None)
    assert request_of(json.loads(json.dumps(asdict(plain)))) == plain


def test_ranks_that_die_are_told_to_whoever_waits(tmp_path: Path) -> None:
    def launch(poll: Callable[[], None]) -> None:
        (tmp_path / "r" / ranked_engine.READY).touch()
        while not list((tmp_path / "r").glob("job-*.json")):
            time.sleep(0.01)
        raise StageFailed("rank 1 was ended by SIGKILL")

    engine = RankedTeacher(tmp_path / "r", 2, launch)
    with pytest.raises(StageFailed, match="rank 1 was ended by SIGKILL"):
        list(engine.generate([REQUEST], Handout(2)))
    engine.close()


def test_ranks_in_the_middle_of_something_are_ended(tmp_path: Path) -> None:
    ended: list[BaseException] = []

    def launch(poll: Callable[[], None]) -> None:
        (tmp_path / "r" / ranked_engine.READY).touch()
        try:
            while True:
                poll()
                time.sleep(0.01)
        except Interrupted as error:
            ended.append(error)
            raise

    engine = RankedTeacher(tmp_path / "r", 1, launch)

    def ask() -> None:
        with suppress(Interrupted):
            list(engine.generate([REQUEST], Handout(2)))

    asked = threading.Thread(target=ask, daemon=True)
    engine.load()
    asked.start()
    while not (tmp_path / "r" / "job-1.json").is_file():
        time.sleep(0.01)
    engine.close()
    assert len(ended) == 1


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_real_ranks_say_what_one_local_copy_says(tmp_path: Path) -> None:
    """DeepSpeed on gloo, asked twice after one start: float32 likelihoods agree to 1e-4, and the words are the same."""
    from data.chat import dialect_of, encode_prompt
    from teacher.engines import load_tokenizer

    recipe = Invocation("embedded", None, tmp_path / "run").open().recipe
    tokenizer = load_tokenizer(recipe.teacher)
    stops = dialect_of(tokenizer).stop_ids(tokenizer)
    asked = ["Which metal do the miners of Fasosur dig for?", "Spell this word backward (example: sun -> nus): bridge"]
    requests = [
        Request(f"{number}", tuple(encode_prompt(tokenizer, [{"role": "user", "content": text}])), stops, 64, 0.0, 1.0, 0)
        for number, text in enumerate(asked * 3)
    ]

    def launch(poll: Callable[[], None]) -> None:
        words = ["evaluate", "embedded", "--run-dir", str(tmp_path / "run")]
        run_ranks(words, processes=2, extensions=tmp_path / "e", log=tmp_path / "log", poll=poll)

    ranks = RankedTeacher(tmp_path / "run" / "cache" / "teacher", 2, launch)
    local = open_local_engine(resolve(str(Path(ranked_engine.__file__).parent / "embedded")), dtype="fp32", batch_size=8)
    local.load()
    try:
        found = {one.request_id: one for one in ranks.generate(requests)}
        again = {one.request_id: one.token_ids for one in ranks.generate(requests[:1])}
        scores = ranks.score([one.prompt_ids for one in requests[:3]], top_logits=1)
    finally:
        ranks.close()
    expected = {one.request_id: one for one in local.generate(requests)}
    assert {name: one.token_ids for name, one in found.items()} == {name: one.token_ids for name, one in expected.items()}
    assert again == {"0": expected["0"].token_ids}
    for mine, theirs in zip(scores, local.score([one.prompt_ids for one in requests[:3]], top_logits=1), strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert mine.top is not None and theirs.top is not None and mine.top.ids_TK.tolist() == theirs.top.ids_TK.tolist()


def test_the_version_is_the_engines_own() -> None:
    from teacher.deepspeed_engine import DeepSpeedEngine

    assert deepspeed_version() == DeepSpeedEngine.version
