"""Which rank does what: named axes and their degrees. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from backends.errors import PlanError

Exactness = Literal["exact", "reordered", "approximate"]
"""exact: same order of arithmetic, up to collectives. reordered: same mathematics, sums in another
order. approximate: uses stale values.
"""
Quality = Literal["exact", "high", "fast"]
QUALITIES: tuple[Quality, ...] = ("exact", "high", "fast")
"""Strictest first: an image like one rank's; one measured to be close (docs/quality.md); any."""
PROMISED_DB: Mapping[Quality, float] = {"high": 40.0, "fast": 25.0}
"""PSNR of the latents against one rank that each level promises for a measured method. `exact`
promises the same mathematics: an image within 1 of 255 in float32.
"""
FEW_STEPS = 15
"""With fewer steps `high` allows no stale values and no skipped steps: each is a large part of the
image, and closeness was measured with 20 and more (docs/quality.md).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """The degrees of one method on `world_size` ranks, validated on construction.

    The only source of process groups (groups/mesh.py). Shared code reads the facts, never
    `options`.
    """

    method: str  # name of the backend
    # (name, degree), outermost first: the last axis joins neighbouring ranks. Names in use: data,
    # cfg, patch, segment, stage, ulysses, ring, tensor. Axes of degree 1 may be left out.
    axes: tuple[tuple[str, int], ...] = ()
    exactness: Exactness = "exact"
    is_close: bool = False  # approximate, but measured to come close (docs/quality.md)
    # The launch option that shards the weights; empty if every rank keeps all of them.
    splits_weights_by: str = ""
    # Which values of the previous step are reused, and what to run instead: part of an error text.
    # Empty if every step is independent.
    reads_previous_step: str = ""
    # Whether such values may come from the last full step of a regular step cache.
    follows_step_cache: bool = False
    # What a step does for the next one, which may be skipped as a whole: the same kind of text.
    begins_next_step: str = ""
    # Whether all ranks run the same blocks of the denoiser, in the same order.
    runs_every_block: bool = True
    intercepts_sdpa: bool = False  # reaches other ranks' tokens through torch's attention operator
    # Why an image must be generated before the host is ready; empty if none is needed.
    needs_prewarm: str = ""
    step_cache: str = ""  # kind of step cache that the method's own options ask for
    # The method's own options, with every default resolved.
    options: Mapping[str, object] = field(default_factory=dict)
    # One sentence per automatically chosen value, for the log and --check.
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise PlanError(
                f"axes {names} of method {self.method!r} repeat a name. Each axis may be given "
                "once."
            )
        for name, degree in self.axes:
            if degree < 1:
                raise PlanError(
                    f"degree {degree} of axis {name!r} is not allowed. Degrees are whole numbers "
                    "from 1."
                )

    @property
    def world_size(self) -> int:
        """The number of ranks: the product of all degrees."""
        return math.prod(degree for _, degree in self.axes)

    @property
    def quality(self) -> Quality:
        """The strictest quality that the plan meets."""
        if self.exactness != "approximate":
            return "exact"
        return "high" if self.is_close else "fast"

    @property
    def keeps_widths(self) -> bool:
        """Whether all layers that a rank keeps have their full size.

        If so, a LoRA fits them. PipeFusion keeps whole blocks.
        """
        return not self.splits_weights_by or self.degree("stage") > 1

    def degree(self, name: str) -> int:
        """Return the degree of an axis; 1 if the plan does not have it."""
        return dict(self.axes).get(name, 1)

    def ranks(self, *names: str, of_rank: int) -> tuple[int, ...]:
        """Return the ranks that differ from `of_rank` only along the axes `names`, and itself."""
        here = self._coordinates(of_rank)
        fixed = [name for name, _ in self.axes if name not in names]
        return tuple(
            rank
            for rank in range(self.world_size)
            if all(self._coordinates(rank)[name] == here[name] for name in fixed)
        )

    def _coordinates(self, rank: int) -> dict[str, int]:
        coordinates: dict[str, int] = {}
        for name, degree in reversed(self.axes):
            coordinates[name] = rank % degree
            rank //= degree
        return coordinates

    def describe(self) -> str:
        """Return one line for logs: 'distrifuser: cfg 2 x patch 2 (exact)'."""
        return f"{self.method}: {times(**dict(self.axes)) or 'one rank'} ({self.exactness})"


def is_met(asked: Quality, by: Quality, *, num_steps: int) -> bool:
    """Return whether a method of quality `by` may generate an image of quality `asked` in
    `num_steps` steps.
    """
    if asked == "high" and num_steps < FEW_STEPS:
        asked = "exact"
    return QUALITIES.index(by) <= QUALITIES.index(asked)


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, in ascending order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def cfg_degrees(ranks: int, *, has_halves: bool) -> list[int]:
    """Return the possible degrees of the CFG split on `ranks` ranks, the largest first."""
    return [2, 1] if has_halves and ranks % 2 == 0 else [1]


def times(**degrees: int) -> str:
    """Return the degrees above 1 as text: 'cfg 2 x patch 2'."""
    return " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)


def require_world_size(plan: ParallelPlan, world_size: int) -> ParallelPlan:
    """Return the plan. PlanError if its degrees do not multiply to the number of ranks."""
    if plan.world_size != world_size:
        given = " x ".join(f"{name} {degree}" for name, degree in plan.axes) or "1"
        raise PlanError(
            f"{plan.method}: {given} = {plan.world_size} ranks, but {world_size} are started. "
            f"Change the degrees or start {plan.world_size} with "
            f"--nproc_per_node={plan.world_size}."
        )
    return plan
