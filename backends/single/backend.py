"""Plain diffusers: attaches nothing."""

from typing import Any, ClassVar

from torch import nn

from backends.parallel.base import Backend


class SingleBackend(Backend):
    name: ClassVar[str] = "single"

    def attach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Nothing to attach: one rank computes everything."""

    def detach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Nothing was attached."""
