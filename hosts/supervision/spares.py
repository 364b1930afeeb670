"""Spare ranks: one process for each rank of this machine that has imported what ranks import and
waits. When the ranks are lost the spares take their places: importing is most of a restart.

The agent starts them once the ranks are ready, and hands over a rank's environment through a pipe.
A spare uses no device and opens no port. Imports no torch itself.
"""

import contextlib
import ctypes
import importlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from hosts.launch.gpus import lowest_capability
from hosts.supervision.exit_reports import RankNotes
from hosts.supervision.parent_watch import request_parent_death_signal

SPARE = "DIFFUSION_SPARE_RANK"
"""Environment variable of a process that waits to become a rank."""
HIDDEN = ("RANK", "LOCAL_RANK")
"""Environment variables by which ranks are found. A spare has them in lower case."""
TOUCH_DEVICES = ("bitsandbytes", "flash_attn", "triton", "xformers")
"""Packages that may use a device when they are imported."""


class Spares:
    """The agent's half."""

    def __init__(self, command: Sequence[str]) -> None:
        """command: of a rank."""
        self._command = command
        self._waiting: dict[int, subprocess.Popen[bytes]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def start(self, environments: Mapping[int, Mapping[str, str]]) -> None:
        """Start a spare for each local rank that has none. environments: of these ranks."""
        for local_rank, environment in environments.items():
            if local_rank not in self._waiting:
                hidden = {
                    name.lower() if name in HIDDEN else name: value
                    for name, value in environment.items()
                }
                self._waiting[local_rank] = start_rank(
                    self._command, {**hidden, SPARE: "1"}, stdin=subprocess.PIPE
                )

    def take(
        self, local_rank: int, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes] | None:
        """Let a spare become this rank and return it; None if there is none that lives."""
        spare = self._waiting.pop(local_rank, None)
        if spare is None or spare.poll() is not None:
            return None
        try:
            with spare.stdin as pipe:
                pipe.write(json.dumps(dict(environment)).encode() + b"\n")
        except OSError:  # it has just ended
            spare.kill()
            spare.wait()
            return None
        return spare

    def stop(self) -> None:
        for spare in self._waiting.values():
            spare.kill()
        for spare in self._waiting.values():
            spare.wait()
        self._waiting.clear()


def start_rank(
    command: Sequence[str], environment: Mapping[str, str], *, stdin: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a rank in a session of its own, so that Ctrl-C does not reach it."""
    return subprocess.Popen(command, env=environment, stdin=stdin, start_new_session=True)


def wait_for_turn(environ: MutableMapping[str, str], notes: Path) -> None:
    """Be a spare: import the modules of these notes, then wait until the agent hands over the
    environment of a rank. Ends the process if the agent ends.

    The hand-over does not wait for the imports: what is left is imported when it is needed.
    """
    request_parent_death_signal()
    capability = lowest_capability()
    plain = None
    for name in RankNotes(notes, attempt=0).modules():
        if select.select([sys.stdin], [], [], 0)[0]:
            break
        if name.partition(".")[0] not in TOUCH_DEVICES:
            with contextlib.suppress(Exception):  # the rank will meet it where it matters
                importlib.import_module(name)
        if plain is None and capability is not None and "torch.cuda" in sys.modules:
            # its own way makes a context of hundreds of MB on each GPU, and bitsandbytes, which
            # peft imports, asks on import
            plain = sys.modules["torch.cuda"].get_device_capability
            sys.modules["torch.cuda"].get_device_capability = lambda device=None: capability
    line = sys.stdin.buffer.readline()
    if plain is not None:
        sys.modules["torch.cuda"].get_device_capability = plain
    if not line:
        os._exit(0)
    environ.update(json.loads(line))
    del environ[SPARE]
    _show_hidden()
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())


def _show_hidden() -> None:
    """Write the names of HIDDEN in upper case where the kernel shows this process's environment:
    there ranks look for each other (parent_watch.absent_ranks).
    """
    entries = ctypes.POINTER(ctypes.c_void_p).in_dll(ctypes.CDLL(None), "environ")
    index = 0
    while (address := entries[index]) is not None:
        index += 1
        name = ctypes.string_at(address).partition(b"=")[0]
        for wanted in HIDDEN:
            if name == wanted.lower().encode():
                ctypes.memmove(address, wanted.encode(), len(wanted))
