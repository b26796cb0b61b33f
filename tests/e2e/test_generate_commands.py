"""`tracestill generate` as its users have it: processes that get signals, share a run folder, run into a budget, are asked how
far they are, and go on."""

import asyncio
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from data.ledger import read_ledger
from data.store import ROLLUP, RunFolder, read_first_copies, read_rollup, segments
from data.work import WorkFolder
from generate.status import read_status
from tests.e2e.commands import Ended, command, end_of, environment, error_line, start, tracestill, wait_until
from tests.teacher.mock_server import Asked, Author, MockServer, Reply, encoded, said, serving, token

REQUESTS = 24
CONCURRENCY = 4
QUICK = 8
"""Requests that a server answers at once before it becomes slow."""
FOR_EVER_S = 600.0
DRAIN_S = 4.0
TTL_S = 3.0
EXIT_S = 1.0
"""What the end of a process may take beyond the bound on its drain."""
NOWHERE = "http://localhost:1/v1"
ANSWER = Reply(body=encoded(said(content="4", reasoning_content="2+2")))


class Case(NamedTuple):
    """A recipe, and a run folder that holds its prompt set."""

    config: Path
    run: RunFolder

    def words(self, *more: str) -> tuple[str, ...]:
        return ("generate", str(self.config), "--run-dir", str(self.run.root), *more)

    def start(self, *more: str) -> "subprocess.Popen[str]":
        return start(*self.words(*more), cwd=self.config.parent)

    def finish(self, *more: str) -> Ended:
        return tracestill(*self.words(*more), cwd=self.config.parent, timeout_s=120.0)


Lay = Callable[..., Case]


@pytest.fixture(scope="module")
def lay(tmp_path_factory: pytest.TempPathFactory) -> Lay:
    """Call with a server's URL; `api` and `engine` go into the recipe's teacher, all else into its generate section. Prompts
    are made once for each protocol: servers, budgets and times may change under a run folder."""
    made: dict[str, Path] = {}

    def prompt_set(api: str) -> Path:
        if api not in made:
            config = write_recipe(tmp_path_factory.mktemp(api), NOWHERE, api)
            ended = tracestill("prompts", str(config), "--run-dir", "run", cwd=config.parent)
            assert ended.code == 0, ended.err
            made[api] = config.parent / "run"
        return made[api]

    def laid(url: str, api: str = "chat", engine: dict[str, object] | None = None, **generate: object) -> Case:
        folder = tmp_path_factory.mktemp("case")
        config = write_recipe(folder, url, api, engine, **generate)
        shutil.copytree(prompt_set(api), folder / "run")
        return Case(config, RunFolder(folder / "run"))

    return laid


def write_recipe(folder: Path, url: str, api: str = "chat", engine: dict[str, object] | None = None, **generate: object) -> Path:
    """24 questions of 4 tasks, whose answer is 4."""
    rows = [
        {"question": f"Question {number}?", "answer": "4", "verifier": "exact", "task": f"t{number % 4}", "split": "train"}
        for number in range(REQUESTS)
    ]
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    http = {"type": "http", "base_urls": [url], "model": "tiny", "api": api, "concurrency": CONCURRENCY, "drain_s": 1.0}
    settings = {
        "prompts": [{"type": "jsonl", "path": "tasks.jsonl"}], "samples_per_prompt": 1, "segment_traces": 4,
        "drain_seconds": DRAIN_S, "lease_ttl_s": TTL_S,
    }  # fmt: skip
    recipe = {"name": "commands", "teacher": {"engine": http | (engine or {})}, "generate": settings | generate}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.fixture
def server() -> Iterator[MockServer]:
    with serving(lambda asked: ANSWER) as found:
        yield found


def check_every_request_ended_once(case: Case, *, superseded: int = 0) -> None:
    """superseded: traces of earlier failures."""
    ledger = read_ledger(case.run)
    assert (ledger.completed, ledger.failed, ledger.pending, ledger.superseded) == (REQUESTS, 0, 0, superseded)
    assert len(set(column(case, "trace_id"))) == len(column(case, "trace_id")) == REQUESTS
    assert read_rollup(case.run.traces) is not None


def column(case: Case, name: str) -> list[str]:
    return [value for table in read_first_copies(case.run.traces) for value in table[name].to_pylist()]


def asks(server: MockServer) -> Counter[str]:
    """How often each request was asked."""
    return Counter(asked.request_id for asked in server.asked)


