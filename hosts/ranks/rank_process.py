"""What one rank holds from its first line to its exit code: rendezvous, loop, stop and failure.

The HTTP side is hosts/main.py's. Torch is imported in `run`, after rank 0's port is bound.
"""

import logging
import sys
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from backends.autotune.ranking import Measured
from backends.errors import HostError, UnavailableError
from hosts.jobs.queue import JobQueue
from hosts.jobs.store import JobStore
from hosts.launch.catalog import Catalog, PlannedModel
from hosts.launch.gpus import count_gpus, driver_version
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan
from hosts.ranks.libraries import import_bitsandbytes
from hosts.ranks.model_control import Apply, Measure, ModelControl
from hosts.supervision import parent_watch
from hosts.supervision.exit_reports import ExitReport, RankNotes
from hosts.supervision.host_state import HostState, Phase
from hosts.supervision.progress import Activity
from hosts.supervision.rendezvous import Machines, Place, choose_interface

logger = logging.getLogger(__name__)

STOP_WITHIN_S = 1.5
"""Time for everything but the running job, which has --drain_seconds."""
ANSWER_WITHIN_S = 0.3
"""Time for waiting clients to read why their jobs end before the ranks restart."""
LOOPBACK = ("127.0.0.1", 1)
STOPPING = "the host is stopping. Try again when it has started."


