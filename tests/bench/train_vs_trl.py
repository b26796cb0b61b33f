"""Training a LoRA adapter: ours against TRL's SFTTrainer and against a plain transformers loop.

    python -m tests.bench.setup
    python -m tests.bench.train_vs_trl --json docs/bench/train_vs_trl.json

Three optimizer steps of two packed rows of 4,096 tokens: a Qwen3 of 4 layers, 128 wide, with 65,536 words, LoRA of rank 16 on all
linear layers, float32 (train_set). Its head is nine tenths of the arithmetic, so this compares what the three do about the head
and the attention of a packed row on a CPU; a 7B model on a GPU is another question.

  ours     train.loop.train as `tracestill train` runs it in one process: ZeRO-2, durable metrics, a checkpoint every other step
  trl      SFTTrainer 1.16, packing by best-fit decreasing, which packs the same documents into as many rows (trl_peer)
  labels   model(..., labels=...) and AdamW on our rows, documents kept apart by position_ids (labels_peer)

Every turn is a new process with one thread, because processor time of two on a shared machine counts their waiting; the sides
take turns. All train on the tokens and masks that the product rendered. W&B is off everywhere. The first step's loss of every
side must be that of its documents one by one through the plain model, which no leak between documents and no other count of
supervised tokens survives.

`ratio`, `ratio_labels`: supervised tokens per second of processor time, ours over theirs: of the whole process tree, over the
steps after the first. `rss_ratio`, `rss_ratio_labels`: the most that was resident above what the imports had left, ours over
theirs; from loading the model to the last step. Both are read from /proc by this process while the other stands still.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from tests.bench.frame import machine
from tests.bench.setup import FOLDER
from tests.bench.train_set import Document, Settings, TrainSet, make_train_set

REPOSITORY = Path(__file__).parents[2]
SIDES = ("ours", "trl", "labels")
LOSS_TOLERANCE = 1e-5
"""Relative, of the first step's mean loss. Sums in another order differ by 5e-8; documents that see each other (a mask of ones,
rows of 512 tokens) by 7e-4."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Turn(NamedTuple):
    """One process. cpu_s: of the steps after the first, which trained `supervised` tokens. losses: nats per token, of all steps.
    rss_mib: the peak above base_mib."""

    cpu_s: float
    supervised: int
    rss_mib: float
    base_mib: float
    losses: list[float]
    facts: dict[str, object]

    @property
    def rate(self) -> float:
        return self.supervised / self.cpu_s


@dataclass(frozen=True, slots=True)
class Result:
    """Medians over the rounds. base_mib: resident after imports; rss_mib: at most, above that. first_loss: of each side;
    reference_loss: of its documents one by one. supervised_tokens: of a side's whole training."""

    benchmark: str
    ratio: float
    rss_ratio: float
    ratio_labels: float
    rss_ratio_labels: float
    ratios: dict[str, list[float]]
    rss_ratios: dict[str, list[float]]
    tokens_per_cpu_s: dict[str, float]
    rss_mib: dict[str, float]
    base_mib: dict[str, float]
    first_loss: dict[str, float]
    reference_loss: dict[str, float]
    settings: dict[str, float]
    supervised_tokens: int
    steps_measured: int
    threads: int
    repeats: int
    versions: object
    machine: str


# --- a side, measured from outside -------------------------------------------------------------------------------


def command_of(side: str, folder: Path, output: Path) -> list[str]:
    ours = [sys.executable, "-m"]
    return {
        "ours": [*ours, "tests.bench.product_peer", str(folder), str(output)],
        "trl": [str(FOLDER / "trl" / "bin" / "python"), "-m", "tests.bench.trl_peer", str(folder), str(output)],
        "labels": [*ours, "tests.bench.labels_peer", str(folder)],
    }[side]


