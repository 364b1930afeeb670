"""Keys and values of all patches, of which only the present patch is fresh. Used by attention.py
under PipeFusion.

Source: PipeFusion, arXiv:2405.14430, section 4: patches attend to the previous step's activations
of patches that are not computed yet.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Buffer:
    """Keys and values of one attention module: (B, H, tokens of all patches, D)."""

    keys: Tensor
    values: Tensor
    offsets: tuple[int, ...]
    """offsets[p] is where patch p begins."""


@dataclass(slots=True)
class StaleKVCache:
    """What one denoiser call stores for the same call of the next step: one buffer per attention
    module.
    """

    _buffers: dict[str, _Buffer] = field(default_factory=dict)

    def remember_all(
        self, path: str, key: Tensor, value: Tensor, *, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store a whole pass. key, value: (B, H, S, D) of every patch; labels: (S,), the patch of
        each token. Returns both, sorted patch after patch.
        """
        order = torch.argsort(labels, stable=True)
        counts = torch.bincount(labels).tolist()
        offsets = tuple(sum(counts[:patch]) for patch in range(len(counts)))
        buffer = _Buffer(
            keys=key[:, :, order].contiguous(),
            values=value[:, :, order].contiguous(),
            offsets=offsets,
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
