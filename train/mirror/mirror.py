"""W&B as a mirror of metrics/train.jsonl that may lag, fail or be missing, kept by a process of its own.

That process (train/mirror/process.py) follows the file that training writes anyway, so a step does nothing for W&B at all: no
call, no queue, no lock. A server that is dead, slow or hostile can hold up that process only, and `close` waits for it for
a limited time. Rows that a kill kept from W&B are read from the file again by the next start.

Privacy: the process gets a working folder, an argument vector and an environment that say nothing; what it is given to send has
been redacted (train/mirror/redact.py). It is the same process that W&B would inspect, so there is nothing for it to find.
"""

import atexit
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from data.store import write_json
from train.mirror.redact import machine_words, redact, redact_cell, redact_config
from train.mirror.spec import SAMPLES_FILE, SPEC_FILE, MirrorSpec
from train.tracking import METRICS_FILE

logger = logging.getLogger(__name__)

Mode = Literal["offline", "online", "disabled"]

WANDB_TIMEOUT_S = 20.0
"""For W&B to begin, and for `close` to wait."""
ABANDON_S = 2.0
"""What the exit of a training that failed waits."""
SLOW_UPLOAD = 20e6
"""Bytes per second: what a server must take of the adapter for `close` not to give up on it."""
MAX_SAMPLES = 200

PASSED = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "TZ")
PASSED_ONLINE = (
    "HOME", "NETRC", "WANDB_API_KEY", "WANDB_CREDENTIALS_FILE", "WANDB_ENTITY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CONFIG_DIR",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR",
    "SSL_CERT_FILE",
)  # fmt: skip
"""What of the environment the process sees: who it is towards the server, and the way there."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """What the adapter is made of, by hash. dataset_manifest: its path relative to the run folder; dataset_files: sha256 of each
    file by its name in that manifest."""

    dataset_sha256: str
    base_sha256: str
    recipe_fingerprint: str
    code_revision: str
    dataset_manifest: str = "dataset/manifest.json"
    dataset_files: Mapping[str, str] = field(default_factory=dict)


class Sample(NamedTuple):
    """A trace as the table shows it."""

    trace_id: str
    task: str
    prompt: str
    reasoning: str
    answer: str
    tokens: int


def open_mirror(
    folder: Path,
    *,
    mode: Mode,
    project: str,
    name: str,
    config: Mapping[str, object],
    lineage: Lineage,
    resume_step: int,
    metrics_file: str = METRICS_FILE,
    timeout_s: float = WANDB_TIMEOUT_S,
) -> "WandbMirror | None":
    """A process mirrors the rows of folder/metrics_file from now on; None when disabled, or when it could not be started.

    Call it on the main thread (the process ends with the thread that started it), on rank 0, after MetricsFile has cut the file
    to resume_step.
    """
    if mode == "disabled":
        return None
    words = machine_words()
    spec = MirrorSpec(
        metrics_file, mode, redact(project, words), redact(name, words),
        _redacted(dict(config), words), _redacted(asdict(lineage), words), _cut_step(folder, resume_step), timeout_s,
    )  # fmt: skip
    try:
        write_json(folder / SPEC_FILE, asdict(spec))
        process = _start(folder, mode)
    except OSError as error:
        logger.warning("W&B stopped: its process did not start (%s); metrics/%s is complete", error, metrics_file)
        return None
    return WandbMirror(process, folder, metrics_file, timeout_s, uploads=mode == "online")


class WandbMirror:
    """The process, from the training's side. Nothing here waits for W&B but `close`."""

    def __init__(
        self, process: subprocess.Popen[bytes], folder: Path, metrics_file: str, timeout_s: float, *, uploads: bool
    ) -> None:  # fmt: skip
        self._process, self._folder, self._file, self._timeout_s = process, folder, metrics_file, timeout_s
        self._uploads = uploads
        self._listener = threading.Thread(target=self._listen, name="W&B", daemon=True)
        self._listener.start()
        atexit.register(self._abandon)

    @property
    def pid(self) -> int:
        return self._process.pid

    def log_samples(self, samples: Sequence[Sample]) -> None:
        """The first MAX_SAMPLES, redacted, stand beside the next row; not when an attempt before this one has logged them."""
        words = machine_words()
        cells = [
            [redact_cell(cell, words) if isinstance(cell, str) else cell for cell in sample] for sample in samples[:MAX_SAMPLES]
        ]
        try:
            write_json(self._folder / SAMPLES_FILE, {"columns": Sample._fields, "data": cells})
        except OSError as error:
            logger.warning("W&B gets no sample traces: %s", error.strerror)
            return
        self._say({"do": "samples"})

    def log_adapter(self, adapter: Path) -> None:
        """The adapter's weights and configuration become an artifact that names its lineage. Online, `close` waits longer for
        it, by its size."""
        if self._uploads:
            self._timeout_s += sum(path.stat().st_size for path in adapter.glob("*.safetensors")) / SLOW_UPLOAD
        self._say({"do": "adapter", "folder": str(adapter.resolve())})

    def close(self, *, exit_code: int = 0, timeout_s: float | None = None) -> None:
        """W&B has every row, or the time was up: then its processes are ended and a warning says so."""
        if self._process.returncode is not None:
            return
        atexit.unregister(self._abandon)
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        self._say({"do": "close", "exit_code": exit_code})
        self._listener.join(limit_s)
        if self._listener.is_alive():
            logger.warning("W&B did not finish in %.0f s and was ended; metrics/%s is complete",
                           limit_s, self._file)  # fmt: skip
        end_with_children(self._process)
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _abandon(self) -> None:
        """At the exit of a process that nobody closed the mirror in: an exception ended the training."""
        self.close(exit_code=1, timeout_s=ABANDON_S)

    def _say(self, command: Mapping[str, object]) -> None:
        """A pipe takes 64 KiB before it would block, and all that is ever said is three short lines; it is set not to block even
        so."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
        except OSError:
            logger.debug("W&B's process has ended; %s was not said", command["do"])

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            logger.warning("W&B %s; metrics/%s is complete", line.decode(errors="replace").strip(), self._file)


def _cut_step(folder: Path, resume_step: int) -> int:
    """Of this attempt, or of an earlier one that ended before W&B had begun, and left the cutting undone."""
    try:
        return min(resume_step, int(json.loads((folder / SPEC_FILE).read_bytes())["cut_step"]))
    except (OSError, ValueError, KeyError):
        return resume_step


def _redacted(value: dict[str, object], words: Sequence[str]) -> dict[str, object]:
    redacted = redact_config(value, words)
    assert isinstance(redacted, dict)
    return redacted


# --- the process -------------------------------------------------------------------------------------------------


def _start(folder: Path, mode: Mode) -> subprocess.Popen[bytes]:
    """A session of its own, so that Ctrl-C and a scheduler's signals to the group of the ranks end the training, not its mirror.
    No buffer on our side of the pipe: it would be written at exit, when nobody reads any more."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "train.mirror.process", SPEC_FILE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
        cwd=folder, env=process_environment(folder, mode), start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    return process


