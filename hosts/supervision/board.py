"""What the ranks of one machine tell each other beside their work, in small files. Imports no
torch.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path


class Board:
    """One file for each key, used as the watch (hosts/supervision/heartbeat.py) uses a store of
    torch.distributed.

    The files are in a folder that only this user can open, so there is no port that a stranger
    could write to. A rank that is stopped holds no lock. A value is written over the last one,
    which takes no room on a full disk.
    """

    def __init__(self, prefix: Path) -> None:
        """prefix: of the names of the files."""
        self._prefix = prefix

    def set_timeout(self, timeout: timedelta) -> None:
        """Files answer at once."""

    def set(self, key: str, value: str) -> None:
        """OSError if it cannot be written."""
        descriptor = os.open(self._path(key), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, os.pwrite(descriptor, value.encode(), 0))
        finally:
            os.close(descriptor)

    def get(self, key: str) -> bytes:
        """OSError if there is none."""
        return self._path(key).read_bytes()

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of them have been set."""
        return all(_size(self._path(key)) > 0 for key in keys)

    def _path(self, key: str) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}-{key.replace('/', '-')}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
