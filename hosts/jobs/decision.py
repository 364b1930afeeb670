"""What somebody who asks the queue for a job may do instead of taking the first. Pure Python."""

import logging
from collections.abc import Callable, Sequence
from enum import Enum

from hosts.jobs.job import Job

logger = logging.getLogger(__name__)

LINGER_S = 0.003


class Choice(Enum):
    """Take the first job that waits, wait for a change, choose again in a moment (LINGER_S), or
    leave without one.
    """

    TAKE = "take"
    WAIT = "wait"
    LINGER = "linger"
    LEAVE = "leave"


Choose = Callable[[Sequence[Job], Sequence[Job]], Choice]
"""choose(waiting jobs in their order, running jobs): arithmetic only, since the queue is locked.
TAKE only if one waits.
"""


def take_first(waiting: Sequence[Job], running: Sequence[Job]) -> Choice:
    """As soon as there is one."""
    return Choice.TAKE if waiting else Choice.WAIT


def choose_or_take(choose: Choose, waiting: Sequence[Job], running: Sequence[Job]) -> Choice:
    """What `choose` says. The first job, if it raises: the rank loop goes on, and finds what is
    wrong with a job when its turn comes.
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
    """How many `count` says. None, if it raises, for the same reason."""
    try:
        return count(waiting, running)
    except Exception:
        logger.exception("the jobs that wait cannot be compared: one goes alone")
        return 0
