"""The gateway's view of one replica, and the thread that supervises it from placement to exit."""

import contextlib
import http.client
import logging
import threading
import time
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any

from diffusion_client import Client
from diffusion_client import HostError as RemoteError

from hosts.cluster import routing
from hosts.cluster.config import DeploymentPlan
from hosts.cluster.nodes import Lost, Nodes, Placed
from hosts.cluster.replica_host import ReplicaAddress
from hosts.cluster.replica_slot import ReplicaSlot
from hosts.jobs.decision import Choice
from hosts.jobs.queue import JobQueue
from hosts.jobs.work import work_of

logger = logging.getLogger(__name__)

POLL_S = 0.2
HEALTH_EVERY_S = 1.0
ANSWER_WITHIN_S = 20.0
"""Twice the heartbeat interval of a job's events: a disconnected node closes no connection."""
HEALTHY_WITHIN_S = 60.0
"""How long a ready replica may fail to answer. It may be busy, or its ranks may be restarting."""
STOP_WITHIN_S = 5.0


class ReplicaState(StrEnum):
    PLACING = "placing"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


class Replica:
    """One replica of a deployment."""

    def __init__(
        self,
        name: str,
        plan: DeploymentPlan,
        *,
        nodes: Nodes,
        queue: JobQueue,
        peers: Callable[[], Iterable["Replica"]],
    ) -> None:
        self.name = name
        self.ranks = plan.ranks
        self.state = ReplicaState.PLACING
        self.reason = ""  # why it is not ready, or gone
        self.is_failure = False  # it ended by itself
        self.is_final = False  # another one would end in the same way
        self.taken_s = 0.0  # when it last took a job
        self.num_done = 0  # finished jobs
        self.place: ReplicaAddress | None = None
        self.facts: dict[str, Any] = {}
        self.client = Client(uses_proxies=False)
        self._plan = plan
        self._nodes = nodes
        self._queue = queue
        self._peers = peers
        self._slots: list[ReplicaSlot] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._answered_s = time.monotonic()
        self._thread = threading.Thread(target=self._keep, name=f"keep-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Give it no more jobs. It ends when its current ones are done."""
        self._become(ReplicaState.DRAINING, "it is being drained")

    def stop(self) -> None:
        """Stop it now. `join` waits for the end."""
        self._stop.set()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def suspect(self, why: str) -> None:
        """Give it no more jobs after a lost one until it answers that it is ready."""
        if self.state is ReplicaState.READY:
            self._become(ReplicaState.STARTING, why)

    def is_next(self) -> bool:
        return routing.is_next(self.load, [peer.load for peer in self._peers() if peer is not self])

    @property
    def is_leaving(self) -> bool:
        return self.state in (ReplicaState.DRAINING, ReplicaState.GONE)

    @property
    def load(self) -> routing.Load:
        jobs = [slot.job for slot in self._slots if slot.job is not None]
        start = self._plan.start
        work = sum(
            work_of(job.request, start.spec, start.load).pixel_steps * (1 - job.percent / 100)
            for job in jobs
        )
        can_take = self.state is ReplicaState.READY and len(jobs) < len(self._slots)
        return routing.Load(name=self.name, work=work, taken_s=self.taken_s, can_take=can_take)

    @property
    def num_jobs(self) -> int:
        return sum(slot.job is not None for slot in self._slots)

    def describe(self) -> dict[str, Any]:
        """Return the facts for GET /cluster."""
        place = self.place
        return {
            "name": self.name,
            "state": self.state,
            "reason": self.reason,
            "node": place.node if place else None,
            "url": place.url if place else None,
            "pid": place.pid if place else None,
            "ranks": self.ranks,
            "jobs": [slot.job.id for slot in self._slots if slot.job is not None],
            "done": self.num_done,
        }

    def metrics(self) -> str:
        """Return its GET /metrics; empty if it does not answer."""
        if self.place is None or self.state is ReplicaState.GONE:
            return ""
        try:
            return self._probe.open("/metrics").decode()
        except (RemoteError, OSError, http.client.HTTPException):
            return ""

    def _keep(self) -> None:
        placed = self._nodes.launch(self.name, self._plan.launch_values(), ranks=self.ranks)
        try:
            self._wait_for_place(placed)
            while not self._stop.wait(0) and not (
                self.state is ReplicaState.DRAINING and not self.num_jobs
            ):
                if (ending := placed.ending(POLL_S)) is not None:
                    self.is_final = ending.is_final
                    raise Lost(ending.reason)
                self._look()
            self._become(ReplicaState.DRAINING, "it is being stopped")
        except Lost as error:
            self.is_failure = True
            self._become(ReplicaState.DRAINING, str(error))
        # a replica without its supervisor must not go on; another replaces it
        except Exception as error:
            logger.exception("replica %s is given up", self.name)
            self.is_failure = True
            self._become(ReplicaState.DRAINING, f"{type(error).__name__}: {error}")
        placed.stop(STOP_WITHIN_S)
        self._become(ReplicaState.GONE, self.reason)

    def _wait_for_place(self, placed: Placed) -> None:
        needs = ", ".join(f"{number} {name}" for name, number in placed.needs.items())
        self.reason = f"it waits for a node with {needs} to spare"
        while self.place is None and not self._stop.is_set() and not self.is_leaving:
            self.place = placed.place(POLL_S)
        if self.place is None:
            return
        self.client = Client(
            self.place.url,
            api_key=placed.key,
            timeout_s=ANSWER_WITHIN_S,
            uses_proxies=False,
            patience_s=0,  # another replica takes the job at once
        )
        self._probe = Client(
            self.place.url, api_key=placed.key, timeout_s=HEALTH_EVERY_S * 3, uses_proxies=False
        )
        self._looked_s = self._answered_s = time.monotonic()
        if not self.is_leaving:
            self._become(ReplicaState.STARTING, "it loads")

    def _look(self) -> None:
        """Cancel unwanted jobs, and check its health every second.

        Raises Lost if it has not answered for too long.
        """
        for slot in self._slots:
            slot.cancel_unwanted()
        now_s = time.monotonic()
        if now_s - self._looked_s < HEALTH_EVERY_S:
            return
        self._looked_s = now_s
        try:
            self._probe.open("/readyz")
        except (RemoteError, OSError, http.client.HTTPException) as error:
            if getattr(error, "status", 0) != 0:
                self._answered_s = now_s
            elif self._slots and now_s - self._answered_s > HEALTHY_WITHIN_S:
                raise Lost(f"it gave no answer for {HEALTHY_WITHIN_S:g} s") from error
            self.suspect(f"it is not ready: {error}")
            return
        self._answered_s = now_s
        if self.state is ReplicaState.STARTING:
            with contextlib.suppress(RemoteError):  # retried at the next check
                self._ready()

    def _ready(self) -> None:
        self.facts = self._probe.settings()
        is_first = not self._slots
        if is_first:
            self._slots = [
                ReplicaSlot(self, self._queue)
                for _ in range(routing.capacity(self.ranks, self.facts.get("mode", "latency")))
            ]
        self._become(ReplicaState.READY, "")
        for slot in self._slots if is_first else ():
            slot.start()
        logger.info(
            "replica %s is ready on node %s", self.name, self.place.node if self.place else ""
        )

    def _become(self, state: ReplicaState, reason: str) -> None:
        """Change the state and wake the slots of all replicas. A leaving replica never comes
        back.
        """
        with self._lock:
            if self.is_leaving and state is not ReplicaState.GONE:
                return
            self.state, self.reason = state, reason
        self._queue.next(lambda waiting, running: Choice.LEAVE)
