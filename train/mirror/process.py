"""The process that keeps W&B up to date with a metrics file: `python -m train.mirror.process SPEC`, started by mirror.py.

Every row of the file is in W&B once, under its train step (`_step` is the train step too: by it W&B's server says at a resume how
far it is). Commands come as lines on standard input; a problem goes back as one line on standard output, and ends
the process. Neither the training's state nor its environment is here, nor torch.
"""

import hashlib
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from configs.launch import die_with_parent
from configs.wandb_privacy import PRIVATE
from train.mirror.fragments import STEP_KEY, fragments_of, last_step, mark_sent, mend
from train.mirror.redact import redact, redact_config
from train.mirror.spec import SAMPLES_FILE, SPEC_FILE, MirrorSpec, run_id

if TYPE_CHECKING:
    import wandb

POLL_S = 0.5
SAMPLES_KEY = "samples/traces"
ADAPTER_WEIGHTS, ADAPTER_CONFIG, SENT_CONFIG = "adapter_model.safetensors", "adapter_config.json", "wandb-adapter-config.json"
"""Of PEFT's layout; student.adapter_files has the names too, and torch with them."""
NOTHING = -1
"""The last step of a run without rows."""

Command = Mapping[str, Any]


class Training(NamedTuple):
    """The other side. problems: descriptor that takes a line of what went wrong, to be read after the words "W&B"."""

    commands: "queue.Queue[Command]"
    problems: int

    def told(self) -> Command:
        """The next command; one that is for nobody where none comes within POLL_S."""
        try:
            return self.commands.get(timeout=POLL_S)
        except queue.Empty:
            return {"do": "nothing"}

    def tell(self, what: str, error: Exception) -> None:
        message = redact(f"{what}: {type(error).__name__}: {error}")
        os.write(self.problems, " ".join(message.split()).encode() + b"\n")


def main(spec_path: Path) -> None:
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the training decides when it ends, and says so
    training = take_pipes()
    try:
        mirror(MirrorSpec(**json.loads(spec_path.read_bytes())), training)
    except Exception as error:  # best effort by contract: whatever W&B raises, training goes on
        training.tell("stopped", error)


def take_pipes() -> Training:
    """Standard input and output are the null device from now on: wandb-core inherits them, and would keep the pipes open after
    this process has gone; and what W&B prints is nobody's."""
    said, problems, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    commands: queue.Queue[Command] = queue.Queue()

    def read() -> None:
        with os.fdopen(said, "rb") as lines:
            for line in lines:
                commands.put(json.loads(line))

    threading.Thread(target=read, daemon=True).start()
    return Training(commands, problems)


def mirror(spec: MirrorSpec, training: Training) -> None:
    """All rows that there are and that come are in W&B, until a command closes it."""
    import wandb

    run, last = begin(spec, training)
    Path(SPEC_FILE).unlink()
    run.define_metric(STEP_KEY)
    run.define_metric("*", step_metric=STEP_KEY)
    log_dataset(run, spec)
    rows, is_first, beside = Follower(Path(spec.metrics_file)), last <= 0, {}
    closing = None
    while closing is None:
        command = training.told()
        match command["do"]:
            case "samples" if is_first:
                beside[SAMPLES_KEY] = samples_table(run, Path(SAMPLES_FILE))
            case "adapter":
                log_adapter(run, spec, Path(command["folder"]))
            case "close":
                closing = command
        for row in rows.new():
            step = int(row.pop("step"))
            if step > last:
                run.log({STEP_KEY: step, **row, **beside}, step=step, commit=True)
                beside, last = {}, step
    run.finish(exit_code=closing["exit_code"])
    wandb.teardown()  # returns when wandb-core has ended: then the file is written


