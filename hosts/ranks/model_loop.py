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
from typing import Any, Protocol, TypeVar

import torch

from backends.autotune.ranking import Measured
from backends.errors import UnavailableError, UnsupportedError
from backends.generation.pipeline import LoadedPipeline
from backends.groups.alarm import Alarm
from backends.groups.control_group import Channel, broadcast_command, open_channels
from backends.groups.mesh import Mesh
from hosts.jobs.policy import Sharing
from hosts.jobs.queue import JobQueue
from hosts.launch.files import size_text
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan
from hosts.ranks.autotune import measure_again, tune
from hosts.ranks.commands import Failure, Stop, agree_on_outcome
from hosts.ranks.dispatch import Dispatcher, FollowerDispatcher, LeaderDispatcher
from hosts.ranks.kept_models import KeptModels
from hosts.ranks.loop import RankLoop
from hosts.ranks.model_control import Apply, Measure, ModelCommand, ModelControl, Offload, Sleep
from hosts.supervision.host_state import HostState, Phase
from hosts.supervision.progress import LOAD_WITHIN_S, Activity

logger = logging.getLogger(__name__)

NOTHING = "no pipeline is loaded. Send its configuration to POST /apply first."
PERCENT_BEGUN, PERCENT_PLANNED = 10.0, 20.0
"""What GET /progress shows while a pipeline is loaded."""
LOG_DOWNLOAD_EVERY_S = 10.0


Value = TypeVar("Value")


class DownloadLog:
    """Tells the log every few seconds how far a download is."""

    def __init__(self) -> None:
        self._told_s = 0.0

    def tell(self, done: int, total: int) -> str:
        """Return 'downloading 3.1 of 6.9 GB'."""
        text = f"downloading {size_text(done, total)}"
        if time.monotonic() - self._told_s >= LOG_DOWNLOAD_EVERY_S:
            self._told_s = time.monotonic()
            logger.info("%s", text)
        return text


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

    def show_download(self, done: int, total: int) -> None:
        """Show how many bytes of a download are here."""

    def has_waiting_jobs(self) -> bool:
        """Whether a job waits, on rank 0."""

    def sleep(self, seconds: float) -> None: ...

    def close(self) -> None: ...


class LeaderControl:
    """Rank 0's: commands from HTTP threads, its queue, and the state that it shows."""

    def __init__(
        self, *, control: ModelControl, queue: JobQueue, state: HostState, is_fixed: bool
    ) -> None:
        """is_fixed: the host is for one pipeline, and fails if that cannot be loaded."""
        self._control = control
        self._while_loading = Phase.READY if control.models else Phase.LOADING
        """A host with several models goes on taking jobs while it loads one."""
        self._queue = queue
        self._state = state
        self._is_fixed = is_fixed
        self._log = DownloadLog()

    def next(self) -> ModelCommand | Stop:
        """Blocks until there is one. Stop once the host stops."""
        if self._state.phase is Phase.LOADING:
            self.show_empty(None)
        command = self._control.take()
        if isinstance(command, Apply):
            self._state.loading_percent = PERCENT_BEGUN
            what = f"model {command.name}" if command.name else "a pipeline"
            self._state.become(self._while_loading, f"{what} is being loaded")
        return command or Stop()

    def dispatcher(
        self,
        start: StartPlan,
        sharing: Sharing,
        facts: Mapping[str, Any],
        channels: Mapping[int, Channel],
    ) -> LeaderDispatcher:
        self._state.loading_percent = PERCENT_PLANNED
        self._state.tell({**facts, **self._control.loaded})
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
        if self._control.models:
            self._state.become(Phase.READY)
        elif failure is None or not self._is_fixed:
            self._state.become(Phase.EMPTY, failure.message if failure is not None else NOTHING)
        else:
            error = failure.as_error()
            self._state.become(Phase.FAILED, str(error))
            self._queue.close(error)

    def show_download(self, done: int, total: int) -> None:
        self._state.become(self._while_loading, self._log.tell(done, total))

    def has_waiting_jobs(self) -> bool:
        return self._queue.num_waiting > 0

    def sleep(self, seconds: float) -> None:
        """The first rank stays awake."""

    def close(self) -> None:
        self._control.abandon(UnavailableError("the host is stopping."))