def check_drained(ended: Ended, seconds: float, name: str) -> None:
    assert ended.code == 75 and seconds <= DRAIN_S + EXIT_S, (ended, seconds)
    assert f"stopped by {name}; finished traces are committed" in error_line(ended)


def check_nothing_is_held(case: Case) -> None:
    folder = WorkFolder.of(case.run)
    assert not list(folder.leases.glob("*.*")) and not list(folder.workers.glob("*.beat"))


# --- signals -----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.smoke
def test_sigterm_commits_what_arrives_in_time_and_the_same_command_ends_the_run(lay: Lay, server: MockServer) -> None:
    """Two of the replies in flight come within drain_s and count; the others do not, and are asked again."""
    case, late = lay(server.url, engine={"drain_s": 2.0}), QUICK + CONCURRENCY // 2

    def reply(asked: Asked) -> Reply:
        number = len(server.asked)
        return Reply(body=ANSWER.body, wait_s=0.0 if number <= QUICK else 1.0 if number <= late else FOR_EVER_S)

    server.reply = reply
    process = case.start()
    wait_until(lambda: len(server.asked) >= QUICK + CONCURRENCY, process)
    check_drained(*end_of(process, signal.SIGTERM), "SIGTERM")
    ledger = read_ledger(case.run)
    assert (ledger.completed, ledger.pending) == (late, REQUESTS - late)
    check_nothing_is_held(case)
    finished, server.reply = set(column(case, "trace_id")), lambda asked: ANSWER
    assert case.finish().code == 0
    check_every_request_ended_once(case)
    assert all(asks(server)[trace_id] == 1 for trace_id in finished), "what was committed was asked again"


@pytest.mark.long
@pytest.mark.smoke
def test_sigusr2_keeps_what_streams_have_said_and_the_same_command_goes_on_from_there(lay: Lay, server: MockServer) -> None:
    """Outputs of 400 tokens at 67 a second; the first 8 at once."""
    case = lay(server.url, api="completions", engine={"stream": True, "drain_s": 0.3}, checkpoint_tokens=32)
    author = Author(reply_bytes=400)

    def reply(asked: Asked) -> Reply:
        author.latency_median_s = 0.0 if len(server.asked) <= QUICK else 6.0
        return author(asked)

    server.reply = reply
    process = case.start()
    wait_until(lambda: len(server.asked) >= QUICK + CONCURRENCY, process)
    time.sleep(1.0)
    check_drained(*end_of(process, signal.SIGUSR2), "SIGUSR2")
    assert read_ledger(case.run).completed == QUICK
    begun, before = {asked.request_id for asked in server.asked[QUICK:]}, len(server.asked)
    author.latency_median_s, server.reply = 0.0, author
    assert case.finish().code == 0
    check_every_request_ended_once(case)
    went_on_at = {ask.request_id: len(ask.body["prompt"]) - author.first_prompt[ask.request_id] for ask in server.asked[before:]}
    assert all(went_on_at[trace_id] >= 32 for trace_id in begun), "an output was begun again"
    for table in read_first_copies(case.run.traces):
        for row in table.select(["trace_id", "turns"]).to_pylist():
            assert row["turns"][1]["token_ids"][:400] == [token(row["trace_id"], place) for place in range(400)]