class Follower:
    """Reads what is appended to a file of JSON lines, whole lines only."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def new(self) -> Iterator[dict[str, float]]:
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                yield json.loads(line)


# --- one run over all attempts -----------------------------------------------------------------------------------


def begin(spec: MirrorSpec, training: Training) -> "tuple[wandb.Run, int]":
    """A W&B run, and the last step that it has. Online falls back to offline where no server answers: what this attempt logs can
    be sent later."""
    if spec.mode == "online":
        try:
            return begin_online(spec)
        except Exception as error:  # wandb raises CommError, UsageError, TimeoutError and more, by the way a server fails
            training.tell("does not answer, so this attempt is kept offline for train.mirror.sync", error)
            import wandb

            wandb.teardown()  # or wandb-core calls the id taken
    return begin_offline(spec)


def begin_online(spec: MirrorSpec) -> "tuple[wandb.Run, int]":
    """The server says how far it is. What offline fragments hold goes there from the metrics file, and `wandb sync` passes over
    them."""
    identity = identity_of(spec)
    run = _init(spec, identity, "online")
    for path, is_sent in fragments_of(Path(), identity):
        if not is_sent:
            mark_sent(path)
    return run, run.starting_step - 1 if run.resumed else NOTHING


def begin_offline(spec: MirrorSpec) -> "tuple[wandb.Run, int]":
    """A new fragment, after the older ones were cut to the step that training resumed at."""
    identity, last = identity_of(spec), NOTHING
    for path, is_sent in fragments_of(Path(), identity):
        if not is_sent and not mend(path, spec.cut_step):
            continue
        steps = last_step(path)
        last = last if steps is None else max(last, steps)
    return _init(spec, identity, "offline"), last


def identity_of(spec: MirrorSpec) -> str:
    """The run's id. A training that starts over is another run where a server may have rows of the first: they stay there."""
    identity = run_id(Path())
    sent = [path for path, is_sent in fragments_of(Path(), identity) if is_sent]
    starts_over = spec.cut_step == 0 and any(last_step(path) is not None for path in sent)
    return run_id(Path(), is_new=starts_over)


def _init(spec: MirrorSpec, identity: str, mode: Literal["offline", "online"]) -> "wandb.Run":
    import wandb

    lineage = {name: value for name, value in spec.lineage.items() if name != "dataset_files"}
    return wandb.init(
        project=spec.project,
        name=spec.name,
        id=identity,
        resume="allow",
        mode=mode,
        dir=".",
        config={**spec.config, "lineage": lineage},
        settings=wandb.Settings(init_timeout=spec.timeout_s / 2, **PRIVATE),  # type: ignore[arg-type]
    )


# --- artifacts ---------------------------------------------------------------------------------------------------


def log_dataset(run: "wandb.Run", spec: MirrorSpec) -> None:
    """An artifact of references: the hash of each file, and no byte of any. Equal datasets are one version. (use_artifact, which
    would make it the run's input, raises offline; the run's config names it.)"""
    import wandb

    files = spec.lineage["dataset_files"]
    assert isinstance(files, Mapping)
    metadata = {name: spec.lineage[name] for name in ("dataset_sha256", "dataset_manifest")}
    artifact = wandb.Artifact(artifact_name(f"{spec.name}-dataset"), "dataset", metadata=metadata)
    for name, sha256 in files.items():
        artifact.add_reference(f"sha256:{sha256}", name=name, checksum=False)
    if not files:
        artifact.add_reference(f"sha256:{spec.lineage['dataset_sha256']}", name="dataset", checksum=False)
    run.log_artifact(artifact)


def log_adapter(run: "wandb.Run", spec: MirrorSpec, folder: Path) -> None:
    """Weights as they are and the configuration redacted (PEFT writes the base's path into it), with the hashes of both originals
    and of what they were made from."""
    import wandb

    made_from = {name: spec.lineage[name] for name in ("dataset_sha256", "base_sha256", "recipe_fingerprint", "code_revision")}
    hashes = {name: sha256(folder / name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)}
    config = redact_config(json.loads((folder / ADAPTER_CONFIG).read_bytes()))
    Path(SENT_CONFIG).write_text(json.dumps(config, indent=1))
    artifact = wandb.Artifact(artifact_name(f"{spec.name}-adapter"), "model", metadata={**made_from, "files": hashes})
    artifact.add_file(str(folder / ADAPTER_WEIGHTS), policy="immutable")  # no second copy of it in a cache
    artifact.add_file(SENT_CONFIG, name=ADAPTER_CONFIG, policy="immutable")
    for entry in artifact.manifest.entries.values():
        # The manifest that goes to the server names where each file lay here. Relative to this folder it says nothing.
        entry.local_path = os.path.relpath(entry.local_path)  # type: ignore[type-var]
    run.log_artifact(artifact)


def sha256(path: Path) -> str:
    """As data.store has it, which loads Arrow: a quarter of this process's start."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def samples_table(run: "wandb.Run", path: Path) -> "wandb.Table":
    """Bound to the run here: a table that W&B binds is logged as an artifact as well, whose manifest names the folder that it was
    staged in."""
    import wandb

    table = wandb.Table(**json.loads(path.read_bytes()))
    table.bind_to_run(run, SAMPLES_KEY, 0)
    return table


def artifact_name(text: str) -> str:
    """Letters, digits, dots, dashes and underlines are all that W&B takes, 128 of them."""
    clean = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in text)
    return clean if len(clean) <= 100 else f"{clean[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
