"""Decides for rank 0 when the ranks split into teams, which team takes a job, and when all rejoin.
Imports no torch.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from backends.generation.batching import batch_key
from backends.model_table import ModelSpec
from backends.plan import Quality
from backends.request import GenerateRequest, LoadRequest
from hosts.jobs.batch_size import BatchGain
from hosts.jobs.decision import Choice
from hosts.jobs.job import Job, now
from hosts.jobs.speed import Drift, Speed, best_size, gathering_is_quicker
from hosts.jobs.work import Work, work_of
from hosts.launch.methods import Methods
from hosts.launch.team_modes import Teams

PATIENCE = 0.01
"""Hold a lone job for this share of its expected duration (at most PATIENCE_S): a burst arrives one
request at a time, and its first job would get all ranks while the others wait.
"""
PATIENCE_S = 0.05


class Sharing:
    """The rules of a mode, and the measured times on which they depend."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        load: LoadRequest,
        teams: Teams | None = None,
        methods: Methods | None = None,
        world_size: int = 1,
        max_batch: int = 1,
    ) -> None:
        """methods: None if there is one only. max_batch: the most jobs that one rank may run in one
        batch.
        """
        teams = teams or Teams()
        self._spec = spec
        self._load = load
        self._mode = teams.mode
        self._sizes = [*teams.plans, world_size]
        self.world_size = world_size
        self._methods = methods
        self._speeds: defaultdict[Quality | None, Speed] = defaultdict(Speed)
        self._gain = BatchGain(max_batch)
        self._drift = Drift()

    def team_size(self, waiting: Sequence[Job]) -> int:
        """Return how many ranks should start on each of these jobs while nothing runs. At least one
        job waits.
        """
        if self._mode == "throughput":
            return min(self._sizes)
        if (size := self._quickest(waiting[0].request)) < self.world_size:
            return size
        times = [self._seconds(job, num_waiting=len(waiting)) for job in waiting]
        return best_size(
            len(waiting), {size: sum(seconds[size] for seconds in times) for size in self._sizes}
        )

    def methods(self, request: GenerateRequest, *, ranks: int) -> tuple[str, ...]:
        """Return the names of the methods that may generate this on `ranks` ranks, the best one
        first. UnsupportedError if none has the request's quality.
        """
        if self._methods is None:
            return ()
        return self._methods.names(request.quality, ranks=ranks, **self._image(request))

    def may_get_company(self, waiting: Sequence[Job]) -> bool:
        """Return whether to hold a lone job for others that may follow, while nothing runs."""
        if self._mode != "auto" or len(waiting) > 1:
            return False
        (job,) = waiting
        return (
            0
            <= now() - job.created_s
            < min(PATIENCE_S, PATIENCE * self._seconds(job)[self.world_size])
        )

    def must_gather(
        self, waiting: Sequence[Job], running: Sequence[Job], *, team_size: int
    ) -> bool:
        """Return whether a free team should take no job, so that all ranks rejoin when the running
        jobs are done.
        """
        if self._mode == "throughput":
            return False
        if not waiting:
            return not running
        return gathering_is_quicker(
            [self._seconds(job, num_waiting=len(waiting)) for job in waiting],
            [self._left(jobs, team_size) for jobs in _batches(running)],
            team_size=team_size,
        )

    def num_companions(self, job: Job, waiting: Sequence[Job], running: Sequence[Job]) -> int:
        """Return how many of the next jobs to run in one batch with this one, which a team has just
        taken.

        Jobs are never taken out of turn, and each free team gets its share. A job that was started
        before runs alone, because it may have caused the failure.
        """
        if (
            job.ranks != 1
            or job.attempts > 1
            or (key := batch_key(job.request, self._load)) is None
        ):
            return 0
        num_free = 1 + max(0, self.world_size - len(_batches(running)))
        most = (
            min(self._gain.limit(self._kind(job.request)), math.ceil((1 + len(waiting)) / num_free))
            - 1
        )
        fitting = itertools.takewhile(
            lambda other: not other.attempts and batch_key(other.request, self._load) == key,
            waiting[:most],
        )
        return len(list(fitting))

    def learn(
        self,
        job: Job,
        *,
        ranks: int,
        seconds: float,
        step_seconds: float,
        batch: int = 1,
        method: str = "",
    ) -> None:
        """Record the time of a job on `ranks` ranks, or of a batch on one. step_seconds: of
        `seconds`, those of its steps. method: its name, if the host has several.
        """
        if self._methods is not None and batch == 1:
            image = self._image(job.request)
            expected_s = self._methods.measured_s(method, ranks=ranks, **image)
            if expected_s is not None:
                self._drift.learn(step_seconds, expected_s=expected_s)
        if batch == 1:
            self._speeds[job.request.quality].learn(
                ranks=ranks,
                work=self._work(job.request),
                seconds=seconds,
                step_seconds=step_seconds,
            )
        if ranks == 1:
            self._gain.learn(self._kind(job.request), batch=batch, seconds=seconds)

    @property
    def has_drifted(self) -> bool:
        """Whether jobs no longer take the times by which their methods were chosen."""
        return self._drift.has_drifted

    def batch_failed(self, job: Job, *, batch: int) -> None:
        """Record that a batch of `batch` jobs like this one failed."""
        self._gain.learn(self._kind(job.request), batch=batch, seconds=math.inf)

    def measured(self) -> dict[str, Any]:
        """Return the measured times for GET /settings."""
        return {
            "seconds_per_megapixel_step": self._speeds[None].measured(),
            "seconds_in_batches": self._gain.measured(),
        }

    def _seconds(self, job: Job, *, num_waiting: int = 1) -> dict[int, float]:
        """Return team size -> seconds for this job, as one of `num_waiting` that wait."""
        work, speed = self._work(job.request), self._speeds[job.request.quality]
        seconds = {size: speed.seconds(size, work) for size in self._sizes}
        if 1 in seconds:
            kind = self._kind(job.request)
            seconds[1] *= self._gain.share(
                kind, min(self._gain.limit(kind), math.ceil(num_waiting / self.world_size))
            )
        return seconds

    def _quickest(self, request: GenerateRequest) -> int:
        """Return how many ranks generate this soonest, if it is alone."""
        if self._methods is None:
            return self.world_size
        return self._methods.quickest(request.quality, self._sizes, **self._image(request))

    def _image(self, request: GenerateRequest) -> dict[str, Any]:
        """Return what decides between methods, besides the quality."""
        work, usual = (work_of(one, self._spec, self._load) for one in (request, GenerateRequest()))
        pixels = work.pixel_steps / work.num_steps / (usual.pixel_steps / usual.num_steps)
        has_halves = self._spec.has_halves and self._scale(request) > 1
        return {
            "num_steps": work.num_steps,
            "pixels": round(pixels, 2),
            "halves": 2 if has_halves else 1,
        }

    def _scale(self, request: GenerateRequest) -> float:
        """Return the guidance scale of the request, the host or the model type."""
        given = (request.guidance_scale, self._load.guidance_scale, self._spec.guidance_scale)
        return next(scale for scale in given if scale is not None)

    def _left(self, jobs: Sequence[Job], team_size: int) -> float:
        """Return the seconds until the jobs of one team are done."""
        job = jobs[0]
        spent = max(0.0, now() - (job.started_s or now()))
        if job.step:
            return spent / job.step * (job.num_steps - job.step)
        share = (
            len(jobs) * self._gain.share(self._kind(job.request), len(jobs))
            if len(jobs) > 1
            else 1.0
        )
        speed = self._speeds[job.request.quality]
        return max(0.0, share * speed.seconds(team_size, self._work(job.request)) - spent)

    def _work(self, request: GenerateRequest) -> Work:
        return work_of(request, self._spec, self._load)

    def _kind(self, request: GenerateRequest) -> str:
        """Return a name for the images for which batches save the same share of time."""
        work = self._work(request)
        guided = " guided" if self._scale(request) > 1 else ""
        scheduler = request.scheduler if request.scheduler is not None else self._load.scheduler
        size = f"{work.width}x{work.height}, {work.num_steps} steps"
        quality = f", {request.quality}" if request.quality is not None else ""
        return f"{size}{guided}{f' of {scheduler}' if scheduler else ''}{quality}"


def _batches(running: Sequence[Job]) -> list[list[Job]]:
    """Return the running jobs of each team."""
    found: dict[str, list[Job]] = {}
    for job in running:
        found.setdefault(job.batch, []).append(job)
    return list(found.values())


class SplitPeriod:
    """One period in which the ranks are split into teams, until they rejoin. The dispatchers of all
    teams share it.
    """

    def __init__(self, sharing: Sharing, *, team_size: int) -> None:
        self._sharing = sharing
        self._team_size = team_size
        self._has_begun = False
        self._is_over = False

    def choose(self, waiting: Sequence[Job], running: Sequence[Job]) -> Choice:
        """Return what a free team does now. Once one team has left, the others leave after their
        jobs.

        The first team takes a job in any case: the ranks have just split for these jobs, and must
        not rejoin and split again endlessly.
        """
        if waiting and not self._has_begun and not self._is_over:
            self._has_begun = True
            return Choice.TAKE
        self._is_over = self._is_over or self._sharing.must_gather(
            waiting, running, team_size=self._team_size
        )
        if self._is_over:
            return Choice.LEAVE
        return Choice.TAKE if waiting else Choice.WAIT

    def end(self) -> None:
        """End the period, because a team has left for another reason."""
        self._is_over = True
