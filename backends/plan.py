"""Which rank does what: named axes and their degrees. Imports no torch, so that the launcher can
check a plan first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from backends.errors import PlanError

Exactness = Literal["exact", "reordered", "approximate"]
"""exact: same arithmetic order up to collectives; reordered: same mathematics, sums in another
order; approximate: stale values.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """The degrees of one method on `world_size` ranks, checked once; the only source of process
    groups (distributed.Mesh).

    axes: (name, degree) outermost first, so the last axis has neighbouring ranks. Names in use:
    data, cfg, patch, segment, stage, ulysses, ring, tensor. Axes of degree 1 may be left out.
    options: what the method's own code reads, already resolved (`warmup_steps`, `sync_mode`, ...).
    reasons: one sentence for each value that was chosen automatically; logged at start and printed
    by --check.
    """

    method: str
    axes: tuple[tuple[str, int], ...] = ()
    exactness: Exactness = "exact"
    options: Mapping[str, object] = field(default_factory=dict)
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
        return math.prod(degree for _, degree in self.axes)

    @property
    def splits_weights_by(self) -> str:
        """The setting by which each rank keeps only a part of the weights; empty where each keeps
        all of them.
        """
        settings = {
            "--shard_weights": bool(self.options.get("shard_weights")),
            "--parallelism=tensor": self.options.get("parallelism") == "tensor",
            "--pipefusion_parallel_degree": self.degree("stage") > 1,
            "--tensor_parallel_degree": self.method == "xdit" and self.degree("tensor") > 1,
        }
        return next((name for name, is_so in settings.items() if is_so), "")

    def degree(self, name: str) -> int:
        """Degree of an axis; 1 where the plan does not have it."""
        return dict(self.axes).get(name, 1)

    def ranks(self, *names: str, of_rank: int) -> tuple[int, ...]:
        """The ranks that differ from `of_rank` only along the axes `names`, in rank order (itself
        included).
        """
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
        """One line for logs: 'distrifuser: cfg 2 x patch 2 (exact)'."""
        axes = (
            " x ".join(f"{name} {degree}" for name, degree in self.axes if degree > 1) or "one rank"
        )
        return f"{self.method}: {axes} ({self.exactness})"


def require_world_size(plan: ParallelPlan, world_size: int) -> ParallelPlan:
    """The plan itself, or PlanError if its degrees do not multiply to the number of ranks."""
    if plan.world_size != world_size:
        given = " x ".join(f"{name} {degree}" for name, degree in plan.axes) or "1"
        raise PlanError(
            f"{plan.method}: {given} = {plan.world_size} ranks, but {world_size} are started. "
            f"Change the degrees or start {plan.world_size} with "
            f"--nproc_per_node={plan.world_size}."
        )
    return plan
