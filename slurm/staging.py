"""The teacher's shards on this node's own disk, copied once however many jobs of the run want them. Run by srun on every node.

A copy has its final name only when it is whole: it is made beside it and renamed. What another attempt has left half-copied is
continued file by file. Sizes are compared here, and hashes by whoever loads (teacher/checkpoint/); small files byte by byte:
shards that were prepared anew have the same sizes, and a manifest that says otherwise.
"""

import argparse
import contextlib
import fcntl
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from configs.errors import TracestillError, UnusableInput
from configs.progress import Count, own_beat, write_beat

BEAT_S = 5.0
SMALL_BYTES = 1 << 20


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m slurm.staging", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", help="environment variables are filled in on the node")
    options = parser.parse_args(words)
    started = time.monotonic()
    try:
        copied = stage(options.source, Path(os.path.expandvars(options.target)))
    except UnusableInput as error:
        print(f"error: slurm.stage_weights: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:  # this node's disk, or the shared one for a moment: another attempt may have it better
        where = error.filename or options.target
        print(f"error: slurm.stage_weights: {where} on {socket.gethostname()}: {error.strerror}", file=sys.stderr, flush=True)
        return TracestillError.exit_code
    if copied:
        seconds = time.monotonic() - started
        print(f"staged {copied / 1e9:,.1f} GB to {options.target} in {seconds:,.0f} s", file=sys.stderr, flush=True)
    return 0


def stage(source: Path, target: Path) -> int:
    """`target` holds what `source` does; returns the bytes copied. Another process of this node at the same is waited for.

    Raises:
        UnusableInput: there is no `source`, or not enough room for it.
        OSError: the disk refuses.
    """
    files = {path.relative_to(source): path.stat().st_size for path in sorted(source.rglob("*")) if path.is_file()}
    if not files:
        raise UnusableInput(f"{source}: no files there; expected the folder of tracestill prepare")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with _counted(part, sum(files.values())), (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of this node's own disk, which has locks
        if is_whole(target, files) and is_copy_of(source, target, files):
            return 0
        if target.exists():  # of other shards under the same name, or damaged
            shutil.rmtree(part, ignore_errors=True)
            target.rename(part)
        if not is_copy_of(source, part, files):
            shutil.rmtree(part, ignore_errors=True)
        missing = {name: size for name, size in files.items() if not _has(part / name, size)}
        for path in [
            path for path in part.rglob("*") if path.is_file() and not _has(path, files.get(path.relative_to(part), -1))
        ]:
            path.unlink()
        free = shutil.disk_usage(target.parent).free
        if free < sum(missing.values()):
            raise UnusableInput(
                f"{target.parent}: {free / 1e9:,.0f} GB free, {sum(missing.values()) / 1e9:,.0f} GB needed; expected a scratch "
                "with more room, or slurm.stage_weights: false"
            )
        for name in sorted(missing, key=lambda name: missing[name]):  # small ones first: they say what the others belong to
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, part / name)
        part.rename(target)
        return sum(missing.values())


@contextlib.contextmanager
def _counted(part: Path, total: int) -> Iterator[None]:
    """Meanwhile, whoever watches over the job sees that bytes arrive: this process's, or of the one that it waits for. A shared
    file system that hangs in the middle is found by their standing still."""
    beat, stop = own_beat(), threading.Event()

    def count() -> None:
        last = -1
        while not stop.wait(BEAT_S):
            if beat is not None and (done := _bytes_in(part)) != last:
                last = done
                write_beat(beat, "staging", Count(done // 10**9, total // 10**9, unit="GB of shards"))

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # renamed meanwhile
            total += path.stat().st_size
    return total


def is_whole(folder: Path, files: dict[Path, int]) -> bool:
    return folder.is_dir() and all(_has(folder / name, size) for name, size in files.items())


def is_copy_of(source: Path, folder: Path, files: dict[Path, int]) -> bool:
    """As far as small files that are there tell. One that a kill has cut was copied before any large one."""
    small = [name for name, size in files.items() if size < SMALL_BYTES and (folder / name).is_file()]
    return all((folder / name).read_bytes() == (source / name).read_bytes() for name in small)


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
