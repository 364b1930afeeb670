"""The launcher's temporary folder, and the removal of those that killed launchers have left.
Imports no torch.
"""

import contextlib
import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

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
        with contextlib.suppress(OSError), (folder / ALIVE).open("r") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - folder.stat().st_mtime > YOUNG_S:
                shutil.rmtree(folder, ignore_errors=True)
