"""What every rank's main thread runs around the rank loop (hosts/ranks/loop.py): load a pipeline,
serve its jobs, and change or unload it on command.

A host with --type begins with the command to load that model. A host without one waits for its
first command, which comes over HTTP (hosts/ranks/model_control.py). The processes stay; groups and
mesh are made anew for each pipeline.
"""

import gc
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from backends.autotune.ranking import Measured
from backends.errors import UnavailableError
from backends.parallel.distributed import Channel, Mesh, broadcast_command, open_channels
from hosts.jobs.policy import Sharing
from hosts.jobs.queue import JobQueue
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan
from hosts.ranks.autotune import tune
from hosts.ranks.commands import Failure, Stop, agree_on_outcome
from hosts.ranks.dispatch import Dispatcher, FollowerDispatcher, LeaderDispatcher
from hosts.ranks.loop import RankLoop
from hosts.ranks.model_control import Apply, ModelCommand, ModelControl, Offload, Sleep
from hosts.supervision.host_state import HostState, Phase
from hosts.supervision.progress import Activity

logger = logging.getLogger(__name__)

NOTHING = "no pipeline is loaded. Send its configuration to POST /apply first."
PERCENT_BEGUN, PERCENT_PLANNED = 10.0, 20.0
"""What GET /progress shows while a pipeline is loaded."""


class Control(Protocol):
    """What differs between rank 0 and the others."""

    def next(self) -> ModelCommand | Stop | None:
        """The next command on rank 0; None on the others, which receive it."""

    def dispatcher(
        self,
        start: StartPlan,
        sharing: Sharing,
        facts: Mapping[str, Any],
        channels: Mapping[int, Channel],
    ) -> Dispatcher:
        """Where this rank's jobs come from, and its results go to."""

    def finish(self, failure: Failure | None) -> None:
        """Answer the command that was taken last."""

    def show_empty(self, failure: Failure | None) -> None:
        """Show that no pipeline is loaded, and why."""

    def sleep(self, seconds: float) -> None: ...

    def close(self) -> None: ...


class LeaderControl:
    """Rank 0's: commands from HTTP threads, its queue, and the state that it shows."""

    def __init__(
        self, *, control: ModelControl, queue: JobQueue, state: HostState, is_fixed: bool
    ) -> None:
        """is_fixed: the host is for one pipeline, and fails if that cannot be loaded."""
        self._control = control
        self._queue = queue
        self._state = state
        self._is_fixed = is_fixed

    def next(self) -> ModelCommand | Stop:
        """Blocks until there is one. Stop once the host stops."""
        if self._state.phase is Phase.LOADING:
            self.show_empty(None)
        command = self._control.take()
        if isinstance(command, Apply):
            self._state.loading_percent = PERCENT_BEGUN
            self._state.become(Phase.LOADING, "a pipeline is being loaded")
        return command or Stop()

    def dispatcher(
        self,
        start: StartPlan,
        sharing: Sharing,
        facts: Mapping[str, Any],
        channels: Mapping[int, Channel],
    ) -> LeaderDispatcher:
        self._state.loading_percent = PERCENT_PLANNED
        self._state.tell(facts)
        return LeaderDispatcher(
            load=start.load,
            queue=self._queue,
            state=self._state,
            sharing=sharing,
            control=self._control,
            channels=channels,
        )

    def finish(self, failure: Failure | None) -> None:
        self._control.finish(failure.as_error() if failure is not None else None)

    def show_empty(self, failure: Failure | None) -> None:
        if failure is None or not self._is_fixed:
            self._state.become(Phase.EMPTY, failure.message if failure is not None else NOTHING)
            return
        error = failure.as_error()
        self._state.become(Phase.FAILED, str(error))
        self._queue.close(error)

    def sleep(self, seconds: float) -> None:
        """The first rank stays awake."""

    def close(self) -> None:
        self._control.abandon(UnavailableError("the host is stopping."))


