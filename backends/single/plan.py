"""The plan of `single`: one rank."""

from collections.abc import Mapping

from backends.errors import PlanError
from backends.model_table import ModelSpec
from backends.plan import ParallelPlan


def make_plan(spec: ModelSpec, options: Mapping[str, object], world_size: int) -> ParallelPlan:
    """One rank, whatever the model type."""
    if world_size != 1:
        raise PlanError(
            f"backend 'single' runs on one rank, but {world_size} are started. Use "
            "--nproc_per_node=1 or another backend."
        )
    return ParallelPlan(method="single")
