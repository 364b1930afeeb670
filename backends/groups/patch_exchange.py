"""Where a patch gets the other patches' values from: at once from the other ranks, or older ones
(distrifuser/stale.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

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

    def moments(self, own: Tensor, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the mean and variance (N, G) of the whole image.

        own: (2, N, G), those of this patch. shares: each patch's fraction of the image.
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


def combine(moments: Sequence[Tensor], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return mean and variance (...) of a whole from those of its parts (2, ...).

    Chan's formula avoids cancellation between large squares.
    """
    parts = [(share, *part.unbind()) for share, part in zip(shares, moments, strict=True)]
    mean = sum(share * of_part for share, of_part, _ in parts)
    var = sum(share * (var + (of_part - mean) ** 2) for share, of_part, var in parts)
    return mean, var
