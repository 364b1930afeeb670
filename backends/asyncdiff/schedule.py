"""The schedule: which evaluation of the denoiser is synchronous, which runs every segment at once,
and which was predicted one turn before (stride 2).

Pure arithmetic; docs/asyncdiff.md explains it. Source: AsyncDiff, arXiv:2406.06911, section 3.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from backends.request import GenerateRequest


class Phase(Enum):
    """The kind of one evaluation of the denoiser."""

    SYNCHRONOUS = "every unit runs on this evaluation's values"
    STALE = "every segment runs once, on the values of the turn before"
    AHEAD = "nothing runs: the turn before has predicted this evaluation too"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRole:
    """This rank's role: the segment that it computes.

    With stride 2 an additional rank also computes the last segment, for the present evaluation,
    while the others compute for the next one.
    """

    num_segments: int
    stride: int
    rank: int

    @property
    def segment(self) -> int:
        """Return the segment that this rank computes."""
        return min(self.rank, self.num_segments - 1)

    @property
    def is_nearer(self) -> bool:
        """Return whether this rank computes for the present evaluation. With stride 2 the other
        ranks compute for the next one.
        """
        return self.stride == 1 or self.rank == self.num_segments

    @property
    def is_sender(self) -> bool:
        """Return whether another segment may read this rank's units. The last segment is read by
        none, and neither is its copy on the additional rank of stride 2.
        """
        return self.rank < self.num_segments - 1

    @property
    def predictor(self) -> int:
        """Return the rank whose result is the prediction of the present evaluation."""
        return self.num_segments if self.stride == 2 else self.num_segments - 1

    def ranks_of(self, segment: int) -> tuple[int, ...]:
        """Return the ranks of the segment axis that compute this segment."""
        return tuple(
            rank
            for rank in range(self.num_segments + self.stride - 1)
            if min(rank, self.num_segments - 1) == segment
        )


def phase_of(evaluation: int, *, num_synchronous: int, stride: int) -> Phase:
    """Return the phase of an evaluation, counted from 0 within one generation."""
    if evaluation < num_synchronous:
        return Phase.SYNCHRONOUS
    return Phase.STALE if (evaluation - num_synchronous) % stride == 0 else Phase.AHEAD


def num_synchronous_steps(
    options: Mapping[str, Any], request: GenerateRequest, num_inference_steps: int
) -> int:
    """Return the number of exact sampling steps at the start: the request's `warmup_steps`, else
    `synced_percent` of the steps, else the plan's `warmup_steps`; at least 1.

    One is needed because the first stale evaluation reads the values of the evaluation before it.
    """
    steps = options["warmup_steps"]
    if options["synced_percent"] > 0:
        steps = math.floor(num_inference_steps * options["synced_percent"] / 100)
    if request.warmup_steps is not None:
        steps = request.warmup_steps
    return max(1, steps)


def extrapolates(options: Mapping[str, Any], *, order: int) -> bool:
    """Return whether stale values are extrapolated: as asked, else where turns are evenly spaced
    and each segment has its own evaluation's timestep.

    order: evaluations per step of the sampler. Two evaluations of one step are not on one line in
    time, and with stride 2 or a shifted timestep the values are not for the present evaluation.
    docs/quality.md has the gain.
    """
    if options["extrapolate"] is not None:
        return bool(options["extrapolate"])
    return options["stride"] == 1 and not options["time_shift"] and order == 1


def num_synchronous_evaluations(steps: int, num_inference_steps: int, order: int) -> int:
    """Convert synchronous steps to evaluations. A warm-up of all steps covers every evaluation,
    because PNDM makes one more than it has steps.
    """
    return sys.maxsize if steps >= num_inference_steps else steps * order
