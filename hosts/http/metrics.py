"""GET /metrics for Prometheus: jobs by outcome, queue and run times, and the latest figures of
each rank.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from hosts.jobs.queue import Job, JobQueue
from hosts.supervision.host_state import HostState, Phase

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800)
STAGES = {"step": "denoise"}
RANK_FIGURES = {
    "memory_bytes": "Memory of the rank: of its GPU where it has one, else of its process.",
    "seconds": "Duration of the last job on the rank.",
    "wait_s": "Seconds of the last job in which the rank waited for others.",
    "sent_bytes": "Bytes that the rank sent to others for the last job.",
}


class Metrics:
    """Metrics of one host. Registers itself with the queue."""

    def __init__(self, queue: JobQueue, state: HostState) -> None:
        self._queue = queue
        self._state = state
        self._registry = CollectorRegistry()
        self._jobs = Counter(
            "diffusion_jobs", "Finished jobs, by outcome.", ["state"], registry=self._registry
        )
        self._waited = Histogram(
            "diffusion_queue_seconds",
            "Time in the queue.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._worked = Histogram(
            "diffusion_job_seconds",
            "Time from start to end of a job that was done.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._stages = Histogram(
            "diffusion_stage_seconds",
            "Time of one stage of a job on rank 0.",
            ["stage"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._batches = Counter(
            "diffusion_batch_jobs",
            "Jobs that were done, by batch size.",
            ["batch"],
            registry=self._registry,
        )
        self._registry.register(self)
        queue.on_end.append(self._ended)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        """Yield the values that are read at scrape time."""
        yield GaugeMetricFamily(
            "diffusion_jobs_waiting", "Jobs in the queue.", value=self._queue.num_waiting
        )
        yield GaugeMetricFamily(
            "diffusion_restarts",
            "Restarts of the ranks.",
            value=self._state.facts.get("restarts", 0),
        )
        yield GaugeMetricFamily(
            "diffusion_ready",
            "1 while images can be generated.",
            value=float(self._state.phase is Phase.READY),
        )
        ranks = self._state.facts.get("ranks_now", [])
        for name, meaning in RANK_FIGURES.items():
            gauge = GaugeMetricFamily(
                f"diffusion_rank_{name.removesuffix('_s')}", meaning, labels=["rank"]
            )
            for figures in ranks:
                if name in figures:
                    gauge.add_metric([str(figures["rank"])], figures[name])
            yield gauge

    def _ended(self, job: Job) -> None:
        self._jobs.labels(state=job.status.value).inc()
        if job.started_s is not None:
            self._waited.observe(max(0.0, job.started_s - job.created_s))
            if job.result is not None:
                self._worked.observe(max(0.0, job.ended_s - job.started_s))
                self._batches.labels(batch=str(job.result.report.get("batch", 1))).inc()
                for stage, seconds in job.result.report.get("stages", {}).items():
                    self._stages.labels(stage=STAGES.get(stage, stage)).observe(seconds)

    @contextlib.contextmanager
    def serialising(self) -> Iterator[None]:
        """Time the encoding of a result for a client."""
        started = time.perf_counter()
        yield
        self._stages.labels(stage="serialise").observe(time.perf_counter() - started)
