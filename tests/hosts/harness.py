"""Real hosts for tests: start one as users or clients do, wait for it, end it in several ways, and
see that nothing is left.

with start_launcher("--type=sdxl", f"--checkpoint={folder}") as host:
    host.wait_until_ready()
    host.post({"positive": "a cat"})
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = REPOSITORY / "launcher.py"
CLIENT_FOLDER = REPOSITORY / "clients" / "multigpu_diffusion"
FAULTS = Path(__file__).parent / "faults"
"""On every host's PYTHONPATH: what FAULT_FILE names goes wrong in it, if the test sets that."""
READY_WITHIN_S = 170.0
"""Two ranks import torch and diffusers; on a busy machine that takes its time."""


def session() -> requests.Session:
    """Without the machine's proxies."""
    made = requests.Session()
    made.trust_env = False
    return made


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(
    condition: Callable[[], bool], *, within_s: float, what: str, every_s: float = 0.05
) -> float:
    """Seconds until `condition()` held; fails with `what` otherwise."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < within_s, f"not within {within_s:g} s: {what}"
        time.sleep(every_s)
    return time.monotonic() - started


@dataclass
class RunningHost:
    """A host in processes of its own, and what a client does with it."""

    process: subprocess.Popen[bytes]
    port: int
    log_file: Path
    session: requests.Session = field(default_factory=session)

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def tree(self) -> list[psutil.Process]:
        """The started process and everything below it."""
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def ranks(self) -> dict[int, psutil.Process]:
        """Rank -> its process, of those that are there now."""
        found = {}
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if "RANK" in environment and "TORCHELASTIC_RUN_ID" in environment:
                    found[int(environment["RANK"])] = process
        return found

    def get(self, path: str, **kwargs: Any) -> requests.Response:
        return self.session.get(self.url(path), timeout=20, **kwargs)

    def post(self, body: Any, *, timeout: float = 120, **kwargs: Any) -> requests.Response:
        return self.session.post(self.url("/generate"), json=body, timeout=timeout, **kwargs)

    def status(self) -> int:
        """Of /initialize; 0 while nobody listens."""
        try:
            return self.get("/initialize").status_code
        except requests.ConnectionError:
            return 0

    def wait_until_listening(self) -> None:
        self._wait_for(lambda: self.status() > 0, "listening")

    def wait_until_ready(self) -> None:
        """Until /initialize is 200, as both clients wait."""
        self._wait_for(lambda: self.status() == 200, "ready")

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while not condition():
            assert self.process.poll() is None, (
                f"the host ended with code {self.process.returncode} before it was "
                f"{what}:\n{self.log}"
            )
            assert time.monotonic() < deadline, f"the host was not {what} in time:\n{self.log}"
            time.sleep(0.2)

    def signal_and_wait(self, number: int, *, within_s: float) -> float:
        """Signal the started process alone; seconds until it and all below it are gone. Fails with
        the log if it takes longer.
        """
        family = self.tree()
        assert family, "nothing runs any more"
        started = time.monotonic()
        self.process.send_signal(number)
        _, left = psutil.wait_procs(family, timeout=within_s)
        seconds = time.monotonic() - started
        assert not left, (
            f"after {within_s:g} s still there: {[(p.pid, p.name()) for p in left]}\n{self.log}"
        )
        self.process.wait(timeout=1)
        return seconds

    def kill_everything(self) -> None:
        """Clean up, whatever the state."""
        family = self.tree()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)
        self.process.wait(timeout=10)
        self.session.close()


@contextlib.contextmanager
def start_launcher(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[RunningHost]:
    """`python launcher.py ARGUMENTS --port=P`. prefix: a command that runs another.

    Without spare ranks, unless an argument says otherwise: most hosts of tests lose none.
    """
    port = port or free_port()
    if not any(each.startswith("--spare_ranks") for each in arguments):
        arguments = ("--spare_ranks=false", *arguments)
    with _started(
        [*prefix, sys.executable, str(LAUNCHER), *arguments, f"--port={port}"], port, environment
    ) as host:
        yield host


@contextlib.contextmanager
def start_client_host(
    script: str,
    *arguments: str,
    num_ranks: int = 1,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
) -> Iterator[RunningHost]:
    """`torchrun ... clients/multigpu_diffusion/SCRIPT --port=P ARGUMENTS`, as the existing clients
    write it, also with their `/../`.
    """
    port = port or free_port()
    command = [
        str(Path(sys.executable).with_name("torchrun")),
        f"--nproc_per_node={num_ranks}",
        f"--master-port={free_port()}",
        str(CLIENT_FOLDER / "modules" / ".." / script),
        f"--port={port}",
        *arguments,
    ]
    with _started(command, port, environment) as host:
        yield host


@contextlib.contextmanager
def _started(
    command: list[str], port: int, environment: Mapping[str, str] | None
) -> Iterator[RunningHost]:
    with tempfile.TemporaryDirectory(prefix="host-test-") as folder:
        log_file = Path(folder) / "log"
        with log_file.open("wb") as log:
            # elsewhere than in the repository: nothing may be found relative to the working
            # directory
            surroundings = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(FAULTS),
                **(environment or {}),
            }
            process = subprocess.Popen(
                command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=surroundings
            )
        host = RunningHost(process=process, port=port, log_file=log_file)
        try:
            yield host
        finally:
            host.kill_everything()


def run_launcher(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """The launcher for what ends by itself."""
    return subprocess.run(
        [sys.executable, str(LAUNCHER), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=tempfile.gettempdir(),
    )


def assert_port_is_free(port: int) -> None:
    """A plain bind without SO_REUSEADDR works, as the ComfyUI client tries it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def is_port_free(port: int) -> bool:
    try:
        assert_port_is_free(port)
    except OSError:
        return False
    return True
