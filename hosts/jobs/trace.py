"""The timed stages of one job on every rank, as a Chrome trace for chrome://tracing or
ui.perfetto.dev. Pure Python.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from backends.errors import NotFoundError
from hosts.jobs.job import Job

Spans = Mapping[int, Sequence[tuple[str, float, float]]]
"""Rank -> (stage, start in seconds since 1970, duration in seconds)."""


def spans_of(figures: Sequence[Mapping[str, Any]]) -> dict[int, Sequence[tuple[str, float, float]]]:
    """Return the spans in the figures that the ranks exchange after a job."""
    return {each["rank"]: each["spans"] for each in figures if "spans" in each}


def without_spans(figures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in each.items() if name != "spans"} for each in figures]


def chrome_trace(job: Job) -> dict[str, Any]:
    """Return the job's trace events, in microseconds. NotFoundError if there are none."""
    if not job.spans:
        raise NotFoundError(
            f"job {job.id!r} has no trace. Only jobs that are done have one, and not after a "
            "restart."
        )
    events: list[dict[str, Any]] = [_name("process_name", 0, f"job {job.id}")]
    if job.started_s is not None:
        events.append(
            _event("queue", job.created_s, job.started_s - job.created_s, rank=min(job.spans))
        )
    for rank, spans in sorted(job.spans.items()):
        events.append(_name("thread_name", rank, f"rank {rank}"))
        number = 0
        for stage, start_s, seconds in spans:
            number += stage == "step"
            events.append(
                _event(f"step {number}" if stage == "step" else stage, start_s, seconds, rank=rank)
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(name: str, start_s: float, seconds: float, *, rank: int) -> dict[str, Any]:
    return {
        "name": name,
        "ph": "X",
        "ts": round(start_s * 1e6),
        "dur": round(seconds * 1e6),
        "pid": 0,
        "tid": rank,
    }


def _name(kind: str, rank: int, text: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 0, "tid": rank, "args": {"name": text}}
