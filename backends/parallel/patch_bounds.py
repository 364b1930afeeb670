"""How an image (or a token sequence) is cut into patches, one per rank: arithmetic only, no torch
and no communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from backends.errors import PlanError


@dataclass(frozen=True, slots=True)
class PatchBounds:
    """Consecutive parts of `total` rows (or tokens): patch i is bounds[i] to bounds[i + 1]. No
    patch is empty.
    """

    bounds: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.bounds[-1]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.size(patch) for patch in range(len(self)))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def size(self, patch: int) -> int:
        return self.bounds[patch + 1] - self.bounds[patch]

    def scaled(self, factor: int) -> "PatchBounds":
        return PatchBounds(tuple(bound * factor for bound in self.bounds))

    def reduced(self, factor: int) -> "PatchBounds":
        """The patches after reducing the resolution by `factor`; only the last bound may not divide
        by it, and is rounded up.
        """
        return PatchBounds(tuple(-(-bound // factor) for bound in self.bounds))


@lru_cache(maxsize=256)
def cut(
    total: int, weights: tuple[float, ...], unit: int = 1, *, what: str = "latent rows"
) -> PatchBounds:
    """Cut `total` rows into len(weights) patches whose sizes are near the weights' shares and whose
    inner bounds divide by `unit`.

    unit: a network that halves its resolution k times needs 2 ** k. PlanError if there are fewer
    units than patches; `what` names them.
    """
    units = -(-total // unit)
    if units < len(weights):
        raise PlanError(
            f"{total} {what} cannot be cut into {len(weights)} patches: this model cuts at every "
            f"{unit}, so at least "
            f"{(len(weights) - 1) * unit + 1} are needed. Make a larger image, or use fewer ranks "
            "for patches."
        )
    sizes = [1] * len(weights)
    for _ in range(units - len(weights)):
        slowest = min(range(len(weights)), key=lambda patch: (sizes[patch] + 1) / weights[patch])
        sizes[slowest] += 1
    return PatchBounds((0, *(min(total, end * unit) for end in accumulate(sizes))))


class RowLayout:
    """Finds the patches that belong to a tensor inside a network, from the shape of this rank's
    part of it.

    The network gets `rows` x `width` and works at that resolution, at 1/2, 1/4, ... (`halvings` of
    them, rounding up as a convolution of stride 2 does) and at 2, 4, ... times (`doublings`).
    """

    def __init__(
        self, rows: PatchBounds, width: int, *, patch: int, halvings: int = 0, doublings: int = 0
    ) -> None:
        self.patch = patch
        down = [(rows.reduced(2**k), -(-width // 2**k)) for k in range(halvings + 1)]
        up = [(rows.scaled(2**k), width * 2**k) for k in range(1, doublings + 1)]
        self._parts = {(patches.size(patch), wide): patches for patches, wide in down + up}
        self._wholes = {(patches.total, wide): patches for patches, wide in down + up}
        self._tokens = {
            patches.size(patch) * wide: patches.scaled(wide) for patches, wide in down + up
        }
        if len(self._tokens) < len(down + up):
            raise PlanError(
                f"an image {width} latent columns wide is too narrow to be cut into patches. Use a "
                "larger width or one rank."
            )

    def rows(self, height: int, width: int) -> PatchBounds:
        """Patches of rows of a (..., height, width) part."""
        return self._found(self._parts.get((height, width)), f"{height} x {width}")

    def tokens(self, length: int) -> PatchBounds:
        """Patches of tokens of a part with `length` tokens, row after row."""
        return self._found(self._tokens.get(length), f"{length} tokens")

    def is_part(self, height: int, width: int) -> bool:
        """Whether a (..., height, width) tensor is this rank's patch already."""
        return (height, width) in self._parts

    def whole(self, height: int, width: int) -> PatchBounds:
        """Patches of rows of a whole (..., height, width) tensor, not cut yet."""
        return self._found(self._wholes.get((height, width)), f"{height} x {width}")

    def _found(self, patches: PatchBounds | None, what: str) -> PatchBounds:
        if patches is None:
            known = ", ".join(f"{height} x {width}" for height, width in self._parts)
            raise PlanError(
                f"the network works on a part of {what}, but this rank's parts are {known}. It "
                "cannot be cut into patches."
            )
        return patches


class TokenLayout:
    """The same for a transformer: one token sequence, one resolution."""

    def __init__(self, patches: PatchBounds, *, patch: int) -> None:
        self.patch = patch
        self._patches = patches

    def tokens(self, length: int) -> PatchBounds:
        """Patches of the image's tokens; `length` includes text tokens beside them."""
        if length < self._patches.size(self.patch):
            raise PlanError(
                f"an attention has {length} tokens, fewer than this rank's "
                f"{self._patches.size(self.patch)}. It cannot be cut."
            )
        return self._patches


def parse_weights(text: str | Sequence[float]) -> tuple[float, ...]:
    """'1.0,0.6' or a list of numbers -> relative speeds of the ranks. PlanError if one is not a
    positive number.
    """
    parts = text.split(",") if isinstance(text, str) else text
    try:
        weights = tuple(float(part) for part in parts)
    except ValueError:
        weights = ()
    if not weights or any(not 0 < weight < float("inf") for weight in weights):
        raise PlanError(
            f"patch_weights={text!r} is not allowed. Give one positive number per rank of an "
            "image, such as 1.0,0.6."
        )
    return weights