@pytest.mark.long
@pytest.mark.smoke
def test_a_second_signal_ends_a_worker_at_once_however_busy_it_is(lay: Lay, server: MockServer) -> None:
    """Whoever is busy is most of the time in a callback of its event loop, which takes an exception for the callback's own."""
    patient = {"stream": True, "drain_s": 30.0, "concurrency": REQUESTS}
    case = lay(server.url, api="completions", engine=patient, drain_seconds=60.0)
    server.reply = Author(reply_bytes=60_000, latency_median_s=60.0)
    process = case.start()
    wait_until(lambda: len(server.asked) >= REQUESTS, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(5.2)  # more than configs.draining.SAME_WISH_S
    assert process.poll() is None, "the first signal leaves what is in flight its time"
    ended, seconds = end_of(process, signal.SIGTERM)
    assert ended.code == 75 and seconds <= 1.0 + EXIT_S, (ended, seconds)
    assert "stopped by SIGTERM again" in error_line(ended)


SENDS_ITSELF = """
import importlib.abc, os, signal, sys

class Sender(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == os.environ["SIGNAL_AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(os.environ["SIGNAL_NUMBER"]))

sys.meta_path.insert(0, Sender())
"""


@pytest.mark.parametrize(
    ("number", "module"),
    [(signal.SIGINT, "generate.launch"), (signal.SIGTERM, "transformers.models.auto.tokenization_auto")],
    ids=["ctrl-c", "sigterm"],
)
def test_a_signal_in_the_middle_of_an_import_ends_with_75_and_a_line(
    lay: Lay, tmp_path: Path, number: signal.Signals, module: str
) -> None:
    """A start imports for seconds, and importers make of an Exception an error of their own."""
    case = lay(NOWHERE)
    (tmp_path / "sitecustomize.py").write_text(SENDS_ITSELF)
    variables = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}", "SIGNAL_AT": module}
    done = subprocess.run(
        command(*case.words()), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        env=environment() | variables | {"SIGNAL_NUMBER": str(int(number))},
    )  # fmt: skip
    assert done.returncode == 75, done.stderr[-2000:]
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


# --- several workers, looked at meanwhile --------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.smoke
def test_of_two_workers_one_is_drained_and_the_other_ends_the_run(lay: Lay, server: MockServer) -> None:
    case, each, waits_s = lay(server.url, engine={"concurrency": 2, "drain_s": 2.0}), 2, [0.7]
    server.reply = lambda asked: Reply(body=ANSWER.body, wait_s=waits_s[-1])
    first, second = case.start(), case.start()
    wait_until(lambda: server.peak == 2 * each, first, second)
    check_drained(*end_of(first, signal.SIGTERM), "SIGTERM")
    assert second.poll() is None and read_ledger(case.run).pending
    waits_s.append(0.0)
    ended, _ = end_of(second)
    assert ended.code == 0, ended.err[-2000:]
    check_every_request_ended_once(case)
    assert len(set(column(case, "worker"))) == 2, "both have written"
    assert set(asks(server).values()) == {1}, "nothing that was in flight at either was asked again"


@pytest.mark.long
@pytest.mark.smoke
def test_a_server_that_hangs_holds_no_drain_up_and_status_tells_from_anywhere_who_is_at_what(
    lay: Lay, server: MockServer, tmp_path: Path
) -> None:
    """Two workers; one is drained, the other is killed."""
    case = lay(server.url)
    server.reply = lambda asked: Reply(body=ANSWER.body, wait_s=0.0 if len(server.asked) <= QUICK else FOR_EVER_S)

    def status() -> tuple[dict[str, object], list[str], str]:
        ended = tracestill(*case.words("--status", "--json"), cwd=tmp_path)
        assert ended.code == 0, ended.err
        found = json.loads(ended.out.splitlines()[-1])
        ledger = [found["ledger"][name] for name in ("requested", "completed", "failed", "pending")]
        assert ledger == [REQUESTS, QUICK, 0, REQUESTS - QUICK]
        return found, sorted(line["state"] for line in found["workers"]), ended.out

    drained, killed = case.start(), case.start()
    wait_until(lambda: read_status(case.run, TTL_S).in_flight == 2 * CONCURRENCY, drained, killed)
    found, states, out = status()
    assert states == ["working", "working"] and found["in_flight"] == 2 * CONCURRENCY
    stragglers = found["stragglers"]
    assert isinstance(stragglers, list) and len(stragglers) == 5 and all(one["seconds"] > 0 for one in stragglers)
    assert stragglers[0]["trace_id"] in out and "longest in flight" in out
    check_drained(*end_of(drained, signal.SIGTERM), "SIGTERM")
    end_of(killed, signal.SIGKILL)
    wait_until(lambda: any(line.state == "dead" for line in read_status(case.run, TTL_S).workers))
    found, states, out = status()
    assert states == ["dead", "ended"] and (found["in_flight"], found["stragglers"]) == (0, [])


