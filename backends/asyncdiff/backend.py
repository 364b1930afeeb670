"""AsyncDiff: the denoiser in segments of consecutive units, one per rank. All segments run at once,
on values that are one turn old.

Source: Chen et al., NeurIPS 2024, arXiv:2406.06911. Cuts and communication are our own:
docs/asyncdiff.md.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from backends.asyncdiff.call_state import Generation
from backends.asyncdiff.exchange import Exchange
from backends.asyncdiff.schedule import (
    RankRole,
    extrapolates,
    num_synchronous_evaluations,
    num_synchronous_steps,
)
from backends.asyncdiff.segments import Segments, choose_segments
from backends.asyncdiff.trace import time_units, trace
from backends.asyncdiff.units import Layout, UnitHooks, find_units
from backends.groups.mesh import Mesh
from backends.model_table import ModelSpec
from backends.parallel import hooks
from backends.parallel.base import Backend, RunInfo
from backends.parallel.weight_shards import KeptWeights, weight_bytes
from backends.plan import ParallelPlan

logger = logging.getLogger(__name__)

NAME = "segments"

CostsOf = Callable[[UnitHooks, Callable[[], Any], Layout, torch.device], list[float]]
"""Return the costs of the units in the layout's order. Called on rank 0 only."""


class AsyncDiffBackend(Backend):
    """`costs_of` weighs the units for the cuts: measured times, unless it is replaced."""

    name: ClassVar[str] = "asyncdiff"

    def __init__(self, *, spec: ModelSpec, plan: ParallelPlan, mesh: Mesh) -> None:
        super().__init__(spec=spec, plan=plan, mesh=mesh)
        self.costs_of: CostsOf = time_units
        self.segments: Segments | None = None
        self._denoiser: nn.Module | None = None
        self._hooks: UnitHooks | None = None
        self._sharded: KeptWeights | None = None
        self._generation: Generation | None = None
        self._report: dict[str, object] = {}

    def attach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Hook the units and the denoiser. The cuts are chosen in its first call, and kept when it
        is attached again: times vary, and other cuts would generate another image.
        """
        if self.mesh.axis("segment").size == 1:
            return
        self.mesh.axis("cfg", "segment")  # the first use is collective
        self._pipe = pipe
        if denoiser is not self._denoiser:
            self._denoiser, self.segments = denoiser, None
        self._hooks = UnitHooks(denoiser)
        hooks.attach(denoiser, NAME, self._around(denoiser))

    def compile_regions(self, denoiser: nn.Module) -> list[nn.Module]:
        """Return the units: each runs whole or not at all, so each can be one graph."""
        if self.mesh.axis("segment").size == 1:
            return super().compile_regions(denoiser)
        return [
            unit for unit in find_units(denoiser).values() if any(True for _ in unit.children())
        ]

    def detach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Remove the hooks, and fetch back the weights of other segments."""
        if self._hooks is None:
            return
        hooks.detach(denoiser, NAME)
        if self._sharded is not None:
            self._sharded.restore(self.mesh.axis("segment"))
            self._sharded = self.segments = None
        self._hooks.detach()
        self._hooks = None

    def begin(self, run: RunInfo) -> None:
        """Start the state of one generation."""
        super().begin(run)
        if self._hooks is None:
            return
        if not self._hooks.is_current():
            self._hooks.detach()
            self._hooks = UnitHooks(self._denoiser)
        steps = num_synchronous_steps(self.plan.options, run.request, run.num_inference_steps)
        self._generation = Generation(
            role=self._role(),
            options={
                **self.plan.options,
                "extrapolate": extrapolates(self.plan.options, order=run.order),
            },
            exchange=Exchange(self.mesh),
            num_synchronous=num_synchronous_evaluations(steps, run.num_inference_steps, run.order),
            scheduler=lambda: self._pipe.scheduler,
        )

    def step_done(self) -> None:
        """Count one evaluation."""
        super().step_done()
        if self._generation is not None:
            self._generation.step_done()

    def end(self) -> None:
        """Wait for messages under way, unless the generation failed, and drop its state."""
        super().end()
        generation, self._generation = self._generation, None
        if generation is None:
            return
        self._report = self._figures(generation)
        if not generation.has_failed:
            generation.exchange.settle()

    def report(self) -> Mapping[str, object]:
        """Return the figures of the running generation so far, else those of the last one."""
        figures = self._figures(self._generation) if self._generation is not None else self._report
        return {**super().report(), **figures}

    def _role(self) -> RankRole:
        options = self.plan.options
        return RankRole(
            num_segments=int(options["model_n"]),
            stride=int(options["stride"]),
            rank=self.mesh.axis("segment").rank,
        )

    def _around(self, denoiser: nn.Module) -> hooks.Around:
        names = [
            name for name in inspect.signature(type(denoiser).forward).parameters if name != "self"
        ]

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            if self._generation is None:
                return forward(**arguments)
            if isinstance(arguments[names[0]], list):
                return _listed(
                    self._evaluate(
                        from_tensors(forward, names), as_tensors(arguments, names), names[0]
                    )
                )
            return self._evaluate(forward, arguments, names[0])

        return around

    def _evaluate(
        self, forward: Callable[..., Any], arguments: dict[str, Any], input_name: str
    ) -> Any:
        if self.segments is None:
            self.segments = self._learn(
                lambda: forward(**_copy_lists(arguments)), arguments[input_name]
            )
            if self.plan.options["shard_weights"]:
                self._sharded = self._keep_own_segment(self.segments)
        return self._generation.evaluate(self._hooks, self.segments, forward, arguments, input_name)

    def _learn(self, call: Callable[[], Any], model_input: torch.Tensor) -> Segments:
        """Find the units in a real call, weigh them and cut. Rank 0 weighs and decides; all ranks
        receive its cuts.
        """
        layout, _ = trace(self._hooks, call, model_input)
        num_segments = int(self.plan.options["model_n"])
        bounds = torch.zeros(num_segments + 1, dtype=torch.int64, device=self.mesh.device)
        if self.mesh.rank == 0:
            costs = self._costs(call, layout)
            segments = choose_segments(
                layout, costs, num_segments, self.plan.options["segment_weights"]
            )
            logger.info("segments of %s:\n%s", type(self._denoiser).__name__, segments.table(costs))
            bounds.copy_(torch.tensor(segments.bounds))
        control_axis = self.mesh.axis("cfg", "segment")
        dist.broadcast(bounds, src=control_axis.ranks[0], group=control_axis.group)
        return Segments(layout, tuple(bounds.tolist()))

    def _keep_own_segment(self, segments: Segments) -> KeptWeights:
        units = segments.layout.units
        parts = [
            [self._hooks.modules[units[unit].name] for unit in segments.units(segment)]
            for segment in range(segments.num_segments)
        ]
        return KeptWeights(parts, kept=self._role().segment)

    def _costs(self, call: Callable[[], Any], layout: Layout) -> list[float]:
        """Return seconds; bytes where weights are sharded, because memory must then be even."""
        if self.plan.options["shard_weights"]:
            return [float(weight_bytes(self._hooks.modules[unit.name])) for unit in layout.units]
        return self.costs_of(self._hooks, call, layout, self.mesh.device)

    def _figures(self, generation: Generation) -> dict[str, object]:
        """Return bytes of one turn for all ranks together. With stride 2 a turn serves two
        evaluations.
        """
        shapes = generation.last_shapes()
        if shapes is None or self.segments is None:
            return {}
        role = self._role()
        crossing, everything, prediction = (
            shapes.traffic(self.segments, role),
            shapes.num_bytes(),
            generation.prediction_bytes,
        )
        others = self.mesh.axis("segment").size - 1
        return {
            "segment_bounds": self.segments.bounds,
            "stale_evaluations": generation.num_stale,
            "turn_bytes": crossing + prediction * others * role.stride,
            "turn_bytes_if_all_outputs_were_broadcast": everything * others
            + prediction * others * role.stride,
        }


def _copy_lists(arguments: dict[str, Any]) -> dict[str, Any]:
    """Copy the lists among the arguments. Some denoisers take items off a list (ControlNet
    residuals of HunyuanDiT), and this call is made several times.
    """
    return {
        name: list(value) if isinstance(value, list) else value for name, value in arguments.items()
    }


def as_tensors(arguments: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Convert the arguments of a denoiser that takes a list of images first and the timestep
    second: one tensor (B, ...), and `timestep`.
    """
    images, timestep, *_ = names
    others = {name: value for name, value in arguments.items() if name not in (images, timestep)}
    return {images: torch.stack(arguments[images]), "timestep": arguments[timestep], **others}


def from_tensors(forward: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """Wrap such a `forward` so that it takes and returns one tensor."""
    images, timestep, *_ = names

    def call(**arguments: Any) -> Any:
        given = {images: list(arguments.pop(images).unbind()), timestep: arguments.pop("timestep")}
        return (torch.stack(forward(**given, **arguments)[0]),)

    return call


def _listed(output: tuple[Any]) -> tuple[list[Any]]:
    return (list(output[0].unbind()),)
