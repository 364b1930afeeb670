"""How a team answers when the queue asks whether it takes the next job. Pure Python."""

import logging
from collections.abc import Callable, Sequence
from enum import Enum

from hosts.jobs.job import Job

logger = logging.getLogger(__name__)

LINGER_S = 0.003
"""Time after which a team that lingers is asked again."""


class Choice(Enum):
    TAKE = "take"
    """Start the first waiting job."""
    WAIT = "wait"
    """Ask again at the next change of the queue."""
    LINGER = "linger"
    """Ask again after LINGER_S, or at a change before that."""
    LEAVE = "leave"
    """Return without a job."""


Choose = Callable[[Sequence[Job], Sequence[Job]], Choice]
"""choose(waiting jobs in their order, running jobs). Arithmetic only, since the queue is locked.
TAKE is allowed only if a job waits.
"""


def take_first(waiting: Sequence[Job], running: Sequence[Job]) -> Choice:
    """Take a job as soon as one waits."""
    return Choice.TAKE if waiting else Choice.WAIT


def choose_or_take(choose: Choose, waiting: Sequence[Job], running: Sequence[Job]) -> Choice:
    """Return what `choose` returns. If it raises, take the first job: the rank loop must go on, and
    a faulty job fails when it runs.
    """
    try:
        return choose(waiting, running)
    except Exception:
        logger.exception("the jobs that wait cannot be compared: the first is taken")
        return take_first(waiting, running)


def count_or_none(
    count: Callable[[Sequence[Job], Sequence[Job]], int],
    waiting: Sequence[Job],
    running: Sequence[Job],
) -> int:
    """Return what `count` returns, or 0 if it raises, for the same reason."""
    try:
        return count(waiting, running)
    except Exception:
        logger.exception("the jobs that wait cannot be compared: one goes alone")
        return 0
