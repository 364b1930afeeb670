"""The plan of `single`: one rank. Imports no torch."""

from collections.abc import Iterator, Mapping

from backends.autotune.cost import MethodCost, RankWork
from backends.errors import PlanError
from backends.model_table import ModelSpec
from backends.options import Option
from backends.plan import ParallelPlan

OPTIONS: tuple[Option, ...] = ()
READS: tuple[str, ...] = ()


def make_plan(spec: ModelSpec, options: Mapping[str, object], world_size: int) -> ParallelPlan:
    """One rank, whatever the model type."""
    if world_size != 1:
        raise PlanError(
            f"backend 'single' runs on one rank, but {world_size} are started. Use "
            "--nproc_per_node=1 or another backend."
        )
    return ParallelPlan(method="single")


def candidates(
    spec: ModelSpec, ranks: int, *, is_guided: bool
) -> Iterator[tuple[str, dict[str, object]]]:
    if ranks == 1:
        yield "", {}


def cost(plan: ParallelPlan, part: RankWork) -> MethodCost:
    return MethodCost(step_s=part.compute_s)
