"""Models of --models that are not in use: each rank keeps its pipelines in main memory, as far as
that has room, and the ones used longest ago go first.
"""

import gc
import logging
from collections import OrderedDict
from dataclasses import dataclass

from backends.generation.pipeline import LoadedPipeline
from backends.main_memory import main_memory
from hosts.launch.start_plan import StartPlan
from hosts.ranks.commands import agree_on_outcome

logger = logging.getLogger(__name__)

SPARE = 0.1
"""Fraction of the main memory that models leave free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptModel:
    """A pipeline with nothing attached, and how it is run."""

    start: StartPlan
    pipeline: LoadedPipeline


class KeptModels:
    """One rank's. All ranks of the machine call every method at the same time, so they keep the
    same models.
    """

    def __init__(self, *, num_ranks: int = 1, limit_bytes: int | None = None) -> None:
        """num_ranks: that keep a copy each. limit_bytes: for all copies together; None for what is
        free.
        """
        self._num_ranks = num_ranks
        self._limit_bytes = limit_bytes
        self._models: OrderedDict[str, KeptModel] = OrderedDict()

    def put(self, name: str, start: StartPlan, pipeline: LoadedPipeline) -> None:
        """Move a pipeline with nothing attached to main memory, and keep it."""
        if pipeline.load.offload is None:  # else it is there already
            pipeline.rest()
        self._models[name] = KeptModel(start=start, pipeline=pipeline)

    def take(self, name: str) -> KeptModel | None:
        return self._models.pop(name, None)

    def make_room(self, num_bytes: int, *, is_used: bool = False) -> bool:
        """Unload models until one more of this size on each rank has room. Return whether it has.

        is_used: it is loaded for the next job, and so does not count for the limit.
        """
        if is_used and self._limit_bytes is not None:
            return True
        while not (has_room := self._has_room(num_bytes * self._num_ranks)) and self._models:
            name, model = self._models.popitem(last=False)
            logger.info("model %s is unloaded to free main memory", name)
            del model
            gc.collect()  # pipelines hold themselves in cycles
        return has_room

    def _has_room(self, num_bytes: int) -> bool:
        if self._limit_bytes is not None:
            kept = sum(model.start.weight_bytes for model in self._models.values())
            return kept * self._num_ranks + num_bytes <= self._limit_bytes
        memory = main_memory()
        spare = memory.available - SPARE * memory.total
        free = agree_on_outcome(None, {"free": spare}).figures
        return min(each["free"] for each in free) >= num_bytes
