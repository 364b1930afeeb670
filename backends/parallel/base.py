"""Backend: what every parallel method must offer. Attached from outside to a loaded diffusers
pipeline, and detachable.

Life: `attach(pipe)` once after loading; then for each generation `begin(run)`, the pipeline runs
(with `step_done` after each scheduler step), and `end()`, also when it failed. All calls are made
on every rank, in the same order, with the same arguments.
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
from backends.parallel.regions import quiet_regions
from backends.plan import Exactness, ParallelPlan
from backends.request import GenerateRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """One generation, as the backends need to know it."""

    request: GenerateRequest
    height: int  # pixels of the result
    width: int
    num_inference_steps: int  # sampling steps asked for, before a window cuts some off
    # Denoiser evaluations per sampling step (2 for heun, dpm_2, ...); each ends in one `step_done`.
    order: int = 1


class Backend(ABC):
    """A parallel method on this rank."""

    name: ClassVar[str]

    def __init__(self, *, spec: ModelSpec, plan: ParallelPlan, mesh: Mesh) -> None:
        self.spec = spec
        self.plan = plan
        self.mesh = mesh
        self._pairs: PairSplit | None = None

    def attach(self, pipe: Any) -> None:
        """Parallelise this pipeline instance: the method's own part first, the shared CFG split
        around it.
        """
        denoiser = self.denoiser_of(pipe)
        self.attach_denoiser(pipe, denoiser)
        if self.spec.guidance_calls == 2 and self.mesh.axis("cfg").size > 1:
            self._pairs = PairSplit(denoiser, self.mesh)
            self._pairs.attach()
        else:
            attach_batch_split(denoiser, self.mesh)

    def detach(self, pipe: Any) -> None:
        """Leave the pipeline as it was found."""
        if self._pairs is not None:
            self._pairs.detach()
            self._pairs = None
        detach_batch_split(self.denoiser_of(pipe))
        self.detach_denoiser(pipe, self.denoiser_of(pipe))

    @property
    def has_whole_weights(self) -> bool:
        """Whether this rank keeps all layers at their full size, so that a LoRA can be loaded after
        attaching.
        """
        return not self.plan.splits_weights_by

    def denoiser_of(self, pipe: Any) -> nn.Module:
        return getattr(pipe, self.spec.denoiser)

    def compile_regions(self, denoiser: nn.Module) -> list[nn.Module]:
        """The parts of the denoiser that may be compiled: nothing in them waits for another rank.
        All of it, if only the batch is split.
        """
        is_whole = all(degree == 1 or axis in ("cfg", "data") for axis, degree in self.plan.axes)
        return [denoiser] if is_whole else quiet_regions(denoiser)

    @abstractmethod
    def attach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Attach the method to the denoiser (and to a ControlNet or VAE of `pipe`, where the method
        covers them).
        """

    @abstractmethod
    def detach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Undo attach_denoiser."""

    def check(self, run: RunInfo) -> None:
        """Refuse, before anything is sent, a run that the method cannot follow (PlanError,
        UnsupportedError). Arithmetic only.

        Called on rank 0 before the broadcast and again on every rank: it must come to the same
        result everywhere.
        """

    def exactness_of(self, run: RunInfo) -> Exactness:
        """How close this run comes to one rank: as the plan says, unless a method depends on the
        request.
        """
        return self.plan.exactness

    def begin(self, run: RunInfo) -> None:
        """A generation starts: forget everything of the last one. To be called by what overrides
        it, as `step_done` and `end`.
        """
        if self._pairs is not None:
            scale = run.request.guidance_scale
            self._pairs.begin(is_on=(self.spec.guidance_scale if scale is None else scale) > 1)

    def step_done(self) -> None:
        """A scheduler step (one denoiser evaluation) has been made on this rank."""
        if self._pairs is not None:
            self._pairs.step_done()

    def end(self) -> None:
        """The generation is over, well or not: wait for what is still under way and drop its
        state.
        """
        if self._pairs is not None:
            self._pairs.end()

    def report(self) -> Mapping[str, object]:
        """Figures of the last generation for logs, settings and benchmarks: bytes sent, seconds
        waited, ...
        """
        traffic = self.mesh.traffic
        return {
            "sent_bytes": traffic.sent_bytes,
            "messages": traffic.messages,
            "wait_s": round(traffic.wait_s, 4),
        }
