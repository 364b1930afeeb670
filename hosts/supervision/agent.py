"""Supervises the ranks of this machine: torchelastic's agent, which also notes how ranks ended and
knows when to give up.

launcher.py runs it as its one child: launcher.py agent OPTIONS ARGUMENTS. torchelastic counts
restarts over its whole life. A host that runs for weeks needs more of them, so the count begins
anew once the ranks have proved that they work.
"""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import HashStore
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.multiprocessing import ProcessFailure
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from hosts.supervision.agent_process import AgentOptions, report_fatal
from hosts.supervision.exit_reports import UNKNOWN, RankNotes
from hosts.supervision.spares import Spares, start_rank

PROVED_AFTER_S = 600.0
"""Being ready for this long proves that the ranks work, like a finished image does."""
ANY_NUMBER = 10**9
LOOK_EVERY_S = 0.1
STOP_WITHIN_S = 3.0
"""Time for the ranks that are left when one is lost: they leave by themselves in less."""
SPARES_AFTER_S = 1.0
"""From being ready to the start of spare ranks, which import for some seconds."""


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


class RankAgent(SimpleElasticAgent):
    """Starts and stops the ranks as processes: what torchelastic leaves to its implementers."""

    def __init__(self, spec: WorkerSpec, options: AgentOptions, environ: Mapping[str, str]) -> None:
        super().__init__(spec)
        self._options = options
        self._environ = environ
        self._command = (sys.executable, *spec.args)
        self._ranks: dict[int, subprocess.Popen[bytes]] = {}
        self._spares = Spares(self._command)
        self._num_in_row = 0
        self._attempt = 0

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        for local_rank in range(self._options.num_ranks):
            environment = self._environment(local_rank)
            self._ranks[local_rank] = self._spares.take(local_rank, environment) or start_rank(
                self._command, environment
            )
        return {local_rank: process.pid for local_rank, process in self._ranks.items()}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = {rank: process.poll() for rank, process in self._ranks.items()}
        if any(codes.values()):
            self._stop_workers(worker_group)
            self._ended(self._notes(), {rank: code for rank, code in codes.items() if code})
            self._attempt += 1
            failures = {
                rank: ProcessFailure(
                    local_rank=rank, pid=self._ranks[rank].pid, exitcode=code, error_file=""
                )
                for rank, code in codes.items()
                if code
            }
            return RunResult(state=WorkerState.FAILED, failures=failures)
        if None not in codes.values():
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(codes))
        if self._options.has_spares and not len(self._spares) and self._are_ready():
            self._spares.start({rank: self._environment(rank) for rank in self._ranks})
        return RunResult(state=WorkerState.HEALTHY)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._stop(signal.SIGTERM, STOP_WITHIN_S)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._spares.stop()
        self._stop(death_sig, timeout)

    def _stop(self, number: signal.Signals, within_s: float) -> None:
        """Signal the ranks that are left, and kill those that are still there after a while."""
        left = [process for process in self._ranks.values() if process.poll() is None]
        for process in left:
            process.send_signal(number)
        deadline = time.monotonic() + within_s
        for process in left:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it
                    process.wait(STOP_WITHIN_S)

    def _environment(self, local_rank: int) -> dict[str, str]:
        """Return ours, and what torchelastic tells a worker, as far as ranks ask for it."""
        rank, size = str(local_rank), str(self._options.num_ranks)
        return {
            **self._environ,
            **dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), rank),
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), size),
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "TORCHELASTIC_RUN_ID": self._worker_group.spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_RESTART_COUNT": str(self._attempt),
        }

    def _are_ready(self) -> bool:
        ready_s = self._notes().marked_s("ready")
        return ready_s is not None and time.monotonic() - ready_s > SPARES_AFTER_S

    def _notes(self) -> RankNotes:
        return RankNotes(
            Path(self._options.notes), attempt=self._attempt, first_rank=self._options.first_rank
        )

    def _ended(self, notes: RankNotes, exits: Mapping[int, int]) -> None:
        """Note exit codes by local rank. GaveUp if this has happened too often."""
        notes.put_exits(exits)
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
        ready_s is not None and time.monotonic() - ready_s > PROVED_AFTER_S
    )


def main(arguments: Sequence[str], *, program: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the ranks, each a process of `program`. Return the exit code: 1 if they could not be kept
    running.

    arguments: AgentOptions as text, then the arguments of every rank. environ: of all ranks.
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
        result: Any = RankAgent(spec, options, environ).run()
    except GaveUp as reason:
        report_fatal(Path(options.fatal), str(reason))
        return 1
    return int(result.is_failed())
