"""Kills an own Ray cluster's processes when the gateway is gone, whatever ended it: after SIGKILL Ray's helpers live on for minutes.

A script: stdin brings a line for each process, its id and when it was started, and ends with the gateway. What Ray starts for a replica
is not among them: it ends with its parent by itself.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterable

import psutil


def start(processes: Iterable[psutil.Process]) -> "subprocess.Popen[str]":
    """Begin to wait for the end of this process."""
    reaper = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True, start_new_session=True)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            reaper.stdin.write(f"{process.pid} {process.create_time()!r}\n")
    reaper.stdin.flush()
    return reaper


def kill(process_id: int, started_s: float) -> None:
    """Unless the id is another process's by now."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(process_id)
        if process.create_time() == started_s:
            process.kill()


def main() -> None:
    lines = [line.split() for line in sys.stdin]  # until it is closed
    for process_id, started_s in lines:
        kill(int(process_id), float(started_s))


if __name__ == "__main__":
    main()
