"""Where a patch gets the other patches' values from: at once from the other ranks, or older ones
(distrifuser/stale.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from backends.groups.collectives import begin_gather, gather_pieces
from backends.groups.mesh import Axis, CommStats

Kind = Literal["halo", "statistics", "attention"]


class Exchange(ABC):
    """Source of the other patches' values."""

    @abstractmethod
    def gather(self, kind: Kind, own: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return one value per patch, in patch order.

        own: this patch's value. shapes: the shapes of all patches' values.
        """

    def begin(
        self, kind: Kind, own: Tensor, shapes: Sequence[Sequence[int]]
    ) -> Callable[[], list[Tensor]]:
        """Start `gather` in the background.

        Returns a function that waits for the values. The caller must call it.
        """
        pieces = self.gather(kind, own, shapes)
        return lambda: pieces

    def moments(self, own: Tensor, shares: Sequence[float]) -> Tensor:
        """Return the mean and variance (2, N, G) of the whole image.

        own: those of this patch. shares: each patch's fraction of the image.
        """
        return combine(self.gather("statistics", own, [own.shape] * len(shares)), shares)


class FreshExchange(Exchange):
    """Values of the current step: every operator waits for the other ranks. Exact."""

    def __init__(self, *, axis: Axis, traffic: CommStats) -> None:
        self.axis = axis
        self.traffic = traffic

    def gather(self, kind: Kind, own: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        return gather_pieces(own, shapes, axis=self.axis, traffic=self.traffic)

    def begin(
        self, kind: Kind, own: Tensor, shapes: Sequence[Sequence[int]]
    ) -> Callable[[], list[Tensor]]:
        return begin_gather(own, shapes, axis=self.axis, traffic=self.traffic)


def combine(moments: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return mean and variance of a whole from those of its parts.

    Chan's formula avoids cancellation between large squares.
    """
    mean = sum(share * part[0] for share, part in zip(shares, moments, strict=True))
    var = sum(
        share * (part[1] + (part[0] - mean) ** 2)
        for share, part in zip(shares, moments, strict=True)
    )
    return torch.stack((mean, var))
