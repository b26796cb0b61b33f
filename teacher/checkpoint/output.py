"""The folder that prepared shards go to: a new one, an empty one or shards of ours, held by one process at a time."""

import contextlib
import fcntl
import re
from collections.abc import Iterator
from pathlib import Path

from configs.errors import UnusableInput
from teacher.checkpoint.manifest import COMPANIONS, MANIFEST, readable_manifest
from teacher.checkpoint.shard_plan import SHARDS
from teacher.checkpoint.source import SUMS

RECORDS, LOCK = ".done", ".lock"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
"""As data.store names a file in the making; a kill leaves it behind."""
FIRST = {LOCK, SUMS, RECORDS}
"""What prepare makes before anything else; with the last two of them a folder is marked as its own."""


def check_output(output: Path, checkpoint: Path) -> None:
    """Nothing would be lost by preparing `checkpoint` in `output`. Writes nothing.

    Raises:
        UnusableInput: `output` is the checkpoint, in it or around it; it cannot be a folder; or it holds something else.
    """
    with _as_folder(output):
        there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        if not there.is_dir():
            raise UnusableInput(f"{output}: {there} is a file, expected a folder; give another --output")
        target, source = output.resolve(), checkpoint.resolve()
        if _is_within(target, source) or _is_within(source, target):
            raise UnusableInput(
                f"{output}: is, holds or lies in the checkpoint's folder {checkpoint}, whose config.json the shards' own would "
                "replace; expected a folder apart from it; give another --output"
            )
        if output.is_dir():
            _check_content(output)


def _check_content(output: Path) -> None:
    """By names alone, where no manifest of ours says it: killed before that, prepare has left nothing else."""
    if readable_manifest(output) is not None:
        return
    names = sorted(path.name for path in output.iterdir())
    is_marked = (output / RECORDS).is_dir() and (output / SUMS).is_file()
    if is_marked and MANIFEST in names:  # damaged, or of another release
        return
    ours = FIRST | {SHARDS, *COMPANIONS} if is_marked else FIRST
    if foreign := [name for name in names if name not in ours and not TEMPORARY.fullmatch(name)]:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UnusableInput(
            f"{output}: holds {foreign[0]}{more}, which prepare did not make; expected a new or empty folder, or shards of its "
            "own; give another --output"
        )


def _is_within(inner: Path, outer: Path) -> bool:
    """By identity, not by name: a bind mount is another name of the same folder."""
    return outer.exists() and any(path.exists() and path.samefile(outer) for path in (inner, *inner.parents))


@contextlib.contextmanager
def held_alone(output: Path) -> Iterator[None]:
    """`output` is a folder, and no other prepare writes there."""
    with contextlib.ExitStack() as stack:
        with _as_folder(output):
            output.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((output / LOCK).open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UnusableInput(f"{output}: another tracestill prepare is writing there; wait for it") from error
        yield


@contextlib.contextmanager
def _as_folder(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnusableInput(
            f"{output}: {error.strerror or error}; expected a folder that can be written; give another --output"
        ) from error
