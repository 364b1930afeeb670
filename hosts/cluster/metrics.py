"""GET /metrics of a gateway: each replica's metrics, labelled with its name and model, and its
own.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from hosts.cluster.deployment import Deployment
from hosts.cluster.replica import ReplicaState

OURS, GATEWAYS = "diffusion_", "diffusion_gateway_"
"""Prefixes. Replica and gateway both count a job, so they need different names for correct sums."""


def merged(deployments: Sequence[Deployment]) -> bytes:
    """Return all metrics in Prometheus' text format."""
    families: dict[str, Metric] = {}
    replicas = [
        (deployment, replica) for deployment in deployments for replica in list(deployment.replicas)
    ]
    with ThreadPoolExecutor(max_workers=max(1, min(16, len(replicas)))) as pool:
        texts = list(pool.map(lambda pair: pair[1].metrics(), replicas))
    for (deployment, replica), text in zip(replicas, texts, strict=True):
        _add(families, text, labels={"model": deployment.name, "replica": replica.name})
    for deployment in deployments:
        text = deployment.app.extensions["metrics"].text().decode()
        _add(families, text, labels={"model": deployment.name}, prefix=GATEWAYS)
    for family in _counts(deployments):
        families[family.name] = family
    registry = CollectorRegistry()
    registry.register(_Ready(families.values()))
    return generate_latest(registry)


def _add(
    families: dict[str, Metric], text: str, *, labels: dict[str, str], prefix: str = OURS
) -> None:
    """Add the samples of a text to the metric families of their names."""
    for found in text_string_to_metric_families(text):
        name = found.name.replace(OURS, prefix, 1)
        family = families.setdefault(name, Metric(name, found.documentation, found.type))
        family.samples += [
            Sample(
                sample.name.replace(OURS, prefix, 1),
                {**sample.labels, **labels},
                sample.value,
                sample.timestamp,
            )
            for sample in found.samples
        ]


def _counts(deployments: Sequence[Deployment]) -> Iterable[Metric]:
    replicas = GaugeMetricFamily(
        f"{GATEWAYS}replicas", "Replicas by state.", labels=["model", "state"]
    )
    lost = GaugeMetricFamily(
        f"{GATEWAYS}replicas_lost", "Replicas that ended by themselves.", labels=["model"]
    )
    for deployment in deployments:
        states = [replica.state for replica in list(deployment.replicas)]
        for state in ReplicaState:
            replicas.add_metric([deployment.name, state.value], states.count(state))
        lost.add_metric([deployment.name], deployment.num_lost)
    return replicas, lost


class _Ready:
    """A collector that returns existing families."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
