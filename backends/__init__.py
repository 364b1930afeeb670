"""The parallel backends by name. torch is imported only when a backend's class is asked for."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from backends.errors import ConfigError

if TYPE_CHECKING:
    from backends.autotune.cost import MethodCost, RankWork
    from backends.model_table import ModelSpec
    from backends.options import Option
    from backends.parallel.base import Backend
    from backends.plan import ParallelPlan

_BACKENDS = {
    "single": "SingleBackend",
    "asyncdiff": "AsyncDiffBackend",
    "distrifuser": "DistriFuserBackend",
    "xdit": "XDiTBackend",
}
"""Folder below backends/ -> class in its backend.py. Each folder also has a torch-free plan.py."""

BACKEND_NAMES = tuple(_BACKENDS)
WITHOUT_ROW = {"asyncdiff": "denoiser", "single": "", "xdit": "transformer"}
"""Backends that need no row of the model table, in order of preference -> what they divide.

The first finds all parts of a denoiser by looking; the last spreads the tokens of transformers of
known classes.
"""


class PlanModule(Protocol):
    """The contents of each backend's plan.py."""

    OPTIONS: "tuple[Option, ...]"
    """The backend's own launch options."""
    READS: tuple[str, ...]
    """Options that another backend declares and this one reads too."""

    def make_plan(
        self, spec: "ModelSpec", options: Mapping[str, object], world_size: int
    ) -> "ParallelPlan":
        """Return the plan for these launch options. PlanError if they do not fit together."""

    def candidates(
        self, spec: "ModelSpec", ranks: int, *, is_guided: bool
    ) -> Iterable[tuple[str, dict[str, object]]]:
        """Yield (name, launch options) of each way to run one image that is worth trying. A name
        "WAY, VARIANT" is of a variant that takes as long as WAY, which came before it.
        """

    def cost(self, plan: "ParallelPlan", part: "RankWork") -> "MethodCost":
        """Return the cost of one step of this plan, within one half of the CFG split."""


def backend_class(name: str) -> "type[Backend]":
    """Return the class of a backend; imports torch."""
    return getattr(importlib.import_module(f"backends.{_known(name)}.backend"), _BACKENDS[name])


def planner(name: str) -> "Callable[..., ParallelPlan]":
    """Return the `make_plan` of a backend."""
    return plan_module(name).make_plan


def plan_module(name: str) -> PlanModule:
    """Return the plan.py of a backend; imports no torch."""
    module: Any = importlib.import_module(f"backends.{_known(name)}.plan")
    return module


def _known(name: str) -> str:
    if name not in _BACKENDS:
        raise ConfigError(f"backend={name!r} is not known. Allowed: {', '.join(_BACKENDS)}.")
    return name
