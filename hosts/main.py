"""Entry of one rank's process: arguments and environment in, exit code out."""

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from backends.autotune.ranking import Measured
from backends.errors import ConfigError, HostError, UnavailableError
from backends.model_table import ModelSpec, read_table
from backends.request import why_loras_are_fixed
from hosts.jobs.queue import queue_within
from hosts.jobs.store import JobStore, NoStore
from hosts.launch.catalog import Catalog, plan_models
from hosts.launch.gpus import gpu_facts, require_queues
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan, plan_start, within_reach
from hosts.ranks.libraries import set_library_defaults
from hosts.ranks.model_control import ModelControl
from hosts.ranks.rank_process import STOPPING, RankProcess
from hosts.supervision import log, parent_watch, spares
from hosts.supervision.agent_process import FATAL_FILE, NOTES_FOLDER, STATE_FOLDER, report_fatal
from hosts.supervision.host_state import HostState
from hosts.supervision.rendezvous import Place

if TYPE_CHECKING:
    from hosts.http.app import ClientProtocol
    from hosts.http.server import Listener

logger = logging.getLogger(__name__)


def is_rank() -> bool:
    """Whether this process was started as a rank, by torchrun or our launcher."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def wait_for_turn() -> None:
    """In a spare rank: return when it is a rank. No effect in other processes."""
    if spares.SPARE in os.environ:
        set_library_defaults(os.environ)
        spares.wait_for_turn(os.environ, Path(os.environ[NOTES_FOLDER]))


def run_rank(
    settings: Settings,
    *,
    protocol: "Callable[[ModelControl], ClientProtocol]",
    after_failed_load: Literal["exit", "answer"],
    bind_patience_s: float = 0.0,
    problem: HostError | None = None,
    starts_empty: bool = False,
) -> int:
    """Serve until told to stop. Return the exit code.

    protocol: what the existing clients may ask of this host. after_failed_load: 'exit' leaves the
    reason to the launcher; 'answer' keeps rank 0 serving it, because the old clients notice nothing
    else. problem: one that the arguments already had. starts_empty: the pipeline comes over HTTP
    instead of from the settings.
    """
    settings = settings.in_environment(os.environ)
    place, models, listener = _set_up(settings), {}, None
    settings, problem = within_reach(settings, problem)
    try:
        if problem is None and not starts_empty:
            models = plan_models(settings, partial(_plan, place=place))
    except HostError as error:
        problem = error
    if problem is not None and after_failed_load == "exit":
        return _fatal(problem)
    try:
        process = _open(settings, place)
        process.stop_when_told()
        control = process.control(models)
        if place.rank == 0:
            listener = _listen(process, models, protocol(control), patience_s=bind_patience_s)
    except ConfigError as error:
        return _fatal(error)
    if problem is None:
        try:
            problem = process.run(control, models.get(""))
        except ConfigError as error:  # a restart would not help
            problem = error
        except Exception as error:  # noqa: BLE001  a lost rank looks like any error: all restart
            return process.leave(error)
        process.queue.abandon(UnavailableError(STOPPING))
    if problem is not None and after_failed_load == "exit":
        return _fatal(problem)
    if problem is not None and place.rank == 0:
        process.answer_only(problem)
    if listener is not None:
        listener.stop()
    return 0


def _set_up(settings: Settings) -> Place:
    """Tie this process to its parent, and set up its log and its libraries."""
    parent_watch.die_with_parent(is_torchelastic="TORCHELASTIC_RUN_ID" in os.environ)
    place = Place.of(settings, os.environ)
    notes = place.notes(os.environ.get(NOTES_FOLDER))
    log.configure(
        rank=place.rank, log_format=settings.log_format, kept_in=notes.log_file(place.rank)
    )
    notes.record_crash(place.rank)
    set_library_defaults(os.environ)
    return place


def _open(settings: Settings, place: Place) -> RankProcess:
    """ConfigError if the folder of jobs cannot be used."""
    store = _open_store(settings) if place.rank == 0 else None
    notes = partial(place.notes, os.environ.get(NOTES_FOLDER))
    notes_before = notes(attempts_ago=1)
    return RankProcess(
        settings=settings,
        place=place,
        environ=os.environ,
        plan=partial(_plan, place=place),
        state=HostState(facts={"restarts": place.attempt}),
        queue=queue_within(settings, store, complete=notes_before.complete),
        store=store,
        state_folder=_state_folder(settings),
        notes=notes(),
        notes_before=notes_before,
    )


def _listen(
    process: RankProcess, models: Catalog, protocol: "ClientProtocol", *, patience_s: float
) -> "Listener":
    """Serve HTTP in threads. ConfigError if the port stays in use for `patience_s`."""
    from hosts.http.app import Host, listen

    settings = process.settings
    shared = {"queue": process.queue, "state": process.state, "protocol": protocol}
    hosts = []
    for name, each in models.items():
        facts = {"fixed_loras": why_loras_are_fixed(each.start.load, each.start.plan)}
        facts |= {"settings": each.settings, "spec": each.start.spec, "name": name}
        hosts.append(Host(**facts, **shared))
    hosts = hosts or [Host(settings=settings, spec=_any_spec(settings), **shared)]
    num_jobs = 2 * settings.queue_size + process.place.world_size * settings.max_batch
    app = protocol.application(hosts, process.store or NoStore())
    listener = listen(app, settings, num_jobs=num_jobs)
    listener.bind(patience_s=patience_s)
    listener.serve()
    return listener


def _plan(settings: Settings, measured: Measured | None = None, *, place: Place) -> StartPlan:
    """What settings mean on these ranks. measured: for --backend=auto."""
    start = plan_start(
        settings,
        read_table(),
        num_ranks=place.local_world_size,
        recall=lambda key: measured,
        **gpu_facts(os.environ),
    )
    require_queues(start.plan, os.environ)
    return start


def _any_spec(settings: Settings) -> ModelSpec:
    """The model type of a host that has none yet, or can only say why it cannot serve."""
    table = read_table()
    return table[settings.type] if settings.type in table else next(iter(table.values()))


def _state_folder(settings: Settings) -> Path | None:
    folder = settings.state_dir or os.environ.get(STATE_FOLDER)
    return Path(folder).expanduser().resolve() if folder else None


def require_store(settings: Settings) -> None:
    """For the launcher: ConfigError if rank 0 could not open its job store."""
    if (store := _open_store(settings)) is not None:
        store.close()


def _open_store(settings: Settings) -> JobStore | None:
    """None where jobs are kept in memory only."""
    folder = _state_folder(settings)
    return JobStore(folder) if folder is not None and not settings.no_job_store else None


def _fatal(error: HostError) -> int:
    """Tell the launcher the reason, or the user where there is none. Exit code 0 keeps torchelastic
    from trying the same again.
    """
    logger.error("%s", error)
    if path := os.environ.get(FATAL_FILE):
        report_fatal(Path(path), str(error))
        return 0
    print(f"error: {error}", file=sys.stderr)  # noqa: T201  the user's only line
    return 2
