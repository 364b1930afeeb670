"""How much main memory the processes of this machine may use: in a container often less than the
machine has, and who takes more is killed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path("/")


class MainMemory(NamedTuple):
    """In bytes."""

    total: int
    available: int
    """Without swapping. Pages of files count: they can be read again."""


class _Names(NamedTuple):
    """Files of a control group."""

    limit: str
    used: str
    files: tuple[str, ...]
    """Keys of `memory.stat`: pages of files."""


V1 = _Names(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
)
V2 = _Names("memory.max", "memory.current", ("active_file", "inactive_file"))


def main_memory(root: Path = ROOT) -> MainMemory:
    """Return the machine's memory, or what the control groups of this process leave of it.

    root: of the file system.
    """
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit, used in _limits(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return MainMemory(total=total, available=available)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield the limit and the used bytes of each group that has a limit."""
    for group, names in _groups(root):
        try:
            limit = int((group / names.limit).read_text(encoding="ascii"))
            used = int((group / names.used).read_text(encoding="ascii"))
            stat = (group / "memory.stat").read_text(encoding="ascii")
        except (OSError, ValueError):  # it does not exist, or its limit is the word max
            continue
        facts = dict(line.split() for line in stat.splitlines())
        yield limit, used - sum(int(facts.get(name, 0)) for name in names.files)


def _groups(root: Path) -> Iterator[tuple[Path, _Names]]:
    """Yield the control groups of this process with all that they are in. In a container its path
    may be the machine's, which is not there; its own group is the uppermost then.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", V1
        elif not controllers:
            top, names = root / "sys/fs/cgroup", V2
        else:
            continue
        inner = top / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group.is_relative_to(top):
                yield group, names
