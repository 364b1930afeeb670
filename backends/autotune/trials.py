"""Tries methods on a loaded model and measures the link between the ranks. Runs on every rank.

Nothing is reloaded: each method is attached, runs the first steps of an image and is detached. Used
for `--backend=auto` (hosts/launch/auto_backend.py) and by benchmarks/planner.py.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from backends import backend_class
from backends.autotune.candidates import Candidate
from backends.autotune.cost import Link, Work
from backends.autotune.ranking import (
    CLOSE_CALL,
    NUM_TRIED,
    Image,
    Measured,
    Row,
    contenders,
    next_to_try,
    rank,
)
from backends.autotune.step_profile import bytes_of, surveyed
from backends.errors import CancelledError
from backends.generation.pipeline import LoadedPipeline, OnStep
from backends.groups.alarm import Alarm
from backends.groups.collectives import begin_gather
from backends.groups.control_group import gather_outcomes
from backends.groups.mesh import Axis, Mesh
from backends.main_memory import main_memory
from backends.model_table import ModelSpec
from backends.parallel.base import Backend
from backends.plan import ParallelPlan, Quality
from backends.request import GenerateRequest
from backends.step_cache_spec import StepCacheSpec

logger = logging.getLogger(__name__)

SECONDS = 60.0
"""No further method is tried after this time."""
SLOW_STEP_S = 10.0
"""A single-rank step that takes longer is not repeated."""
NUM_STEPS = 6
"""Steps of each trial: a synchronous one, one that still allocates buffers, and two pairs (stride 2
communicates every other step).
"""
ALONE_STEPS = 4
MOST_DB = 200.0
"""PSNR of equal images, which would be infinite."""
NUM_TRIED_ALSO = 2
"""Largest number of candidates that are tried for each further level of quality."""
NUM_REPEATS = 3
"""Rounds in which candidates that are close to the fastest are tried again, until the two best
times of each agree: another program may have slowed one down.
"""
WARMUP_STEPS = 1
LINK_MESSAGES = 20
LINK_BYTES = 4_000_000
HIDES = {"cuda": 0.9, "cpu": 0.5}
"""Fraction of a message's time that overlaps with computing. On a CPU the sending thread takes time
from the computing ones.
"""


class Subject(Protocol):
    """A model on this rank that can be tried."""

    denoiser: nn.Module
    other_bytes: int
    device: torch.device

    def attach(self, backend: Backend, step_cache: StepCacheSpec | None = None) -> None: ...

    def detach(self) -> None: ...

    def run(self, on_step: OnStep) -> None:
        """Start an image with WARMUP_STEPS synchronous steps.

        `on_step` ends it with CancelledError.
        """

    def image(self) -> np.ndarray:
        """Return the latents of a whole image, or its pixels where there are no latents."""


class PipelineSubject:
    """A loaded pipeline and the request to try it with."""

    def __init__(
        self, pipeline: LoadedPipeline, request: GenerateRequest, whole: GenerateRequest
    ) -> None:
        """request: whose first steps are timed. whole: the image that is compared."""
        self._pipeline = pipeline
        self._whole = whole
        self._request = request.model_copy(update={"warmup_steps": WARMUP_STEPS})
        self.device = pipeline.device
        self.denoiser: nn.Module = getattr(pipeline.pipe, pipeline.spec.denoiser)
        modules = [
            part
            for part in pipeline.pipe.components.values()
            if isinstance(part, nn.Module) and part is not self.denoiser
        ]
        self.other_bytes = sum(bytes_of(part) for part in modules)

    def attach(self, backend: Backend, step_cache: StepCacheSpec | None = None) -> None:
        self._pipeline.attach(backend, step_cache)

    def detach(self) -> None:
        self._pipeline.detach()

    def run(self, on_step: OnStep) -> None:
        self._pipeline.generate(self._request, on_step=on_step)

    def image(self) -> np.ndarray:
        result = self._pipeline.generate(self._whole)
        return (result.frames if result.latents is None else result.latents).astype(np.float64)


@dataclass(slots=True)
class _Stopwatch:
    """Ends a trial after `num_steps` steps and measures them."""

    num_steps: int
    device: torch.device
    period: int = 2
    """Steps after which the work repeats: with stride 2 or a step cache not every step is equal."""
    marks: list[float] = field(default_factory=list)

    def __call__(self, step: int, num_steps: int, latents: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.marks.append(time.perf_counter())
        if len(self.marks) >= min(self.num_steps, num_steps):
            raise CancelledError("the trial is complete")

    @property
    def step_s(self) -> float:
        """Seconds per step, from the fastest period of steady steps.

        Another program may slow one period down. Images with few steps use the steps that exist.
        """
        steps = [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]
        steady = steps[WARMUP_STEPS:] or steps
        size = min(self.period, len(steady))
        return min(
            sum(steady[first : first + size]) / size for first in range(len(steady) - size + 1)
        )


@dataclass(slots=True)
class _Found:
    """What has been measured so far."""

    link: Link
    work: Work
    memory_bytes: int
    started: float = field(default_factory=time.perf_counter)
    times: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.times["single"] = [self.work.step_s]

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def names(self) -> list[str]:
        return [*self.times, *self.failures]

    def add(self, candidate: Candidate, step_s: float, failure: str) -> None:
        if not failure:
            self.times[candidate.name] = sorted([*self.times.get(candidate.name, []), step_s])
        elif candidate.name not in self.times:
            self.failures[candidate.name] = failure

    def is_unsure(self, candidate: Candidate) -> bool:
        """Return whether the two best times of a candidate differ, or there is only one."""
        times = self.times.get(candidate.timed_as or candidate.name, [])
        return len(times) < 2 or times[1] > CLOSE_CALL * times[0]

    def measured(self) -> Measured:
        return Measured(
            work=self.work,
            link=self.link,
            memory_bytes=self.memory_bytes,
            steps={name: times[0] for name, times in self.times.items()},
            failures=dict(self.failures),
            spread={name: times[1] / times[0] for name, times in self.times.items() if times[1:]},
        )


class Trials:
    """Finds the fastest method. All ranks make the same calls in the same order."""

    def __init__(
        self,
        subject: Subject,
        *,
        spec: ModelSpec,
        rank: int,
        world_size: int,
        halves: int,
        alarm: Alarm | None = None,
    ) -> None:
        """halves: predictions per step, 2 with guidance. alarm: see Mesh."""
        self._subject = subject
        self._spec = spec
        self._rank = rank
        self._world_size = world_size
        self._halves = halves
        self._alarm = alarm

    def measure(
        self,
        candidates: Sequence[Candidate],
        *,
        quality: Quality,
        image: Image,
        also: Sequence[Quality] = (),
        must_end: Callable[[], bool] = lambda: False,
    ) -> Measured:
        """Return the measurements, equal on all ranks.

        A failed method is recorded with its reason. A failure of the single-rank step is raised.

        also: other levels of which the best candidates are tried too. must_end: asked on rank 0
        between trials; no further one then begins.
        """
        found = _Found(
            link=self.link(),
            work=self.alone(),
            memory_bytes=min(
                gather_outcomes(_memory_bytes(self._subject.device, self._world_size))
            ),
        )
        levels = [quality, *also]

        def rows(level: Quality) -> list[Row]:
            return rank(candidates, found.measured(), quality=level, image=image)

        # a trial takes NUM_STEPS such steps. A CPU is there to try things out, not to wait for that
        is_too_slow = self._subject.device.type == "cpu" and found.work.step_s >= SLOW_STEP_S
        if is_too_slow:
            logger.info(
                "a step of the default size takes %.0f s on this CPU, so no method is tried: the "
                "estimate decides. --height, --width and --backend make the start quicker",
                found.work.step_s,
            )

        def may_go_on() -> bool:
            is_done = is_too_slow or found.seconds >= SECONDS or must_end()
            return gather_outcomes(not is_done)[0]

        for level in levels:
            most = len(found.times) + (NUM_TRIED if level == quality else NUM_TRIED_ALSO)
            while len(found.times) < most and (new := next_to_try(rows(level))) and may_go_on():
                self._attempt(new, found)
        for _ in range(NUM_REPEATS):
            close = {each.name: each for level in levels for each in contenders(rows(level))}
            for candidate in close.values():
                if found.is_unsure(candidate) and may_go_on():
                    self._attempt(candidate, found)
        logger.info("tried %s in %.1f s", ", ".join(found.names), found.seconds)
        return found.measured()

    def _attempt(self, candidate: Candidate, found: "_Found") -> None:
        if candidate.name == "single":
            step_s, failure = self.alone().step_s, ""
        else:
            step_s, failure = self.trial(candidate)
        found.add(candidate, step_s, failure)

    def link(self) -> Link:
        """Return the latency of a small message and the bandwidth of large ones, all ranks sending
        to all, and the device memory of the one communicator that this takes.
        """
        plan = ParallelPlan(method="probe", axes=(("data", self._world_size),))
        free = _free_bytes(self._subject.device)
        mesh = Mesh(plan, rank=self._rank, device=self._subject.device, alarm=self._alarm)
        taken = max(0, free - _free_bytes(self._subject.device))
        try:
            axis = mesh.axis("data")
            latency_s = statistics.median(_exchange(axis, mesh, 4) for _ in range(LINK_MESSAGES))
            large_s = min(_exchange(axis, mesh, LINK_BYTES) for _ in range(3))
        finally:
            mesh.destroy()
        speed = LINK_BYTES * max(1, self._world_size - 1) / max(large_s - latency_s, 1e-9)
        return gather_outcomes(
            Link(
                latency_s=latency_s,
                bytes_per_s=speed,
                hides=HIDES.get(self._subject.device.type, 0.5),
                communicator_bytes=taken,
            )
        )[0]

    def alone(self) -> Work:
        """Return one rank's Work, measured on rank 0 while the others wait.

        An error on rank 0 is raised on all ranks.
        """
        outcome = self._survey() if self._rank == 0 else None
        work = gather_outcomes(outcome)[0]
        if isinstance(work, Exception):
            raise work
        return work

    def trial(self, candidate: Candidate) -> tuple[float, str]:
        """Return (seconds per step, "") of one method, or (0.0, reason) if it failed."""

        def time_steps() -> float:
            watch = _Stopwatch(NUM_STEPS, self._subject.device, period=_period(candidate))
            _run(self._subject, watch)
            return watch.step_s

        return self._run_with(candidate, time_steps)

    def closeness(self, candidates: Sequence[Candidate]) -> tuple[dict[str, float], dict[str, str]]:
        """Return each method's PSNR in dB against one rank, of one whole image, and why others
        failed. The same on all ranks.
        """
        single = Candidate(
            name="single", backend="single", ranks=1, plan=ParallelPlan(method="single")
        )
        found: dict[str, float] = {}
        failures: dict[str, str] = {}
        images: list[np.ndarray] = []

        def compare() -> float:
            images.append(self._subject.image())
            return psnr(images[0], images.pop()) if len(images) > 1 else inf

        for candidate in (single, *candidates):
            decibels, failure = self._run_with(candidate, compare)
            if candidate is single and failure:
                raise RuntimeError(failure)
            if failure:
                failures[candidate.name] = failure
            elif candidate is not single:
                found[candidate.name] = decibels
        return found, failures

    def _run_with(self, candidate: Candidate, work: Callable[[], float]) -> tuple[float, str]:
        """Attach a method, do some work and detach it. Return (rank 0's figure, ""), or (0.0,
        reason) if any rank failed.

        The first ranks work while the others wait.
        """
        assert candidate.plan is not None
        team, rank = divmod(self._rank, candidate.ranks)
        mesh = Mesh(
            candidate.plan,
            rank=rank,
            device=self._subject.device,
            alarm=self._alarm,
            team=team,
            num_teams=self._world_size // candidate.ranks,
        )
        mesh.prepare()
        figure, failure, is_attached = 0.0, None, False
        try:
            backend = backend_class(candidate.backend)(
                spec=self._spec, plan=candidate.plan, mesh=mesh
            )
            is_attached = True
            self._subject.attach(backend, candidate.step_cache)
            if team == 0:
                figure = work()
        except Exception as error:  # noqa: BLE001  any error rules out this method only
            failure = (time.time(), f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            mesh.fail()  # wakes the ranks that wait for this one
        # By time: errors about closed connections come after their cause.
        failures = sorted(found for found in gather_outcomes(failure) if found is not None)
        if failures:
            mesh.rebuild()  # detaching may have to fetch weights from other ranks
        if is_attached:
            self._subject.detach()
        mesh.destroy()
        if failures:
            logger.info("%s failed when it was tried: %s", candidate.name, failures[0][1])
            return 0.0, failures[0][1]
        return gather_outcomes(figure)[0], ""

    def _survey(self) -> Work | Exception:
        device = self._subject.device
        plan = ParallelPlan(method="single")
        backend = backend_class("single")(
            spec=self._spec, plan=plan, mesh=Mesh(plan, rank=0, device=device)
        )
        try:
            self._subject.attach(backend)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            with surveyed(self._subject.denoiser) as survey:
                _run(self._subject, _Stopwatch(1, device))
            step_s = survey.seconds
            if step_s < SLOW_STEP_S:
                _run(self._subject, watch := _Stopwatch(ALONE_STEPS, device))
                step_s = watch.step_s
            self._subject.detach()
        except Exception as error:  # noqa: BLE001  reported to the other ranks, which wait
            return error
        return survey.work(
            step_s=step_s,
            halves=self._halves,
            weight_bytes=bytes_of(self._subject.denoiser),
            other_bytes=self._subject.other_bytes,
            activation_bytes=torch.cuda.max_memory_allocated(device) - before
            if device.type == "cuda"
            else None,
        )


def psnr(reference: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB; the peak is the range of `reference`. At most
    MOST_DB.
    """
    error = float(np.mean((reference - other) ** 2))
    peak = float(np.ptp(reference))
    return min(MOST_DB, 10 * math.log10(peak**2 / error)) if error > 0 else MOST_DB


def _period(candidate: Candidate) -> int:
    """Return the number of steps after which the candidate's work repeats."""
    return max(2, int(candidate.step_cache.value) if candidate.step_cache is not None else 2)


def _run(subject: Subject, watch: _Stopwatch) -> None:
    try:
        subject.run(watch)
    except CancelledError:
        return


def _exchange(axis: Axis, mesh: Mesh, num_bytes: int) -> float:
    """Return the seconds until every rank has the bytes of every other."""
    piece = torch.zeros(num_bytes // 4, device=mesh.device)
    started = time.perf_counter()
    begin_gather(piece, [piece.shape] * axis.size, axis=axis, traffic=mesh.traffic)()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
    return time.perf_counter() - started


def _free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, which also counts what NCCL takes; 0 for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _memory_bytes(device: torch.device, world_size: int) -> Any:
    """Return the memory of this rank's device. Ranks on CPUs divide the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return main_memory().total // world_size
