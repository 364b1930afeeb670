"""Kills our own Ray cluster's processes when the gateway is gone, even after SIGKILL.

Otherwise Ray's helpers survive for minutes. The gateway starts this script before the cluster. The
script records the gateway's child processes until a line on stdin says that the cluster is
complete, then waits until stdin closes. Later processes belong to replicas and end with their
parents.
"""

import contextlib
import os
import select
import subprocess
import sys

import psutil

LOOK_EVERY_S = 0.5


def start() -> "subprocess.Popen[bytes]":
    """Start recording the child processes of this one."""
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, start_new_session=True
    )


def cluster_is_complete(reaper: "subprocess.Popen[bytes]") -> None:
    """Stop recording."""
    reaper.stdin.write(b"\n")
    reaper.stdin.flush()


def main() -> None:
    """Record processes and kill them at the end.

    psutil never kills a process that merely reuses a recorded id.
    """
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
