"""Which evaluation does what: synchronous at the start, then every segment at once, or two
evaluations at a time (stride 2).

Pure arithmetic; docs/asyncdiff.md has the same in words. Source: AsyncDiff, arXiv:2406.06911,
method section.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from backends.request import GenerateRequest


class Phase(Enum):
    """What one evaluation of the denoiser is."""

    SYNCHRONOUS = "every unit runs on this evaluation's values"
    STALE = "every segment runs once, on what the others made one turn ago"
    AHEAD = "nothing runs: the turn before has predicted this evaluation as well"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRole:
    """This rank's part: the segment it computes. With stride 2 one more rank computes the last
    segment, for the nearer evaluation.
    """

    num_segments: int
    stride: int
    rank: int

    @property
    def segment(self) -> int:
        return min(self.rank, self.num_segments - 1)

    @property
    def is_nearer(self) -> bool:
        """Whether this rank computes for the evaluation at hand; with stride 2 the others compute
        for the one after it.
        """
        return self.stride == 1 or self.rank == self.num_segments

    @property
    def is_sender(self) -> bool:
        """The additional rank of stride 2 repeats the last segment, which no other segment
        reads.
        """
        return self.rank < self.num_segments - 1

    @property
    def predictor(self) -> int:
        """The rank whose result is the prediction of the evaluation at hand."""
        return self.num_segments if self.stride == 2 else self.num_segments - 1

    def ranks_of(self, segment: int) -> tuple[int, ...]:
        return tuple(
            rank
            for rank in range(self.num_segments + self.stride - 1)
            if min(rank, self.num_segments - 1) == segment
        )


def phase_of(evaluation: int, *, num_synchronous: int, stride: int) -> Phase:
    """evaluation: counted from 0 within one generation."""
    if evaluation < num_synchronous:
        return Phase.SYNCHRONOUS
    return Phase.STALE if (evaluation - num_synchronous) % stride == 0 else Phase.AHEAD


def num_synchronous_steps(
    options: Mapping[str, Any], request: GenerateRequest, num_inference_steps: int
) -> int:
    """Sampling steps at the start that are exact: the request's, else `synced_percent` of the
    steps, else `warmup_steps`; at least 1.

    One is needed because the first stale evaluation reads the values of the one before it.
    """
    steps = options["warmup_steps"]
    if options["synced_percent"] > 0:
        steps = math.floor(num_inference_steps * options["synced_percent"] / 100)
    if request.warmup_steps is not None:
        steps = request.warmup_steps
    return max(1, steps)


def extrapolates(options: Mapping[str, Any], *, order: int) -> bool:
    """Whether stale values are continued along a line: as asked, else where turns are evenly spaced
    and the timestep is the present one.

    order: evaluations per step of the sampler. Two of them do not lie on one line in time, and with
    stride 2 or a shifted timestep the values are not meant for the evaluation at hand.
    docs/quality.md has what it brings.
    """
    if options["extrapolate"] is not None:
        return bool(options["extrapolate"])
    return options["stride"] == 1 and not options["time_shift"] and order == 1


def num_synchronous_evaluations(steps: int, num_inference_steps: int, order: int) -> int:
    """The same in evaluations. A warm-up of all steps covers every evaluation: PNDM makes one more
    than it has steps.
    """
    return sys.maxsize if steps >= num_inference_steps else steps * order