def process_environment(folder: Path, mode: Mode, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What W&B's process may know. Offline it has no home either: W&B would look for a netrc, settings and caches there."""
    names = PASSED + (PASSED_ONLINE if mode == "online" else ())
    kept = {name: environment[name] for name in names if name in environment}
    files = folder.resolve() / "wandb-files"
    own = {
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "WANDB_ERROR_REPORTING": "false",
        # Tables and artifacts wait here for `wandb sync`, which may come days later.
        "WANDB_DATA_DIR": str(files),
        "WANDB_CACHE_DIR": str(files),
        # By default the file is flushed every 15 s, and SIGKILL loses what is not in it.
        "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",
    }
    if mode == "offline":
        return kept | own | {"HOME": str(files), "WANDB_CONFIG_DIR": str(files)}
    url = {"WANDB_BASE_URL": without_credentials(environment["WANDB_BASE_URL"])} if "WANDB_BASE_URL" in environment else {}
    return kept | own | url


def without_credentials(url: str) -> str:
    """W&B knows its users by their API key; a name and password in the address would stand in its logs."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def end_with_children(process: subprocess.Popen[bytes]) -> None:
    """The process has ended, and the children it had: wandb-core leaves by itself when it is asked to, but not from inside a
    connection that hangs."""
    children = children_of(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + ABANDON_S
    for pid in children:
        _end_orphan(pid, deadline)


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    except OSError:
        return []


def _end_orphan(pid: int, deadline: float) -> None:
    """By pid, and only while it is still W&B's: a number may be given to another process at once."""
    while time.monotonic() < deadline and _is_core(pid):
        time.sleep(0.02)
    if _is_core(pid):
        os.kill(pid, 9)


def _is_core(pid: int) -> bool:
    try:
        state = re.search(r"\) (\w)", Path(f"/proc/{pid}/stat").read_text())
        return state is not None and state[1] != "Z" and b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
