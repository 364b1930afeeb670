"""A host on this machine that runs in processes of its own, for as long as a program needs it.

with LocalHost("--type=sdxl", "--nproc_per_node=2") as host:
    host.wait_until_ready()
    image = host.client.generate(prompt="a red circle on a blue background")
"""

import atexit
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from diffusion_client import Client, HostError

POLL_S = 0.2
STOP_WITHIN_S = 15.0
PORT_WITHIN_S = 5.0
LOG_TAIL = 2000
"""Characters of the host's log that an error shows."""


class LocalHost:
    """A host that starts at once and ends with `stop`, or with this process however it ends.

    arguments: those of launcher.py; a free port is chosen unless they name one. command: replaces
    the launcher beside this file, or `diffusion-launcher`.
    """

    def __init__(self, *arguments: str, command: Sequence[str] | None = None) -> None:
        ports = [
            argument.partition("=")[2] for argument in arguments if argument.startswith("--port=")
        ]
        port = int(ports[-1]) if ports else _free_port()
        _wait_until_free(port)
        self.arguments = arguments
        self.client = Client(f"http://127.0.0.1:{port}", during_outage=self.require_running)
        self._log = tempfile.NamedTemporaryFile(prefix="diffusion-host-", suffix=".log")  # noqa: SIM115  closed by stop
        given = [*arguments, *([] if ports else [f"--port={port}"]), "--exit_with_parent"]
        self._process = subprocess.Popen(
            [*(command or _launcher()), *given], stdout=self._log, stderr=subprocess.STDOUT
        )
        atexit.register(self.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def log(self) -> str:
        """The last lines of the host's log."""
        text = (
            Path(self._log.name).read_text(encoding="utf-8", errors="replace")
            if not self._log.closed
            else ""
        )
        return text[-LOG_TAIL:]

    def wait_until_ready(self, look: Callable[[], None] = lambda: None) -> None:
        """Block while the host loads. HostError with its message if it ended or cannot serve.

        `look` is called meanwhile, and may raise.
        """
        while True:
            look()
            self.require_running()
            try:
                health = self.client.health()
            except HostError as error:
                if error.status != 0:
                    raise
                health = {"phase": "loading"}  # not listening yet
            if health["phase"] == "ready":
                return
            if health["phase"] != "loading":
                raise HostError(f"the host cannot serve: {health['reason']}", status=503)
            time.sleep(POLL_S)

    def require_running(self) -> None:
        """HostError with what it said, if it ended."""
        if not self.is_running:
            raise HostError(
                f"the host ended with code {self._process.returncode}: {_last_line(self.log)}",
                status=0,
            )

    def stop(self) -> None:
        """Stop the host and wait until all its processes are gone."""
        atexit.unregister(self.stop)
        if self.is_running:
            self._process.terminate()
            try:
                self._process.wait(timeout=STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()


def _launcher() -> list[str]:
    """Return the command of the launcher.

    The clone that contains this file comes first, with the environment of `make install`, then the
    installed package.
    """
    clone = Path(__file__).resolve().parents[3]
    if (clone / "launcher.py").is_file():
        python = clone / ".venv" / "bin" / "python"
        return [str(python) if python.is_file() else sys.executable, str(clone / "launcher.py")]
    installed = shutil.which("diffusion-launcher")
    if installed is None:
        raise HostError(
            "diffusion-launcher is not installed. Install it, or give the address of a host that "
            "runs.",
            status=0,
        )
    return [installed]


def _last_line(log: str) -> str:
    return next((line for line in reversed(log.splitlines()) if line.strip()), "it said nothing")


def _wait_until_free(port: int) -> None:
    """Ranks of a host that was killed hold its port for a moment, and would seem to be the new one.
    Who holds it for longer is named by the new host.
    """
    until = time.monotonic() + PORT_WITHIN_S
    while not _is_free(port) and time.monotonic() < until:
        time.sleep(POLL_S)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
