"""A checkpoint within seconds of a signal, whatever the processor is at.

A stop is taken between micro-batches, and one of a long row takes long on a GPU: 20 s by the plan of the 13B recipe, in which
Python's main thread waits for the device and hears nothing. So where micro-batches are long, rank 0 holds the state after each
step in its memory, and a thread of its own writes it as soon as the signal is there. What the step after it had done is taken
again.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from configs.draining import SIGNALS
from train.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

HELD_ABOVE_S = 2.0
"""Of a micro-batch: shorter ones leave most of the ten seconds to the files. Holding takes 12 bytes a trained parameter from the
device, 3 GB at most for the recipes, once a step of many micro-batches."""

Save = Callable[[Checkpoint], None]


class Standby:
    """held: what would be written. written: what was, last, by the thread."""

    def __init__(self) -> None:
        self._save: Save = _nowhere
        self._lock = threading.Lock()
        self._held: Checkpoint | None = None
        self._written: Checkpoint | None = None

    def save_with(self, save: Save) -> None:
        """save: makes a checkpoint durable; raises OSError where the disk does not let it."""
        self._save = save

    def hold(self, checkpoint: Checkpoint | None) -> None:
        """None: nothing that is not on disk already."""
        with self._lock:
            self._held = checkpoint

    def write(self) -> None:
        """What is held is durable when this returns. A disk that is full is the main thread's to tell of: it saves too."""
        with self._lock:
            if self._held is None or self._held is self._written:
                return
            try:
                self._save(self._held)
            except OSError as error:
                logger.warning("not saved at the signal: %s", error)
                return
            self._written = self._held
            logger.info("the state after step %d is saved; the row under way is not waited for", self._held.progress.step)

    def has_written(self, checkpoint: Checkpoint) -> bool:
        """Whether it is on disk as it would be written now. Waits for the thread."""
        with self._lock:
            written = self._written
        return (
            written is not None
            and written.progress.step == checkpoint.progress.step
            and (written.unlogged is None) == (checkpoint.unlogged is None)
        )


def _nowhere(_: Checkpoint) -> None:
    raise AssertionError("nothing is held before it is known where to write it")


@contextmanager
def on_standby() -> Iterator[Standby]:
    """While this lasts, one of SIGNALS has what is held written, by a thread that the C handler wakes. Outside the main thread,
    which alone may ask for that, nothing is."""
    standby = Standby()
    if threading.current_thread() is not threading.main_thread():
        yield standby
        return
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(woken, standby), name="standby", daemon=True)
    thread.start()
    try:
        yield standby
    finally:
        signal.set_wakeup_fd(before)
        os.close(wake)
        thread.join()
        os.close(woken)


def _listen(woken: int, standby: Standby) -> None:
    """A byte a signal, its number; nothing at the end."""
    while numbers := os.read(woken, 64):
        if {*numbers} & {*SIGNALS}:
            standby.write()
