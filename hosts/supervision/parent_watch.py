"""Ends this process with its parent, however that died: no rank may outlive its launcher and hold
the port and the GPU.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import psutil

logger = logging.getLogger(__name__)

_started = threading.Event()
_sign_s = time.monotonic()
PR_SET_PDEATHSIG = 1
POLL_S = 0.5
START_WITHIN_S = 300.0
"""From the start of a rank until all are connected. Imports take a minute on a busy machine."""
EXIT_LOST_RANK = 70
"""Exit code of a rank that lost a peer. torchelastic then starts the whole set again."""


def die_with_parent(*, is_torchelastic: bool) -> None:
    """Ask the kernel for SIGKILL at the parent's death, and watch the parent's pid as well (the
    signal is Linux only).

    is_torchelastic: the parent must be torchelastic's agent. If it is not, the agent died before
    this call, and this process exits.
    """
    request_parent_death_signal()
    parent = os.getppid()
    if is_torchelastic and not _is_agent(parent):
        os._exit(1)
    threading.Thread(target=_watch, args=(parent,), name="lifeline", daemon=True).start()
    if is_torchelastic:
        threading.Thread(target=_limit_start, name="start", daemon=True).start()


def has_started() -> None:
    """End the time limit of the start: the ranks are connected and watch each other, or this one
    only answers HTTP.
    """
    _started.set()


def still_waiting() -> None:
    """Restart the time limit of the start, because this rank waits for other machines."""
    global _sign_s
    _sign_s = time.monotonic()


def request_parent_death_signal() -> None:
    """Ask the kernel for SIGKILL when the parent dies. Safe between fork and exec."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    except (AttributeError, OSError):
        return  # not Linux: the watch remains


def end_process(code: int) -> NoReturn:
    """Exit at once. The libraries' own teardown takes a second, and other ranks and clients may
    wait for this process to be gone.
    """
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def on_stop_signal(stop: Callable[[], None], *, drain_s: float, within_s: float) -> None:
    """Call `stop`, which may take `drain_s`, at the first SIGTERM or SIGINT, and end the process
    `within_s` later. The main thread must call this.

    A Python handler would wait for the main thread, which may be in a collective; the wake-up
    descriptor is written at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        os.read(reader, 1)
        stopping = threading.Thread(target=stop, name="stop", daemon=True)
        stopping.start()
        stopping.join(timeout=drain_s)
        time.sleep(within_s)
        os._exit(0)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def absent_ranks(local_ranks: range) -> list[int]:
    """Return the ranks of this machine whose process is gone; none if that is unknown."""
    try:
        siblings = psutil.Process(os.getppid()).children()
    except psutil.Error:
        return []
    present = {rank for process in siblings if (rank := _local_rank_of(process)) is not None}
    return (
        [local_ranks[rank] for rank in range(len(local_ranks)) if rank not in present]
        if present
        else []
    )


def kill_rank(local_rank: int) -> None:
    """Send SIGKILL to another rank of this machine. torchelastic would send a hanging rank SIGTERM
    and wait half a minute.
    """
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(os.getppid()).children():
            if process.pid != os.getpid() and _local_rank_of(process) == local_rank:
                process.kill()


def _local_rank_of(process: psutil.Process) -> int | None:
    """None for a process that is not a rank, or is a zombie."""
    try:
        return int(process.environ()["LOCAL_RANK"])
    except (psutil.Error, KeyError, ValueError):
        return None


def _is_agent(pid: int) -> bool:
    """Whether a process may be our agent: torchrun, or any command with our script. True if its
    command line cannot be read.
    """
    try:
        return any(
            "torch" in argument or argument == sys.argv[0]
            for argument in psutil.Process(pid).cmdline()
        )
    except psutil.AccessDenied:
        return True
    except psutil.NoSuchProcess:
        return False


def _limit_start() -> None:
    """End all ranks of this machine if they do not connect in time: torchelastic would wait half an
    hour for a hanging one.
    """
    while time.monotonic() - _sign_s < START_WITHIN_S:
        if _started.wait(1.0):
            return
    logger.error(
        "the ranks did not connect within %g s: one of them hangs, so all restart",
        START_WITHIN_S,
    )
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(os.getppid()).children():
            if process.pid != os.getpid() and _local_rank_of(process) is not None:
                process.kill()
    os._exit(EXIT_LOST_RANK)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)
