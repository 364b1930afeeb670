"""One pipeline on every rank's main thread: take the next command, run it, agree on the outcome.

The code is the same on all ranks; what differs is in the dispatcher (hosts/ranks/dispatch.py).
"""

import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import psutil
import torch

from backends import backend_class
from backends.autotune.candidates import Candidate
from backends.errors import CancelledError, HostError
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.generation.step_driver import EndRun
from backends.groups.control_group import broadcast_command, close, control_axis, control_of_team
from backends.groups.mesh import Axis, Mesh
from backends.model_table import ModelSpec
from backends.parallel.base import Backend
from backends.plan import Quality
from backends.request import GenerateRequest, GenerateResult, LoadRequest
from backends.step_cache_spec import StepCacheSpec
from hosts.ranks.commands import (
    Command,
    Failure,
    Generate,
    Outcome,
    SplitIntoTeams,
    Stop,
    agree_on_outcome,
    breaks_groups,
    give_next,
)
from hosts.ranks.dispatch import END, GO_ON, Dispatcher, TeamDispatcher
from hosts.ranks.warmup import prewarm_request
from hosts.supervision.log import about_job
from hosts.supervision.progress import COMPILE_WITHIN_S, LOAD_WITHIN_S, Activity

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way for a team to generate an image, ready to be attached."""

    mesh: Mesh
    backend: Backend
    step_cache: StepCacheSpec | None = None
    quality: Quality | None = None
    """The level that it meets; None: what its plan says."""


@dataclass(slots=True, kw_only=True)
class Team:
    """The ranks that work on one job together, as this rank sees them."""

    control: Axis
    """Their group for commands and outcomes."""
    methods: Mapping[str, Method]
    """By name. The first one is for a job without any special wish."""
    attached: str
    """The name of the method that is attached while the team works."""

    @property
    def method(self) -> Method:
        return self.methods[self.attached]

    @property
    def mesh(self) -> Mesh:
        return self.method.mesh

    @property
    def backend(self) -> Backend:
        return self.method.backend


class RankLoop:
    """One rank's commands. Its main thread runs them: no other thread touches the device or a
    collective.
    """

    def __init__(
        self,
        *,
        rank: int,
        spec: ModelSpec,
        mesh: Mesh,
        dispatcher: Dispatcher,
        methods: Mapping[int, Mapping[str, Candidate]] = MappingProxyType({}),
        activity: Activity | None = None,
        pipeline: LoadedPipeline | None = None,
    ) -> None:
        """mesh: of all ranks. methods: size of a team -> its methods by name, for all ranks and
        for each size into which they may split; none for the plan of the mesh alone. activity: of
        this thread, for the watch. pipeline: if it is loaded already.
        """
        self._rank = rank
        self._spec = spec
        self._device = mesh.device
        self._dispatcher = dispatcher
        self._activity = activity or Activity()
        self._team_dispatcher: TeamDispatcher = dispatcher
        self._alarm = mesh.groups.alarm
        self._named = methods
        first = Method(mesh=mesh, backend=self._backend(mesh))
        self._all = self._team = Team(
            control=control_axis(), methods={mesh.plan.method: first}, attached=mesh.plan.method
        )
        self._teams: dict[int, Team] = {}
        self._is_broken = self._is_switch = False
        self._last_step: torch.cuda.Event | None = None
        self._pipeline = pipeline

    def run(self) -> Failure | None:
        """Run commands until Stop. Return the Failure if loading failed."""
        while not isinstance(command := self._next_command(), Stop):
            if isinstance(command, Generate):
                self._generate(command)
            elif isinstance(command, SplitIntoTeams):
                self._split(command.team_size)
            elif (failure := self._load(command.request)) is not None:
                return failure
        return None

    def _next_command(self) -> Command:
        """The team's next one. A request that cannot be sent to its other ranks fails, and they
        never hear of it.
        """
        dispatcher, control = self._team_dispatcher, self._team.control
        return give_next(
            take=lambda: dispatcher.next_command(self._check),
            send=lambda command: broadcast_command(self._with_method(command), control),
            refuse=lambda outcome: dispatcher.generated([], outcome),
            rank=self._rank,
        )

    def offload(self) -> None:
        """Keep the weights in main memory until the next job."""
        self._pipeline.rest()

    def release(self) -> LoadedPipeline:
        """Close the groups, and return the pipeline with nothing attached."""
        pipeline = self._pipeline
        pipeline.detach()
        self.unload()
        return pipeline

    def unload(self) -> None:
        """Release the pipeline as it is, hooks and all, and close the groups."""
        self._pipeline = None
        for team in (*self._teams.values(), self._all):
            for method in team.methods.values():
                method.mesh.destroy()
        for team in self._teams.values():
            close(team.control)

    def _load(self, request: LoadRequest) -> Failure | None:
        started = time.perf_counter()
        failure = None
        self._activity.begin("loading", within_s=LOAD_WITHIN_S)
        try:
            self._pipeline = self._pipeline or load_pipeline(
                self._spec,
                request,
                device=self._device,
                share=(self._rank, self._all.control.size),
                is_cut=bool(self._all.method.mesh.plan.splits_weights_by),
            )
            self._attach(self._all)
        # the other ranks must learn of any error before they continue
        except Exception as error:  # noqa: BLE001
            failure = self._failed(error)
        failure = agree_on_outcome(failure).failure or self._form_teams()
        if failure is None and request.prewarm_steps:
            prewarming = Generate(job_ids=(), requests=(prewarm_request(self._spec, request),))
            failure = self._attempt(prewarming, "the first image")[1].failure
        self._activity.rest()
        if failure is None:
            self._activity.mark("ready")
            logger.info("loaded %s in %.1f s", request.checkpoint, time.perf_counter() - started)
        else:
            self._pipeline = None  # frees the device
            logger.error("loading failed: %s\n%s", failure.message, failure.trace)
        self._dispatcher.loaded(failure)
        return failure

    def _form_teams(self) -> Failure | None:
        """Make the teams of all sizes, with all methods ready to be attached. Every rank must call
        this; the failure is the same on all.
        """
        failure = None
        world_size = self._all.control.size
        for size, named in sorted(self._named.items()):
            if size == world_size:
                self._all.methods = self._prepare(size, named, [self._all.method])
                self._all.attached = next(iter(named))
            else:
                self._teams[size] = Team(
                    control=control_of_team(size),
                    methods=self._prepare(size, named, []),
                    attached=next(iter(named)),
                )
        if not self._teams and len(self._all.methods) == 1:
            return None  # it is attached; weights that it has cut would be gathered again
        try:
            # each once, so that a plan that does not work is found before the first job
            for team in (*self._teams.values(), self._all):
                for name in reversed(team.methods):
                    team.attached = name
                    self._attach(team)
        # the other ranks must learn of any error before they continue
        except Exception as error:  # noqa: BLE001
            failure = Failure.of(error, rank=self._rank)
        return agree_on_outcome(failure).failure

    def _prepare(
        self, size: int, named: Mapping[str, Candidate], present: list[Method]
    ) -> dict[str, Method]:
        """Make the groups of a team's methods. Methods with the same plan share theirs.

        present: methods whose groups exist.
        """
        found = {}
        place = {
            "rank": self._rank % size,
            "team": self._rank // size,
            "num_teams": self._all.control.size // size,
        }
        for name, candidate in named.items():
            base = next((one for one in present if one.mesh.plan == candidate.plan), None)
            if base is None:
                mesh = Mesh(candidate.plan, device=self._device, alarm=self._alarm, **place)
                mesh.prepare()
                base = Method(mesh=mesh, backend=self._backend(mesh))
                present.append(base)
            found[name] = replace(base, step_cache=candidate.step_cache, quality=candidate.quality)
        return found

    def _backend(self, mesh: Mesh) -> Backend:
        return backend_class(mesh.plan.method)(spec=self._spec, plan=mesh.plan, mesh=mesh)

    def _attach(self, team: Team) -> None:
        """Replace the hooks. No weights move, and the team's groups exist."""
        method = team.method
        self._pipeline.detach()
        self._pipeline.attach(method.backend, method.step_cache, quality=method.quality)

    def _with_method(self, command: Command | None) -> Command | None:
        """Return what the other ranks receive: with the one method that this rank has attached to
        check the requests.
        """
        if not isinstance(command, Generate):
            return command
        is_switch, self._is_switch = self._is_switch, False
        return replace(command, methods=(self._team.attached,), is_switch=is_switch)

    def _split(self, team_size: int) -> None:
        """Run jobs of this rank's team until all teams rejoin."""
        self._join(self._teams[team_size])
        with self._dispatcher.split(team_size) as self._team_dispatcher:
            while not self._is_broken and isinstance(command := self._next_command(), Generate):
                self._generate(command)
            if self._is_broken:
                self._team_dispatcher.leave()
        self._team_dispatcher = self._dispatcher
        self._join(self._all)

    def _join(self, team: Team) -> None:
        """Switch all ranks to their teams, or back. A failure ends the rank, and all ranks
        restart.
        """
        failure = None
        self._activity.begin("changing teams")
        try:
            self._attach(team)
        # the other ranks must learn of any error before they continue
        except Exception as error:  # noqa: BLE001
            failure = Failure.of(error, rank=self._rank)
        broken = self._team.attached if self._is_broken else None
        outcome = agree_on_outcome(failure, {"broken": broken})
        if outcome.failure is not None:
            raise outcome.failure.as_error()
        for name in sorted({figures["broken"] for figures in outcome.figures} - {None}):
            # in all teams: torch makes groups with all ranks only
            self._team.methods[name].mesh.rebuild()
        self._is_broken = False
        self._team = team
        self._activity.rest()

    def _generate(self, command: Generate) -> None:
        with about_job(" ".join(command.job_ids)):
            self._work_on(command)

    def _work_on(self, command: Generate) -> None:
        what = f"job {' and '.join(command.job_ids)}"
        logger.info("%s begins on %d ranks", what, self._team.control.size)
        results, outcome = self._attempt(command, what)
        failure = outcome.failure
        if failure is not None:
            log = logger.info if failure.error is not None else logger.error
            log(
                "%s failed on rank %d: %s%s",
                what,
                failure.rank,
                failure.message,
                "" if failure.error else f"\n{failure.trace}",
            )
        else:
            logger.info("%s done in %.2f s", what, results[0].seconds)
            self._activity.mark("served")
        self._team_dispatcher.generated(results, outcome)

    def _attempt(self, command: Generate, what: str) -> tuple[Sequence[GenerateResult], Outcome]:
        """Return the results, or none and the first failure of any rank of the team.

        what: the job's name in the log. Afterwards all are ready for the next command, unless a
        team's groups are broken: all ranks must rejoin to make new ones.
        """
        results: Sequence[GenerateResult] = ()
        failure = self._last_step = None
        self._activity.begin(
            what,
            least_s=COMPILE_WITHIN_S if self._pipeline.load.compile is not None else 0.0,
            jobs=command.job_ids,
        )
        try:
            self._use(command)
            results = self._pipeline.generate_together(command.requests, on_step=self._on_step)
        # the other ranks must learn of any error before they continue
        except Exception as error:  # noqa: BLE001
            failure = self._failed(error)
        outcome = agree_on_outcome(failure, self._figures(results), self._team.control)
        if outcome.failure is not None:
            self._pipeline.forget_prompts()  # on all ranks: one may have failed before it encoded
        if outcome.groups_are_broken and self._team is self._all:
            self._team.mesh.rebuild()
        elif outcome.groups_are_broken:
            self._is_broken = self._team.control.size > 1
        self._activity.rest()
        return (self._noted(results) if outcome.failure is None else ()), outcome

    def _noted(self, results: Sequence[GenerateResult]) -> list[GenerateResult]:
        """Return the results with the method that made them."""
        facts = {"method": self._team.attached, "backend": self._team.mesh.plan.method}
        return [replace(result, report={**result.report, **facts}) for result in results]

    def _figures(self, results: Sequence[GenerateResult]) -> dict[str, Any]:
        """Return this rank's figures after an image or a batch, in bytes and seconds."""
        is_cuda = self._device.type == "cuda"
        memory = (
            torch.cuda.max_memory_allocated(self._device)
            if is_cuda
            else psutil.Process().memory_info().rss
        )
        figures = {"rank": self._rank, "device": str(self._device), "memory_bytes": memory}
        for result in results[:1]:
            kept = {
                name: result.report[name]
                for name in ("wait_s", "sent_bytes")
                if name in result.report
            }
            figures |= {"seconds": round(result.seconds, 4), "spans": self._pipeline.spans, **kept}
        return figures

    def _use(self, command: Generate) -> None:
        """Attach the command's method, unless it is attached."""
        for name in command.methods[:1]:
            if command.is_switch or name != self._team.attached:
                self._team.attached = name
                self._attach(self._team)

    def _check(self, request: GenerateRequest, methods: Sequence[str]) -> None:
        """Attach the first of these methods that can do the request. Raise the best one's error if
        none can.

        All ranks attach it again when they receive the command: what a method learns in its first
        call, it learns on all ranks together.
        """
        errors = []
        for name in methods or (self._team.attached,):
            if name != self._team.attached:
                self._team.attached, self._is_switch = name, True
                self._attach(self._team)
            try:
                return self._pipeline.check(request)
            except HostError as error:
                errors.append(error)
        raise errors[0]

    def _on_step(self, step: int, num_steps: int, latents: torch.Tensor) -> None:
        signal = self._team.mesh.broadcast_signal(self._team_dispatcher.step_signal())
        if signal == END and self._spec.returns_latents and not self._spec.runs_as_is:
            self._wait_for_device(is_last=True)
            raise EndRun
        if signal != GO_ON:
            raise CancelledError(f"the job was cancelled at step {step} of {num_steps}.")
        self._wait_for_device(is_last=step == num_steps)
        self._team_dispatcher.step_done(
            step, num_steps, lambda row: self._pipeline.preview(latents, row)
        )
        self._activity.step(is_last=step == num_steps)

    def _wait_for_device(self, *, is_last: bool) -> None:
        """Let the device lag behind this thread by one step at most: else progress, cancelling and
        the watch would mean nothing. After the last step let it finish, so that decoding is timed
        apart from the steps.
        """
        if self._device.type != "cuda":
            return
        before, self._last_step = self._last_step, torch.cuda.Event()
        self._last_step.record()
        for event in (before, self._last_step if is_last else None):
            if event is not None:
                self._team.mesh.groups.wait_for(event)
        if is_last:
            self._last_step = None

    def _failed(self, error: Exception) -> Failure:
        failure = Failure.of(error, rank=self._rank, time_s=self._team.mesh.groups.failed_s)
        if breaks_groups(failure):
            # frames may hold a group, and only its last reference closes its connections
            traceback.clear_frames(error.__traceback__)
            self._team.mesh.fail()  # wakes the ranks that wait for this one in a collective
        if self._device.type == "cuda" and not isinstance(error, HostError):
            torch.cuda.empty_cache()
        return failure
