"""Which tokens a rank computes: the arithmetic of shards (parts of the sequence on ranks) and
patches (parts in time, PipeFusion).

Pure Python except `take` and the cache of keys. A span is (start, stop).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

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

    def order(self, shards: Sequence[int], *, is_joint: bool, is_text_first: bool) -> list[Span]:
        """Return the spans, in the model's sequence, of the tokens of these shards in the order in
        which their ranks have them. is_joint: the sequence has the text too.

        They are cut out as they are: an index of tokens would be copied to the GPU in each call,
        and the host would wait for that.
        """
        num_text = self.num_text if is_joint else 0
        starts = (0, num_text) if is_text_first else (self.num_image, 0)
        found: list[Span] = []
        for index in shards:
            shard = self.shard(index)
            streams = [(starts[0], shard.text if is_joint else ()), (starts[1], shard.image)]
            for begin, spans in streams if is_text_first else reversed(streams):
                for start, stop in spans:
                    if found and found[-1][1] == begin + start:
                        found[-1] = found[-1][0], begin + stop
                    elif stop > start:
                        found.append((begin + start, begin + stop))
        return found or [(0, 0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Buffer:
    """Keys and values of one attention module: (B, H, tokens of all patches, D)."""

    keys: Tensor
    values: Tensor
    offsets: tuple[int, ...]
    """offsets[p] is where patch p begins."""


@dataclass(slots=True)
class StaleKVCache:
    """Keys and values of all patches, of which only the present one is fresh. One denoiser call
    stores it for the same call of the next step (PipeFusion, arXiv:2405.14430, section 4): one
    buffer per attention module.
    """

    _buffers: dict[str, _Buffer] = field(default_factory=dict)

    def remember_all(
        self, path: str, key: Tensor, value: Tensor, *, patches: Sequence[Sequence[Span]]
    ) -> tuple[Tensor, Tensor]:
        """Store a whole pass. key, value: (B, H, S, D) of every patch; patches: the spans of S that
        are each patch's. Returns both, sorted patch after patch.
        """
        lengths = [count(spans) for spans in patches]
        order = [span for spans in patches for span in spans]
        buffer = _Buffer(
            keys=_sorted(key, order),
            values=_sorted(value, order),
            offsets=tuple(sum(lengths[:patch]) for patch in range(len(lengths))),
        )
        self._buffers[path] = buffer
        return buffer.keys, buffer.values

    def remember_patch(
        self, path: str, key: Tensor, value: Tensor, *, patch: int
    ) -> tuple[Tensor, Tensor]:
        """Store one patch, (B, H, n, D). Returns the keys and values of all patches, fresh and
        stale.
        """
        buffer = self._buffers[path]
        start, stop = buffer.offsets[patch], buffer.offsets[patch] + key.shape[2]
        buffer.keys[:, :, start:stop] = key
        buffer.values[:, :, start:stop] = value
        return buffer.keys, buffer.values


def _sorted(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    """Return a copy of (B, H, S, D) with these spans of S one after the other."""
    parts = [tensor[:, :, start:stop] for start, stop in spans]
    return torch.cat(parts, dim=2).contiguous()
