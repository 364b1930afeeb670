"""Kills an own Ray cluster's processes when the gateway is gone, whatever ended it: after SIGKILL
Ray's helpers live on for minutes.

A script that the gateway starts before the cluster. It notes what the gateway has started, until a
line on stdin says that the cluster is complete, and waits for stdin to end with the gateway. What
comes later belongs to a replica, and ends with its parent by itself.
"""

import contextlib
import os
import select
import subprocess
import sys

import psutil

LOOK_EVERY_S = 0.5


def start() -> "subprocess.Popen[bytes]":
    """Begin to note the processes below this one."""
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, start_new_session=True
    )


def cluster_is_complete(reaper: "subprocess.Popen[bytes]") -> None:
    """Nothing more is to be noted."""
    reaper.stdin.write(b"\n")
    reaper.stdin.flush()


def main() -> None:
    """psutil kills no process that has only the number of one that was noted."""
    gateway, noted = psutil.Process(os.getppid()), set()
    is_complete = False
    while not is_complete:
        is_complete = bool(select.select([sys.stdin], [], [], LOOK_EVERY_S)[0])
        with contextlib.suppress(psutil.NoSuchProcess):
            noted |= set(gateway.children(recursive=True))
    sys.stdin.read()
    for process in noted - {psutil.Process()}:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main()
