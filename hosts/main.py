"""Entry of one rank: listener first, then groups, then the loop. The only file that reads the
rank's environment.
"""

import logging
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

from backends.autotune.ranking import Measured
from backends.errors import ConfigError, HostError, UnavailableError
from backends.model_table import ModelSpec, read_table
from hosts.http.limits import queue_within
from hosts.jobs.policy import Sharing
from hosts.jobs.queue import JobQueue
from hosts.jobs.store import JobStore
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan, count_gpus, plan_start
from hosts.ranks.model_control import ModelControl
from hosts.supervision import log, parent_watch
from hosts.supervision.exit_reports import ExitReport, RankNotes
from hosts.supervision.host_state import HostState, Phase
from hosts.supervision.progress import Activity
from hosts.supervision.rendezvous import Machines, interface_towards, parse_endpoint

logger = logging.getLogger(__name__)

STOP_WITHIN_S = 1.5
"""For everything but the running job, which has --drain_seconds."""
ANSWER_WITHIN_S = 0.3
"""What waiting clients get to read why their jobs end, when the ranks are about to be started
again.
"""
LIBRARY_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Defaults for the libraries, read when they are imported: nothing is fetched, and their chatter
stays out of the log.
"""
DISABLES_DYNAMO = "TORCHDYNAMO_DISABLE"
"""Torch's environment variable, which it reads at each call of torch.compile."""
FATAL_FILE = "DIFFUSION_FATAL_FILE"
"""Environment variable: where a rank leaves the reason for which starting it again would not help.
Set by launcher.py.
"""

STOPPING = "the host is stopping. Try again when it has started."
STATE_FOLDER = "DIFFUSION_STATE_FOLDER"
"""Environment variable: where jobs outlive the ranks if --state_dir is not given. Set by
launcher.py, and gone with it.
"""
NOTES_FOLDER = "DIFFUSION_NOTES_FOLDER"
"""Environment variable: where ranks leave notes for those that come after them
(hosts/supervision/exit_reports.py). Set by launcher.py, and gone with it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This rank among the others, as torchelastic tells it. attempt: how often the set was started
    before.

    is_one_of_several: torchelastic knows the ranks of this machine only, and they meet those of
    other machines by themselves.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    attempt: int = 0
    is_one_of_several: bool = False

    @classmethod
    def from_environment(cls, settings: Settings) -> "Place":
        number = {
            name: int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        }
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", number["WORLD_SIZE"]))
        is_one_of_several = (
            settings.nnodes > 1 and number["WORLD_SIZE"] == local_world_size
        )  # else torchrun, by hand, over all machines
        return cls(
            rank=number["RANK"]
            + (settings.node_rank * local_world_size if is_one_of_several else 0),
            local_rank=number["LOCAL_RANK"],
            world_size=number["WORLD_SIZE"] * (settings.nnodes if is_one_of_several else 1),
            local_world_size=local_world_size,
            attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
            is_one_of_several=is_one_of_several,
        )

    @property
    def local_ranks(self) -> range:
        """Of all ranks on this machine."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_world_size)


