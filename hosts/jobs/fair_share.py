"""Whose turn it is: clients take turns, each client's jobs in the order they came. Pure Python."""

from collections import Counter
from collections.abc import Sequence

from hosts.jobs.job import Job


class Turns:
    """How many jobs of each client were begun since nothing waited."""

    def __init__(self) -> None:
        self._num_begun: Counter[str] = Counter()

    def order(self, waiting: Sequence[Job]) -> list[Job]:
        """The waiting jobs in the order in which they will run: always the client that has been
        served least, then the oldest job.
        """
        begun, left, order = Counter(self._num_begun), list(waiting), []
        while left:
            job = min(left, key=lambda job: begun[job.client])  # the first of equals: the oldest
            left.remove(job)
            begun[job.client] += 1
            order.append(job)
        return order

    def join(self, client: str, waiting: Sequence[Job]) -> None:
        """A client that comes (back) starts level with those that wait, not with a lead for the
        time it was away.
        """
        if not waiting:
            self._num_begun.clear()
        elif not any(job.client == client for job in waiting):
            least = min(self._num_begun[job.client] for job in waiting)
            self._num_begun[client] = max(self._num_begun[client], least)

    def begin(self, job: Job) -> None:
        self._num_begun[job.client] += 1

    def give_back(self, job: Job) -> None:
        """It was begun, and will be begun once more."""
        self._num_begun[job.client] -= 1
