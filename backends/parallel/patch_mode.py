"""Runs a network on one patch of an image and supplies what three operators need from the others.

Li et al., DistriFusion (CVPR 2024, arXiv:2402.19481), section 4: convolutions need the border rows
of their neighbours, group norms need the statistics of all patches, and self-attention needs the
keys and values of all patches. Everything else works on single rows or tokens, so model code, LoRA
layers and quantised linears stay as they are. An Exchange decides whether the other patches' values
are from this step or the previous one.

The three operators are intercepted at their modules, and torch code between them runs untouched:
a TorchFunctionMode around the whole network costs 3 microseconds for each of its thousands of torch
functions. Code may also call the operators elsewhere (some adapters do). So the first call after a
change of the modules runs in such a mode, and so do all later ones if that happened.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

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
from backends.groups.patch_exchange import Exchange
from backends.parallel import hooks
from backends.parallel.group_norms import moments, normalized
from backends.parallel.hooks import run_attention, with_attention
from backends.parallel.patch_bounds import PatchBounds, RowLayout, TokenLayout

ImageTokens = Literal["all", "first", "last"]
NAME = "patch operator"
STRIPS_FROM = 48
"""Rows of a patch (per row of padding) from which it is cheaper to compute a convolution's border
rows twice than to copy the patch.
"""

SPATIAL = (Attention, AttentionModuleMixin, QwenImageAttentionBlock, WanAttentionBlock)
"""Modules with attention over the pixels of one frame, unless they are part of one of _TEMPORAL."""
_TEMPORAL = (TransformerTemporalModel, AnimateDiffTransformer3D, TemporalBasicTransformerBlock)
"""Modules whose attention runs over frames. Each pixel's frames all lie in one patch."""


