"""Which tokens a rank computes: the arithmetic of shards (parts of the sequence on ranks) and
patches (parts in time, PipeFusion).

Pure Python but for `take`. A span is (start, stop).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Span = tuple[int, int]


def split(span: Span, *, parts: int, index: int) -> Span:
    """Part `index` of an even cut; lengths differ by at most one, and may be 0."""
    start, length = span[0], span[1] - span[0]
    return start + length * index // parts, start + length * (index + 1) // parts


def sizes(length: int, parts: int) -> list[int]:
    """Lengths of the parts of an even cut."""
    spans = [split((0, length), parts=parts, index=index) for index in range(parts)]
    return [stop - start for start, stop in spans]


def count(spans: Sequence[Span]) -> int:
    return sum(stop - start for start, stop in spans)


def take(tensor: Tensor, spans: Sequence[Span], *, dim: int) -> Tensor:
    """The entries of `tensor` in these spans, concatenated along `dim`."""
    parts = [tensor.narrow(dim, start, stop - start) for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The tokens that one rank computes in one pass through the blocks; one span per patch."""

    text: tuple[Span, ...]
    image: tuple[Span, ...]

    def count(self, *, with_text: bool) -> int:
        return count(self.image) + (count(self.text) if with_text else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the tokens of one denoiser call are cut: first into patches, then each patch into shards.

    A pass computes one patch, or (patch=None) all of them at once. A rank has the same shard of
    every patch in both cases, so that the keys and values it remembers from a whole pass are those
    it will refresh patch by patch.
    """

    num_text: int
    num_image: int
    num_patches: int = 1
    num_shards: int = 1

    def patch(self, index: int) -> tuple[Span, Span]:
        """Text span and image span of a patch: an even cut of the text followed by the image.

        Text comes first so that it is computed in the first patch(es) of a step, and every later
        one meets it fresh.
        """
        start, stop = split(
            (0, self.num_text + self.num_image), parts=self.num_patches, index=index
        )
        text = min(start, self.num_text), min(stop, self.num_text)
        return text, (
            max(start, self.num_text) - self.num_text,
            max(stop, self.num_text) - self.num_text,
        )

    def shard(self, index: int, *, patch: int | None = None) -> Shard:
        """Text and image are cut apart, each evenly, because a text token may cost another amount
        of work than an image token.
        """
        patches = range(self.num_patches) if patch is None else (patch,)
        spans = [self.patch(number) for number in patches]
        return Shard(
            text=tuple(split(text, parts=self.num_shards, index=index) for text, _ in spans),
            image=tuple(split(image, parts=self.num_shards, index=index) for _, image in spans),
        )