def run_side(side: str, folder: Path) -> Turn:
    """A new process goes through its marks (tests/bench/marks.py): imported, warm, trained, done."""
    with tempfile.TemporaryDirectory() as output:
        process = start(command_of(side, folder, Path(output)))
        await_mark(process, "imported")
        base = resident_mib(process.pid)
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak starts anew
        proceed(process)
        await_mark(process, "warm")
        before = cpu_seconds(process.pid)
        proceed(process)
        await_mark(process, "trained")
        cpu_s, peak = cpu_seconds(process.pid) - before, peak_mib(process.pid)
        proceed(process)
        facts = await_mark(process, "done")
        proceed(process)
        assert process.wait() == 0, side
    losses, (_, *supervised) = facts.pop("losses"), facts.pop("supervised")  # type: ignore[misc]
    return Turn(cpu_s, int(sum(supervised)), peak - base, base, losses, facts)  # type: ignore[arg-type]


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def await_mark(process: subprocess.Popen[str], name: str) -> dict[str, object]:
    """The facts of that mark; the process stands still until `proceed`. Other lines are the libraries'."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{"mark":'):
            facts = json.loads(line)
            assert facts.pop("mark") == name, (name, line)
            return facts
    raise RuntimeError(f"{process.args}: ended with {process.wait()} before it was {name}")


def proceed(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in tree(int(child)))]


def cpu_seconds(pid: int) -> float:
    """User and system time so far of a process, of those below it, and of those they have waited for."""
    ticks = 0
    for one in tree(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(int(field) for field in fields[11:15])
    return ticks / TICKS_PER_S


def status_mib(pid: int, field: str) -> float:
    """Of the whole tree; kB in /proc."""
    lines = [line for one in tree(pid) for line in Path(f"/proc/{one}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def resident_mib(pid: int) -> float:
    return status_mib(pid, "VmRSS")


def peak_mib(pid: int) -> float:
    return status_mib(pid, "VmHWM")


# --- all sides do the same ---------------------------------------------------------------------------------------


def document_nats(folder: Path, documents: Sequence[Document]) -> list[float]:
    """Summed cross-entropy of each document by itself in the plain base model, before any training."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    found = []
    for document in documents:
        ids_T = torch.tensor(document.ids)
        places_N = torch.tensor(document.trained[1:]).nonzero()[:, 0]
        with torch.no_grad():
            logits_NV = model(input_ids=ids_T[None], use_cache=False, logits_to_keep=places_N).logits[0]
        found.append(float(torch.nn.functional.cross_entropy(logits_NV.double(), ids_T[places_N + 1], reduction="sum")))
    return found


def first_documents(side: str, turn: Turn, found: TrainSet) -> list[int]:
    """Which documents the side's first step trained. TRL orders rows itself, so what it was given is looked up."""
    if side != "trl":
        return [document for row in found.steps[0] for document in row]
    numbers = {tuple(document.ids): number for number, document in enumerate(found.documents)}
    documents = []
    for ids, position_ids in turn.facts["first_rows"]:  # type: ignore[attr-defined]
        starts = [place for place, position in enumerate(position_ids) if position == 0]
        documents += [numbers[tuple(ids[first:stop])] for first, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return documents


def reference_loss(documents: Sequence[int], found: TrainSet, nats: Sequence[float]) -> float:
    supervised = sum(found.documents[document].supervised for document in documents)
    return sum(nats[document] for document in documents) / supervised


def check_turn(side: str, turn: Turn, expected: float, num_steps: int) -> None:
    assert len(turn.losses) == num_steps, f"{side}: {len(turn.losses)} steps, expected {num_steps}"
    assert abs(turn.losses[0] / expected - 1) < LOSS_TOLERANCE, f"{side}: first loss {turn.losses[0]}, expected {expected}"


# --- the benchmark -----------------------------------------------------------------------------------------------


def measure(folder: Path, settings: Settings, repeats: int) -> Result:
    found = make_train_set(folder, settings)
    nats = document_nats(folder, found.documents)
    rounds: list[dict[str, Turn]] = []
    expected: dict[str, float] = {}
    for _ in range(repeats):
        rounds.append({})
        for side in SIDES:
            turn = rounds[-1][side] = run_side(side, folder)
            expected[side] = reference_loss(first_documents(side, turn, found), found, nats)
            check_turn(side, turn, expected[side], len(found.steps))
            assert turn.facts["trainable"] == rounds[-1]["ours"].facts["trainable"], side
            print(
                f"{side}: {turn.rate:,.0f} supervised tokens per CPU-second, {turn.rss_mib:,.0f} MiB above {turn.base_mib:,.0f}",
                flush=True,
            )
    return compare(rounds, found, expected)


def compare(rounds: Sequence[Mapping[str, Turn]], found: TrainSet, expected: Mapping[str, float]) -> Result:
    peers = SIDES[1:]
    ratios = {peer: [turns["ours"].rate / turns[peer].rate for turns in rounds] for peer in peers}
    rss_ratios = {peer: [turns["ours"].rss_mib / turns[peer].rss_mib for turns in rounds] for peer in peers}

    def median(name: str) -> dict[str, float]:
        return {side: round(statistics.median(getattr(turns[side], name) for turns in rounds), 1) for side in SIDES}

    trained = sum(document.supervised for document in found.documents)
    return Result(
        "train_vs_trl", statistics.median(ratios["trl"]), statistics.median(rss_ratios["trl"]),
        statistics.median(ratios["labels"]), statistics.median(rss_ratios["labels"]), ratios, rss_ratios, median("rate"),
        median("rss_mib"), median("base_mib"), {side: rounds[-1][side].losses[0] for side in SIDES}, dict(expected),
        found.settings._asdict(), trained,
        len(found.steps) - 1, 1, len(rounds), rounds[-1]["trl"].facts["versions"], machine(),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--row-tokens", type=int, default=Settings().row_tokens)
    parser.add_argument("--steps", type=int, default=Settings().num_steps, help="of the optimizer; the first is not measured")
    arguments = parser.parse_args()
    settings = Settings(row_tokens=arguments.row_tokens, num_steps=arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(asdict(measure(Path(folder), settings, arguments.repeats)), indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
