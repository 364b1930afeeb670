"""One replica: a launcher with its ranks, started by a Ray actor on the node that Ray chose.

Runs in the actor's process. The launcher ends with that process (--exit_with_parent), which ends
with its node or with the gateway, however they end.
"""

import contextlib
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hosts.supervision.temp_folder import scratch_folder

LAUNCHER = Path(__file__).resolve().parents[2] / "launcher.py"
KEPT_LINES = 20
ERROR = "error: "
"""Start of the line in which the launcher says why it ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """What to start."""

    values: Mapping[str, Any]  # launch arguments
    address: str | None  # to listen on; None: the node's own
    key: str  # API key
    folder: str  # to start in, if the node has it


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaAddress:
    """Where the replica runs."""

    url: str
    node: str
    pid: int  # of the launcher


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaExit:
    """How the launcher ended."""

    code: int
    reason: str  # its last error line, if any

    @property
    def is_final(self) -> bool:
        """Whether a restart would end in the same way, as for wrong arguments or a bad checkpoint.

        A chosen port that is no longer free is not final.
        """
        return (
            self.code in (1, 2) and self.reason.startswith(ERROR) and "--port=" not in self.reason
        )


class ReplicaHost:
    """The actor. Call `start` once. `wait` blocks until the launcher has ended; `stop` ends it."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self._spec = spec
        self._open = contextlib.ExitStack()
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> ReplicaAddress:
        """Start the launcher. The host then loads its model."""
        import ray.util

        node = ray.util.get_node_ip_address()
        address = self._spec.address or node
        folder = self._open.enter_context(scratch_folder())
        (folder / "key").write_text(self._spec.key, encoding="utf-8")
        (folder / "config.yaml").write_text(
            yaml.safe_dump(dict(self._spec.values)), encoding="utf-8"
        )
        port = _free_port(address)
        self._process = subprocess.Popen(
            [
                sys.executable, "-u", str(LAUNCHER), f"--config={folder / 'config.yaml'}",
                f"--host={address}", f"--port={port}",
                f"--api_key=@{folder / 'key'}", "--exit_with_parent",
            ],
            cwd=self._spec.folder if Path(self._spec.folder).is_dir() else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )  # fmt: skip
        self._reader = threading.Thread(
            target=self._pass_on, args=(self._process,), name="log", daemon=True
        )
        self._reader.start()
        return ReplicaAddress(url=f"http://{address}:{port}", node=node, pid=self._process.pid)

    def wait(self) -> ReplicaExit:
        """Block until the launcher has ended."""
        code = self._process.wait()
        self._reader.join(timeout=1)
        self._open.close()
        said = next(
            (line for line in reversed(self._lines) if line.startswith(ERROR)),
            f"its launcher ended with code {code}",
        )
        return ReplicaExit(code=code, reason=said)

    def stop(self, within_s: float) -> None:
        """Ask the launcher to stop, and kill it if it is not gone in time."""
        self._process.terminate()
        try:
            self._process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _pass_on(self, process: subprocess.Popen[str]) -> None:
        """Forward the launcher's log to the actor's, which Ray forwards to the gateway."""
        for line in process.stdout:
            self._lines.append(line.rstrip())
            sys.stderr.write(line)


def _free_port(address: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
