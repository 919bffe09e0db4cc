"""One run at a time in a folder: of two that share it, both would write its checkpoints.

Two objects may name one output and one spec, and a pod that was deleted by force may still be at work on a machine that
nobody can reach. The lock is the file system's: whoever holds it has ended, or is cut off from the files, when another
one gets it.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd_core.errors import StorageError

from opd_trainer.engine import World, broadcast
from opd_trainer.rounds import say

_SECONDS = 10.0  # between two looks


@contextmanager
def alone(folder: Path, world: World) -> Iterator[None]:
    """Inside, no other run is at work in `folder`; before that it is waited for. All ranks call it; rank 0 holds the
    lock for them.

    Raises:
        StorageError: the folder cannot be written.
    """
    if world.rank != 0:
        while not broadcast(0, world):
            pass
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("a+")
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error}") from error
    with handle:
        told = False
        while not broadcast(_locked(handle.fileno()), world):
            if not told:
                say(world, f"another run is at work in {folder}; waiting for it")
                told = True
            time.sleep(_SECONDS)
        yield


def _locked(descriptor: int) -> int:
    """1 once this process has the lock, or where the file system has none to give."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    except OSError:  # ENOLCK, ENOTSUP: a network file system without locks
        return 1
    return 1
