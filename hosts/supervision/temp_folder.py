"""The launcher's temporary folder, and the removal of those that killed launchers have left.
Imports no torch.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PREFIX = "diffusion-launcher-"
ALIVE = "alive"
"""A file that the launcher keeps locked. The kernel releases the lock when the launcher dies."""

YOUNG_S = 60
"""Age below which a folder without a lock may belong to a launcher that is just starting."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder for this user alone and remove it at the end. Also remove those of dead
    launchers.
    """
    remove_leftovers(Path(tempfile.gettempdir()))
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX) as name,
        (Path(name) / ALIVE).open("w") as alive,
    ):
        fcntl.flock(alive, fcntl.LOCK_EX)
        yield Path(name)


def remove_leftovers(parent: Path) -> None:
    """Remove the folders of dead launchers, but not those of other users, nor young ones."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid != os.getuid():
                continue
            # a pipe under this name must not make a launcher wait
            descriptor = os.open(folder / ALIVE, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            with open(descriptor) as alive:
                _remove_if_dead(folder, alive)


def _remove_if_dead(folder: Path, alive: IO[str]) -> None:
    """alive: its locked file. OSError while its launcher lives."""
    fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if time.time() - folder.stat().st_mtime > YOUNG_S:
        shutil.rmtree(folder, ignore_errors=True)