class FollowerControl:
    """A rank without clients: it receives all commands."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def next(self) -> None:
        return None

    def dispatcher(
        self,
        start: StartPlan,
        sharing: Sharing,
        facts: Mapping[str, Any],
        channels: Mapping[int, Channel],
    ) -> FollowerDispatcher:
        return FollowerDispatcher(rank=self._rank, channel=channels.get(0))

    def finish(self, failure: Failure | None) -> None: ...

    def show_empty(self, failure: Failure | None) -> None: ...

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None: ...


class ModelLoop:
    """One rank's. The code is the same on all ranks; what differs is in `control`."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        plan: Callable[[Settings, Measured | None], StartPlan],
        control: Control,
        activity: Activity | None = None,
        memory: Path | None = None,
    ) -> None:
        """plan: what settings mean on these ranks, by what was measured. activity: of this thread,
        for the watch. memory: folder for the times that --backend=auto has measured.
        """
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._plan = plan
        self._control = control
        self._activity = activity or Activity()
        self._memory = memory
        self._channels: dict[int, Channel] = {}
        self._loop: RankLoop | None = None

    def run(self, first: Apply | None = None) -> Failure | None:
        """Run commands, beginning with `first`, until the host stops. Return the Failure if the
        pipeline of `first` cannot be loaded.
        """
        try:
            command = first or self._next()
            while not isinstance(command, Stop):
                failure = self._do(command)
                if self._loop is not None:
                    failure = self._serve()
                if failure is not None and command is first:
                    return failure
                command = self._next()
            return None
        finally:
            self._control.close()
            if self._loop is not None:
                self._loop.unload()

    def _next(self) -> ModelCommand | Stop:
        return broadcast_command(self._control.next())

    def _do(self, command: ModelCommand) -> Failure | None:
        """Run a command on all ranks, and answer it; a pipeline is only prepared, and `_serve`
        answers when it is loaded.
        """
        failure = self._prepare(command)
        if isinstance(command, Apply) and self._loop is not None:
            return None
        if isinstance(command, Apply):
            self._control.show_empty(failure)
        self._control.finish(failure)
        if isinstance(command, Sleep) and failure is None:
            self._control.sleep(command.seconds)
        return failure

    def _prepare(self, command: ModelCommand) -> Failure | None:
        """Unload, plan or offload. All ranks agree on the outcome."""
        failure = start = None
        try:
            if isinstance(command, Apply):
                self._unload()
                start = self._plan(command.settings, None) if command.settings else None
            elif isinstance(command, Offload):
                self._offload()
        except Exception as error:  # noqa: BLE001  the other ranks must learn of any error before they continue
            failure = Failure.of(error, rank=self._rank)
        failure = agree_on_outcome(failure).failure
        if failure is None and start is not None:
            self._loop = self._loop_of(start, partial(self._plan, command.settings))
        return failure

    def _serve(self) -> Failure | None:
        """Load the pipeline unless it is loaded, and serve jobs until the next command."""
        failure = self._loop.run()
        if failure is not None:
            self._unload()
            self._control.show_empty(failure)
            self._control.finish(failure)
        return failure

    def _loop_of(self, start: StartPlan, plan: Callable[[Measured], StartPlan]) -> RankLoop:
        start, pipeline = tune(
            start,
            plan,
            folder=self._memory,
            rank=self._rank,
            world_size=self._world_size,
            device=self._device,
            activity=self._activity,
        )
        mesh = Mesh(start.plan, rank=self._rank, device=self._device)
        if start.teams.plans and not self._channels:
            self._channels = open_channels()
        facts = {**start.facts(), "device": str(self._device)}
        logger.info("%s on %s", start.plan.describe(), self._device)
        for reason in facts["reasons"]:
            logger.info("chosen: %s", reason)
        return RankLoop(
            rank=self._rank,
            spec=start.spec,
            mesh=mesh,
            dispatcher=self._control.dispatcher(start, self._sharing(start), facts, self._channels),
            team_plans=start.teams.plans,
            activity=self._activity,
            pipeline=pipeline,
        )

    def _sharing(self, start: StartPlan) -> Sharing:
        return Sharing(
            spec=start.spec,
            load=start.load,
            teams=start.teams,
            world_size=self._world_size,
            max_batch=start.max_batch,
        )

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