def is_rank() -> bool:
    """Whether this process was started as a rank (by torchrun or our launcher)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_rank(
    settings: Settings,
    *,
    after_failed_load: Literal["exit", "answer"],
    bind_patience_s: float = 0.0,
    problem: HostError | None = None,
    waits: bool = False,
) -> int:
    """Serve until told to stop. Returns the exit code. `problem`: one that the arguments already
    had.

    waits: for a pipeline that is configured over HTTP, instead of loading the one of the settings.

    after_failed_load: 'answer' keeps rank 0 serving the reason as an error, because the old clients
    notice nothing else; 'exit' leaves it to the launcher to print.
    """
    parent_watch.die_with_parent(is_torchelastic="TORCHELASTIC_RUN_ID" in os.environ)
    place = Place.from_environment(settings)
    notes = _notes(place)
    log.configure(
        rank=place.rank,
        log_format=settings.log_format,
        kept_in=notes.log_file(place.rank) if notes else None,
    )
    if notes is not None:
        notes.record_crash(place.rank)
    for name, value in LIBRARY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    start = None
    try:
        if problem is None and not waits:
            start = _plan(settings, place=place)
    except HostError as error:
        problem = error
    if problem is not None and after_failed_load == "exit":
        return _fatal(problem)
    state = HostState()
    state.tell({"restarts": place.attempt})
    try:
        store = _open_store(settings) if place.rank == 0 else None
        queue = _queue(settings, store, place)
        _stop_when_told(settings, place, state, queue, store)
        control = (
            ModelControl(
                queue, base=settings, plan=partial(_plan, place=place), num_ranks=place.world_size
            )
            if waits
            else None
        )
        listener = (
            _listen(settings, start, state, queue, control, patience_s=bind_patience_s)
            if place.rank == 0
            else None
        )
    except ConfigError as error:
        return _fatal(error)
    if problem is None:
        try:
            if control is not None:
                _serve_errands(settings, place, state, queue, store, control)
            else:
                problem = _serve(settings, start, place, state, queue, store)
        except ConfigError as error:  # starting again would not help
            problem = error
        except Exception as error:  # noqa: BLE001  a lost rank looks like any error; this process ends, and the set is started again
            return _leave(place, queue, store, error)
        queue.abandon(UnavailableError(STOPPING))
    if problem is not None and after_failed_load == "exit":
        return _fatal(problem)
    if problem is not None and place.rank == 0:
        _answer_only(state, queue, problem)
    if listener is not None:
        listener.stop()
    return 0


def end_rank(code: int) -> NoReturn:
    """Leave at once: the libraries' own teardown takes a second, and other ranks and clients may
    wait for this process to be gone.
    """
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def _state_folder(settings: Settings) -> Path | None:
    folder = settings.state_dir or os.environ.get(STATE_FOLDER)
    return Path(folder).expanduser().resolve() if folder else None


def _open_store(settings: Settings) -> JobStore | None:
    if settings.no_job_store:
        return None
    folder = _state_folder(settings)
    return JobStore(folder) if folder is not None else None


def _notes(place: Place, *, before: int = 0) -> RankNotes | None:
    """Of this attempt, or of so many before it; None without a launcher."""
    folder = os.environ.get(NOTES_FOLDER)
    return (
        RankNotes(Path(folder), attempt=place.attempt - before, first_rank=place.local_ranks.start)
        if folder
        else None
    )


def _queue(settings: Settings, store: JobStore | None, place: Place) -> JobQueue:
    before = _notes(place, before=1)
    return queue_within(
        settings, store, complete=before.complete if before is not None else lambda ending: ending
    )


def _serve(
    settings: Settings,
    start: StartPlan,
    place: Place,
    state: HostState,
    queue: JobQueue,
    store: JobStore | None,
) -> HostError | None:
    """Open the groups and run the loop; the error if loading failed. Imports torch, after the port
    is bound.
    """
    import_bitsandbytes()
    from backends.parallel import distributed
    from hosts.ranks.autotune import tune
    from hosts.ranks.dispatch import FollowerDispatcher, LeaderDispatcher
    from hosts.ranks.loop import RankLoop

    activity = _activity(place)
    others = _meet_machines(settings, start, place, state) if place.is_one_of_several else None
    device = _meet(settings, place, store, activity, others)
    ranks = {"rank": place.rank, "world_size": place.world_size, "device": device}
    start, pipeline = tune(
        start,
        partial(_plan, settings, place=place),
        folder=_state_folder(settings),
        activity=activity,
        **ranks,
    )
    mesh = distributed.Mesh(start.plan, rank=place.rank, device=device)
    state.tell({**start.facts(), "device": str(device)})
    logger.info("%s on %s", start.plan.describe(), device)
    for reason in start.facts()["reasons"]:
        logger.info("chosen: %s", reason)
    channels = distributed.open_channels() if start.teams.plans else {}
    sharing = Sharing(
        spec=start.spec,
        load=start.load,
        teams=start.teams,
        world_size=place.world_size,
        max_batch=start.max_batch,
    )
    front = LeaderDispatcher(
        load=start.load, queue=queue, state=state, sharing=sharing, channels=channels
    )
    dispatcher = (
        front if place.rank == 0 else FollowerDispatcher(rank=place.rank, line=channels.get(0))
    )
    try:
        told = {"desk": dispatcher, "activity": activity, "team_plans": start.teams.plans}
        failure = RankLoop(
            rank=place.rank, spec=start.spec, mesh=mesh, pipeline=pipeline, **told
        ).run()
    finally:
        mesh.destroy()
        distributed.shutdown()
    return failure.as_error() if failure is not None else None


def _plan(settings: Settings, measured: Measured | None = None, *, place: Place) -> StartPlan:
    """What settings mean on these ranks. measured: for --backend=auto."""
    known = {
        "num_gpus": count_gpus(os.environ),
        "num_ranks": place.local_world_size,
        "recall": lambda key: measured,
    }
    return plan_start(settings, read_table(), **known)


def _activity(place: Place) -> Activity:
    notes = _notes(place)
    return Activity(mark=notes.mark) if notes is not None else Activity()


def _meet_machines(settings: Settings, start: StartPlan, place: Place, state: HostState) -> Any:
    """The store over which the ranks of all machines talk, once they are all there."""
    from backends.parallel.distributed import open_store

    endpoint = parse_endpoint(settings.rdzv_endpoint)
    if (interface := interface_towards(endpoint)) is not None:
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
    machines = Machines(
        endpoint=endpoint,
        rank=place.rank,
        world_size=place.world_size,
        local_world_size=place.local_world_size,
        within_s=settings.node_timeout,
        facts=start.fingerprint(settings),
    )
    ending = ExitReport(
        why=f"machine {settings.node_rank} was started again", rank=place.rank, is_seen_only=True
    )
    if (before := _notes(place, before=1)) is not None:
        ending = before.complete(ending)
    waits = partial(state.become, Phase.WAITING)
    store = machines.meet(
        open_store, ending=ending, tell=waits, still_waiting=parent_watch.still_waiting
    )
    state.become(Phase.LOADING)
    return store


def _meet(
    settings: Settings, place: Place, store: JobStore | None, activity: Activity, others: Any = None
) -> Any:
    """This rank's device, once all ranks have met and watch each other. others: the store of
    several machines.
    """
    from backends.parallel import distributed
    from hosts.supervision.heartbeat import Watch

    device = distributed.select_device(place.local_rank)
    beats = distributed.initialize(rank=place.rank, world_size=place.world_size, store=others)
    Watch(
        beats,
        rank=place.rank,
        world_size=place.world_size,
        timeout_s=settings.failure_timeout,
        activity=activity,
        local_ranks=place.local_ranks,
        on_leave=store.note if store is not None else lambda ending: None,
    ).start()
    return device


def import_bitsandbytes() -> None:
    """Before peft does: it has torch compile a few functions as it is imported, which brings all of
    inductor: 2 s and 50 MB per rank.
    """
    given = os.environ.get(DISABLES_DYNAMO)
    os.environ[DISABLES_DYNAMO] = "1"
    with suppress(ImportError):
        import bitsandbytes  # noqa: F401
    if given is None:
        del os.environ[DISABLES_DYNAMO]
    else:
        os.environ[DISABLES_DYNAMO] = given


def _serve_errands(
    settings: Settings,
    place: Place,
    state: HostState,
    queue: JobQueue,
    store: JobStore | None,
    control: ModelControl,
) -> None:
    """The same for a host that waits for its pipeline: until told to stop."""
    import_bitsandbytes()
    from backends.parallel import distributed
    from hosts.ranks.model_loop import LeaderControl, ModelLoop

    activity = _activity(place)
    device = _meet(settings, place, store, activity)
    front = LeaderControl(control=control, queue=queue, state=state) if place.rank == 0 else None
    try:
        loop = ModelLoop(
            rank=place.rank,
            world_size=place.world_size,
            device=device,
            plan=control.plan,
            front=front,
            activity=activity,
        )
        loop.run()
    finally:
        distributed.shutdown()


def _listen(
    settings: Settings,
    start: StartPlan | None,
    state: HostState,
    queue: JobQueue,
    control: ModelControl | None,
    *,
    patience_s: float,
) -> "object":
    from hosts.dialects.catalogue import application
    from hosts.http.app import Host
    from hosts.http.server import Listener

    spec = start.spec if start is not None else _any_spec(settings)
    host = Host(settings=settings, spec=spec, queue=queue, state=state, control=control)
    listener = Listener(application(host), host=settings.host, port=settings.port)
    listener.bind(patience_s=patience_s)
    listener.serve()
    logger.info("listening on http://%s:%d", settings.host, settings.port)
    return listener


def _any_spec(settings: Settings) -> ModelSpec:
    """For a host that can only say why it cannot serve."""
    table = read_table()
    return table[settings.type] if settings.type in table else next(iter(table.values()))


def _answer_only(state: HostState, queue: JobQueue, problem: HostError) -> None:
    """Nothing is loaded; every request is answered with the reason until the client ends the
    host.
    """
    parent_watch.has_started()
    state.become(Phase.FAILED, str(problem))
    queue.close(UnavailableError(str(problem)))
    logger.error("cannot serve: %s", problem)
    state.wait_for_stop()


def _stop_when_told(
    settings: Settings, place: Place, state: HostState, queue: JobQueue, store: JobStore | None
) -> None:
    """At SIGTERM or SIGINT the running job may still end, within --drain_seconds. Followers wait
    for rank 0, which tells them to stop.
    """
    drain_s = float(settings.drain_seconds)
    if place.rank != 0:
        parent_watch.on_stop_signal(
            lambda: time.sleep(drain_s), drain_s=drain_s, within_s=STOP_WITHIN_S
        )
        return

    def stop() -> None:
        if parent_watch.absent_ranks(
            place.local_ranks
        ):  # the agent tells us because one of us died: it will start the set again
            end_rank(_leave(place, queue, store, None))
        logger.info("stopping")
        state.become(Phase.STOPPING, "the host is stopping")
        queue.close(UnavailableError(STOPPING), finish_running=True)
        queue.wait_until_idle(drain_s)
        queue.interrupt()

    parent_watch.on_stop_signal(stop, drain_s=drain_s + ANSWER_WITHIN_S, within_s=STOP_WITHIN_S)


def _leave(place: Place, queue: JobQueue, store: JobStore | None, error: Exception | None) -> int:
    """This rank cannot go on: say why, answer who waits, and let torchelastic start the set
    again.
    """
    gone = parent_watch.absent_ranks(place.local_ranks)
    if gone:
        ending = ExitReport(
            why=f"rank {', '.join(map(str, gone))} was gone", rank=gone[0], is_seen_only=True
        )
    elif place.is_one_of_several:
        ending = ExitReport(
            why=(
                f"rank {place.rank} lost a rank on another machine, or failed: "
                f"{type(error).__name__}: {str(error)[:500]}"
            )
        )
    else:
        ending = ExitReport(
            why=f"rank {place.rank} failed: {type(error).__name__}: {str(error)[:500]}",
            rank=place.rank,
        )
    why = ending.why
    logger.error("rank %d leaves: %s", place.rank, why, exc_info=error if not gone else None)
    if store is not None:
        store.note(ending)
    queue.abandon(UnavailableError(f"the ranks are started again ({why}). Send the request again."))
    if place.rank == 0:
        time.sleep(ANSWER_WITHIN_S)
    return parent_watch.EXIT_LOST_RANK


def _fatal(error: HostError) -> int:
    """Say why, and leave the reason where the launcher finds it. Exit code 0 keeps torchelastic
    from trying the same again.
    """
    logger.error("%s", error)
    if path := os.environ.get(FATAL_FILE):
        Path(path).write_text(str(error), encoding="utf-8")
        return 0
    print(f"error: {error}", file=sys.stderr)  # noqa: T201  without a launcher this is the user's only line
    return 2
