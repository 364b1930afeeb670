"""Which tokens a rank computes: the arithmetic of shards (parts of the sequence on ranks) and
patches (parts in time, PipeFusion).

Pure Python except `take`. A span is (start, stop).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Span = tuple[int, int]


def split(span: Span, *, parts: int, index: int) -> Span:
    """Return part `index` of an even cut. Lengths differ by at most one, and may be 0."""
    start, length = span[0], span[1] - span[0]
    return start + length * index // parts, start + length * (index + 1) // parts


def sizes(length: int, parts: int) -> list[int]:
    """Return the lengths of the parts of an even cut."""
    spans = [split((0, length), parts=parts, index=index) for index in range(parts)]
    return [stop - start for start, stop in spans]


def count(spans: Sequence[Span]) -> int:
    """Return the number of tokens in the spans."""
    return sum(stop - start for start, stop in spans)


def take(tensor: Tensor, spans: Sequence[Span], *, dim: int) -> Tensor:
    """Return the entries of `tensor` in these spans, concatenated along `dim`."""
    parts = [tensor.narrow(dim, start, stop - start) for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def reorder(tensor: Tensor, positions: Sequence[int], *, dim: int) -> Tensor:
    """Return the entries of `tensor` at these positions along `dim`; a view if they are
    consecutive.
    """
    start = positions[0] if positions else 0
    if list(positions) == list(range(start, start + len(positions))):
        return tensor.narrow(dim, start, len(positions))
    return tensor.index_select(dim, torch.tensor(positions, device=tensor.device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The tokens that one rank computes in one pass through the blocks, one span per patch."""

    text: tuple[Span, ...]
    image: tuple[Span, ...]

    def count(self, *, with_text: bool) -> int:
        """Return the number of tokens, of the image alone or with the text."""
        return count(self.image) + (count(self.text) if with_text else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the tokens of one denoiser call are cut: first into patches, then each patch into shards.

    A pass computes one patch, or all of them at once (patch=None). In both cases a rank has the
    same shard of every patch, so the keys and values that it stores in a whole pass are those that
    it later replaces patch by patch.
    """

    num_text: int
    num_image: int
    num_patches: int = 1
    num_shards: int = 1

    def patch(self, index: int) -> tuple[Span, Span]:
        """Return the text span and the image span of a patch: an even cut of the text followed by
        the image.

        Text comes first, so it is computed in the first patch or patches of a step, and every later
        patch reads fresh text.
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
        """Return a rank's shard of one patch, or of all. Text and image are each cut evenly,
        because a text token may cost another amount of work than an image token.
        """
        patches = range(self.num_patches) if patch is None else (patch,)
        spans = [self.patch(number) for number in patches]
        return Shard(
            text=tuple(split(text, parts=self.num_shards, index=index) for text, _ in spans),
            image=tuple(split(image, parts=self.num_shards, index=index) for _, image in spans),
        )

    def order(self, shards: Sequence[int], *, is_joint: bool, is_text_first: bool) -> list[int]:
        """Return the positions, in the model's sequence, of the tokens of these shards in the order
        in which their ranks have them. is_joint: the sequence has the text too.
        """
        num_text = self.num_text if is_joint else 0
        starts = (0, num_text) if is_text_first else (self.num_image, 0)
        positions: list[int] = []
        for index in shards:
            shard = self.shard(index)
            streams = [(starts[0], shard.text if is_joint else ()), (starts[1], shard.image)]
            for start, spans in streams if is_text_first else reversed(streams):
                positions += [start + token for span in spans for token in range(*span)]
        return positions
