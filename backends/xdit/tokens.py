"""Distribute the tokens of a denoiser over the ranks of a sequence group: cut them on the way in,
gather them before the output layer.

Attached at a few places of an unchanged diffusers transformer: its forward (arguments are cut), its
patch embedding or first block (image tokens are cut), its position embeddings, and its output norm
(tokens are gathered). The attention between them is in attention.py; everything else works token by
token.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from backends.errors import UnsupportedError
from backends.groups.mesh import Mesh
from backends.parallel import hooks
from backends.parallel.cfg_split import cut_batch
from backends.parallel.transformer_spec import TransformerSpec
from backends.parallel.transformers import TRANSFORMERS, transformer_of
from backends.xdit.attention import Pass, SpreadAttention
from backends.xdit.exchange import gather_tokens
from backends.xdit.layout import Layout, Shard, Span, StaleKVCache, count, take

NAME = "xdit tokens"


class TokenCut:
    """Attached to one denoiser. During a pass only this rank's shard of the tokens runs through the
    blocks.
    """

    def __init__(
        self, denoiser: nn.Module, mesh: Mesh, *, collect: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """collect: converts this rank's tokens to the input of the output layers; by default
        `gather`.
        """
        self.transformer: TransformerSpec = require_row(denoiser)
        self.attention = SpreadAttention(self.transformer, mesh)
        self._denoiser = denoiser
        self._mesh = mesh
        self._collect = collect or self.gather
        self._names = names_of(denoiser)
        self._places: list[nn.Module] = []

    def attach(self) -> None:
        """Hook the embedding, positions, blocks, output norm and attention of the denoiser."""
        self.attention.attach(self._denoiser)
        if self.transformer.embed is not None:
            self._attach(getattr(self._denoiser, self.transformer.embed), self._cut_embedding)
        for name, streams in self.transformer.positions.items():
            self._attach(getattr(self._denoiser, name), self._cut_positions(streams))
        if self.transformer.cut_in_blocks:
            blocks = [
                block for name in self.transformer.blocks for block in getattr(self._denoiser, name)
            ]
            for block in blocks:
                self._attach(block, self._cut_block(names_of(block), is_first=block is blocks[0]))
        tail = getattr(self._denoiser, self.transformer.tail)
        for module in tail.values() if isinstance(tail, nn.ModuleDict) else [tail]:
            self._attach(module, self._gather)

    def detach(self) -> None:
        """Remove the hooks."""
        while self._places:
            hooks.detach(self._places.pop(), NAME)
        self.attention.detach()

    def _attach(self, module: nn.Module, around: hooks.Around) -> None:
        hooks.attach(module, NAME, around)
        self._places.append(module)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a call's arguments by name, in the order of the signature."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        return {name: given[name] for name in self._names if name in given}

    def layout(self, arguments: dict[str, Any], *, num_patches: int = 1) -> Layout:
        """Return how the tokens of this call are cut."""
        text = arguments[self.transformer.text].shape[1] if self.transformer.text is not None else 0
        image = self.transformer.num_image_tokens(self._denoiser.config, arguments)
        shards = self._mesh.axis("ring", "ulysses").size
        return Layout(num_text=text, num_image=image, num_patches=num_patches, num_shards=shards)

    def run(
        self,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        layout: Layout,
        *,
        patch: int | None = None,
        stale: StaleKVCache | None = None,
    ) -> Any:
        """Run one pass: `forward` of the whole denoiser on this rank's tokens."""
        self.attention.current = Pass(
            layout=layout,
            patch=patch,
            stale=stale,
            is_text_first=self.transformer.is_text_first,
        )
        try:
            return forward(**self._cut_arguments(arguments))
        finally:
            self.attention.current = None

    def shard(self) -> Shard:
        """Return this rank's tokens in the pass under way."""
        this = self.current
        return this.layout.shard(self._mesh.axis("ring", "ulysses").rank, patch=this.patch)

    @property
    def current(self) -> Pass:
        """Return the pass under way."""
        assert self.attention.current is not None
        return self.attention.current

    def _cut_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        shard = self.shard()
        cuts: dict[str, tuple[tuple[Span, ...], int]] = {}
        if self.transformer.text is not None:
            cuts[self.transformer.text] = (shard.text, 1)
        cuts |= {name: (shard.text, dim) for name, dim in self.transformer.text_arguments.items()}
        cuts |= {name: (shard.image, dim) for name, dim in self.transformer.image_arguments.items()}
        return {
            name: _cut(value, *cuts[name]) if name in cuts else _own(value)
            for name, value in arguments.items()
        }

    def _cut_embedding(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        tokens = forward(*args, **kwargs)
        if self.attention.current is None:
            return tokens
        # (B, D, n): the class flattens the dims after dim 1, of which one is left
        if self.transformer.embeds_map:
            return take(tokens.flatten(2), self.shard().image, dim=2)
        return take(tokens, self.shard().image, dim=1)

    def _cut_positions(self, streams: tuple[tuple[str, int], ...]) -> hooks.Around:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self.attention.current is None:
                return forward(*args, **kwargs)
            if self.transformer.text_length is not None:
                kwargs = {**kwargs, self.transformer.text_length: self.current.layout.num_text}
            positions, shard = forward(*args, **kwargs), self.shard()
            return tuple(
                take(tensor, shard.image if stream == "image" else shard.text, dim=dim)
                for tensor, (stream, dim) in zip(positions, streams, strict=True)
            )

        return around

    def _cut_block(self, names: list[str], *, is_first: bool) -> hooks.Around:
        """Return a hook for a block whose arguments are still whole. Tokens from the block before
        are cut already.
        """
        dims = self.transformer.cut_in_blocks
        tokens, *others = dims

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            if self.attention.current is not None:
                for name in [tokens, *others] if is_first else others:
                    arguments[name] = take(
                        arguments[name],
                        self.shard().image,
                        dim=self.transformer.cut_in_blocks[name],
                    )
            return forward(**arguments)

        return around

    def _gather(
        self, forward: Callable[..., Any], tokens: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Pass all image tokens to the output norm and the layers after it. tokens: (B, n, D), of
        this rank; passed on as (B, N, D).
        """
        return forward(
            tokens if self.attention.current is None else self._collect(tokens), *args, **kwargs
        )

    def gather(self, tokens: Tensor) -> Tensor:
        """Return all image tokens (B, N, D) of the pass under way, in their natural order."""
        this, axis = self.current, self._mesh.axis("ring", "ulysses")
        shards = [this.layout.shard(index, patch=this.patch) for index in range(axis.size)]
        if axis.size > 1:
            lengths = [count(shard.image) for shard in shards]
            tokens = gather_tokens(tokens, lengths=lengths, axis=axis, traffic=self._mesh.traffic)
        if len(shards) > 1 and len(shards[0].image) > 1:
            # shards interleave: each has a part of every patch. They are cut out, because the host
            # would wait for an index of tokens to be copied to the GPU
            spans = [span for shard in shards for span in shard.image]
            parts = tokens.split([stop - start for start, stop in spans], dim=1)
            in_order = sorted(range(len(spans)), key=spans.__getitem__)
            tokens = torch.cat([parts[index] for index in in_order], dim=1)
        return tokens


def require_row(denoiser: nn.Module) -> TransformerSpec:
    """Return the facts of this denoiser's class. UnsupportedError if nobody has described it."""
    row = transformer_of(denoiser)
    if row is None:
        raise UnsupportedError(
            f"backend 'xdit' cannot spread the tokens of {type(denoiser).__name__}. Allowed: "
            f"{', '.join(TRANSFORMERS)}. "
            "Use CFG parallelism alone (--use_cfg_parallel on 2 ranks), or another backend."
        )
    return row


def _cut(value: Any, spans: tuple[Span, ...], dim: int) -> Any:
    """Cut every tensor in `value` along `dim`."""
    if torch.is_tensor(value):
        dim = dim if dim < value.dim() else 0
        is_shared = value.shape[dim] == 1 and spans[-1][1] > 1  # one entry for all tokens
        return value if is_shared else take(value, spans, dim=dim)
    if isinstance(value, list | tuple):
        return type(value)(_cut(item, spans, dim) for item in value)
    if isinstance(value, dict):
        return {key: _cut(item, spans, dim) for key, item in value.items()}
    return value


def names_of(module: nn.Module) -> list[str]:
    """Return the arguments of a module's class, in order."""
    return [name for name in inspect.signature(type(module).forward).parameters if name != "self"]


def _own(value: Any) -> Any:
    """Copy a dict, because some denoisers take entries out of it and a call may consist of several
    passes.
    """
    return dict(value) if isinstance(value, dict) else value


class SequenceParallel:
    """Ulysses and ring parallelism: every denoiser call is one pass over this rank's shard."""

    def __init__(self, denoiser: nn.Module, mesh: Mesh) -> None:
        self._cut = TokenCut(denoiser, mesh)
        self._denoiser = denoiser

    def attach(self) -> None:
        """Hook the denoiser and its tokens."""
        self._cut.attach()
        hooks.attach(self._denoiser, NAME, self._call)

    def detach(self) -> None:
        """Remove the hooks."""
        hooks.detach(self._denoiser, NAME)
        self._cut.detach()

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = self._cut.bind(args, kwargs)
        first = next(iter(arguments.values()))
        if not isinstance(first, list):
            return self._pass(forward, arguments)
        parts = [
            cut_batch(arguments, len(first), parts=len(first), part=part)
            for part in range(len(first))
        ]
        if len({self._cut.layout(part) for part in parts}) == 1:
            return self._pass(forward, arguments)
        # images with texts of different lengths would be padded to one length, with a mask in every
        # attention; one pass for each image needs no mask
        outputs = [self._pass(forward, part) for part in parts]
        samples = [sample for output in outputs for sample in output[0]]
        return (samples,) if isinstance(outputs[0], tuple) else type(outputs[0])(sample=samples)

    def _pass(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        return self._cut.run(forward, arguments, self._cut.layout(arguments))
