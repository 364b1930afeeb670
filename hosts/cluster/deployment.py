"""One model behind the gateway: its queue, its HTTP application and its replicas."""

import itertools
import logging
import time
from pathlib import Path
from typing import Any

from flask import Flask

from backends.request import why_loras_are_fixed
from hosts.cluster.config import DeploymentPlan
from hosts.cluster.nodes import Nodes
from hosts.cluster.replica import Replica, ReplicaState
from hosts.cluster.scaling import Rule, Scale
from hosts.compat.protocol import FixedModel
from hosts.http.app import Host, create_app
from hosts.jobs.queue import queue_within
from hosts.jobs.store import JobStore
from hosts.supervision.host_state import HostState, Phase

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 30.0
"""Longest delay before a failed replica is replaced. It starts at one second and doubles with
each failure.
"""
NOT_SHOWN = (
    "given",
    "restarts",
    "ranks_now",
    "last_report",
    "seconds_per_megapixel_step",
    "seconds_in_batches",
)
"""Facts that differ between replicas."""


class Deployment:
    """A model with its replicas. HTTP clients see it as a host."""

    def __init__(self, plan: DeploymentPlan, *, store: JobStore | None) -> None:
        settings = plan.settings
        self.plan = plan
        self.name = plan.name
        self.queue = queue_within(settings, store)
        self.state = HostState()
        self.state.tell({**plan.start.facts(), "restarts": 0})
        self.app: Flask = create_app(
            Host(
                settings=settings,
                spec=plan.start.spec,
                fixed_loras=why_loras_are_fixed(plan.start.load, plan.start.plan),
                queue=self.queue,
                state=self.state,
                protocol=FixedModel(),
                name=plan.name,
            )
        )
        self.replicas: list[Replica] = []
        self.problem = ""  # why no replica can ever serve, if known
        self.num_lost = 0  # replicas that ended by themselves
        self._nodes: Nodes | None = None
        self._numbers = itertools.count(1)
        self._was_ready = False
        self._failures = 0
        self._not_before_s = 0.0
        rule = Rule(
            minimum=plan.minimum,
            maximum=plan.maximum,
            jobs_per_replica=settings.jobs_per_replica,
            idle_s=float(settings.idle_seconds),
        )
        self._scale = Scale(rule, first=plan.first, now_s=time.monotonic())

    def use(self, nodes: Nodes) -> None:
        """Allow replicas to be started from now on."""
        self._nodes = nodes

    def look(self) -> None:
        """Remove replicas that ended, and start or drain some if there are too few or too many.

        Call it often.
        """
        self._note_the_gone()
        self._show_phase()
        target = self._scale.look(num_jobs=self.num_jobs, now_s=time.monotonic())
        staying = [replica for replica in self.replicas if not replica.is_leaving]
        if len(staying) < target and time.monotonic() >= self._not_before_s:
            for _ in range(target - len(staying)):
                self._start_one()
        elif len(staying) > target:
            least = min(
                staying,
                key=lambda replica: (
                    replica.state is ReplicaState.READY,
                    replica.num_jobs,
                    replica.taken_s,
                ),
            )
            logger.info(
                "%s: %d replicas are enough, so %s is drained", self.name, target, least.name
            )
            least.drain()

    @property
    def num_jobs(self) -> int:
        """Waiting and running jobs."""
        return self.queue.num_waiting + sum(replica.num_jobs for replica in self.replicas)

    @property
    def num_ready(self) -> int:
        return sum(replica.state is ReplicaState.READY for replica in self.replicas)

    def describe(self) -> dict[str, Any]:
        """Return the facts for GET /cluster."""
        return {
            "model": self.name,
            "type": self.plan.start.spec.name,
            "phase": self.state.phase,
            "target": self._scale.target,
            "min_replicas": self.plan.minimum,
            "max_replicas": self.plan.maximum,
            "waiting": self.queue.num_waiting,
            "lost": self.num_lost,
            "replicas": [replica.describe() for replica in self.replicas],
        }

    def stop_replicas(self, within_s: float) -> None:
        """Stop all replicas at once."""
        deadline = time.monotonic() + within_s
        for replica in self.replicas:
            replica.stop()
        for replica in self.replicas:
            replica.join(max(0.0, deadline - time.monotonic()))

    def _start_one(self) -> None:
        assert self._nodes is not None
        replica = Replica(
            f"{self.name}-{next(self._numbers)}",
            self.plan,
            nodes=self._nodes,
            queue=self.queue,
            peers=lambda: list(self.replicas),
        )
        self.replicas.append(replica)
        replica.start()

    def _note_the_gone(self) -> None:
        for replica in [replica for replica in self.replicas if replica.state is ReplicaState.GONE]:
            self.replicas.remove(replica)
            if not replica.is_failure:
                continue
            logger.warning("replica %s is gone: %s", replica.name, replica.reason)
            self.num_lost += 1
            self._failures += 1
            self._not_before_s = time.monotonic() + min(LONGEST_WAIT_S, 2.0 ** (self._failures - 1))
            if replica.is_final and not self._was_ready:
                self.problem = (
                    f"replica {replica.name} cannot serve: {replica.reason.removeprefix('error: ')}"
                )

    def _show_phase(self) -> None:
        ready = next(
            (replica for replica in self.replicas if replica.state is ReplicaState.READY), None
        )
        if ready is None:
            reasons = "; ".join(
                f"{replica.name}: {replica.reason}" for replica in self.replicas if replica.reason
            )
            self.state.become(Phase.LOADING, f"no replica is ready. {reasons}".strip())
            return
        if self.state.phase is not Phase.READY:
            self._was_ready, self._failures = True, 0
            self.state.tell(
                {name: value for name, value in ready.facts.items() if name not in NOT_SHOWN}
            )
            self.state.become(Phase.READY)


def open_store(plan: DeploymentPlan, *, is_only: bool) -> JobStore | None:
    """Open the job store in --state_dir, in a folder of its own if there are several models.

    ConfigError if it cannot be used.
    """
    if plan.settings.state_dir is None:
        return None
    folder = Path(plan.settings.state_dir).expanduser().resolve()
    return JobStore(folder if is_only else folder / plan.name)
