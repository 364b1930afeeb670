"""The launcher's own temporary folder, and what launchers that were killed have left of theirs.
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
"""A file that the launcher has locked for as long as it lives: nothing can be left locked, whatever
kills it.
"""

YOUNG_S = 60


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A fresh folder for this user alone, gone at the end. Those of launchers that ended without
    removing theirs go now.
    """
    remove_leftovers(Path(tempfile.gettempdir()))
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX) as name,
        (Path(name) / ALIVE).open("w") as alive,
    ):
        fcntl.flock(alive, fcntl.LOCK_EX)
        yield Path(name)


def remove_leftovers(parent: Path) -> None:
    """Folders whose launcher is dead. Those of other users stay, and those that may not be locked
    yet.
    """
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), (folder / ALIVE).open("r") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - folder.stat().st_mtime > YOUNG_S:
                shutil.rmtree(folder, ignore_errors=True)
