"""Chooses the replica for the next job: the one with the least outstanding work. Pure Python."""

from collections.abc import Iterable
from dataclasses import dataclass

from backends.model_table import ModelSpec
from backends.request import GenerateRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Outstanding work of one replica."""

    name: str
    work: float  # megapixel steps left in its jobs
    taken_s: float  # when it last took a job
    can_take: bool = True


def is_next(mine: Load, others: Iterable[Load]) -> bool:
    """Whether this replica takes the next job.

    No other available replica has less work, or the same amount and has waited longer.
    """
    return mine.can_take and not any(
        other.can_take and _rank(other) < _rank(mine) for other in others
    )


def _rank(load: Load) -> tuple[float, float, str]:
    return load.work, load.taken_s, load.name


def work_of(request: GenerateRequest, spec: ModelSpec) -> float:
    """Return the work of a request in megapixel steps, with the model type's defaults."""
    size = (request.height or spec.height) * (request.width or spec.width)
    steps = (
        len(request.timesteps or request.sigmas or ())
        or request.num_inference_steps
        or spec.num_inference_steps
    )
    return size * 1e-6 * steps * (request.num_frames or spec.num_frames)


def capacity(ranks: int, mode: str) -> int:
    """Return the number of jobs that a replica runs at once.

    One per rank if its ranks may split into teams, else one.
    """
    return 1 if mode == "latency" else ranks
