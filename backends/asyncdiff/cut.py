"""One denoiser in segments: its hooks, its cuts, and its state in one generation."""

import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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
from backends.asyncdiff.trace import trace
from backends.asyncdiff.units import Layout, UnitHooks
from backends.groups.mesh import Mesh
from backends.parallel import hooks
from backends.parallel.base import RunInfo
from backends.parallel.weight_shards import KeptWeights, full_bytes, settle
from backends.plan import ParallelPlan

logger = logging.getLogger(__name__)

NAME = "segments"

CostsOf = Callable[[UnitHooks, Callable[[], Any], Layout, torch.device], list[float]]
"""Return the costs of the units in the layout's order. Called on rank 0 only."""


class CutDenoiser:
    """A denoiser of a pipeline. Pipelines with a prior have two, and some with two noise ranges."""

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        plan: ParallelPlan,
        mesh: Mesh,
        costs_of: CostsOf,
        scheduler: Callable[[], Any],
    ) -> None:
        self.denoiser = denoiser
        self.segments: Segments | None = None
        self.generation: Generation | None = None
        self._plan = plan
        self._mesh = mesh
        self._costs_of = costs_of
        self._scheduler = scheduler
        self._hooks: UnitHooks
        self._sharded: KeptWeights | None = None

    def attach(self) -> None:
        self._hooks = UnitHooks(self.denoiser)
        hooks.attach(self.denoiser, NAME, self._around())

    def detach(self) -> None:
        """Remove the hooks, and fetch back the weights of other segments."""
        hooks.detach(self.denoiser, NAME)
        if self._sharded is not None:
            self._sharded.restore(self._mesh.axis("segment"))
            self._sharded = self.segments = None
        self._hooks.detach()

    def begin(self, run: RunInfo, exchange: Exchange) -> None:
        """Start the state of one generation."""
        if not self._hooks.is_current():
            self._hooks.detach()
            self._hooks = UnitHooks(self.denoiser)
        options = self._plan.options
        steps = num_synchronous_steps(options, run.request, run.num_inference_steps)
        self.generation = Generation(
            role=self.role,
            options={**options, "extrapolate": extrapolates(options, order=run.order)},
            exchange=exchange,
            num_synchronous=num_synchronous_evaluations(steps, run.num_inference_steps, run.order),
            scheduler=self._scheduler,
        )

    def step_done(self) -> None:
        """Count one evaluation."""
        if self.generation is not None:
            self.generation.step_done()

    def end(self) -> Generation | None:
        """Drop the state of the generation and return it."""
        generation, self.generation = self.generation, None
        return generation

    @property
    def role(self) -> RankRole:
        options = self._plan.options
        return RankRole(
            num_segments=int(options["model_n"]),
            stride=int(options["stride"]),
            rank=self._mesh.axis("segment").rank,
        )

    def _around(self) -> hooks.Around:
        names = [
            name
            for name in inspect.signature(type(self.denoiser).forward).parameters
            if name != "self"
        ]

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            if self.generation is None:
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
            with self._eagerly():
                self.segments = self._learn(
                    lambda: forward(**_copy_lists(arguments)), arguments[input_name]
                )
            if self._plan.options["shard_weights"]:
                self._sharded = self._keep_own_segment(self.segments)
                settle(self.denoiser)
        return self.generation.evaluate(
            self._hooks, self.segments, forward, arguments, input_name, denoiser=self.denoiser
        )

    def _eagerly(self) -> AbstractContextManager[None]:
        """Compile nothing for weights that other ranks will keep, or that are not read yet."""
        is_sharded = self._plan.options["shard_weights"]
        return torch.compiler.set_stance("force_eager") if is_sharded else nullcontext()

    def _learn(self, call: Callable[[], Any], model_input: torch.Tensor) -> Segments:
        """Find the units in a real call, weigh them and cut. Rank 0 weighs and decides; all ranks
        receive its cuts. Deferred weights are zeros here: what the call returns is not used.
        """
        layout, _ = trace(self._hooks, call, model_input)
        num_segments = int(self._plan.options["model_n"])
        bounds = torch.zeros(num_segments + 1, dtype=torch.int64, device=self._mesh.device)
        if self._mesh.rank == 0:
            costs = self._costs(call, layout)
            segments = choose_segments(
                layout, costs, num_segments, self._plan.options["segment_weights"]
            )
            logger.info("segments of %s:\n%s", type(self.denoiser).__name__, segments.table(costs))
            bounds.copy_(torch.tensor(segments.bounds))
        control_axis = self._mesh.axis("cfg", "segment")
        dist.broadcast(bounds, src=control_axis.ranks[0], group=control_axis.group)
        return Segments(layout, tuple(bounds.tolist()))

    def _keep_own_segment(self, segments: Segments) -> KeptWeights:
        units = segments.layout.units
        parts = [
            [self._hooks.modules[units[unit].name] for unit in segments.units(segment)]
            for segment in range(segments.num_segments)
        ]
        shared = segments.layout.shared_weights
        return KeptWeights(parts, kept=self.role.segment, shared=shared)

    def _costs(self, call: Callable[[], Any], layout: Layout) -> list[float]:
        """Return seconds; bytes where weights are sharded, because memory must then be even."""
        if self._plan.options["shard_weights"]:
            return [float(full_bytes(self._hooks.modules[unit.name])) for unit in layout.units]
        return self._costs_of(self._hooks, call, layout, self._mesh.device)


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
