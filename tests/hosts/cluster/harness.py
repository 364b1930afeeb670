"""A real gateway for tests: tests/hosts/harness.py, and what a cluster has besides."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from diffusion_client import Client

from tests.hosts.harness import LAUNCHER, RunningHost, start_launcher, wait_until

READY_WITHIN_S = 170.0


class Cluster:
    """A gateway that runs, and what clients do with it. Everything else is the host's."""

    def __init__(self, host: RunningHost, key: str) -> None:
        self._host = host
        self._key = key
        host.session.headers["Authorization"] = f"Bearer {key}"
        self.client = Client(host.url(""), api_key=key, timeout_s=60, uses_proxies=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def describe(self, model: int = 0) -> dict[str, Any]:
        return json.loads(self.client.open("/cluster"))["deployments"][model]

    def replicas(self, model: int = 0) -> list[dict[str, Any]]:
        """Those that are not on their way out."""
        return [
            replica
            for replica in self.describe(model)["replicas"]
            if replica["state"] not in ("gone", "draining")
        ]

    def num_ready(self, model: int = 0) -> int:
        return sum(replica["state"] == "ready" for replica in self.replicas(model))

    def wait_for_replicas(self, number: int, model: int = 0) -> None:
        """Until so many are ready. Fails with the log if the gateway ends before."""
        self._host.wait_until_listening()

        def are_ready() -> bool:
            assert self._host.process.poll() is None, self._host.log
            return self.num_ready(model) == number

        try:
            wait_until(
                are_ready, within_s=READY_WITHIN_S, what=f"{number} replicas are ready", every_s=0.2
            )
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.replicas(model)}; {self._host.log}") from None

    def status(self) -> "subprocess.CompletedProcess[str]":
        """`diffusion-launcher status`."""
        command = [
            sys.executable,
            str(LAUNCHER),
            "status",
            f"--url={self._host.url('')}",
            f"--api_key={self._key}",
        ]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, cwd=tempfile.gettempdir()
        )


@contextlib.contextmanager
def start_cluster(*arguments: str, key: str) -> Iterator[Cluster]:
    """`python launcher.py --engine=ray ARGUMENTS`."""
    with start_launcher("--engine=ray", *arguments) as host:
        yield Cluster(host, key)
