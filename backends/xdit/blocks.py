"""Distribute the tokens within the lists of blocks of a denoiser, for classes whose own code around
the lists must see all tokens (`TransformerSpec.cuts`). tokens.py is the other way.

Every rank runs what comes before, between and after the lists on all tokens. These are a few thin
layers beside the blocks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backends.errors import UnsupportedError
from backends.groups.mesh import Axis, Mesh
from backends.parallel import hooks
from backends.parallel.transformer_spec import BlockCut, Cut
from backends.xdit.attention import Pass, SpreadAttention
from backends.xdit.exchange import gather_tokens
from backends.xdit.layout import Layout, count, split, take
from backends.xdit.tokens import NAME, SequenceParallel, names_of, require_row


class BlockTokens:
    """Attached to the block lists of one denoiser (`TransformerSpec.cuts`): within a list only this
    rank's tokens are computed.
    """

    def __init__(self, denoiser: nn.Module, mesh: Mesh) -> None:
        self._transformer = require_row(denoiser)
        self._attention = SpreadAttention(self._transformer, mesh)
        self._denoiser = denoiser
        self._mesh = mesh
        self._places: list[nn.Module] = []
        self._pass: Pass | None = None

    def attach(self) -> None:
        """Hook the blocks and their attention."""
        self._attention.attach(self._denoiser)
        if self._transformer.image_arguments:
            hooks.attach(self._denoiser, NAME, self._call)
            self._places.append(self._denoiser)
        for name, cut in self._transformer.cuts.items():
            try:
                blocks = list(self._denoiser.get_submodule(name))
            except AttributeError:  # an optional list
                continue
            for number, block in enumerate(blocks):
                is_first = cut.gathers_each or number == 0
                is_last = cut.gathers_each or number == len(blocks) - 1
                around = self._around(block, cut, is_first=is_first, is_last=is_last)
                hooks.attach(block, NAME, around)
                self._places.append(block)

    def detach(self) -> None:
        """Remove the hooks."""
        while self._places:
            hooks.detach(self._places.pop(), NAME)
        self._attention.detach()

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Cut what the class adds to the tokens between its blocks (a ControlNet's residuals)."""
        arguments = dict(zip(names_of(self._denoiser), args, strict=False)) | kwargs
        axis = self._mesh.axis("ring", "ulysses")
        for name, dim in self._transformer.image_arguments.items():
            value = arguments.get(name)
            if isinstance(value, list | tuple) and value:
                arguments[name] = self._residuals(value, dim, axis)
            else:
                arguments[name] = _shards_of(value, dim, axis)
        return forward(**arguments)

    def _residuals(self, value: Sequence[Any], dim: int, axis: Axis) -> list[Any]:
        """Return one residual for each block, as they are shared out in diffusers. The last one is
        whole, since it is added to what the last block has gathered.
        """
        name, cut = next(iter(self._transformer.cuts.items()))
        num_blocks = len(list(self._denoiser.get_submodule(name)))
        interval = math.ceil(num_blocks / len(value))
        each = [value[index // interval] for index in range(num_blocks)]
        return each if cut.gathers_each else [*_shards_of(each[:-1], dim, axis), each[-1]]

    def _around(
        self, block: nn.Module, cut: BlockCut, *, is_first: bool, is_last: bool
    ) -> hooks.Around:
        names = names_of(block)

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if is_first:
                arguments = dict(zip(names, args, strict=False)) | kwargs
                layout = self._layout(cut, arguments)
                self._pass = Pass(layout=layout, is_text_first=cut.is_text_first)
            given = [
                self._cut(cut.arguments.get(name), value)
                for name, value in zip(names, args, strict=False)
            ]
            named = {
                name: self._cut(cut.arguments.get(name), value) for name, value in kwargs.items()
            }
            self._attention.current = self._pass
            try:
                output = forward(*given, *args[len(given) :], **named)
            finally:
                self._attention.current = None
            return self._gathered(output, cut) if is_last else output

        return around

    def _layout(self, cut: BlockCut, arguments: dict[str, Any]) -> Layout:
        lengths = {
            where.stream: arguments[name].shape[where.dim]
            for name, where in reversed(cut.arguments.items())
            if isinstance(where, Cut) and torch.is_tensor(arguments.get(name))
        }
        shards = self._mesh.axis("ring", "ulysses").size
        if cut.has_text and lengths["text"] < shards:
            raise UnsupportedError(
                f"a text of {lengths['text']} tokens cannot be spread over {shards} ranks by "
                f"{type(self._denoiser).__name__}. Use a longer prompt, or --use_cfg_parallel."
            )
        return Layout(
            num_text=lengths["text"] if cut.has_text else 0,
            num_image=lengths["image"],
            num_shards=shards,
        )

    def _cut(self, where: Cut | tuple[Cut | None, ...] | None, value: Any) -> Any:
        """Return this rank's entries of an argument. Those of the block before are cut already."""
        if where is None:
            return value
        if isinstance(value, dict):
            return {name: self._cut(where, item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            places = [where] * len(value) if isinstance(where, Cut) else where
            return type(value)(
                self._cut(place, item) for place, item in zip(places, value, strict=True)
            )
        if isinstance(value, int) and not isinstance(value, bool):
            return self._cut_number(value)
        if not torch.is_tensor(value) or not isinstance(where, Cut):
            return value
        if where.ndim is not None and value.dim() != where.ndim:
            return value
        assert self._pass is not None
        layout, rank = self._pass.layout, self._mesh.axis("ring", "ulysses").rank
        shard, total = layout.shard(rank), layout.num_image
        spans = shard.image
        if where.stream == "joint":
            spans = layout.order([rank], is_joint=True, is_text_first=self._pass.is_text_first)
            total += layout.num_text
        elif where.stream == "text":
            spans, total = shard.text, layout.num_text
        length = value.shape[where.dim]
        if length == total:
            return take(value, spans, dim=where.dim)
        if length in (1, count(spans)):
            return value
        raise UnsupportedError(
            f"{type(self._denoiser).__name__} gives its blocks {length} entries for {total} "
            "tokens, which Ulysses and ring do not cut. Use --use_cfg_parallel alone."
        )

    def _cut_number(self, number: int) -> int:
        """Return how many of this rank's image tokens are among the first `number` of all."""
        assert self._pass is not None
        (span,) = self._pass.layout.shard(self._mesh.axis("ring", "ulysses").rank).image
        return max(0, min(number, span[1]) - span[0])

    def _gathered(self, output: Any, cut: BlockCut) -> Any:
        """Return a block's output with the tokens of all ranks, in the order of the model."""
        if torch.is_tensor(output):
            return self._gather(output, cut, cut.returns[0])
        return type(output)(
            self._gather(tokens, cut, stream)
            for tokens, stream in zip(output, cut.returns, strict=True)
        )

    def _gather(self, tokens: Tensor | None, cut: BlockCut, stream: str) -> Tensor | None:
        if tokens is None or stream == "whole":
            return tokens
        assert self._pass is not None
        axis, layout = self._mesh.axis("ring", "ulysses"), self._pass.layout
        dim = next(
            where.dim
            for where in cut.arguments.values()
            if isinstance(where, Cut) and where.stream == stream
        )
        shards = [layout.shard(index) for index in range(axis.size)]
        lengths = [count(shard.image if stream == "image" else shard.text) for shard in shards]
        rows = tokens.movedim(dim, 1)
        whole = gather_tokens(
            rows.flatten(2).contiguous(), lengths=lengths, axis=axis, traffic=self._mesh.traffic
        )
        return whole.unflatten(2, rows.shape[2:]).movedim(1, dim)


def _shards_of(value: Any, dim: int, axis: Axis) -> Any:
    """Cut every tensor in `value` evenly along `dim`, and return this rank's parts."""
    if isinstance(value, list | tuple):
        return type(value)(_shards_of(item, dim, axis) for item in value)
    if value is None:
        return None
    return take(value, [split((0, value.shape[dim]), parts=axis.size, index=axis.rank)], dim=dim)


def sequence_parallel(denoiser: nn.Module, mesh: Mesh) -> BlockTokens | SequenceParallel:
    """Return what spreads the tokens of this class by Ulysses and ring."""
    kind = BlockTokens if require_row(denoiser).cuts else SequenceParallel
    return kind(denoiser, mesh)
