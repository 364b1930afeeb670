"""The Ray cluster: started on this machine, or an existing one that is joined.

It places replicas on nodes and reports when they end. Each replica is an actor in a placement group
of its own, with CPUs and, where there are GPUs, one GPU per rank. Ray reports at once when the
actor's process or its node is gone.
"""

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from backends.errors import ConfigError
from hosts.cluster import reaper
from hosts.cluster.replica_host import ReplicaAddress, ReplicaExit, ReplicaHost, ReplicaSpec

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's minimum, since nothing large is stored."""
ACTOR_THREADS = 3
"""One for start or stop, one for wait, one spare."""
SETTINGS = {
    # else 15: beside any other work a replica would get next to nothing of a busy machine
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_COLOR_PREFIX": "0",
}
STOP_WITHIN_S = 5.0
ANSWER_WITHIN_S = 10.0
NAMESPACE = "diffusion"


def environment(ray_address: str | None) -> dict[str, str]:
    """Return variables that must be set before ray is imported.

    They disable usage reports, and keep others from reaching or using our own cluster.
    """
    if ray_address is not None:
        return SETTINGS
    # Ray's switch for machines that are no cluster nodes: every process of it then listens on the
    # loopback address alone
    return {
        **SETTINGS,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def _require_listener(address: str) -> None:
    """Raise OSError if nothing listens at host:port; Ray itself would retry for minutes.

    ValueError if it is not an address.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection(
        (host.removeprefix("[").removesuffix("]"), int(port)), timeout=ANSWER_WITHIN_S
    ).close()


class Lost(Exception):
    """The replica's process, its node or the cluster is gone."""


class Nodes:
    """The cluster, once connected. Thread-safe."""

    def __init__(
        self, *, address: str | None, folder: Path, start_in: str, num_ranks: int, num_gpus: int
    ) -> None:
        """address: cluster to join; None starts one, which ends with this process and has its
        files in `folder`. start_in: folder in which replicas start if the node has it, for
        relative paths. num_ranks: largest number of ranks of all replicas. num_gpus: GPUs of
        this machine.
        """
        self._address = address
        self._folder = folder
        self._start_in = start_in
        # Ray counts CPUs and does not bind to them: every replica gets a place, and as many threads
        # as there are CPUs for it
        self._cpus_per_rank = max(1, (os.cpu_count() or 1) // num_ranks) if address is None else 1
        self._cpus = max(os.cpu_count() or 1, num_ranks)
        self._gpus = num_gpus
        self._raylets: list[psutil.Process] = []
        """Of our own cluster."""

    def connect(self) -> None:
        """Connect to the cluster. Blocks for seconds. ConfigError if it cannot be used.

        Call it in the main thread, with which our own cluster ends.
        """
        import ray

        own = {
            "num_cpus": self._cpus,
            "num_gpus": self._gpus,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_temp_dir": str(self._folder),
        }
        watcher = reaper.start() if self.is_own else None
        try:
            if self._address is not None:
                _require_listener(self._address)
            ray.init(
                address=self._address or "local",
                namespace=NAMESPACE,
                logging_level="ERROR",
                **(own if self._address is None else {}),
            )
        except (OSError, ValueError, RuntimeError) as error:
            where = f"--ray_address={self._address}" if self._address else "an own Ray cluster"
            why = str(error).splitlines()[0]
            raise ConfigError(
                f"{where} cannot be used ({why}). Start the cluster, or leave --ray_address out."
            ) from error
        if watcher is not None:
            self._raylets = [
                process
                for process in psutil.Process().children(recursive=True)
                if process.name() == "raylet"
            ]
            reaper.cluster_is_complete(watcher)
            self._reaper = watcher  # keep its stdin open

    @property
    def is_own(self) -> bool:
        return self._address is None

    def problem(self) -> str:
        """Return why our own cluster cannot start replicas any more; empty while it can.

        A cluster that we joined may get a node at any time.
        """
        if not self._raylets or any(map(_is_alive, self._raylets)):
            return ""
        return (
            "the Ray process of this machine (raylet) has ended, so no replica can be started. See "
            "dmesg for why, and start the gateway again: jobs in --state_dir go on."
        )

    def launch(self, name: str, values: Mapping[str, Any], *, ranks: int) -> "Placed":
        """Request a place and start a replica there once there is one. Does not wait."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        cpus = ranks * self._cpus_per_rank
        gpus = ranks if ray.cluster_resources().get("GPU") else 0
        needs = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        group = placement_group([needs], strategy="STRICT_PACK", name=name)
        order = ReplicaSpec(
            values=values,
            address=LOOPBACK if self.is_own else None,
            key=secrets.token_hex(16),
            folder=self._start_in,
        )
        actor = (
            ray.remote(ReplicaHost)
            .options(
                name=name,
                num_cpus=cpus,
                num_gpus=gpus,
                max_concurrency=ACTOR_THREADS,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=0
                ),
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._cpus_per_rank)}},
            )
            .remote(order)
        )
        return Placed(actor, group, key=order.key, needs=needs)

    def close(self) -> None:
        """Leave the cluster. Our own cluster ends with all its processes."""
        import ray

        family = psutil.Process().children(recursive=True) if self.is_own else []
        ray.shutdown()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=STOP_WITHIN_S)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Placed:
    """A replica in the Ray cluster, perhaps still waiting for a place. needs: resources it waits
    for.
    """

    def __init__(self, actor: Any, group: Any, *, key: str, needs: Mapping[str, int]) -> None:
        self.key = key
        self.needs = needs
        self._actor = actor
        self._group = group
        self._started = actor.start.remote()
        self._ended: Any = None

    def place(self, timeout_s: float) -> ReplicaAddress | None:
        """Return its address once it has a place, else None. Raises Lost."""
        return self._get(self._started, timeout_s)

    def ending(self, timeout_s: float) -> ReplicaExit | None:
        """Return how its launcher ended, or None. Call it only once the replica has a place.

        Raises Lost if Ray reports that its process or node is gone.
        """
        if self._ended is None:
            self._ended = self._actor.wait.remote()
        return self._get(self._ended, timeout_s)

    def stop(self, within_s: float) -> None:
        """Stop it in order, then release its place."""
        import ray

        with contextlib.suppress(Lost):
            if self.place(0) is not None:
                self._get(self._actor.stop.remote(within_s), within_s + 1)
        with contextlib.suppress(
            Exception
        ):  # Ray's errors share no base class; the actor ends with this process in any case
            ray.kill(self._actor)
            ray.util.remove_placement_group(self._group)

    @staticmethod
    def _get(answer: Any, timeout_s: float) -> Any:
        import ray

        try:
            done, _ = ray.wait([answer], timeout=timeout_s)
            return ray.get(done[0]) if done else None
        except ray.exceptions.RayTaskError as error:  # raised by the actor
            raise Lost(f"{type(error.cause).__name__}: {error.cause}") from error
        except ray.exceptions.RayError as error:
            raise Lost(
                next(
                    (line.strip() for line in str(error).splitlines() if line.strip()),
                    type(error).__name__,
                )
            ) from error
