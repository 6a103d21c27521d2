"""Temporary folders that do not outlive their owner for long.

A run that is killed deletes nothing. So the owner holds a lock on its folder, which the operating system
releases whatever ends the process, and whoever makes the next folder of the same kind deletes those that
nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path


class Scratch:
    """A folder of this process, deleted by `close`, or by the next owner of one if the process was killed.

    Args:
        kind: Beginning of the folder's name; only folders of the same kind are swept.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, kind: str) -> None:
        parent = Path(tempfile.gettempdir())
        _sweep(parent, kind)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=kind, dir=parent))
            lock = _lock(self.path)
            if lock is not None:
                break
        self._delete = weakref.finalize(self, _delete, self.path, lock)

    def close(self) -> None:
        """Delete the folder, as the end of the process does at the latest. Safe to call twice."""
        self._delete()


def _lock(folder: Path) -> int | None:
    """The lock of a folder just made, as a descriptor; None if another's sweep deleted it first."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    fcntl.flock(lock, fcntl.LOCK_EX)
    if folder.exists():
        return lock
    os.close(lock)
    return None


def _delete(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _sweep(parent: Path, kind: str) -> None:
    """Delete the folders of a kind that no process holds."""
    for folder in parent.glob(f"{kind}*"):
        # Not a folder, another user's, gone meanwhile, or held: none of this is ours to delete.
        with contextlib.suppress(OSError), _held(folder):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises:
        OSError: somebody else holds it, or it is no folder that can be read.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
