"""XDiTBackend: attaches what the plan asks for to a transformer pipeline."""

from typing import Any, ClassVar

from torch import nn

from backends.base import Backend
from backends.xdit.tokens import SequenceParallel


class XDiTBackend(Backend):
    """Ulysses, ring and PipeFusion on the denoiser; the CFG split comes around them from the base class."""

    name: ClassVar[str] = "xdit"
    _method: SequenceParallel | None = None

    def attach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        if self.plan.degree("ulysses") * self.plan.degree("ring") > 1:
            self._method = SequenceParallel(denoiser, self.mesh)
            self._method.attach()

    def detach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        if self._method is not None:
            self._method.detach()
            self._method = None