@pytest.mark.long
def test_another_node_that_may_not_join_says_so_in_one_line_and_starts_no_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is at the rendezvous; what the node may not do is known before it would wait there."""
    words = (str(write_recipe(tmp_path, NOWHERE)), "--run-dir", "run", "-s", "teacher.engine={type: deepspeed}")
    assert tracestill("prompts", *words, cwd=tmp_path).code == 0
    for name, value in {"NODES": "2", "RENDEZVOUS": "localhost:1", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(f"TRACESTILL_{name}", value)
    words = ("generate", *words, "-s", "teacher.hardware.nodes=2")
    refused = tracestill(*words, "-s", "generate.canary.share=0.5", cwd=tmp_path)
    assert refused.code == 2 and "a canary is asked with --canary 0.5; leave it out" in error_line(refused)
    monkeypatch.setenv("TRACESTILL_NODE_RANK", "2")
    lost = tracestill(*words, cwd=tmp_path)
    assert lost.code == 2 and "says which node this is; expected 0..1" in error_line(lost)
    assert not (tmp_path / "run" / "logs").exists() and not (tmp_path / "run" / "traces").exists()


def test_the_status_of_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    ended = tracestill("generate", str(write_recipe(tmp_path, NOWHERE)), "--run-dir", "nowhere", "--status", cwd=tmp_path)
    assert ended.code == 2 and "nowhere: not a run folder" in error_line(ended)
    assert not (tmp_path / "nowhere").exists()


# --- before the fleet is spent -------------------------------------------------------------------------------------


def test_a_dry_run_prints_counts_hours_cost_and_storage_and_touches_nothing(tmp_path: Path) -> None:
    config = write_recipe(tmp_path, NOWHERE, engine={"price_input_per_million": 1.0, "price_output_per_million": 10.0})
    before = sorted(tmp_path.rglob("*"))
    ended = tracestill("generate", str(config), "--run-dir", "run", "--dry-run", "--json", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert sorted(tmp_path.rglob("*")) == before
    for word in ("requests", "prompt tokens", "hours", "cost", "storage", "t3"):
        assert word in ended.out
    found = json.loads(ended.out.splitlines()[-1])
    assert (found["requests"], found["by_task"]) == (REQUESTS, {f"t{task}": REQUESTS // 4 for task in range(4)})
    assert found["dollars"] > REQUESTS * found["output_tokens_mean"] * 10.0 / 1e6


@pytest.mark.long
def test_a_canary_that_disappoints_costs_its_share_only_and_the_run_goes_on_from_it(lay: Lay, server: MockServer) -> None:
    """A fifth of each of four tasks of six prompts: eight requests, of which every second is answered wrong."""
    case = lay(server.url)
    server.reply = lambda asked: Reply(body=encoded(said(content=str(4 + len(server.asked) % 2), reasoning_content="2+2")))
    refused = case.finish("--canary", "0.2", "-s", "generate.canary.min_kept_share=0.6", "--json")
    assert refused.code == 3 and "50.0% kept, expected at least min_kept_share 60.0%" in error_line(refused)
    assert json.loads(refused.out.splitlines()[-1])["fates"]["kept"] == 4
    assert len(server.asked) == 8 and read_rollup(case.run.traces) is None
    passed = case.finish("--canary", "0.2", "-s", "generate.canary.min_kept_share=0.4")
    assert passed.code == 0 and "canary: 8 requests" in passed.out, passed.err
    assert len(server.asked) == 8, "a canary that is answered was asked again"
    assert case.finish().code == 0
    check_every_request_ended_once(case)
    assert set(asks(server).values()) == {1}


# --- failures and budgets ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_sealed_run_is_opened_again_for_what_failed_and_nothing_else(lay: Lay, server: MockServer) -> None:
    """Two questions are refused, two answered with what is no JSON."""
    case = lay(server.url, engine={"attempts": 1})
    no, torn = Reply(400, b"no"), Reply(body=b"{")
    faults = {"Question 3?": no, "Question 4?": no, "Question 5?": torn, "Question 6?": torn}
    server.reply = lambda asked: faults.get(asked.body["messages"][-1]["content"], ANSWER)
    assert case.finish().code == 0
    sealed = read_rollup(case.run.traces)
    assert sealed is not None and sealed.counts["failed_by_reason"] == {"refused": 2, "bad_reply": 2}
    before = {
        path: path.read_bytes()
        for segment in segments(case.run.traces)
        for path in case.run.traces.glob(f"{segment.path.stem}.*")
    }
    faults.clear()
    again = case.finish("-s", "generate.retry_failed=true")
    assert again.code == 0, again.err[-2000:]
    assert len(server.asked) == REQUESTS + 4
    assert {path: path.read_bytes() for path in before} == before
    check_every_request_ended_once(case, superseded=4)
    sealed = read_rollup(case.run.traces)
    assert sealed is not None and sealed.counts["failed_by_reason"] == {} and sealed.counts["completed"] == REQUESTS
    sidecar = segments(case.run.traces)[0].path.with_suffix(".json")
    sidecar.write_bytes(sidecar.read_bytes() + b" ")
    damaged = case.finish()
    assert damaged.code == 2 and sidecar.name in error_line(damaged), "a changed byte is named, not sealed again"
    assert (case.run.traces / ROLLUP).is_file()


@pytest.mark.long
def test_a_budget_leaves_the_rest_pending_and_a_higher_one_goes_on(lay: Lay, server: MockServer) -> None:
    """Six tokens a reply, a dollar each; what is in flight, or waits to be parsed, when the limit is reached is finished."""
    case = lay(server.url, engine={"price_output_per_million": 1e6, "concurrency": 2})
    server.reply = lambda asked: Reply(body=ANSWER.body, wait_s=0.1)
    for name, limit in {"max_tokens": 20, "max_cost": 80}.items():
        ended = case.finish("-s", f"generate.budget={{{name}: {limit}}}")
        assert ended.code == 75 and f"generate.budget.{name} {limit} is reached" in error_line(ended), ended.err
        status = read_status(case.run, TTL_S)
        assert limit <= getattr(status.spent, name.removeprefix("max_")) <= limit + 6 * 6, "more than what was in flight"
        assert status.ledger.pending == REQUESTS - len(server.asked) > 0, "what was asked is finished, all else is pending"
    assert set(asks(server).values()) == {1}


# --- https -------------------------------------------------------------------------------------------------------


class SecureServer(MockServer):
    """The mock behind TLS. certificate: a PEM file with the key in it."""

    def __init__(self, certificate: Path) -> None:
        super().__init__(lambda asked: ANSWER)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}/v1"

    async def serve(self, port: int) -> None:
        self._server = await asyncio.start_server(self._converse, "127.0.0.1", port, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A folder with authority.pem, and server.pem that it has signed for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("makes certificates with the openssl command")
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    (tmp_path / "names").write_text("subjectAltName=IP:127.0.0.1")
    for words in (
        f"req -x509 {key} -keyout ca.key -out authority.pem -subj /CN=lab -days 2",
        f"req {key} -keyout server.key -out server.csr -subj /CN=teacher",
        "x509 -req -in server.csr -CA authority.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt",
    ):
        subprocess.run(["openssl", *words.split()], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "server.pem").write_text((tmp_path / "server.key").read_text() + (tmp_path / "server.crt").read_text())
    return tmp_path


@pytest.mark.long
def test_a_server_behind_https_needs_its_authority_named(lay: Lay, authority: Path) -> None:
    with SecureServer(authority / "server.pem") as server:
        trusting, stranger = lay(server.url, engine={"ca_file": str(authority / "authority.pem")}), lay(server.url)
        both = trusting.start(), stranger.start()
        (ended, _), (refused, _) = end_of(both[0]), end_of(both[1])
        assert ended.code == 0, ended.err[-2000:]
        check_every_request_ended_once(trusting)
        assert refused.code == 2 and "certificate is not trusted here; name its authority in ca_file" in error_line(refused)
        assert len(server.asked) == REQUESTS


@pytest.mark.long
def test_a_signal_to_one_rank_alone_drains_them_all(tmp_path: Path) -> None:
    """As when one node of several is preempted: the others must not wait for it in their last collective."""
    words = ("embedded", "--run-dir", "r")
    assert tracestill("prompts", *words, cwd=tmp_path, small=True).code == 0
    process, run = start(*command("generate", *words, small=True)[3:], cwd=tmp_path), RunFolder(tmp_path / "r")
    wait_until(lambda: bool(segments(run.traces)), process)
    (rank,) = (name for path in WorkFolder.of(run).workers.glob("*.beat") if (name := path.stem).endswith("-r1"))
    os.kill(int(rank.split("-")[-3]), signal.SIGTERM)
    ended, seconds = end_of(process)
    assert ended.code == 75 and "stopped by" in error_line(ended) and seconds < 60
    before = read_ledger(run)
    assert before.completed and before.pending
    assert tracestill("generate", *words, cwd=tmp_path, small=True).code == 0
    ledger = read_ledger(run)
    assert (ledger.pending, ledger.superseded) == (0, 0)
