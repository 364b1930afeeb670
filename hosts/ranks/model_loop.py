"""A host that is started without a model: its pipeline is loaded, changed and unloaded over HTTP,
on all ranks, in the same processes.

Around the rank loop (hosts/ranks/loop.py) there is one more: errands (hosts/ranks/model_control.py)
are announced and done like jobs, and while a pipeline is loaded the inner loop serves jobs until
the next errand.
"""

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from backends.errors import UnavailableError
from backends.groups.alarm import Alarm
from backends.groups.control_group import Channel, close, open_channels
from backends.groups.mesh import Mesh
from backends.request import LoadRequest
from hosts.jobs.decision import Choice, Choose
from hosts.jobs.policy import Sharing, SplitPeriod
from hosts.jobs.queue import Job, JobQueue
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan
from hosts.ranks.commands import Command, Failure, SplitIntoTeams, Stop, agree_on_outcome, announce
from hosts.ranks.dispatch import Check, Dispatcher, FollowerDispatcher, LeaderDispatcher
from hosts.ranks.loop import RankLoop
from hosts.ranks.model_control import Apply, ModelCommand, ModelControl, Sleep
from hosts.supervision.host_state import HostState, Phase
from hosts.supervision.progress import Activity

logger = logging.getLogger(__name__)

NOTHING = "no pipeline is loaded. Send its configuration to POST /apply first."
PERCENT_BEGUN, PERCENT_PLANNED, PERCENT_LOADED = 10.0, 20.0, 100.0
"""What GET /progress says while a pipeline is loaded."""


class ControlDispatcher(LeaderDispatcher):
    """Rank 0's while a pipeline is loaded: jobs, until there is an errand. A pipeline that cannot
    be loaded leaves the host waiting.
    """

    def __init__(
        self,
        *,
        load: LoadRequest,
        queue: JobQueue,
        state: HostState,
        sharing: Sharing,
        control: ModelControl,
        channels: Mapping[int, Channel],
    ) -> None:
        super().__init__(load=load, queue=queue, state=state, sharing=sharing, channels=channels)
        self._control = control

    def next_command(self, check: Check) -> Command:
        command = super().next_command(check)
        return (
            Stop() if isinstance(command, SplitIntoTeams) and self._control.is_waiting else command
        )

    def loaded(self, failure: Failure | None) -> None:
        if failure is None:
            self._state.loading_percent = PERCENT_LOADED
            self._state.become(Phase.READY)
        self._control.finish(failure.as_error() if failure is not None else None)

    def _choose_size(self, waiting: Sequence[Job], running: Sequence[Job]) -> Choice:
        return Choice.LEAVE if self._control.is_waiting else super()._choose_size(waiting, running)

    def _choose_in(self, period: SplitPeriod) -> Choose:
        def choose(waiting: Sequence[Job], running: Sequence[Job]) -> Choice:
            if self._control.is_waiting:
                period.end()  # all ranks take part in it
            return period.choose(waiting, running)

        return choose


class LeaderControl:
    """What only rank 0 has: the HTTP side's errands, its queue and what it is told."""

    def __init__(self, *, control: ModelControl, queue: JobQueue, state: HostState) -> None:
        self._control = control
        self._queue = queue
        self._state = state

    def next(self) -> ModelCommand | Stop:
        if self._state.phase is Phase.LOADING:
            self.nothing_is_loaded(NOTHING)
        return self._control.take() or Stop()

    def begun(self, command: ModelCommand) -> None:
        if isinstance(command, Apply):
            self._state.loading_percent = PERCENT_BEGUN
            self._state.become(Phase.LOADING, "a pipeline is being loaded")

    def ended(self, failure: Failure | None) -> None:
        self._control.finish(failure.as_error() if failure is not None else None)

    def nothing_is_loaded(self, why: str) -> None:
        self._state.become(Phase.EMPTY, why)

    def dispatcher(
        self,
        start: StartPlan,
        sharing: Sharing,
        facts: dict[str, Any],
        channels: Mapping[int, Channel],
    ) -> ControlDispatcher:
        self._state.loading_percent = PERCENT_PLANNED
        self._state.tell(facts)
        return ControlDispatcher(
            load=start.load,
            queue=self._queue,
            state=self._state,
            sharing=sharing,
            control=self._control,
            channels=channels,
        )

    def close(self) -> None:
        self._control.abandon(UnavailableError("the host is stopping."))


