"""Parallel VAE: every rank decodes, or encodes, one patch of rows. Exact, and the same for all
backends.

The convolutions, norms and attention exchange data with the other patches as they run
(patch_mode.py), so the result equals a single rank's up to summation order. Tiled decoding keeps
its tiles, and the ranks share each tile. Video VAEs keep their temporal caches: these hold each
rank's own rows.
"""

import logging
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
)
from torch import Tensor, nn

from backends.errors import UnsupportedError
from backends.groups.collectives import gather_pieces
from backends.groups.mesh import Axis, Mesh
from backends.groups.patch_exchange import FreshExchange
from backends.parallel import hooks
from backends.parallel.patch_bounds import PatchBounds, RowLayout, cut
from backends.parallel.patch_mode import PatchMode

logger = logging.getLogger(__name__)

NAME = "patch decode"
SHARED = (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
)
"""VAE classes that look beyond their rows only through operators that PatchMode and VaeMode
handle.
"""
MIN_ROWS = 8
"""Smallest number of latent rows per rank for splitting. Below it every rank works on the whole
image, because the exchange would cost what it saves.
"""
MOST_DOUBLINGS = 6
"""More than any decoder has. A level that does not occur costs nothing."""


class VaeMode(PatchMode):
    """PatchMode for VAEs, which also pad before a convolution, convolve in 3-D, and attend over all
    frames of a video at once.
    """

    operators: ClassVar = {**PatchMode.operators, F.pad: "pad"}
    is_everywhere = True  # the VAEs call F.pad in their own modules

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self._padded: Callable[[], Tensor | None] = lambda: None

    def _is_padded(self, x: Tensor) -> bool:
        """Whether the border rows are in x (or in what it is a view of) already."""
        padded = self._padded()
        if padded is None or x.shape[-2:] != padded.shape[-2:]:
            return False
        return x.untyped_storage().data_ptr() == padded.untyped_storage().data_ptr()

    def pad(
        self, x: Tensor, pad: Any, mode: str = "constant", value: float | None = None
    ) -> Tensor:
        """Pad a patch (..., h, W) with rows of its neighbours, and as asked at the ends of the
        image.
        """
        if x.dim() < 4 or len(pad) < 4 or not (pad[2] or pad[3]):
            return F.pad(x, pad, mode, value)
        patches, patch = self._layout.rows(x.shape[-2], x.shape[-1]), self._layout.patch
        with_rows = self._with_halo(x, patches, pad[2], pad[3], beyond=(0, 0))
        top = pad[2] if patch == 0 else 0
        bottom = pad[3] if patch == len(patches) - 1 else 0
        padded = F.pad(with_rows, (pad[0], pad[1], top, bottom, *pad[4:]), mode, value)
        self._padded = weakref.ref(padded)
        return padded

    def conv2d(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Convolve a patch, with border rows unless they are there."""
        conv = F.conv2d if self._is_padded(x) else super().conv2d
        return conv(x, *args, **kwargs)

    def conv3d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """Convolve a patch (B, C, F, h, W) with the border rows of its neighbours."""
        rows, (_, step, _), (pad_frames, pad, pad_width) = (
            weight.shape[3],
            _triple(stride),
            _triple(padding),
        )
        if rows == 1 or self._is_padded(x):
            return F.conv3d(x, weight, bias, stride, padding, dilation, groups)
        if pad == 0 or _triple(dilation)[1] > 1:
            raise UnsupportedError(
                "a 3-D convolution without padding, or with dilation, cannot be cut into patches. "
                "Use --parallel_vae=false."
            )
        patches = self._layout.rows(x.shape[-2], x.shape[-1])
        below = rows - 1 - pad - (step - 1)
        whole = self._with_halo(x, patches, pad, below, beyond=(pad, pad))
        return F.conv3d(whole, weight, bias, stride, (pad_frames, 0, pad_width), dilation, groups)

    def group_norm(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalise tokens (N, C, F * tokens) of all frames like their pixels."""
        if x.dim() == 3:
            rows, columns = self._rows_of(x.shape[-1])
            pixels = x.unflatten(-1, (-1, rows, columns))
            return super().group_norm(pixels, *args, **kwargs).flatten(2)
        return super().group_norm(x, *args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend from this patch's queries (B, H, F * tokens, D) to the keys of all patches. A mask
        may tell frames apart (HunyuanVideo is causal), but not pixels of one frame.
        """
        rows, columns = self._rows_of(key.shape[-2])
        own = rows * columns
        patches = self._layout.rows(rows, columns).scaled(columns)
        if key.shape[-2] == own:
            return super()._attention(query, key, value, attn_mask, *args, **kwargs)
        both = torch.stack((key, value)).unflatten(-2, (-1, own))
        shapes = [(*both.shape[:-2], size, both.shape[-1]) for size in patches.sizes]
        pieces = self._exchange.gather("attention", both, shapes)
        key, value = torch.cat(pieces, dim=-2).flatten(-3, -2)
        if attn_mask is not None:
            frames = attn_mask.unflatten(-1, (-1, own))
            if not torch.equal(frames, frames[..., :1].expand_as(frames)):
                raise UnsupportedError(
                    "an attention mask that tells pixels of a frame apart cannot be cut into "
                    "patches. Use --parallel_vae=false."
                )
            attn_mask = frames[..., :1].expand(*frames.shape[:-1], patches.total).flatten(-2)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)

    def _rows_of(self, length: int) -> tuple[int, int]:
        """Return the rows and columns of this rank's part at the resolution of the latents, in
        which the VAEs attend. `length`: the number of tokens of some frames.
        """
        rows, columns = min(self._layout.parts())
        if length % (rows * columns):
            raise UnsupportedError(
                f"{length} tokens are not whole frames of {rows} x {columns}, so this VAE cannot "
                "be cut into patches. Use --parallel_vae=false."
            )
        return rows, columns


_modes: weakref.WeakKeyDictionary[nn.Module, VaeMode] = weakref.WeakKeyDictionary()
"""The modes of the networks that are attached."""
_is_undivided = ContextVar("is_undivided", default=False)


def attach_patch_decode(vae: nn.Module, mesh: Mesh, *axes: str) -> None:
    """Split every call of this VAE's decoder and encoder among the ranks of these axes (default:
    all axes).

    Afterwards all these ranks must decode and encode together, and each gets the whole result.
    Nothing is attached for a single rank. A VAE of another class stays whole on every rank, with a
    warning in the log.
    """
    names = axes or tuple(name for name, _ in mesh.plan.axes)
    if not names or mesh.axis(*names).size == 1:
        return
    if not isinstance(vae, SHARED):
        logger.warning(
            "parallel_vae has no effect: %s cannot be cut into patches, so every rank decodes "
            "the whole image",
            type(vae).__name__,
        )
        return
    for network in (vae.decoder, vae.encoder):
        mode = _modes[network] = VaeMode(network)
        mode.attach()
        halvings = _halvings(vae) if network is vae.encoder else 0
        hooks.attach(network, NAME, _patch_call(mesh, names, mode, halvings))


@contextmanager
def undivided() -> Iterator[None]:
    """Within it this rank decodes and encodes by itself, whatever is attached. For what one rank
    does while the others do not.
    """
    before = _is_undivided.set(True)
    try:
        yield
    finally:
        _is_undivided.reset(before)


def splits_decode(vae: nn.Module) -> bool:
    """Whether the ranks decode this VAE's images together."""
    return isinstance(vae, SHARED) and NAME in hooks.attached(vae.decoder)


def detach_patch_decode(vae: nn.Module) -> None:
    """Undo `attach_patch_decode`. Does nothing if it is not attached."""
    if splits_decode(vae):
        for network in (vae.decoder, vae.encoder):
            hooks.detach(network, NAME)
            _modes.pop(network).detach()


def _patch_call(
    mesh: Mesh, names: tuple[str, ...], mode: PatchMode, halvings: int
) -> Callable[..., Tensor]:
    """Return a hook for a decoder, or for an encoder that halves its rows so often."""
    unit = 2**halvings
    doublings = 0 if halvings else MOST_DOUBLINGS

    def around(forward: Callable[..., Tensor], sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """sample: (B, C, [F,] h, w). Returns the network's output, whole on every rank."""
        axis = mesh.axis(*names)
        height = sample.shape[-2]
        is_too_small = height < MIN_ROWS * unit * axis.size
        if _is_undivided.get() or is_too_small or height % unit or sample.shape[-1] % unit:
            return forward(sample, *args, **kwargs)
        rows = cut(height, (1.0,) * axis.size, unit)
        layout = RowLayout(
            rows, sample.shape[-1], patch=axis.rank, halvings=halvings, doublings=doublings
        )
        mine = sample.narrow(-2, rows.bounds[axis.rank], rows.size(axis.rank)).contiguous()
        with mode.on(layout, FreshExchange(axis=axis, traffic=mesh.traffic)):
            output = forward(mine, *args, **kwargs)
        part = output[0] if isinstance(output, tuple) else output
        before, after = rows.size(axis.rank), part.shape[-2]
        bounds = rows.reduced(before // after) if halvings else rows.scaled(after // before)
        whole = _join(part, bounds, axis, mesh)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole  # and temporal caches

    return around


def _halvings(vae: nn.Module) -> int:
    """Return how often the encoder halves the rows of what it is given."""
    if "spatio_temporal_scaling" in vae.config:  # its encoder makes the pixels patches itself
        return int(math.log2(vae.spatial_compression_ratio))
    field = "dim_mult" if "dim_mult" in vae.config else "block_out_channels"
    return len(vae.config[field]) - 1


def _join(part: Tensor, rows: PatchBounds, axis: Axis, mesh: Mesh) -> Tensor:
    shapes = [(*part.shape[:-2], size, part.shape[-1]) for size in rows.sizes]
    return torch.cat(gather_pieces(part, shapes, axis=axis, traffic=mesh.traffic), dim=-2)


def _triple(value: Any) -> tuple[int, int, int]:
    return (value,) * 3 if isinstance(value, int) else tuple(value)
