"""Supervises the ranks of this machine: torchelastic's agent, which also notes how ranks ended and
knows when to give up.

launcher.py runs it as its one child: launcher.py agent OPTIONS ARGUMENTS. torchelastic counts
restarts over its whole life. A host that runs for weeks needs more of them, so the count begins
anew once the ranks have proved that they work.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed import HashStore
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from hosts.supervision.agent_process import AgentOptions, report_fatal
from hosts.supervision.exit_reports import UNKNOWN, RankNotes

PROVED_AFTER_S = 600.0
"""Being ready for this long proves that the ranks work, like a finished image does."""
ANY_NUMBER = 10**9
LOOK_EVERY_S = 0.1


class OneMachine(RendezvousHandler):
    """Torchelastic's rendezvous for the one machine that takes part.

    It meets nobody, so its store stays in this process. Torchelastic's own handlers open a port on
    all addresses and unpickle what anybody writes there.
    """

    def __init__(self) -> None:
        self._store = HashStore()

    def get_backend(self) -> str:
        return "none"

    def get_run_id(self) -> str:
        return "ranks"

    def next_rendezvous(self) -> RendezvousInfo:
        # the ranks connect by themselves (hosts/ranks/rank_process.py)
        nowhere = RendezvousStoreInfo(master_addr="127.0.0.1", master_port=0)
        return RendezvousInfo(self._store, 0, 1, nowhere)

    def num_nodes_waiting(self) -> int:
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None: ...

    def shutdown(self) -> bool:
        return True


class GaveUp(Exception):
    """The ranks have failed too many times in a row."""


class RankAgent(LocalElasticAgent):
    """Overrides one of the methods that torchelastic gives to its implementers."""

    def __init__(self, spec: WorkerSpec, options: AgentOptions) -> None:
        # in a folder that the launcher removes, else torchelastic leaves one at each start
        logs = Path(options.notes) / "torchelastic"
        super().__init__(spec, DefaultLogsSpecs(log_dir=str(logs)))
        self._options = options
        self._num_in_row = 0
        self._attempt = 0

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._ended(self._notes(), result)
            self._attempt += 1
        return result

    def _notes(self) -> RankNotes:
        return RankNotes(
            Path(self._options.notes), attempt=self._attempt, first_rank=self._options.first_rank
        )

    def _ended(self, notes: RankNotes, result: RunResult) -> None:
        notes.put_exits({rank: failure.exitcode for rank, failure in result.failures.items()})
        notes.forget_older()
        self._num_in_row = 1 if _has_proved_itself(notes) else self._num_in_row + 1
        if self._num_in_row > self._options.max_restarts:
            ending = notes.complete(UNKNOWN)
            times = f"{self._num_in_row} time{'s' if self._num_in_row > 1 else ''}"
            limit = self._options.max_restarts
            raise GaveUp(
                f"the ranks failed {times} without a finished image in between "
                f"(--max_restarts={limit}). The last time: {ending.why}. "
                f"{ending.last_lines('')}".strip()
            )


def _has_proved_itself(notes: RankNotes) -> bool:
    ready_s = notes.marked_s("ready")
    return notes.marked_s("served") is not None or (
        ready_s is not None and time.time() - ready_s > PROVED_AFTER_S
    )


def main(arguments: Sequence[str], *, program: Sequence[str]) -> int:
    """Run the ranks, each a process of `program`. Return the exit code: 1 if they could not be kept
    running.

    arguments: AgentOptions as text, then the arguments of every rank.
    """
    options = AgentOptions.from_text(arguments[0])
    spec = WorkerSpec(
        role="ranks",
        local_world_size=options.num_ranks,
        entrypoint=sys.executable,
        args=(*program, *arguments[1:]),
        rdzv_handler=OneMachine(),
        max_restarts=ANY_NUMBER,
        monitor_interval=LOOK_EVERY_S,
        local_addr="127.0.0.1",
    )
    try:
        result: Any = RankAgent(spec, options).run()
    except GaveUp as reason:
        report_fatal(Path(options.fatal), str(reason))
        return 1
    return int(result.is_failed())