@dataclass(slots=True, kw_only=True)
class RankProcess:
    """One rank. Its main thread calls the methods; signals are handled in threads."""

    settings: Settings
    place: Place
    environ: MutableMapping[str, str]
    """This process's environment, for torch, gloo and NCCL."""
    plan: Callable[[Settings, Measured | None], StartPlan]
    """What settings mean on these ranks, by what --backend=auto has measured."""
    state: HostState
    queue: JobQueue
    """Rank 0's jobs; empty on the others."""
    store: JobStore | None
    """Rank 0's jobs on disk. None on the others, and where a gateway keeps the jobs."""
    state_folder: Path | None
    """Where measured plans are kept for the next launch."""
    notes: RankNotes
    """For the process that takes over from this one."""
    notes_before: RankNotes
    """Of the process that this one takes over from."""

    def control(self, models: Catalog) -> ModelControl:
        """Commands of HTTP threads for the model loop."""
        control = ModelControl(
            self.queue,
            base=self.settings,
            plan=lambda settings: self.plan(settings, None),
            num_ranks=self.place.world_size,
            models={name: model.settings for name, model in models.items() if name},
        )
        self.state.measure = partial(control.run, Measure())
        return control

    def run(self, control: ModelControl, only: PlannedModel | None) -> HostError | None:
        """Rendezvous with the other ranks and run the loop until told to stop.

        only: the model to load at once; None waits for one from `control`. Return the error if it
        cannot be loaded.
        """
        first = Apply(settings=only.settings) if only is not None else None
        import_bitsandbytes(self.environ)
        from backends.groups import control_group
        from hosts.ranks.kept_models import KeptModels
        from hosts.ranks.model_loop import FollowerControl, LeaderControl, ModelLoop

        limit = self.settings.models_memory
        activity = Activity(
            mark=self._mark, note_jobs=partial(self.notes.put_jobs, self.place.rank)
        )
        device, alarm = self._rendezvous(activity, only.start if only is not None else None)
        leader = LeaderControl(
            control=control, queue=self.queue, state=self.state, is_fixed=first is not None
        )
        loop = ModelLoop(
            rank=self.place.rank,
            world_size=self.place.world_size,
            device=device,
            plan=self.plan,
            control=FollowerControl(self.place.rank) if self.place.rank else leader,
            activity=activity,
            alarm=alarm,
            memory=self.state_folder,
            is_first_here=self.place.local_rank == 0,
            kept=KeptModels(
                num_ranks=self.place.world_size,
                limit_bytes=None if limit is None else limit * 10**9,
            ),
        )
        try:
            failure = loop.run(first)
        finally:
            control_group.shutdown()
        return failure.as_error() if failure is not None else None

    def _mark(self, what: str) -> None:
        if what == "ready" and self.place.local_rank == 0:
            self.notes.put_modules([*sys.modules])
        self.notes.mark(what)

    def _rendezvous(self, activity: Activity, start: StartPlan | None) -> tuple[Any, Any]:
        """This rank's device and alarm, once all ranks are connected and watch each other."""
        from backends.groups import control_group
        from backends.groups.alarm import Alarm
        from backends.groups.devices import select_device
        from backends.groups.links import is_busy
        from backends.groups.message import share_secret
        from hosts.supervision.heartbeat import Watch

        place = self.place
        secret = (self.settings.rdzv_key or "").encode()
        share_secret(secret if place.world_size > place.local_world_size else self.notes.secret)
        if place.world_size == place.local_world_size:
            # else gloo and NCCL listen where the machine's name leads, which others may reach
            choose_interface(LOOPBACK, self.environ)
        meeting = self._meet_machines(start) if place.is_one_of_several else self.notes.meeting
        device = select_device(
            place.local_rank,
            local_world_size=place.local_world_size,
            num_gpus=count_gpus(self.environ),
            driver=driver_version(),
        )
        store = control_group.initialize(
            rank=place.rank, world_size=place.world_size, store=meeting
        )
        board = None if place.is_one_of_several else self.notes.board
        beats = board if board is not None else store
        Watch(
            beats,
            rank=place.rank,
            world_size=place.world_size,
            timeout_s=self.settings.failure_timeout,
            activity=activity,
            local_ranks=place.local_ranks,
            on_leave=self._note_end,
            is_device_busy=partial(is_busy, device),
        ).start()
        return device, Alarm(beats)

    def _meet_machines(self, start: StartPlan | None) -> Any:
        """The store through which the ranks of all machines connect, once all are there."""
        from backends.groups.control_group import open_store

        facts = start.fingerprint(self.settings) if start is not None else {}
        machines = Machines.of(self.settings, self.place, facts)
        choose_interface(machines.endpoint, self.environ)
        store = machines.meet(
            open_store,
            ending=self.notes_before.complete(machines.restarted(self.settings.node_rank)),
            tell=partial(self.state.become, Phase.WAITING),
            still_waiting=parent_watch.still_waiting,
        )
        self.state.become(Phase.LOADING)
        return store

    def stop_when_told(self) -> None:
        """At SIGTERM or SIGINT the running job has --drain_seconds to end. Followers wait for rank
        0, which tells them to stop.
        """
        drain_s = float(self.settings.drain_seconds)
        stop = partial(time.sleep, drain_s) if self.place.rank else self._stop
        parent_watch.on_stop_signal(stop, drain_s=drain_s + ANSWER_WITHIN_S, within_s=STOP_WITHIN_S)

    def _stop(self) -> None:
        if parent_watch.absent_ranks(self.place.local_ranks):
            # the agent stops us because another rank died, and will start all ranks again
            parent_watch.end_process(self.leave(None))
        logger.info("stopping")
        self.state.become(Phase.STOPPING, "the host is stopping")
        self.queue.close(UnavailableError(STOPPING), finish_running=True)
        self.queue.wait_until_idle(float(self.settings.drain_seconds))
        self.queue.interrupt()

    def leave(self, error: Exception | None) -> int:
        """Note why this rank ends, answer waiting clients, and return the exit code with which
        torchelastic restarts all ranks.
        """
        gone = parent_watch.absent_ranks(self.place.local_ranks)
        report = self.place.exit_report(gone, error)
        logger.error(
            "rank %d leaves: %s", self.place.rank, report.why, exc_info=None if gone else error
        )
        self._note_end(report)
        why = f"the ranks are started again ({report.why}). Send the request again."
        self.queue.abandon(UnavailableError(why))
        if self.place.rank == 0:
            time.sleep(ANSWER_WITHIN_S)
        return parent_watch.EXIT_LOST_RANK

    def _note_end(self, report: ExitReport) -> None:
        if self.store is not None:
            self.store.note(report)

    def answer_only(self, problem: HostError) -> None:
        """Answer every request with the reason until the client ends the host."""
        parent_watch.has_started()
        self.state.become(Phase.FAILED, str(problem))
        self.queue.close(UnavailableError(str(problem)))
        logger.error("cannot serve: %s", problem)
        self.state.wait_for_stop()