class _ServingLoop(RankLoop):
    """The rank loop of one pipeline, which can be told to keep it elsewhere or to let it go."""

    def offload(self) -> None:
        self._pipeline.rest()

    def unload(self) -> None:
        """Let the pipeline go as it is, hooks and all, and close the groups."""
        self._pipeline = None
        for team in (*self._teams.values(), self._all):
            team.mesh.destroy()
        for team in self._teams.values():
            close(team.control)


class ModelLoop:
    """One rank's. front: rank 0's side; None on the others, which hear what to do. plan: settings
    -> what they mean here.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        plan: Callable[[Settings], StartPlan],
        front: LeaderControl | None,
        activity: Activity | None = None,
        alarm: Alarm | None = None,
    ) -> None:
        self._rank = rank
        self._alarm = alarm
        self._world_size = world_size
        self._device = device
        self._plan = plan
        self._front = front
        self._activity = activity
        self._channels: dict[int, Channel] = {}
        self._loop: _ServingLoop | None = None

    def run(self) -> None:
        """Until the host stops."""
        try:
            while not isinstance(
                command := announce(self._front.next() if self._front is not None else None), Stop
            ):
                self._do(command)
                if self._loop is not None and (failure := self._loop.run()) is not None:
                    self._unload()
                    self._tell_nothing_is_loaded(failure.message)
        finally:
            if self._front is not None:
                self._front.close()
            self._unload()

    def _do(self, command: ModelCommand) -> None:
        """Afterwards all ranks agree on how it went, and rank 0 has told who asked; of a pipeline
        to load it tells when that is loaded.
        """
        if self._front is not None:
            self._front.begun(command)
        failure = start = None
        try:
            if isinstance(command, Apply):
                self._unload()
                start = self._plan(command.settings) if command.settings is not None else None
            elif not isinstance(command, Sleep):
                self._offload()
        except Exception as error:  # noqa: BLE001  whatever it is, the other ranks must hear of it before anyone goes on
            failure = Failure.of(error, rank=self._rank)
        failure = agree_on_outcome(failure).failure
        if failure is None and start is not None:
            self._loop = self._loop_of(start)
            return
        if isinstance(command, Apply):
            self._tell_nothing_is_loaded(failure.message if failure is not None else NOTHING)
        if self._front is not None:
            self._front.ended(failure)
        elif isinstance(command, Sleep):
            time.sleep(command.seconds)

    def _loop_of(self, start: StartPlan) -> _ServingLoop:
        mesh = Mesh(start.plan, rank=self._rank, device=self._device, alarm=self._alarm)
        if start.teams.plans and not self._channels:
            self._channels = open_channels()
        sharing = Sharing(
            spec=start.spec,
            load=start.load,
            teams=start.teams,
            world_size=self._world_size,
            max_batch=start.max_batch,
        )
        facts = {**start.facts(), "device": str(self._device)}
        dispatcher = self._dispatcher(start, sharing, facts)
        logger.info("%s on %s", start.plan.describe(), self._device)
        return _ServingLoop(
            rank=self._rank,
            spec=start.spec,
            mesh=mesh,
            dispatcher=dispatcher,
            team_plans=start.teams.plans,
            activity=self._activity,
        )

    def _dispatcher(self, start: StartPlan, sharing: Sharing, facts: dict[str, Any]) -> Dispatcher:
        if self._front is not None:
            return self._front.dispatcher(start, sharing, facts, self._channels)
        return FollowerDispatcher(rank=self._rank, line=self._channels.get(0))

    def _offload(self) -> None:
        if self._loop is None:
            raise UnavailableError(NOTHING)
        self._loop.offload()

    def _unload(self) -> None:
        if self._loop is None:
            return
        self._loop.unload()
        self._loop = None
        gc.collect()  # pipelines hold themselves in cycles
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _tell_nothing_is_loaded(self, why: str) -> None:
        if self._front is not None:
            self._front.nothing_is_loaded(why)
