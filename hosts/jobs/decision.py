"""What somebody who asks the queue for a job may do instead of taking the first. Pure Python."""

from collections.abc import Callable, Sequence
from enum import Enum

from hosts.jobs.job import Job

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