class FollowerControl:
    """A rank without clients: it receives all commands."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._log = DownloadLog()

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

    def show_download(self, done: int, total: int) -> None:
        self._log.tell(done, total)

    def has_waiting_jobs(self) -> bool:
        return False

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
        alarm: Alarm | None = None,
        memory: Path | None = None,
        is_first_here: bool = True,
        kept: KeptModels | None = None,
    ) -> None:
        """plan: what settings mean on these ranks, by what was measured. activity: of this thread,
        for the watch. alarm: by which ranks on GPUs learn of another's failure. memory: folder for
        the times that --backend=auto has measured. is_first_here: of the ranks of this machine.
        kept: where models are that are not in use.
        """
        self._is_first_here = is_first_here
        self._rank = rank
        self._alarm = alarm
        self._world_size = world_size
        self._device = device
        self._plan = plan
        self._control = control
        self._activity = activity or Activity()
        self._memory = memory
        self._channels: dict[int, Channel] = {}
        self._loop: RankLoop | None = None
        self._start: StartPlan | None = None
        self._settings: Settings | None = None
        self._name = ""
        """Of the loaded one of several models."""
        self._kept = kept or KeptModels()

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
        is_answered_later = isinstance(command, Apply) or (
            isinstance(command, Measure) and failure is None
        )
        if is_answered_later and self._loop is not None:
            return None
        if isinstance(command, Apply):
            self._control.show_empty(failure)
        self._control.finish(failure)
        if isinstance(command, Sleep) and failure is None:
            self._control.sleep(command.seconds)
        return failure

    def _prepare(self, command: ModelCommand) -> Failure | None:
        """Unload, plan and download, offload or measure. All ranks agree on the outcome."""
        if not isinstance(command, Apply):
            return self._agree(partial(self._obey, command))[1]
        self._put_away()
        if (known := self._kept.take(command.name)) is not None:
            logger.info("model %s is taken from main memory", command.name)
            _, failure = self._agree(known.pipeline.wake)
            if failure is None:
                self._settings, self._name = command.settings, command.name
                self._loop = self._rank_loop(known.start, known.pipeline)
            return failure
        start, failure = self._agree(partial(self._plan_if_any, command.settings))
        # once all ranks have planned, what they have found on the disk may change
        if failure is None:
            _, failure = self._agree(partial(self._download, start))
        if failure is None and start is not None and start.hub.found:
            start, failure = self._agree(partial(self._plan, command.settings, None))
        if failure is None and start is not None:
            self._settings, self._name = command.settings, command.name
            if command.name:
                self._kept.make_room(start.weight_bytes, is_used=True)
            self._loop = self._loop_of(start, partial(self._plan, command.settings))
        return failure

    def _agree(self, action: Callable[[], Value]) -> tuple[Value | None, Failure | None]:
        """Return the action's value here, and the failure of any rank."""
        value = failure = None
        try:
            value = action()
        # the other ranks must learn of any error before they continue
        except Exception as error:  # noqa: BLE001
            failure = Failure.of(error, rank=self._rank)
        return value, agree_on_outcome(failure).failure

    def _obey(self, command: Offload | Sleep | Measure) -> None:
        if isinstance(command, Offload):
            self._offload()
        elif isinstance(command, Measure):
            self._measure(command)

    def _plan_if_any(self, settings: Settings | None) -> StartPlan | None:
        return self._plan(settings, None) if settings else None

    def _put_away(self) -> None:
        """Unload the pipeline, or keep it in main memory if it is one of several and there is room.
        All ranks decide alike.
        """
        is_kept = self._name and self._loop is not None
        if not is_kept or not self._kept.make_room(self._start.weight_bytes):
            return self._unload()
        pipeline, self._loop = self._loop.release(), None
        keep = partial(self._kept.put, self._name, self._start, pipeline)
        if (failure := self._agree(keep)[1]) is not None:
            logger.warning("model %s is not kept: %s", self._name, failure.message)
            self._kept.take(self._name)
        del pipeline, keep
        self._free()

    def _download(self, start: StartPlan | None) -> None:
        """Download what the plan lacks, on the first rank of each machine."""
        if start is not None and self._is_first_here:
            start.hub.download(self._control.show_download)

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
            alarm=self._alarm,
        )
        return self._rank_loop(start, pipeline)

    def _rank_loop(self, start: StartPlan, pipeline: LoadedPipeline | None) -> RankLoop:
        self._start = start
        mesh = Mesh(start.plan, rank=self._rank, device=self._device, alarm=self._alarm)
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
            methods=start.methods.of_size,
            activity=self._activity,
            pipeline=pipeline,
        )

    def _sharing(self, start: StartPlan) -> Sharing:
        return Sharing(
            spec=start.spec,
            load=start.load,
            teams=start.teams,
            methods=start.methods,
            world_size=self._world_size,
            max_batch=start.max_batch,
        )

    def _measure(self, command: Measure) -> None:
        """Measure with the loaded pipeline, and make the loop anew. All ranks raise alike."""
        if self._loop is None:
            raise UnavailableError(NOTHING)
        if self._start.auto is None:
            raise UnsupportedError(
                f"there is nothing to measure: this host runs {self._start.plan.describe()} only. "
                "Start it on several ranks without naming a method."
            )
        pipeline, start = self._loop.release(), self._start
        self._activity.begin("measuring the methods", within_s=LOAD_WITHIN_S)
        try:
            measured = measure_again(
                start,
                pipeline,
                with_closeness=command.with_closeness,
                must_end=lambda: not command.with_closeness and self._control.has_waiting_jobs(),
                folder=self._memory,
                rank=self._rank,
                world_size=self._world_size,
                alarm=self._alarm,
            )
            start = self._plan(self._settings, measured)
        finally:
            self._activity.rest()
            self._loop = self._rank_loop(start, pipeline)

    def _offload(self) -> None:
        if self._loop is None:
            raise UnavailableError(NOTHING)
        self._loop.offload()

    def _unload(self) -> None:
        if self._loop is None:
            return
        self._loop.unload()
        self._loop = None
        self._free()

    def _free(self) -> None:
        gc.collect()  # pipelines hold themselves in cycles
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
