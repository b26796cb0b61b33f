"""A thousand corruptions of a finished run folder, one at a time: how many `tracestill data verify` does not see.

    python -m tests.bench.corruption --json docs/bench/corruption.json

Each trial damages one file of the run in one way (a flipped bit, a page of zeros, a truncation at a random place, a cut at a
boundary of the format: an Arrow message, a Parquet row group's end, a line) or removes it, verifies the run, and puts it back.
`undetected` has to be 0, `false_alarms` (an undamaged run refused) too.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from configs.errors import TracestillError
from configs.load import load_recipe
from data.build import build
from data.run_config import open_run
from data.store import RunFolder, seal
from data.verification import verify_run
from tests.bench.frame import machine
from tests.data.asked_run import NUM_FACTS, Student, fact, models_with, settings
from tests.data.make_run import commit_traces, make_prompt, make_trace, seal_prompts

PAGE = 4096
Damage = Callable[[bytes, random.Random], bytes]


def flipped_bit(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def zeroed_page(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(0, len(content), PAGE)
    return content[:start] + bytes(len(content[start : start + PAGE])) + content[start + PAGE :]


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def cut_at_boundary(content: bytes, rng: random.Random) -> bytes:
    """Where an Arrow stream's message begins (0xFFFFFFFF), or a line ends; a stream cut there reads short without an error."""
    mark = b"\xff\xff\xff\xff" if b"\xff\xff\xff\xff" in content else b"\n"
    places = [place for place in range(1, len(content)) if content.startswith(mark, place)]
    return content[: rng.choice(places)] if places else content[:-1]


DAMAGES: dict[str, Damage] = {
    "flipped bit": flipped_bit, "zeroed page": zeroed_page, "truncation": truncated, "boundary cut": cut_at_boundary,
}  # fmt: skip


def make_finished_run(root: Path) -> RunFolder:
    """Prompts, three trace segments, a base student's replies, verdicts and a dataset of some 200 rows, sealed."""
    run = open_run(load_recipe("embedded"), root)
    sums = [make_prompt(f"What is {number} + 1?", str(number + 1)) for number in range(74)]
    prompts = [*sums, *map(fact, range(NUM_FACTS))]
    seal_prompts(run, prompts, 240)
    for sample in range(3):
        commit_traces(
            run, [make_trace(prompt, prompt.answer, sample=sample, reasoning=f"{sample} {prompt.answer}") for prompt in prompts]
        )
    files = [path for path in sorted(run.traces.iterdir()) if path.suffix in (".arrow", ".json")]
    seal(run, run.traces, stage="generate", fingerprint="f", inputs={}, files=files, counts={}, seconds=0.0)
    built = build(settings(), run, models=models_with(Student()))
    seal(run, run.dataset, stage="data", fingerprint="f", inputs={}, files=built.files, counts=dict(built.counts), seconds=0.0)
    return run


def is_detected(run: RunFolder) -> bool:
    try:
        verify_run(run)
    except TracestillError:
        return True
    return False


def storm(root: Path, trials: int, seed: int) -> dict[str, object]:
    run, rng = make_finished_run(root / "run"), random.Random(seed)
    files = sorted(
        path
        for path in run.root.rglob("*")
        if path.is_file() and path.parts[len(run.root.parts)] not in ("work", "logs", "cache")
    )
    files = [path for path in files if path.stat().st_size]
    assert not is_detected(run), "an undamaged run is refused"
    tried, undetected = Counter[str](), []
    for trial in range(trials):
        path, name = rng.choice(files), rng.choice(list(DAMAGES))
        content = path.read_bytes()
        damaged = DAMAGES[name](content, rng)
        while damaged == content:  # a page that was zero before
            damaged = flipped_bit(content, rng)
        path.write_bytes(damaged)
        tried[name] += 1
        if not is_detected(run):
            undetected.append(f"trial {trial}: {name} of {path.relative_to(run.root)}")
        path.write_bytes(content)
    return {
        "benchmark": "corruption", "trials": trials, "seed": seed, "files": len(files), "by_damage": dict(sorted(tried.items())),
        "undetected": len(undetected), "examples": undetected[:10], "false_alarms": int(is_detected(run)), "machine": machine(),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = storm(Path(folder), arguments.trials, arguments.seed)
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
