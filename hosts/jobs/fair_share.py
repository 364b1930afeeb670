"""The waiting jobs and their order: clients take turns, and each client's jobs run in the order in
which they came. Pure Python.
"""

from collections import Counter
from collections.abc import Iterator

from hosts.jobs.job import Job


class WaitingJobs:
    """The jobs that wait, and how many jobs of each client were started since nothing waited."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._num_begun: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job: Job) -> bool:
        return job in self._jobs

    def __iter__(self) -> Iterator[Job]:
        """Iterate over a copy, oldest first, so that jobs may be removed meanwhile."""
        return iter([*self._jobs])

    def in_order(self) -> list[Job]:
        """Return the jobs in the order in which they will run: always the client that has been
        served least, then its oldest job.
        """
        begun, left, order = Counter(self._num_begun), [*self._jobs], []
        while left:
            job = min(left, key=lambda job: begun[job.client])  # the first of equals: the oldest
            left.remove(job)
            begun[job.client] += 1
            order.append(job)
        return order

    def num_of(self, client: str) -> int:
        """Return how many jobs of this client wait."""
        return sum(job.client == client for job in self._jobs)

    def add(self, job: Job) -> None:
        """Append a new job. A client that comes (back) starts level with the clients that wait: it
        gets no lead for the time it was away.
        """
        if not self._jobs:
            self._num_begun.clear()
        elif not any(other.client == job.client for other in self._jobs):
            least = min(self._num_begun[other.client] for other in self._jobs)
            self._num_begun[job.client] = max(self._num_begun[job.client], least)
        self._jobs.append(job)

    def put_in_front(self, job: Job) -> None:
        """Insert a job that was started before and will be started once more."""
        self._jobs.insert(0, job)

    def remove(self, job: Job) -> None:
        self._jobs.remove(job)

    def begin(self, job: Job) -> None:
        """Remove a job that is started. It counts as its client's turn."""
        self._jobs.remove(job)
        self._num_begun[job.client] += 1

    def give_back_turn(self, job: Job) -> None:
        """Let the last start of this job not count."""
        self._num_begun[job.client] -= 1
