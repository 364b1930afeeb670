"""AsyncDiff: the denoiser in segments of consecutive units, one per rank. All segments run at once,
on values that are one turn old.

Source: Chen et al., NeurIPS 2024, arXiv:2406.06911. Cuts and communication are our own:
docs/asyncdiff.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from backends.asyncdiff.call_state import Generation
from backends.asyncdiff.cut import CostsOf, CutDenoiser
from backends.asyncdiff.exchange import Exchange
from backends.asyncdiff.segments import Segments
from backends.asyncdiff.trace import time_units
from backends.asyncdiff.units import find_units
from backends.groups.mesh import Mesh
from backends.model_table import ModelSpec
from backends.parallel.base import Backend, RunInfo
from backends.plan import ParallelPlan


class AsyncDiffBackend(Backend):
    """`costs_of` weighs the units for the cuts: measured times, unless it is replaced."""

    name: ClassVar[str] = "asyncdiff"

    def __init__(self, *, spec: ModelSpec, plan: ParallelPlan, mesh: Mesh) -> None:
        super().__init__(spec=spec, plan=plan, mesh=mesh)
        self.costs_of: CostsOf = time_units
        self._cuts: list[CutDenoiser] = []
        self._known: list[CutDenoiser] = []  # those that were detached too
        self._report: dict[str, object] = {}

    @property
    def segments(self) -> Segments | None:
        """The cuts of the first denoiser that was called; None before that."""
        found = self._cuts or self._known
        return next((cut.segments for cut in found if cut.segments is not None), None)

    @property
    def cuts_in_first_call(self) -> bool:
        """Return True with sharded weights."""
        return bool(self.plan.options["shard_weights"]) and self.mesh.axis("segment").size > 1

    def attach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Hook the units and the denoiser. The cuts are chosen in its first call, and kept when it
        is attached again: times vary, and other cuts would generate another image.
        """
        if self.mesh.axis("segment").size == 1:
            return
        self.mesh.axis("cfg", "segment")  # the first use is collective
        cut = next((cut for cut in self._known if cut.denoiser is denoiser), None)
        if cut is None:
            cut = CutDenoiser(
                denoiser,
                plan=self.plan,
                mesh=self.mesh,
                costs_of=lambda *given: self.costs_of(*given),
                scheduler=lambda: pipe.scheduler,
            )
        cut.attach()
        self._cuts.append(cut)
        self._known = [*(each for each in self._known if each is not cut), cut]

    def compile_regions(self, denoiser: nn.Module) -> list[nn.Module]:
        """Return the units: each runs whole or not at all, so each can be one graph."""
        if self.mesh.axis("segment").size == 1:
            return super().compile_regions(denoiser)
        return [
            unit for unit in find_units(denoiser).values() if any(True for _ in unit.children())
        ]

    def detach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Remove the hooks, and fetch back the weights of other segments."""
        for cut in [cut for cut in self._cuts if cut.denoiser is denoiser]:
            cut.detach()
            self._cuts.remove(cut)

    def begin(self, run: RunInfo) -> None:
        """Start the state of one generation."""
        super().begin(run)
        exchange = Exchange(self.mesh) if self._cuts else None
        for cut in self._cuts:
            cut.begin(run, exchange)

    def step_done(self) -> None:
        """Count one evaluation."""
        super().step_done()
        for cut in self._cuts:
            cut.step_done()

    def end(self) -> None:
        """Wait for messages under way, unless the generation failed, and drop its state."""
        super().end()
        generations = [cut.end() for cut in self._cuts]
        if None in generations or not generations:
            return
        self._report = self._figures(generations)
        if not any(generation.has_failed for generation in generations):
            generations[0].exchange.settle()

    def report(self) -> Mapping[str, object]:
        """Return the figures of the running generation so far, else those of the last one."""
        generations = [cut.generation for cut in self._cuts if cut.generation is not None]
        figures = self._figures(generations) if generations else self._report
        return {**super().report(), **figures}

    def _figures(self, generations: Sequence[Generation]) -> dict[str, object]:
        """Return bytes of one turn for all ranks together. With stride 2 a turn serves two
        evaluations. Of several denoisers, those of the first one.
        """
        called = [
            (cut, generation)
            for cut, generation in zip(self._cuts, generations, strict=True)
            if generation.last_shapes() is not None and cut.segments is not None
        ]
        if not called:
            return {}
        cut, generation = called[0]
        role, shapes = cut.role, generation.last_shapes()
        crossing, everything, prediction = (
            shapes.traffic(cut.segments, role),
            shapes.num_bytes(),
            generation.prediction_bytes,
        )
        others = self.mesh.axis("segment").size - 1
        return {
            "segment_bounds": cut.segments.bounds,
            "stale_evaluations": sum(each.num_stale for _, each in called),
            "turn_bytes": crossing + prediction * others * role.stride,
            "turn_bytes_if_all_outputs_were_broadcast": everything * others
            + prediction * others * role.stride,
        }
