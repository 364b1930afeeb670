"""Runs a network on one patch of an image and supplies what three operators need from the others.

Li et al., DistriFusion (CVPR 2024, arXiv:2402.19481), section 4: convolutions need the border rows
of their neighbours, group norms need the statistics of all patches, and self-attention needs the
keys and values of all patches. Everything else works on single rows or tokens. A TorchFunctionMode
intercepts the three operators while the network runs, so model code, LoRA layers and quantised
linears stay as they are. An Exchange decides whether the other patches' values are from this step
or the previous one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageAttentionBlock
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backends.errors import UnsupportedError
from backends.groups.collectives import begin_gather, gather_pieces
from backends.groups.mesh import Axis, CommStats
from backends.parallel import hooks
from backends.parallel.patch_bounds import PatchBounds, RowLayout, TokenLayout

Kind = Literal["halo", "statistics", "attention"]
ImageTokens = Literal["all", "first", "last"]
NAME = "patch attention"
STRIPS_FROM = 48
"""Rows of a patch (per row of padding) from which it is cheaper to compute a convolution's border
rows twice than to copy the patch.
"""

SPATIAL = (Attention, AttentionModuleMixin, QwenImageAttentionBlock, WanAttentionBlock)
"""Modules with attention over the pixels of one frame, unless they are part of one of _TEMPORAL."""
_TEMPORAL = (TransformerTemporalModel, AnimateDiffTransformer3D, TemporalBasicTransformerBlock)
"""Modules whose attention runs over frames. Each pixel's frames all lie in one patch."""


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


