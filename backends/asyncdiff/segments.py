"""Where to cut: consecutive units in segments, so that the slowest segment takes as little time as
possible, and what crosses the cuts.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from backends.asyncdiff.units import Layout, Source
from backends.errors import PlanError

logger = logging.getLogger(__name__)

TOLERANCE = 0.02
"""Cuts this much slower than the best count as equal, because measured times differ more from call
to call. Among equal cuts the fewest bytes win.
"""


@dataclass(frozen=True, slots=True)
class Segments:
    """Segment s has the units bounds[s] .. bounds[s + 1] - 1. Every unit is in exactly one."""

    layout: Layout
    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        edges = (self.bounds[0], self.bounds[-1])
        assert edges == (0, len(self.layout.units)) and all(
            a < b for a, b in itertools.pairwise(self.bounds)
        ), self.bounds

    @property
    def num_segments(self) -> int:
        return len(self.bounds) - 1

    def units(self, segment: int) -> range:
        """Return the units of a segment."""
        return range(self.bounds[segment], self.bounds[segment + 1])

    def segment_of(self, unit: int) -> int:
        """Return the segment of a unit."""
        return next(segment for segment in range(self.num_segments) if unit in self.units(segment))

    def imports(self, segment: int) -> tuple[Source, ...]:
        """Return the tensors of other segments that this segment reads. The last segment also
        computes the denoiser's result.
        """
        mine = self.units(segment)
        reads = set().union(*(self.layout.units[unit].reads for unit in mine))
        if segment == self.num_segments - 1:
            reads |= self.layout.output_reads
        return tuple(sorted(source for source in reads if source[0] not in mine))

    def table(self, seconds: Sequence[float]) -> str:
        """Return one line for each unit (name, milliseconds, segment, part of the whole), then one
        for each segment.
        """
        total = sum(seconds) or 1.0
        lines = [f"{'unit':56} {'ms':>9} segment   share"]
        for index, (unit, cost) in enumerate(zip(self.layout.units, seconds, strict=True)):
            lines.append(
                f"{unit.name:56} {1e3 * cost:9.3f} {self.segment_of(index):7} {cost / total:7.1%}"
            )
        for segment in range(self.num_segments):
            share = sum(seconds[unit] for unit in self.units(segment)) / total
            received = sum(self.layout.num_bytes(source) for source in self.imports(segment))
            lines.append(
                f"segment {segment}: {len(self.units(segment))} units, {share:.1%} of the time, "
                f"reads {received / 1e6:.3f} MB of other segments"
            )
        return "\n".join(lines)


def choose_segments(
    layout: Layout,
    costs: Sequence[float],
    num_segments: int,
    weights: Sequence[float] | None = None,
) -> Segments:
    """Return the contiguous cuts whose largest segment (cost / weight) is smallest, and among near
    equals those with the fewest bytes across the cuts.

    costs: of each unit, in any unit of measure. weights: relative speed of each segment's rank.
    PlanError if there are more segments than units.
    """
    if num_segments > len(layout.units):
        raise PlanError(
            f"model_n={num_segments} is not possible: this model has {len(layout.units)} units. "
            f"Use at most {len(layout.units)} segments."
        )
    speeds = tuple(weights or [1.0] * num_segments)
    table = _Costs(costs, speeds, _live_bytes(layout))
    smallest = table.best_cuts(limit=float("inf"), by_bytes=False)[0]
    return Segments(layout, table.best_cuts(limit=smallest * (1 + TOLERANCE), by_bytes=True)[1])


def _live_bytes(layout: Layout) -> list[int]:
    """Return for each p the bytes that are computed before unit p and read at p or later: what the
    ranks send if there is a cut before p.
    """
    num_units = len(layout.units)
    last_reader: dict[Source, int] = {}
    for index, unit in enumerate(layout.units):
        last_reader |= dict.fromkeys(unit.reads, index)
    last_reader |= dict.fromkeys(layout.output_reads, num_units)
    return [
        sum(
            layout.num_bytes(source)
            for source, last in last_reader.items()
            if source[0] < p <= last
        )
        for p in range(num_units + 1)
    ]


class _Costs:
    """Dynamic programming over (segments placed, units placed)."""

    def __init__(
        self, costs: Sequence[float], speeds: Sequence[float], live_bytes: Sequence[int]
    ) -> None:
        self._total = [0.0, *itertools.accumulate(costs)]
        self._speeds = speeds
        self._live_bytes = live_bytes

    def best_cuts(self, *, limit: float, by_bytes: bool) -> tuple[float, tuple[int, ...]]:
        """Return (value, bounds) with the smallest largest segment, or with the fewest bytes if no
        segment may cost more than `limit`.
        """
        num_units = len(self._total) - 1
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
        for speed in self._speeds:
            placed: dict[int, tuple[float, tuple[int, ...]]] = {}
            for start, (value, bounds) in best.items():
                for stop in range(start + 1, num_units + 1):
                    cost = (self._total[stop] - self._total[start]) / speed
                    if cost > limit:
                        break
                    worse = value + self._live_bytes[stop] if by_bytes else max(value, cost)
                    if stop not in placed or (worse, (*bounds, stop)) < placed[stop]:
                        placed[stop] = (worse, (*bounds, stop))
            best = placed
        return best[num_units]
