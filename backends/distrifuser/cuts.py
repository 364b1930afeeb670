"""How each kind of network is cut: which arguments are cut where, and how the output is put
together again.

Rows for UNets and their ControlNets, tokens (after the position embedding) for transformers, by
their rows in backends/parallel/transformers.py.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backends.errors import UnsupportedError
from backends.parallel.patch_bounds import PatchBounds, RowLayout, TokenLayout, cut
from backends.parallel.patch_mode import ImageTokens
from backends.parallel.transformer_spec import TransformerSpec
from backends.parallel.transformers import names_with, transformer_of


def part_of(tensor: Tensor, patches: PatchBounds, patch: int, dim: int) -> Tensor:
    """This patch of a whole tensor, contiguous."""
    return tensor.narrow(dim, patches.bounds[patch], patches.size(patch)).contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCut:
    """A UNet or ControlNet: rows are dim -2 of every spatial tensor (also of videos)."""

    halvings: int  # how often the resolution is halved
    # Arguments with ControlNet residuals: a tensor (or a list) at any of the resolutions, whole or
    # cut already.
    residuals: tuple[str, ...] = ()
    hint: str | None = None  # argument with the ControlNet's image
    hint_doublings: int = 0  # how often that image is twice as large as the latents
    image_tokens: ImageTokens = "all"

    def patches(self, sample: Tensor, weights: tuple[float, ...], dim: int = -2) -> PatchBounds:
        return self.patches_of(*sample.shape[-2:], weights, dim)

    def patches_of(
        self, height: int, width: int, weights: tuple[float, ...], dim: int = -2
    ) -> PatchBounds:
        """Of latents of this size. PlanError if there are too few rows (columns) for the ranks."""
        return cut(
            height if dim == -2 else width,
            weights,
            2**self.halvings,
            what="latent rows" if dim == -2 else "latent columns",
        )

    def layout(self, sample: Tensor, patches: PatchBounds, patch: int, dim: int = -2) -> RowLayout:
        return RowLayout(
            patches,
            sample.shape[_other(dim)],
            patch=patch,
            halvings=self.halvings,
            doublings=self.hint_doublings,
        )

    def arguments(
        self, arguments: Mapping[str, Any], layout: RowLayout, patches: PatchBounds, dim: int = -2
    ) -> dict[str, Any]:
        """The network's arguments for this patch of rows; of columns, with dim -1."""
        mine = dict(arguments)
        first = next(iter(arguments))
        mine[first] = part_of(arguments[first], patches, layout.patch, dim)
        if self.hint is not None:
            mine[self.hint] = part_of(
                arguments[self.hint], patches.scaled(2**self.hint_doublings), layout.patch, dim
            )
        for name in self.residuals:
            if mine.get(name) is not None:
                mine[name] = _cut_residuals(mine[name], layout, dim)
        return mine


def _other(dim: int) -> int:
    return -1 if dim == -2 else -2


def _cut_residuals(value: Any, layout: RowLayout, dim: int) -> Any:
    if isinstance(value, Tensor):
        size = value.shape[dim], value.shape[_other(dim)]
        return (
            value
            if layout.is_part(*size)
            else part_of(value, layout.whole(*size), layout.patch, dim)
        )
    return type(value)(_cut_residuals(item, layout, dim) for item in value)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCut:
    """A transformer: the image's tokens are cut, the text's are every rank's own."""

    transformer: TransformerSpec
    head: ClassVar[str] = "proj_out"  # module whose output is gathered

    @property
    def embedding(self) -> str | None:
        """Module whose output tokens are cut; None if they arrive as the first argument."""
        return self.transformer.embed

    @property
    def image_tokens(self) -> ImageTokens:
        return self.transformer.image_tokens

    @property
    def prompt_follows_image(self) -> bool:
        """Whether an IP-Adapter's attention sees the image's tokens before those of its own."""
        return self.transformer.image_prompt_keys == "after image"

    def patches(self, sample: Tensor, weights: tuple[float, ...], patch_size: int) -> PatchBounds:
        """Of the image's tokens; any number of them may be in a patch."""
        if self.embedding is None:
            return cut(sample.shape[1], weights, what="tokens")
        return self.patches_of(*sample.shape[-2:], weights, patch_size)

    def patches_of(
        self, height: int, width: int, weights: tuple[float, ...], patch_size: int
    ) -> PatchBounds:
        """Of latents of this size. PlanError if there are fewer tokens than ranks."""
        return cut((height // patch_size) * (width // patch_size), weights, what="tokens")

    def arguments(
        self, arguments: Mapping[str, Any], layout: TokenLayout, patches: PatchBounds
    ) -> dict[str, Any]:
        """The network's arguments for this patch."""
        dims = self.transformer.image_arguments
        return {
            name: _cut_tokens(value, patches, layout.patch, dims[name]) if name in dims else value
            for name, value in arguments.items()
        }


def _cut_tokens(value: Any, patches: PatchBounds, patch: int, dim: int) -> Any:
    if isinstance(value, Tensor):
        return part_of(value, patches, patch, dim)
    return (
        None
        if value is None
        else type(value)(_cut_tokens(item, patches, patch, dim) for item in value)
    )


_CONTROL = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


def cut_of(network: nn.Module) -> RowCut | TokenCut:
    """How this network is cut. UnsupportedError for one that nobody has described."""
    transformer = transformer_of(network)
    if transformer is not None and transformer.has_patches:
        return TokenCut(transformer=transformer)
    parameters = inspect.signature(type(network).forward).parameters
    if not hasattr(network, "down_blocks") or "sample" not in parameters:
        raise UnsupportedError(
            f"a {type(network).__name__} cannot be cut into patches: it is neither a UNet nor one "
            f"of {', '.join(names_with('has_patches'))}."
        )
    halvings = sum(1 for block in network.down_blocks if getattr(block, "downsamplers", None))
    if "controlnet_cond" in parameters:
        return RowCut(
            halvings=halvings, hint="controlnet_cond", hint_doublings=_hint_doublings(network)
        )
    return RowCut(
        halvings=halvings, residuals=tuple(name for name in _CONTROL if name in parameters)
    )


def _hint_doublings(network: nn.Module) -> int:
    if network.config.global_pool_conditions:
        raise UnsupportedError(
            "this ControlNet pools over the whole image (global_pool_conditions), which patches "
            "cannot. Use another."
        )
    return sum(1 for block in network.controlnet_cond_embedding.blocks if block.stride[0] == 2)


def named_arguments(
    network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Positional and keyword arguments of a call by name, in the order of the network's
    signature.
    """
    names = [name for name in inspect.signature(type(network).forward).parameters if name != "self"]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {
        name: given[name]
        for name in sorted(
            given, key=lambda name: names.index(name) if name in names else len(names)
        )
    }


def with_first(output: Any, whole: Tensor) -> Any:
    """The network's output with its tensor replaced: a tuple, or an output object with `sample`."""
    return (whole, *output[1:]) if isinstance(output, tuple) else type(output)(sample=whole)


def join(pieces: list[Tensor], order: list[int], dim: int) -> Tensor:
    """Put the ranks' patches together: rank i had patch order[i]."""
    return torch.cat([pieces[order.index(patch)] for patch in range(len(order))], dim=dim)