class PatchMode(TorchFunctionMode):
    """Intercepts operators while a network runs on this rank's patch.

    `on` sets the patch and the source of the other patches' values.
    """

    def __init__(
        self, *, image_tokens: ImageTokens = "all", prompt_follows_image: bool = False
    ) -> None:
        """prompt_follows_image: an IP-Adapter's own attention also sees the image's keys, before
        the keys of its image prompt.
        """
        super().__init__()
        self.image_tokens = image_tokens
        self.prompt_follows_image = prompt_follows_image
        self._layout: RowLayout | TokenLayout | None = None
        self._exchange: Exchange | None = None
        self._attends_to_all = False
        self._attends_to_prompt = False

    @contextmanager
    def on(self, layout: RowLayout | TokenLayout, exchange: Exchange) -> Any:
        """Run the enclosed forward as patch `layout.patch`."""
        self._layout, self._exchange = layout, exchange
        try:
            with self:
                yield
        finally:
            self._layout = self._exchange = None
            self._attends_to_all = self._attends_to_prompt = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if isinstance(self._layout, RowLayout):
            if func is F.conv2d:
                return self._conv2d(*args, **kwargs)
            if func is F.group_norm:
                return self._group_norm(*args, **kwargs)
            if func is F.conv3d:
                _require_one_row(*args, **kwargs)
        return func(*args, **kwargs)

    def around_attention(
        self, forward: Callable[..., Any], *args: Any, is_joint: bool = False, **kwargs: Any
    ) -> Any:
        """Run one spatial attention module.

        Its arguments decide: with text states, and not joint, it is a cross-attention and stays
        local.
        """
        encoder_hidden_states = kwargs.get(
            "encoder_hidden_states", args[1] if len(args) > 1 else None
        )
        if self._layout is None or not (encoder_hidden_states is None or is_joint):
            return forward(*args, **kwargs)
        self._attends_to_all = True
        output = forward(*args, **kwargs)
        self._attends_to_prompt = False
        if self._attends_to_all:
            raise UnsupportedError(
                "an attention layer of this model does not use torch's "
                "scaled_dot_product_attention, so it cannot see the other ranks' patches. "
                "Use the native attention backend, without slicing, or another parallel method."
            )
        return output

    def _conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """Convolve a patch (B, C, h, W) with the border rows of its neighbours.

        Rows beyond the image are zero.
        """
        rows, (step, _), (pad, pad_width), (spread, _) = (
            weight.shape[2],
            _pair(stride),
            _pair(padding),
            _pair(dilation),
        )
        if rows == 1:
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        above, below = pad, (rows - 1) * spread - pad - (step - 1)
        patches = self._layout.rows(x.shape[-2], x.shape[-1])

        def conv(part: Tensor, zero_rows: int) -> Tensor:
            return F.conv2d(part, weight, bias, stride, (zero_rows, pad_width), dilation, groups)

        if step == 1 and above == below and x.shape[-2] >= STRIPS_FROM * pad:
            return self._conv_with_strips(x, patches, conv, pad)
        return conv(self._with_halo(x, patches, above, below, beyond=(pad, pad)), 0)

    def _conv_with_strips(
        self, x: Tensor, patches: PatchBounds, conv: Callable[[Tensor, int], Tensor], pad: int
    ) -> Tensor:
        """Convolve without changing the height: the patch first, then its outer rows again.

        The patch alone is computed while the neighbours' rows arrive. Copying the whole patch with
        two more rows would cost as much as the exchange on large images.
        """
        arrived = self._begin_halo(x, patches, pad, pad)
        output = conv(x, pad)
        pieces, patch = arrived(), self._layout.patch
        if patch > 0:
            output[..., :pad, :] = conv(
                torch.cat((_last_rows(pieces[patch - 1], pad), x[..., : 2 * pad, :]), dim=-2), 0
            )
        if patch < len(patches) - 1:
            output[..., -pad:, :] = conv(
                torch.cat((_last_rows(x, 2 * pad), pieces[patch + 1][..., :pad, :]), dim=-2), 0
            )
        return output

    def _with_halo(
        self, x: Tensor, patches: PatchBounds, above: int, below: int, *, beyond: tuple[int, int]
    ) -> Tensor:
        """Return the patch with `above` rows of the patch above it and `below` rows of the one
        below.

        At the ends of the image, `beyond` rows of zeros take their place.
        """
        patch, last = self._layout.patch, len(patches) - 1
        pieces = self._begin_halo(x, patches, above, below)()
        top = (
            x.new_zeros(*x.shape[:-2], beyond[0], x.shape[-1])
            if patch == 0
            else _last_rows(pieces[patch - 1], above)
        )
        bottom = (
            x.new_zeros(*x.shape[:-2], beyond[1], x.shape[-1])
            if patch == last
            else pieces[patch + 1][..., :below, :]
        )
        return torch.cat((top, x, bottom), dim=-2)

    def _begin_halo(
        self, x: Tensor, patches: PatchBounds, above: int, below: int
    ) -> Callable[[], list[Tensor]]:
        """Start the exchange of border rows.

        Each patch sends its first `below` rows to the patch above it, then its last `above` rows to
        the patch below it.
        """
        last = len(patches) - 1
        own = torch.cat(_border(x, self._layout.patch, last, above, below), dim=-2)
        heights = [
            (below if i > 0 else 0) + (above if i < last else 0) for i in range(len(patches))
        ]
        return self._exchange.begin(
            "halo", own, [(*x.shape[:-2], height, x.shape[-1]) for height in heights]
        )

    def _group_norm(
        self,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """Normalise a patch (N, C, ..., h, W) or (N, C, tokens) with the image's statistics."""
        patches = (
            self._layout.tokens(x.shape[-1])
            if x.dim() == 3
            else self._layout.rows(x.shape[-2], x.shape[-1])
        )
        grouped = x.reshape(x.shape[0], num_groups, -1).to(
            torch.promote_types(x.dtype, torch.float32)
        )
        shares = [size / patches.total for size in patches.sizes]
        mean, var = self._exchange.moments(torch.stack(_moments(grouped)), shares)
        return _normalize(x, mean, var, weight, bias, eps)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend from this patch's queries (B, H, L, D) to the keys and values of all patches.

        Text tokens are not exchanged, since every rank has them all.
        """
        if not self._attends_to_all and not self._attends_to_prompt:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
        self._attends_to_all, self._attends_to_prompt = (
            False,
            self._attends_to_all and self.prompt_follows_image,
        )
        if attn_mask is not None:
            raise UnsupportedError(
                "a self-attention layer with a mask cannot be cut into patches. "
                "Use another parallel method for this model."
            )
        patches = self._layout.tokens(key.shape[-2])
        own = patches.size(self._layout.patch)
        before, after = _text_tokens(key.shape[-2] - own, self.image_tokens)
        both = torch.stack((key, value))
        pieces = self._exchange.gather(
            "attention",
            both.narrow(-2, before, own),
            [(*both.shape[:-2], size, both.shape[-1]) for size in patches.sizes],
        )
        texts = both.narrow(-2, 0, before), both.narrow(-2, before + own, after)
        key, value = torch.cat((texts[0], *pieces, texts[1]), dim=-2)
        return F.scaled_dot_product_attention(query, key, value, None, *args, **kwargs)


def attach_attention(network: nn.Module, mode: PatchMode) -> None:
    """Hook every spatial attention of the network, so that `mode` can tell self- from
    cross-attention.
    """
    for module, is_joint in _spatial_attentions(network):
        hooks.attach(module, NAME, _around(mode, is_joint))


def detach_attention(network: nn.Module) -> None:
    for module, _ in _spatial_attentions(network):
        if NAME in hooks.attached(module):
            hooks.detach(module, NAME)


def _around(mode: PatchMode, is_joint: bool) -> hooks.Around:
    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return mode.around_attention(forward, *args, is_joint=is_joint, **kwargs)

    return around


def _spatial_attentions(network: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Return the attention modules over one image's tokens, each with whether it is joint.

    Joint attention has text and image in one sequence.
    """
    temporal = {
        id(part)
        for module in network.modules()
        if isinstance(module, _TEMPORAL)
        for part in module.modules()
    }
    spatial = [m for m in network.modules() if isinstance(m, SPATIAL) and id(m) not in temporal]
    return [(module, getattr(module, "add_k_proj", None) is not None) for module in spatial]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _border(x: Tensor, patch: int, last: int, above: int, below: int) -> list[Tensor]:
    """Return the rows that the neighbours need: the first for the patch above, the last for the one
    below.
    """
    first = x[..., : below if patch > 0 else 0, :]
    return [first, _last_rows(x, above if patch < last else 0)]


def _last_rows(x: Tensor, rows: int) -> Tensor:
    return x[..., x.shape[-2] - rows :, :]


def _text_tokens(count: int, image_tokens: ImageTokens) -> tuple[int, int]:
    """Return the numbers of text tokens before and after the image tokens."""
    return (count, 0) if image_tokens == "last" else (0, count)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over the last dimension."""
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x, dim=-1, correction=0)
        return mean, var
    mean = x.mean(dim=-1)  # on a CPU torch.var_mean takes ten times as long
    return mean, (x - mean[..., None]).square_().mean(dim=-1)


def _normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias in one pass over x.

    mean, var: (N, G), float32, or float64 if x is.
    """
    channels = x.shape[1] // mean.shape[1]
    scale = torch.rsqrt(var + eps).repeat_interleave(channels, dim=1)
    shift = -mean.repeat_interleave(channels, dim=1) * scale
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    if bias is not None:
        shift = shift + bias
    shape = (*scale.shape, *[1] * (x.dim() - 2))
    return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(x.dtype)


def _require_one_row(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> None:
    if weight.shape[3] > 1:
        raise UnsupportedError(
            "a 3-D convolution over rows cannot be cut into patches. Use another parallel method "
            "for this model."
        )
