"""Bounds of the patches of an image or token sequence, one per rank. Arithmetic only, no torch."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from backends.errors import PlanError


@dataclass(frozen=True, slots=True)
class PatchBounds:
    """Consecutive parts of `total` rows (or tokens).

    Patch i spans bounds[i] to bounds[i + 1]. No patch is empty.
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
        """Return the patches after reducing the resolution by `factor`.

        Only the last bound may not be a multiple of `factor`; it is rounded up.
        """
        return PatchBounds(tuple(-(-bound // factor) for bound in self.bounds))


@lru_cache(maxsize=256)
def cut(
    total: int, weights: tuple[float, ...], unit: int = 1, *, what: str = "latent rows"
) -> PatchBounds:
    """Cut `total` rows into len(weights) patches with sizes nearly proportional to the weights.

    Inner bounds are multiples of `unit`; a network that halves its resolution k times needs 2 ** k.
    PlanError, which names the rows `what`, if there are fewer units than patches.
    """
    units = -(-total // unit)
    if units < len(weights):
        raise PlanError(
            f"{total} {what} cannot be cut into {len(weights)} patches: this model cuts at "
            f"multiples of {unit}, so at least {(len(weights) - 1) * unit + 1} are needed. "
            "Generate a larger image, or use fewer ranks for patches."
        )
    sizes = [1] * len(weights)
    for _ in range(units - len(weights)):
        slowest = min(range(len(weights)), key=lambda patch: (sizes[patch] + 1) / weights[patch])
        sizes[slowest] += 1
    return PatchBounds((0, *(min(total, end * unit) for end in accumulate(sizes))))


class RowLayout:
    """Finds the patches of a tensor inside a network from the shape of this rank's part.

    The network gets `rows` x `width` latents. It works at that resolution, at 1/2, 1/4, ...
    (`halvings` levels, rounded up as by a stride-2 convolution) and at 2, 4, ... times (`doublings`
    levels).
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
        """Return the row patches for a part of shape (..., height, width). PlanError if unknown."""
        return self._found(self._parts.get((height, width)), f"{height} x {width}")

    def tokens(self, length: int) -> PatchBounds:
        """Return the token patches for a part of `length` tokens in row order."""
        return self._found(self._tokens.get(length), f"{length} tokens")

    def parts(self) -> list[tuple[int, int]]:
        """Return (height, width) of this rank's part at all resolutions."""
        return list(self._parts)

    def is_part(self, height: int, width: int) -> bool:
        """Whether a (..., height, width) tensor is already this rank's patch."""
        return (height, width) in self._parts

    def whole(self, height: int, width: int) -> PatchBounds:
        """Return the row patches of a whole (..., height, width) tensor that is not cut yet."""
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
    """The counterpart of RowLayout for a transformer: one token sequence, one resolution."""

    def __init__(self, patches: PatchBounds, *, patch: int) -> None:
        self.patch = patch
        self._patches = patches

    def tokens(self, length: int) -> PatchBounds:
        """Return the patches of the image tokens. `length` also counts text tokens beside them."""
        if length < self._patches.size(self.patch):
            raise PlanError(
                f"an attention layer has {length} tokens, fewer than this rank's "
                f"{self._patches.size(self.patch)}. It cannot be cut."
            )
        return self._patches
