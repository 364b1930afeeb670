"""How many ranks should work on each job: decided from measured times. Pure arithmetic; imports no
torch.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence

ASSUMED_GAIN = 1.7
"""How many times faster twice as many ranks are, until both sizes were measured."""
ASSUMED_SECONDS = 1e-5
"""Per pixel and step on one rank, until anything was measured. Only ratios of times decide, so its
size hardly matters.
"""
NUM_REMEMBERED = 4
WAIT_COUNTS = 1e-4
"""Of two equally quick ways the one in which the jobs' own waits are shorter: what a second of one
job's wait adds to the time of all.
"""
WORTH_GATHERING = 0.98
"""Teams gather only if that ends the work in less than this share of the time: changing to and fro
costs a little too.
"""


class Speed:
    """Seconds per unit of work (one pixel in one step) that teams of each size have needed.

    The best of the last few jobs counts: the first one pays for caches, and another program may
    have slowed one down.
    """

    def __init__(self) -> None:
        self._measured: dict[int, deque[float]] = {}

    def learn(self, *, ranks: int, work: float, seconds: float) -> None:
        """`ranks` ranks did `work` in `seconds`."""
        self._measured.setdefault(ranks, deque(maxlen=NUM_REMEMBERED)).append(seconds / work)

    def seconds(self, ranks: int, work: float) -> float:
        """How long `ranks` ranks will take: as measured, or else as the nearest measured size tells
        with ASSUMED_GAIN.
        """
        best = {size: min(found) for size, found in list(self._measured.items())} or {
            1: ASSUMED_SECONDS
        }
        nearest = min(best, key=lambda size: abs(math.log2(size / ranks)))
        return work * best[nearest] * ASSUMED_GAIN ** math.log2(nearest / ranks)

    def measured(self) -> dict[int, float]:
        """Team size -> seconds per million units of work."""
        return {size: round(1e6 * min(found), 4) for size, found in sorted(self._measured.items())}


def best_size(num_jobs: int, seconds: Mapping[int, float]) -> int:
    """The team size to begin with, so that `num_jobs` equal jobs that nobody has begun are done
    first.

    seconds: team size -> time for one job; the largest is that of all ranks. One job is always for
    all of them.
    """
    return _plan(num_jobs, seconds)[num_jobs][1] if num_jobs > 1 else max(seconds)


def gathering_is_quicker(
    waiting: Sequence[Mapping[int, float]], busy: Sequence[float], *, team_size: int
) -> bool:
    """Whether a free team should leave the next job, so that all ranks meet when the busy teams are
    done, and share the rest anew.

    waiting: for each job that waits, in order: team size -> seconds. busy: seconds that each busy
    team still needs. Taking jobs is judged by the best number of them that the teams may take
    before all gather.
    """
    world = max(waiting[0])
    mean = {size: sum(job[size] for job in waiting) / len(waiting) for size in waiting[0]}
    rests = [seconds for seconds, _ in _plan(len(waiting), mean)]
    ends = sorted([*busy, *[0.0] * (world // team_size - len(busy))])
    gathered = ends[-1] + rests[len(waiting)]
    taken = math.inf
    for number, job in enumerate(waiting, start=1):
        ends[0] += job[team_size]
        ends.sort()
        taken = min(taken, ends[-1] + rests[len(waiting) - number])
    return gathered < WORTH_GATHERING * taken


def _plan(num_jobs: int, seconds: Mapping[int, float]) -> list[tuple[float, int]]:
    """For 0, 1, ... `num_jobs` equal jobs: the time to do them all, and the size of teams to begin
    with, chosen anew for each round.
    """
    world = max(seconds)
    plan = [(0.0, world)]
    for number in range(1, num_jobs + 1):
        weight = 1 + WAIT_COUNTS * number
        plan.append(
            min(
                (weight * needed + plan[max(0, number - world // size)][0], size)
                for size, needed in seconds.items()
            )
        )
    return plan
