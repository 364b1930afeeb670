"""Backend: the interface of every parallel method.

A backend is attached from outside to a loaded diffusers pipeline and can be detached.
`attach(pipe)` is called once after loading. Each generation calls `begin(run)`, runs the pipeline
with `step_done()` after each scheduler step, and calls `end()`, also after a failure. Every rank
makes all calls in the same order with the same arguments.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from backends.groups.mesh import Mesh
from backends.model_table import ModelSpec
from backends.parallel.cfg_split import attach_batch_split, detach_batch_split
from backends.parallel.cfg_two_calls import PairSplit
from backends.parallel.cfg_unknown import GuidanceSplit
from backends.parallel.regions import quiet_regions
from backends.parallel.weight_shards import settle
from backends.plan import Exactness, ParallelPlan
from backends.request import GenerateRequest
from backends.step_cache_spec import StepCacheSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """Facts about one generation that the backends need."""

    request: GenerateRequest
    height: int  # pixels of the result
    width: int
    num_inference_steps: int  # requested sampling steps, before a step window removes some
    # Denoiser evaluations per sampling step (2 for heun, dpm_2, ...); each ends in one `step_done`.
    order: int = 1
    step_cache: StepCacheSpec | None = None  # in use during this generation

    @property
    def skips_whole_steps(self) -> bool:
        """Whether there are steps of which a method is told nothing, not even `step_done`."""
        return self.step_cache is not None and self.step_cache.skips_whole_steps


class Backend(ABC):
    """A parallel method on this rank."""

    name: ClassVar[str]

    def __init__(self, *, spec: ModelSpec, plan: ParallelPlan, mesh: Mesh) -> None:
        self.spec = spec
        self.plan = plan
        self.mesh = mesh
        self._pairs: list[PairSplit] = []
        self._unknown: list[GuidanceSplit] = []

    def attach(self, pipe: Any) -> None:
        """Parallelise this pipeline instance.

        The method's own hooks go on first, the shared CFG split around them.
        """
        for denoiser in self.denoisers_of(pipe):
            self.attach_denoiser(pipe, denoiser)
            if not self.cuts_in_first_call:
                settle(denoiser)
            if self.mesh.axis("cfg").size == 1:
                continue
            if self.spec.runs_as_is or self.spec.is_of_another_class:
                self._unknown.append(GuidanceSplit(denoiser, self.mesh))
                self._unknown[-1].attach()
            elif self.spec.guidance_calls == 2:
                self._pairs.append(PairSplit(denoiser, self.mesh))
                self._pairs[-1].attach()
            else:
                attach_batch_split(denoiser, self.mesh)

    def detach(self, pipe: Any) -> None:
        """Restore the pipeline to its state before `attach`."""
        for split in (*self._pairs, *self._unknown):
            split.detach()
        self._pairs, self._unknown = [], []
        for denoiser in self.denoisers_of(pipe):
            detach_batch_split(denoiser)
            self.detach_denoiser(pipe, denoiser)

    def refuse_split(self) -> None:
        """Divide a step's calls among ranks no more: this pipeline raised GuidanceChanged."""
        for split in self._unknown:
            split.refuse()

    @property
    def has_whole_weights(self) -> bool:
        """Whether this rank keeps all layers at full size.

        If so, a LoRA can be loaded after attaching.
        """
        return self.plan.keeps_widths

    @property
    def cuts_in_first_call(self) -> bool:
        """Whether it is known only in the denoiser's first call which weights this rank keeps.

        If so, the method settles deferred weights itself (weight_shards.py).
        """
        return False

    def denoiser_of(self, pipe: Any) -> nn.Module:
        return getattr(pipe, self.spec.denoiser)

    def denoisers_of(self, pipe: Any) -> list[nn.Module]:
        """Return the denoiser, and those that run in other steps. Some are absent."""
        found = (getattr(pipe, name, None) for name in self.spec.denoisers)
        return [module for module in found if isinstance(module, nn.Module)]

    def compile_regions(self, denoiser: nn.Module) -> list[nn.Module]:
        """Return the parts of the denoiser that may be compiled: none of them waits for another
        rank.

        If only the batch is split, this is the whole denoiser.
        """
        is_whole = all(degree == 1 or axis in ("cfg", "data") for axis, degree in self.plan.axes)
        return [denoiser] if is_whole else quiet_regions(denoiser)

    @abstractmethod
    def attach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Attach the method to the denoiser, and to a ControlNet or VAE of `pipe` if it covers
        them.
        """

    @abstractmethod
    def detach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Undo `attach_denoiser`."""

    def check(self, run: RunInfo) -> None:
        """Raise PlanError or UnsupportedError for a run that this method cannot do.

        Called on rank 0 before the broadcast and again on every rank. It only computes with numbers
        and must give the same result everywhere.
        """

    def exactness_of(self, run: RunInfo) -> Exactness:
        """Return how closely this run matches one rank.

        The plan says so, unless the method depends on the request.
        """
        return self.plan.exactness

    def begin(self, run: RunInfo) -> None:
        """Start a generation and forget the state of the previous one.

        Overrides must call it, and likewise `step_done` and `end`.
        """
        scale = run.request.guidance_scale
        for pairs in self._pairs:
            pairs.begin(is_on=(self.spec.guidance_scale if scale is None else scale) > 1)
        for split in self._unknown:
            split.begin()

    def step_done(self) -> None:
        """Note that this rank has finished a scheduler step (one denoiser evaluation)."""
        for split in (*self._pairs, *self._unknown):
            split.step_done()

    def end(self) -> None:
        """End a generation, successful or not: wait for pending transfers and drop its state."""
        for split in (*self._pairs, *self._unknown):
            split.end()

    def report(self) -> Mapping[str, object]:
        """Return figures of the last generation for logs and benchmarks: bytes sent, seconds
        waited, ...
        """
        traffic = self.mesh.traffic
        return {
            "sent_bytes": traffic.sent_bytes,
            "messages": traffic.messages,
            "wait_s": round(traffic.wait_s, 4),
            **({"guidance": [split.kind for split in self._unknown]} if self._unknown else {}),
        }
