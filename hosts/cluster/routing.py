"""Which replica takes the next job: the one with the least outstanding work. Pure Python."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one replica has to do."""

    name: str
    """Of the replica."""
    work: float
    """Pixel steps that its jobs still need."""
    taken_s: float
    """When it took the last one."""
    can_take: bool = True
    """Whether it is ready and has a free slot."""


def is_next(mine: Load, others: Iterable[Load]) -> bool:
    """Return whether the next job is this replica's: no other that can take one has less to do, or
    has waited longer with as little to do.
    """
    return mine.can_take and not any(
        other.can_take and _rank(other) < _rank(mine) for other in others
    )


def _rank(load: Load) -> tuple[float, float, str]:
    return load.work, load.taken_s, load.name


def capacity(ranks: int, mode: str) -> int:
    """Return how many jobs a replica works on at once: one per rank if its ranks may split, else
    one.
    """
    return 1 if mode == "latency" else ranks
