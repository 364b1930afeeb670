"""The launcher's one child: starts the agent (hosts/supervision/agent.py), waits for it and stops
its ranks. Imports no torch.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from hosts.launch.settings import Settings
from hosts.supervision.exit_reports import SECRET_FILE
from hosts.supervision.parent_watch import request_parent_death_signal
from hosts.supervision.temp_folder import scratch_folder

FATAL_FILE = "DIFFUSION_FATAL_FILE"
"""Environment variable: the file in which a rank leaves a reason that a restart cannot cure."""
STATE_FOLDER = "DIFFUSION_STATE_FOLDER"
"""Environment variable: where jobs outlive the ranks without --state_dir. Removed with the
launcher.
"""
NOTES_FOLDER = "DIFFUSION_NOTES_FOLDER"
"""Environment variable: where ranks leave notes for their successors
(hosts/supervision/exit_reports.py). Removed with the launcher.
"""
STOP_WITHIN_S = 10.0
"""Time for the ranks to stop, on top of --drain_seconds."""
POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOptions:
    """What the launcher tells the agent, as the first argument of its command line."""

    num_ranks: int
    max_restarts: int
    """Consecutive restarts before giving up."""
    notes: str
    """Folder for hosts/supervision/exit_reports.py."""
    fatal: str
    """File for the reason for giving up."""
    has_spares: bool = True
    """Whether processes wait to take the places of lost ranks."""
    first_rank: int = 0
    """The first rank of this machine."""

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "AgentOptions":
        return cls(**json.loads(text))


def run_agent(
    settings: Settings,
    argv: Sequence[str],
    *,
    num_ranks: int,
    script: Path,
    environment: Mapping[str, str],
) -> tuple[int, str]:
    """Run the agent until it ends or a signal stops it. Return the exit code, and the reason if the
    host could not serve.

    script: starts the agent with `agent OPTIONS ARGV`, and a rank with ARGV alone.
    """
    parent = os.getppid()
    with scratch_folder() as folder:
        options = _agent_options(settings, folder, num_ranks=num_ranks)
        Path(options.notes).mkdir(mode=0o700, exist_ok=True)
        (Path(options.notes) / SECRET_FILE).write_bytes(secrets.token_bytes(32))
        # a session of its own, so that Ctrl-C reaches it once and through us; it dies with us,
        # whatever kills us
        agent = subprocess.Popen(
            [sys.executable, str(script), "agent", options.to_text(), *argv],
            env=_environment(environment, folder, options),
            start_new_session=True,
            preexec_fn=request_parent_death_signal,
        )
        fatal_file = Path(options.fatal)
        code = _wait(
            agent,
            fatal_file,
            parent=parent if settings.exit_with_parent else None,
            within_s=settings.drain_seconds + STOP_WITHIN_S,
        )
        if fatal_file.is_file():
            return 1, fatal_file.read_text(encoding="utf-8")
    if code < 0:
        name = signal.Signals(-code).name
        return 1, f"the process that supervises the ranks was killed by {name}. Start again."
    return code, ""


def report_fatal(fatal_file: Path, reason: str) -> None:
    """Tell the launcher why no rank can go on. The file appears with its whole text: the launcher
    polls for it, and then ends the ranks that wait for this one.
    """
    unfinished = fatal_file.with_suffix(".new")
    unfinished.write_text(reason, encoding="utf-8")
    unfinished.rename(fatal_file)


def _wait(
    agent: subprocess.Popen[bytes], fatal_file: Path, *, parent: int | None, within_s: float
) -> int:
    """Return the agent's exit code, or 0 once it was stopped: by a signal, by the end of `parent`,
    or because a rank wrote into `fatal_file` why no rank can go on.

    The ranks get `within_s` to stop; a second signal ends them at once.
    """
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped.append(number))
    while not stopped and parent in (None, os.getppid()) and not fatal_file.is_file():
        with contextlib.suppress(subprocess.TimeoutExpired):
            return agent.wait(timeout=POLL_S)
    _stop_ranks(agent.pid, stopped, within_s=within_s)
    # the agent has nothing left to do; what is left of its ranks follows it. Its own way out is
    # slow and ends in a traceback
    agent.kill()
    agent.wait()
    return 0


def _stop_ranks(agent: int, stopped: Sequence[int], *, within_s: float) -> None:
    """SIGTERM to all ranks, then wait until they are gone, time is up or a second signal came."""
    ranks = psutil.Process(agent).children()
    for process in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + within_s
    while psutil.wait_procs(ranks, timeout=POLL_S / 2)[1]:
        if time.monotonic() >= deadline or len(stopped) > 1:
            return


def _agent_options(settings: Settings, folder: Path, *, num_ranks: int) -> AgentOptions:
    return AgentOptions(
        num_ranks=num_ranks,
        max_restarts=settings.max_restarts,
        notes=str(folder / "notes"),
        fatal=str(folder / "fatal"),
        has_spares=settings.spare_ranks,
        first_rank=settings.node_rank * num_ranks,
    )


def _environment(
    environment: Mapping[str, str], folder: Path, options: AgentOptions
) -> dict[str, str]:
    """The environment of the agent and its ranks. What the user has set stays."""
    threads = max(1, (os.cpu_count() or 1) // options.num_ranks)
    return {
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **environment,
        FATAL_FILE: options.fatal,
        NOTES_FOLDER: options.notes,
        STATE_FOLDER: str(folder / "state"),
    }
