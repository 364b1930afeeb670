"""--engine=ray: the launcher's process is the gateway.

It starts the listener first, then the Ray cluster, then replicas, and runs until it is told to
stop.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from backends.errors import UnavailableError
from backends.model_table import read_table
from hosts.cluster.config import DeploymentPlan, plan_deployments
from hosts.cluster.deployment import Deployment, open_store
from hosts.cluster.gateway import create_gateway
from hosts.cluster.nodes import Nodes, environment
from hosts.http.app import listen
from hosts.launch.gpus import count_gpus
from hosts.launch.settings import Settings
from hosts.supervision import log, parent_watch
from hosts.supervision.host_state import Phase
from hosts.supervision.temp_folder import scratch_folder

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2
STOP_WITHIN_S = 8.0
"""For everything except running jobs, which have --drain_seconds."""
REPLICAS_STOP_WITHIN_S = 5.0
STOPPING = "the gateway is stopping. Try again when it has started."


def run_gateway(settings: Settings, environ: MutableMapping[str, str]) -> int:
    """Serve until told to stop. Return 0, or 1 if a model's first replica cannot serve.

    environ: this process's environment, from which Ray reads its own variables.
    """
    parent = os.getppid()
    num_gpus = count_gpus(environ)
    plans = plan_deployments(settings, read_table(), num_gpus=num_gpus)
    if settings.check:
        text = (
            json.dumps([plan.facts() for plan in plans], indent=2)
            if settings.json
            else "\n\n".join(plan.describe() for plan in plans)
        )
        print(text)  # noqa: T201  output of --check
        return 0
    environ.update(environment(settings.ray_address))
    log.configure(rank=0, log_format=settings.log_format)
    deployments = [
        Deployment(plan, store=open_store(plan, is_only=len(plans) == 1)) for plan in plans
    ]
    num_jobs = sum(
        2 * plan.settings.queue_size + plan.maximum * plan.ranks * plan.settings.max_batch
        for plan in plans
    )
    listener = listen(create_gateway(deployments), settings, num_jobs=num_jobs)
    listener.bind()
    listener.serve()
    try:
        with scratch_folder() as folder:
            nodes = _nodes(settings, plans, folder, num_gpus=num_gpus)
            nodes.connect()
            stopped = _stop_when_told(settings, deployments)
            for deployment in deployments:
                deployment.use(nodes)
            problem = _serve(
                deployments, nodes, stopped, parent=parent if settings.exit_with_parent else None
            )
            _end(deployments, nodes)
    finally:
        # its threads would keep the process, also where there is no cluster to join
        listener.stop()
    if problem:
        print(f"error: {problem}", file=sys.stderr)  # noqa: T201  one line for the user
    return 1 if problem else 0


def _nodes(
    settings: Settings, plans: Sequence[DeploymentPlan], folder: Path, *, num_gpus: int
) -> Nodes:
    num_ranks = sum(plan.maximum * plan.ranks for plan in plans)
    return Nodes(
        address=settings.ray_address,
        folder=folder,
        start_in=str(Path.cwd()),
        num_ranks=num_ranks,
        num_gpus=num_gpus,
    )


def _serve(
    deployments: Sequence[Deployment],
    nodes: Nodes,
    stopped: threading.Event,
    *,
    parent: int | None,
) -> str:
    """Maintain the replicas until told to stop or until `parent` is gone.

    Return why a model cannot be served, or an empty text.
    """
    while not stopped.wait(LOOK_EVERY_S) and parent in (None, os.getppid()):
        if problem := nodes.problem():
            return problem
        for deployment in deployments:
            deployment.look()
            if deployment.problem:
                return deployment.problem
    return ""


def _stop_when_told(settings: Settings, deployments: Sequence[Deployment]) -> threading.Event:
    """Return an event that SIGTERM or SIGINT sets.

    It is set once the running jobs have ended or --drain_seconds have passed.
    """
    stopped = threading.Event()
    drain_s = float(settings.drain_seconds)

    def stop() -> None:
        logger.info("stopping")
        deadline = time.monotonic() + drain_s
        for deployment in deployments:
            deployment.state.become(Phase.STOPPING, "the gateway is stopping")
            deployment.queue.close(UnavailableError(STOPPING), finish_running=True)
        for deployment in deployments:
            deployment.queue.wait_until_idle(max(0.0, deadline - time.monotonic()))
            deployment.queue.interrupt()
        stopped.set()
        logger.info("the jobs have ended")

    parent_watch.on_stop_signal(stop, drain_s=drain_s + 1, within_s=STOP_WITHIN_S)
    return stopped


def _end(deployments: Sequence[Deployment], nodes: Nodes) -> None:
    """Answer waiting clients, stop the replicas and leave the cluster."""
    for deployment in deployments:
        deployment.queue.abandon(UnavailableError(STOPPING))
    stopping = [
        threading.Thread(target=deployment.stop_replicas, args=(REPLICAS_STOP_WITHIN_S,))
        for deployment in deployments
    ]
    for thread in stopping:
        thread.start()
    for thread in stopping:
        thread.join()
    logger.info("the replicas have ended")
    nodes.close()
