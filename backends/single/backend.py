"""Plain diffusers on one rank. Attaches nothing."""

from typing import Any, ClassVar

from torch import nn

from backends.parallel.base import Backend


class SingleBackend(Backend):
    """One rank alone: the reference for every other backend."""

    name: ClassVar[str] = "single"

    def attach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Do nothing: one rank computes everything."""

    def detach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Do nothing: nothing was attached."""
