"""xDiT: attach what the plan asks for to a transformer pipeline."""

from typing import Any, ClassVar

from torch import nn

from backends.errors import RequestError
from backends.groups.mesh import Mesh
from backends.model_table import ModelSpec
from backends.parallel.base import Backend, RunInfo
from backends.parallel.cfg_split import attach_batch_split, detach_batch_split
from backends.plan import ParallelPlan
from backends.xdit.blocks import BlockTokens, sequence_parallel
from backends.xdit.stages import PipeFusion
from backends.xdit.tensor import TensorParallel
from backends.xdit.tokens import SequenceParallel

Method = TensorParallel | PipeFusion | SequenceParallel | BlockTokens


class XDiTBackend(Backend):
    """Ulysses, ring, PipeFusion, tensor and data parallelism on each denoiser. The base class adds
    the CFG split around them.
    """

    name: ClassVar[str] = "xdit"

    def __init__(self, *, spec: ModelSpec, plan: ParallelPlan, mesh: Mesh) -> None:
        super().__init__(spec=spec, plan=plan, mesh=mesh)
        self._attached: list[tuple[nn.Module, list[Method]]] = []

    def attach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Attach from the inside outwards: tensor, then stages or sequence, then data."""
        methods: list[Method] = []
        if self.plan.degree("tensor") > 1:
            methods.append(TensorParallel(denoiser, self.mesh))
            methods[-1].attach()
        if self.plan.degree("stage") > 1:
            options = self.plan.options
            methods.append(
                PipeFusion(
                    denoiser,
                    self.mesh,
                    num_patches=options["num_pipeline_patch"],
                    blocks_per_stage=options["attn_layer_num_for_pp"],
                )
            )
            methods[-1].attach()
        elif self.plan.degree("ulysses") * self.plan.degree("ring") > 1:
            methods.append(sequence_parallel(denoiser, self.mesh))
            methods[-1].attach()
        self._attached.append((denoiser, methods))
        attach_batch_split(denoiser, self.mesh, axis="data")

    def detach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Remove them in reverse order."""
        detach_batch_split(denoiser, axis="data")
        for one, methods in self._attached:
            if one is denoiser:
                for method in reversed(methods):
                    method.detach()
        self._attached = [entry for entry in self._attached if entry[0] is not denoiser]

    @property
    def _pipefusions(self) -> list[PipeFusion]:
        every = (method for _, methods in self._attached for method in methods)
        return [method for method in every if isinstance(method, PipeFusion)]

    def check(self, run: RunInfo) -> None:
        """Raise RequestError for PipeFusion without a synchronous step."""
        if self._pipefusions and run.request.warmup_steps == 0:
            raise RequestError(
                "warmup_steps=0 is not available with PipeFusion: the first step has no earlier "
                "values to use. Allowed: 1 or more.",
                field="warmup_steps",
            )

    def begin(self, run: RunInfo) -> None:
        """Start a generation."""
        super().begin(run)
        for method in self._pipefusions:
            asked = run.request.warmup_steps
            method.begin(
                (self.plan.options["warmup_steps"] if asked is None else asked) * run.order
            )

    def step_done(self) -> None:
        """Count one step."""
        super().step_done()
        for method in self._pipefusions:
            method.step_done()

    def end(self) -> None:
        """Wait for messages under way, and forget the stale values."""
        super().end()
        for method in self._pipefusions:
            method.end()
