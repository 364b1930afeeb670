"""Decides for rank 0 when the ranks split into teams, which team takes a job, and when all meet again. Imports no torch."""

import time
from collections.abc import Sequence

from backends.model_table import ModelSpec
from backends.request import GenerateRequest, LoadRequest
from hosts.choice import Choice
from hosts.job import Job
from hosts.modes import Teams
from hosts.pace import Pace, best_size, gathering_is_quicker

PATIENCE = 0.01
"""A job that comes alone waits so much of the time that it will take, and PATIENCE_S at most, for others: a burst comes one request at a
time, and the first of it would have all ranks while the others wait."""
PATIENCE_S = 0.05


class Sharing:
    """The rules of a mode, and the times they go by."""

    def __init__(self, *, spec: ModelSpec, load: LoadRequest, teams: Teams | None = None, world_size: int = 1) -> None:
        teams = teams or Teams()
        self._spec = spec
        self._load = load
        self._mode = teams.mode
        self._sizes = [*teams.plans, world_size]
        self.world_size = world_size
        self.pace = Pace()

    def team_size(self, waiting: Sequence[Job]) -> int:
        """With how many ranks to begin on these jobs, of which there is at least one, while nothing runs."""
        if self._mode == "throughput":
            return min(self._sizes)
        times = [self._seconds(job) for job in waiting]
        return best_size(len(waiting), {size: sum(seconds[size] for seconds in times) for size in self._sizes})

    def may_get_company(self, waiting: Sequence[Job]) -> bool:
        """Whether to see first whether another job follows the only one, while nothing runs."""
        if self._mode != "auto" or len(waiting) > 1:
            return False
        (job,) = waiting
        return time.time() - job.created_s < min(PATIENCE_S, PATIENCE * self._seconds(job)[self.world_size])

    def must_gather(self, waiting: Sequence[Job], running: Sequence[Job], *, team_size: int) -> bool:
        """Whether a team that is free should take no job, so that all ranks meet when the running ones are done."""
        if self._mode == "throughput":
            return False
        if not waiting:
            return not running
        return gathering_is_quicker(
            [self._seconds(job) for job in waiting], [self._left(job, team_size) for job in running], team_size=team_size
        )

    def learn(self, job: Job, *, ranks: int, seconds: float) -> None:
        """A job was done by that many ranks."""
        self.pace.learn(ranks=ranks, work=self._work(job.request), seconds=seconds)

    def _seconds(self, job: Job) -> dict[int, float]:
        return {size: self.pace.seconds(size, self._work(job.request)) for size in self._sizes}

    def _left(self, job: Job, team_size: int) -> float:
        """Seconds until a running job is done."""
        spent = time.time() - (job.started_s or time.time())
        if job.step:
            return spent / job.step * (job.num_steps - job.step)
        return max(0.0, self.pace.seconds(team_size, self._work(job.request)) - spent)

    def _work(self, request: GenerateRequest) -> float:
        """Pixels times steps, as far as they are known before a job has begun."""
        height = request.height or self._load.height or self._spec.height
        width = request.width or self._load.width or self._spec.width
        steps = request.num_inference_steps or self._load.num_inference_steps or self._spec.num_inference_steps
        return float(height * width * steps * (request.num_frames or self._spec.num_frames))


class Handout:
    """One time in which the ranks are split: from when they part until they meet again. Shared by the desks of all teams."""

    def __init__(self, sharing: Sharing, *, team_size: int) -> None:
        self._sharing = sharing
        self._team_size = team_size
        self._has_begun = False
        self._is_over = False

    def choose(self, waiting: Sequence[Job], running: Sequence[Job]) -> Choice:
        """What a free team does now. Once one team has left all will, each when its job is done.

        The first takes a job in any case: the ranks have just split for these jobs, and must not meet and split again for ever.
        """
        if waiting and not self._has_begun and not self._is_over:
            self._has_begun = True
            return Choice.TAKE
        self._is_over = self._is_over or self._sharing.must_gather(waiting, running, team_size=self._team_size)
        if self._is_over:
            return Choice.LEAVE
        return Choice.TAKE if waiting else Choice.WAIT

    def end(self) -> None:
        """A team has left for a reason of its own."""
        self._is_over = True
