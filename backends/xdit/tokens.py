"""Spreads the tokens of a denoiser over the ranks of a sequence group: cut them going in, gather them before the output layer.

Attached around three places of an untouched diffusers transformer: its forward (arguments are cut), its patch embedding (image tokens
are cut) and its output norm (tokens are gathered). Attention in between is attention.py's; everything else works token by token.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from backends import hooks
from backends.distributed import Mesh
from backends.xdit.attention import Pass, SpreadAttention
from backends.xdit.exchange import gather_tokens
from backends.xdit.families import Family, family_of
from backends.xdit.layout import Layout, Share, Span, count, take

NAME = "xdit tokens"


class TokenCut:
    """Attached to one denoiser. During a pass only this rank's shard of the tokens runs through the blocks."""

    def __init__(self, denoiser: nn.Module, mesh: Mesh, *, collect: Callable[[Tensor], Tensor] | None = None) -> None:
        """collect: turns this rank's tokens into what the output layers get; by default `gather`."""
        self.family: Family = family_of(denoiser)
        self.attention = SpreadAttention(self.family, mesh)
        self._denoiser = denoiser
        self._mesh = mesh
        self._collect = collect or self.gather
        self._names = [name for name in inspect.signature(type(denoiser).forward).parameters if name != "self"]

    def attach(self) -> None:
        self.attention.attach(self._denoiser)
        if self.family.embed is not None:
            hooks.attach(getattr(self._denoiser, self.family.embed), NAME, self._cut_embedding)
        hooks.attach(getattr(self._denoiser, self.family.tail), NAME, self._gather)

    def detach(self) -> None:
        hooks.detach(getattr(self._denoiser, self.family.tail), NAME)
        if self.family.embed is not None:
            hooks.detach(getattr(self._denoiser, self.family.embed), NAME)
        self.attention.detach()

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def layout(self, arguments: dict[str, Any], *, num_patches: int = 1) -> Layout:
        """How the tokens of this call are cut."""
        text = arguments[self.family.text].shape[1] if self.family.text is not None else 0
        image = self.family.num_image_tokens(self._denoiser, arguments[self._names[0]])
        shards = self._mesh.axis("ring", "ulysses").size
        return Layout(num_text=text, num_image=image, num_patches=num_patches, num_shards=shards)

    def run(self, forward: Callable[..., Any], arguments: dict[str, Any], this: Pass) -> Any:
        """One pass: `forward` of the whole denoiser on this rank's tokens."""
        self.attention.current = this
        try:
            return forward(**self._cut_arguments(arguments))
        finally:
            self.attention.current = None

    def share(self) -> Share:
        """This rank's tokens in the pass under way."""
        this = self.current
        return this.layout.share(self._mesh.axis("ring", "ulysses").rank, patch=this.patch)

    @property
    def current(self) -> Pass:
        """The pass under way."""
        assert self.attention.current is not None
        return self.attention.current

    def _cut_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        share = self.share()
        cuts: dict[str, tuple[tuple[Span, ...], int]] = {}
        if self.family.text is not None:
            cuts[self.family.text] = (share.text, 1)
        cuts |= {name: (share.text, dim) for name, dim in self.family.text_arguments.items()}
        cuts |= {name: (share.image, dim) for name, dim in self.family.image_arguments.items()}
        return {name: _cut(value, *cuts[name]) if name in cuts else _own(value) for name, value in arguments.items()}

    def _cut_embedding(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        tokens = forward(*args, **kwargs)
        return tokens if self.attention.current is None else take(tokens, self.share().image, dim=1)

    def _gather(self, forward: Callable[..., Any], tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """tokens: (B, this rank's, D). The output norm, and what comes after it, get (B, N, D)."""
        return forward(tokens if self.attention.current is None else self._collect(tokens), *args, **kwargs)

    def gather(self, tokens: Tensor) -> Tensor:
        """All image tokens of the pass under way, in their natural order."""
        this, axis = self.current, self._mesh.axis("ring", "ulysses")
        shares = [this.layout.share(shard, patch=this.patch) for shard in range(axis.size)]
        if axis.size > 1:
            lengths = [count(share.image) for share in shares]
            tokens = gather_tokens(tokens, lengths=lengths, axis=axis, traffic=self._mesh.traffic)
        if len(shares) > 1 and len(shares[0].image) > 1:  # shards interleave: each holds a part of every patch
            positions = [torch.arange(*span) for share in shares for span in share.image]
            tokens = tokens[:, torch.argsort(torch.cat(positions)).to(tokens.device)]
        return tokens


def _cut(value: Any, spans: tuple[Span, ...], dim: int) -> Any:
    """Every tensor in `value`, cut along `dim`."""
    if torch.is_tensor(value):
        return take(value, spans, dim=dim if dim < value.dim() else 0)
    if isinstance(value, list | tuple):
        return type(value)(_cut(item, spans, dim) for item in value)
    return value


def _own(value: Any) -> Any:
    """A copy of containers, because some denoisers take entries out of theirs and a call may consist of several passes."""
    return dict(value) if isinstance(value, dict) else value


class SequenceParallel:
    """Ulysses and ring parallelism: every denoiser call is one pass over this rank's shard."""

    def __init__(self, denoiser: nn.Module, mesh: Mesh) -> None:
        self._cut = TokenCut(denoiser, mesh)
        self._denoiser = denoiser

    def attach(self) -> None:
        self._cut.attach()
        hooks.attach(self._denoiser, NAME, self._call)

    def detach(self) -> None:
        hooks.detach(self._denoiser, NAME)
        self._cut.detach()

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = self._cut.bind(args, kwargs)
        return self._cut.run(forward, arguments, Pass(layout=self._cut.layout(arguments)))