class PatchMode:
    """Intercepts operators of one network while it runs on this rank's patch.

    `on` sets the patch and the source of the other patches' values.
    """

    operators: ClassVar[Mapping[Callable[..., Any], str]] = {
        F.conv2d: "conv2d",
        F.conv3d: "conv3d",
        F.group_norm: "group_norm",
    }
    """Torch function -> method in its place. torch.compile reads no MappingProxyType of these."""
    is_everywhere: ClassVar[bool] = False
    """Whether the operators are also called outside of the modules that are hooked."""

    def __init__(
        self,
        network: nn.Module,
        *,
        image_tokens: ImageTokens = "all",
        prompt_follows_image: bool = False,
    ) -> None:
        """prompt_follows_image: an IP-Adapter's own attention also sees the image's keys, before
        the keys of its image prompt.
        """
        self.image_tokens = image_tokens
        self.prompt_follows_image = prompt_follows_image
        self._network = network
        self._hooked: dict[int, nn.Module] = {}
        self._everywhere = _Operators(self)
        self._is_watching = True
        self._is_hooked_call = False
        self._layout: RowLayout | TokenLayout | None = None
        self._exchange: Exchange | None = None

    def attach(self) -> None:
        """Hook every convolution, group norm and spatial attention of the network."""
        for module, around in self._operators():
            if id(module) not in self._hooked:
                hooks.attach(module, NAME, around)
                self._hooked[id(module)] = module
                self._is_watching = True

    def refresh(self) -> None:
        """Hook modules that came since (peft's), between two calls."""
        self.attach()

    def detach(self) -> None:
        """Remove the hooks."""
        for module in self._hooked.values():
            hooks.detach(module, NAME)
        self._hooked.clear()

    @contextmanager
    def on(self, layout: RowLayout | TokenLayout, exchange: Exchange) -> Iterator[None]:
        """Run the enclosed forward as patch `layout.patch`."""
        self._layout, self._exchange = layout, exchange
        try:
            if self._is_watching and isinstance(layout, RowLayout):
                self._everywhere.num_elsewhere = 0
                with self._everywhere:
                    yield
                self._is_watching = self.is_everywhere or self._everywhere.num_elsewhere > 0
            else:
                yield
        finally:
            self._layout = self._exchange = None

    def operator(self, func: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return what a patch needs in place of this torch function; None if it needs nothing."""
        name = self.operators.get(func) if isinstance(self._layout, RowLayout) else None
        return None if name is None else getattr(self, name)

    def _operators(self) -> Iterator[tuple[nn.Module, hooks.Around]]:
        """Yield the modules to hook with their hooks."""
        for module, is_joint in _spatial_attentions(self._network):
            yield module, self._around_attention(module, is_joint)
        for module in self._network.modules():
            if isinstance(module, nn.modules.conv._ConvNd | nn.GroupNorm):
                yield module, self._around_operator(module)

    def _around_operator(self, module: nn.Module) -> hooks.Around:
        """Return the hook of a convolution or group norm.

        A plain one is replaced by its operator on patches. Others (offloaded ones, whose weights
        come with the call) run in a mode.
        """
        plain = _PLAIN.get(type(module).forward)
        is_plain = (
            plain is not None
            and "forward" not in module.__dict__
            and getattr(module, "padding_mode", "zeros") == "zeros"
        )

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not isinstance(self._layout, RowLayout):
                return forward(*args, **kwargs)
            if self._is_watching:
                with self._everywhere.expected():
                    return forward(*args, **kwargs)
            if is_plain:
                return plain(self, module, *args, **kwargs)
            with self._everywhere:
                return forward(*args, **kwargs)

        return around

    def _around_attention(self, module: nn.Module, is_joint: bool) -> hooks.Around:
        """Return the hook of a spatial attention module.

        Its arguments decide: with text states, and not joint, it is a cross-attention and stays
        local.
        """

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            if self._layout is None or not (text is None or is_joint):
                return run_attention(module, forward, *args, **kwargs)
            num_calls = 0

            def attend(*call: Any, **options: Any) -> Tensor:
                nonlocal num_calls
                num_calls += 1
                sees_all = num_calls == 1 or (num_calls == 2 and self.prompt_follows_image)
                attention = self._attention if sees_all else F.scaled_dot_product_attention
                return attention(*call, **options)

            output = with_attention(attend, run_attention, module, forward, *args, **kwargs)
            if num_calls == 0:
                raise UnsupportedError(
                    "an attention layer of this model does not use torch's "
                    "scaled_dot_product_attention, so it cannot see the other ranks' patches. "
                    "Use the native attention backend, without slicing, or another parallel method."
                )
            return output

        return around

    def conv2d(
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
        rows = _border(x, self._layout.patch, last, above, below)
        own = rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2)
        heights = [
            (below if i > 0 else 0) + (above if i < last else 0) for i in range(len(patches))
        ]
        return self._exchange.begin(
            "halo", own, [(*x.shape[:-2], height, x.shape[-1]) for height in heights]
        )

    def conv3d(self, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Convolve over frames only. UnsupportedError for a convolution over rows."""
        if weight.shape[3] > 1:
            raise UnsupportedError(
                "a 3-D convolution over rows cannot be cut into patches. Use another parallel "
                "method for this model."
            )
        return F.conv3d(x, weight, *args, **kwargs)

    def group_norm(
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
        grouped = x.reshape(x.shape[0], num_groups, -1)
        shares = [size / patches.total for size in patches.sizes]
        mean, var = self._exchange.moments(moments(grouped), shares)
        return normalized(x, mean, var, weight, bias, eps)

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
            both.narrow(-2, before, own) if before or after else both,
            [(*both.shape[:-2], size, both.shape[-1]) for size in patches.sizes],
        )
        text = [both.narrow(-2, 0 if before else own, before + after)] if before or after else []
        key, value = torch.cat((*text, *pieces) if before else (*pieces, *text), dim=-2)
        return F.scaled_dot_product_attention(query, key, value, None, *args, **kwargs)


class _Operators(TorchFunctionMode):
    """Pass the operators to a PatchMode wherever they are called."""

    def __init__(self, patches: PatchMode) -> None:
        super().__init__()
        self._patches = patches
        self._is_expected = False
        self.num_elsewhere = 0

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Do not count the operator in a hooked module as one that was called elsewhere."""
        self._is_expected = True
        try:
            yield
        finally:
            self._is_expected = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        operator = self._patches.operator(func)
        if operator is None:
            return func(*args, **(kwargs or {}))
        self.num_elsewhere += not self._is_expected
        return operator(*args, **(kwargs or {}))


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
    if last == 0:
        return [x[..., :0, :]]
    rows = [x[..., :below, :]] if patch > 0 else []
    return [*rows, _last_rows(x, above)] if patch < last else rows


def _last_rows(x: Tensor, rows: int) -> Tensor:
    return x[..., x.shape[-2] - rows :, :]


def _text_tokens(count: int, image_tokens: ImageTokens) -> tuple[int, int]:
    """Return the numbers of text tokens before and after the image tokens."""
    return (count, 0) if image_tokens == "last" else (0, count)


def _conv2d_of(patches: PatchMode, conv: nn.Conv2d, x: Tensor) -> Tensor:
    return patches.conv2d(
        x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _conv3d_of(patches: PatchMode, conv: nn.Conv3d, x: Tensor) -> Tensor:
    return patches.conv3d(
        x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _group_norm_of(patches: PatchMode, norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return patches.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


_PLAIN: dict[Callable[..., Any], Callable[..., Tensor]] = {
    nn.Conv2d.forward: _conv2d_of,
    nn.Conv3d.forward: _conv3d_of,
    nn.GroupNorm.forward: _group_norm_of,
}
"""Forward of a module's class -> what it computes on a patch."""
