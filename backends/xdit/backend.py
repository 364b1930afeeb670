"""xDiT: attach what the plan asks for to a transformer pipeline."""

from typing import Any, ClassVar

from torch import nn

from backends.errors import RequestError
from backends.parallel.base import Backend, RunInfo
from backends.parallel.cfg_split import attach_batch_split, detach_batch_split
from backends.xdit.blocks import BlockTokens, sequence_parallel
from backends.xdit.stages import PipeFusion
from backends.xdit.tensor import TensorParallel
from backends.xdit.tokens import SequenceParallel


class XDiTBackend(Backend):
    """Ulysses, ring, PipeFusion, tensor and data parallelism on the denoiser. The base class adds
    the CFG split around them.
    """

    name: ClassVar[str] = "xdit"
    _method: SequenceParallel | BlockTokens | PipeFusion | None = None
    _tensor: TensorParallel | None = None

    @property
    def has_whole_weights(self) -> bool:
        """Return False under tensor parallelism only. PipeFusion's layers keep their widths, so a
        LoRA fits them.
        """
        return self.plan.degree("tensor") == 1

    def attach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Attach from the inside outwards: tensor, then stages or sequence, then data."""
        if self.plan.degree("tensor") > 1:
            self._tensor = TensorParallel(denoiser, self.mesh)
            self._tensor.attach()
        if self.plan.degree("stage") > 1:
            options = self.plan.options
            self._method = PipeFusion(
                denoiser,
                self.mesh,
                num_patches=options["num_pipeline_patch"],
                blocks_per_stage=options["attn_layer_num_for_pp"],
            )
        elif self.plan.degree("ulysses") * self.plan.degree("ring") > 1:
            self._method = sequence_parallel(denoiser, self.mesh)
        if self._method is not None:
            self._method.attach()
        attach_batch_split(denoiser, self.mesh, axis="data")

    def detach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Remove them in reverse order."""
        detach_batch_split(denoiser, axis="data")
        if self._method is not None:
            self._method.detach()
            self._method = None
        if self._tensor is not None:
            self._tensor.detach()
            self._tensor = None

    def check(self, run: RunInfo) -> None:
        """Raise RequestError for PipeFusion without a synchronous step."""
        if isinstance(self._method, PipeFusion) and run.request.warmup_steps == 0:
            raise RequestError(
                "warmup_steps=0 is not available with PipeFusion: the first step has no earlier "
                "values to use. Allowed: 1 or more.",
                field="warmup_steps",
            )

    def begin(self, run: RunInfo) -> None:
        """Start a generation."""
        super().begin(run)
        if isinstance(self._method, PipeFusion):
            asked = run.request.warmup_steps
            self._method.begin(
                (self.plan.options["warmup_steps"] if asked is None else asked) * run.order
            )

    def step_done(self) -> None:
        """Count one step."""
        super().step_done()
        if isinstance(self._method, PipeFusion):
            self._method.step_done()

    def end(self) -> None:
        """Wait for messages under way, and forget the stale values."""
        super().end()
        if isinstance(self._method, PipeFusion):
            self._method.end()
