"""Parallel backends, by the customer's names. Naming one does not import torch; using it does,
late.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from backends.errors import ConfigError

if TYPE_CHECKING:
    from backends.parallel.base import Backend
    from backends.plan import ParallelPlan

_BACKENDS = {
    "single": "SingleBackend",
    "asyncdiff": "AsyncDiffBackend",
    "distrifuser": "DistriFuserBackend",
    "xdit": "XDiTBackend",
}
"""Folder below backends/ -> class in its backend.py. Each folder also has a plan.py that imports no
torch.
"""

BACKEND_NAMES = tuple(_BACKENDS)


def backend_class(name: str) -> "type[Backend]":
    """The class of a backend; imports torch."""
    return getattr(importlib.import_module(f"backends.{_known(name)}.backend"), _BACKENDS[name])


def planner(name: str) -> "Callable[..., ParallelPlan]":
    """`make_plan(spec, options, world_size)` of a backend; imports no torch. Raises PlanError where
    nothing fits.
    """
    module: Any = importlib.import_module(f"backends.{_known(name)}.plan")
    return module.make_plan


def _known(name: str) -> str:
    if name not in _BACKENDS:
        raise ConfigError(f"backend={name!r} is not known. Allowed: {', '.join(_BACKENDS)}.")
    return name
