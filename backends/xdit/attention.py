"""Joint and self-attention over tokens that are distributed over ranks (Ulysses, ring) and over
time (PipeFusion's stale patches).

Each attention module of the blocks is wrapped. While a wrapped module runs, the torch operator
scaled_dot_product_attention is replaced (backends/parallel/hooks.py), so processors, LoRA
layers, quantised layers and norms stay diffusers' own. Cross-attention is left alone.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backends.errors import UnsupportedError
from backends.groups.mesh import Axis, Mesh
from backends.parallel import hooks
from backends.parallel.hooks import run_attention, with_attention
from backends.parallel.transformer_spec import TransformerSpec
from backends.xdit.exchange import (
    gather_tokens,
    heads_for_tokens,
    own_heads,
    own_mask,
    plain_attention,
    repeat_heads,
    ring_attention,
    tokens_for_heads,
)
from backends.xdit.layout import Layout, Span, StaleKVCache

NAME = "xdit attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One run through the blocks."""

    layout: Layout
    """How the tokens are cut."""
    patch: int | None = None
    """The patch that is computed; None for all tokens at once."""
    stale: StaleKVCache | None = None
    """Keys and values of all patches; None where there are no patches."""
    is_text_first: bool = False
    """Text precedes the image where the two are concatenated."""


class SpreadAttention:
    """Attaches to the attention modules of one denoiser. `current` is the pass under way; None
    leaves attention alone.
    """

    def __init__(self, transformer: TransformerSpec, mesh: Mesh) -> None:
        self.current: Pass | None = None
        self._transformer = transformer
        self._mesh = mesh
        self._modules: list[nn.Module] = []

    def attach(self, denoiser: nn.Module) -> None:
        """Wrap every attention module of the blocks except cross-attention."""
        for path, module in attention_modules(denoiser, self._transformer):
            if path.rpartition(".")[2] in self._transformer.cross_attention:
                continue
            is_joint = path.rpartition(".")[2] not in self._transformer.image_attention
            hooks.attach(module, NAME, self._around(module, path, is_joint))
            self._modules.append(module)

    def detach(self) -> None:
        """Remove the hooks."""
        while self._modules:
            hooks.detach(self._modules.pop(), NAME)

    def _around(self, module: nn.Module, path: str, is_joint: bool) -> Callable[..., Any]:
        crosses = (
            not self._transformer.has_text_in(path)
            and path.rpartition(".")[2] not in self._transformer.gathers_keys
            and getattr(module, "added_kv_proj_dim", None) is None
        )  # has no projections for a second stream

        names = [*inspect.signature(type(module).forward).parameters][1:]  # without self

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            other = given.get("encoder_hidden_states")
            is_other = other is not None and other is not given.get("hidden_states")
            if self.current is None or (crosses and is_other):
                return run_attention(module, forward, *args, **kwargs)
            num_calls = 0

            def attend(*call: Any, **options: Any) -> Tensor:
                nonlocal num_calls
                num_calls += 1
                plain = _plain_arguments(*call, **options)
                return self._attend(path, is_joint, num_calls - 1, **plain)

            output = with_attention(attend, run_attention, module, forward, *args, **kwargs)
            if num_calls == 0:
                raise UnsupportedError(
                    f"{path} did not compute its attention with scaled_dot_product_attention, so "
                    "tokens on other ranks would be left out. Reset the attention processor or "
                    "backend to diffusers' default."
                )
            return output

        return around

    def _attend(
        self,
        path: str,
        is_joint: bool,
        index: int,
        *,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Return the attention of this rank's tokens (B, H, S, D) to the tokens of all ranks and
        patches, as (B, H, S, D). key, value may have fewer heads (grouped queries).

        mask: None, or of bools (False: not seen) or added to the scores, broadcast to (B, H,
        queries, keys), where the keys are this rank's, or queries and keys are those of all ranks
        in the order of the model.
        """
        if path.rpartition(".")[2] in self._transformer.gathers_keys:
            key, value = (self._gathered_keys(tensor) for tensor in (key, value))
            return plain_attention(query, key, value, scale=scale, mask=mask)
        if index > 0:
            return self._attend_to_image_prompt(path, query, key, value, scale, mask)
        return self._attend_to_all(path, is_joint, query, key, value, scale, mask=mask)

    def _attend_to_image_prompt(
        self,
        path: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Return the second attention of an IP-Adapter: to its keys, which are whole on every rank,
        and in some families also to all image tokens before them.
        """
        if mask is not None:
            raise UnsupportedError(
                f"{path} has a mask in its attention to an image prompt, which backend 'xdit' "
                "cannot distribute over ranks. Use --use_cfg_parallel alone, or another backend."
            )
        if self._transformer.image_prompt_keys == "alone":
            return plain_attention(query, key, value, scale=scale)
        own, prompt = zip(
            *(tensor.tensor_split([query.shape[2]], dim=2) for tensor in (key, value)), strict=True
        )
        return self._attend_to_all(f"{path} image prompt", False, query, *own, scale, prompt)

    def _attend_to_all(
        self,
        path: str,
        is_joint: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        whole: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend to all tokens. whole: further keys and values (B, H, K, D) that every rank has."""
        assert self.current is not None
        ulysses, ring, traffic = (
            self._mesh.axis("ulysses"),
            self._mesh.axis("ring"),
            self._mesh.traffic,
        )
        num_heads = query.shape[1]
        lengths = self._lengths(is_joint, ulysses, ring.rank)
        if mask is not None:
            mask = self._own_mask(mask, path, is_joint, query.shape[2])
        if ulysses.size > 1:
            query, key, value = self._exchange_heads(query, key, value, lengths)
            whole = own_heads(whole, axis=ulysses) if whole else None
        if self.current.stale is not None:
            key, value = self._with_stale(self.current.stale, path, is_joint, key, value)
        if ring.size > 1:
            totals = [
                sum(self._lengths(is_joint, ulysses, rank, all_patches=True))
                for rank in range(ring.size)
            ]
            output = ring_attention(
                query,
                key,
                value,
                lengths=totals,
                axis=ring,
                traffic=traffic,
                scale=scale,
                whole=whole,
                mask=mask,
            )
        else:
            key, value = (
                (torch.cat(pair, dim=2) for pair in zip((key, value), whole, strict=True))
                if whole
                else (key, value)
            )
            output = plain_attention(query, key, value, scale=scale, mask=mask)
        if ulysses.size > 1:
            output = heads_for_tokens(
                output, num_heads=num_heads, lengths=lengths, axis=ulysses, traffic=traffic
            )
        return (
            output.transpose(1, 2).contiguous().transpose(1, 2)
        )  # in the layout of torch's operator, because some processors view it so

    def _exchange_heads(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]
    ) -> tuple[Tensor, ...]:
        """Ulysses' first exchange. Grouped keys travel as they are where their heads divide, else
        once for each query head.
        """
        exchange = functools.partial(
            tokens_for_heads,
            lengths=lengths,
            axis=self._mesh.axis("ulysses"),
            traffic=self._mesh.traffic,
        )
        if query.shape[1] != key.shape[1] and key.shape[1] % self._mesh.axis("ulysses").size:
            key, value = (repeat_heads(tensor, query.shape[1]) for tensor in (key, value))
        if query.shape[1] == key.shape[1]:
            return exchange((query, key, value))
        (query,) = (tensor.clone() for tensor in exchange((query,)))  # read before the next one
        return query, *exchange((key, value))

    def _own_mask(self, mask: Tensor, path: str, is_joint: bool, own: int) -> Tensor:
        """Return a mask for this rank's queries after the exchange of heads."""
        assert self.current is not None
        made = None
        if self.current.stale is None:
            made = own_mask(
                mask,
                own=own,
                layout=self.current.layout,
                is_joint=is_joint,
                is_text_first=self.current.is_text_first,
                mesh=self._mesh,
            )
        if made is None:
            raise UnsupportedError(
                f"{path} has an attention mask of shape {tuple(mask.shape)} for {own} tokens of "
                "this rank, which backend 'xdit' cannot distribute over ranks"
                f"{' with PipeFusion' if self.current.stale is not None else ''}. Use "
                "--use_cfg_parallel alone, or another backend."
            )
        return made

    def _gathered_keys(self, tensor: Tensor) -> Tensor:
        """Return the keys or values (B, H, S, D) of all image tokens."""
        assert self.current is not None
        axis, layout = self._mesh.axis("ring", "ulysses"), self.current.layout
        lengths = [layout.shard(index).count(with_text=False) for index in range(axis.size)]
        tokens = gather_tokens(
            tensor.transpose(1, 2).flatten(2).contiguous(),
            lengths=lengths,
            axis=axis,
            traffic=self._mesh.traffic,
        )
        return tokens.unflatten(2, (tensor.shape[1], -1)).transpose(1, 2)

    def _lengths(
        self, is_joint: bool, ulysses: Axis, ring_rank: int, *, all_patches: bool = False
    ) -> list[int]:
        """Return the number of tokens of each Ulysses rank beside ring rank `ring_rank`: in this
        pass, or of all patches whose keys are kept.
        """
        assert self.current is not None
        patch = None if all_patches and self.current.stale is not None else self.current.patch
        indices = range(ring_rank * ulysses.size, (ring_rank + 1) * ulysses.size)
        return [
            self.current.layout.shard(index, patch=patch).count(with_text=is_joint)
            for index in indices
        ]

    def _with_stale(
        self, stale: StaleKVCache, path: str, is_joint: bool, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store these keys and values. Return them with the stored ones of other patches."""
        assert self.current is not None
        if self.current.patch is None:
            return stale.remember_all(path, key, value, patches=self._patches(is_joint))
        return stale.remember_patch(path, key, value, patch=self.current.patch)

    def _patches(self, is_joint: bool) -> list[list[Span]]:
        """Return, for a whole pass, where the tokens of each patch are, in the order in which this
        rank has them after the exchange of heads.
        """
        assert self.current is not None
        layout, ulysses, ring = (
            self.current.layout,
            self._mesh.axis("ulysses"),
            self._mesh.axis("ring"),
        )
        found: list[list[Span]] = [[] for _ in range(layout.num_patches)]
        begin = 0
        for index in range(ring.rank * ulysses.size, (ring.rank + 1) * ulysses.size):
            shard = layout.shard(index)
            streams = (
                [shard.text, shard.image]
                if self.current.is_text_first
                else [shard.image, shard.text]
            )
            for spans in streams if is_joint else [shard.image]:
                for patch, (start, stop) in enumerate(spans):
                    found[patch].append((begin, begin + stop - start))
                    begin += stop - start
        return found


def attention_modules(
    denoiser: nn.Module, transformer: TransformerSpec
) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of every attention module in the blocks: the modules that hold a
    processor.
    """
    return [
        (f"{blocks}.{path}", module)
        for blocks in transformer.blocks
        for path, module in denoiser.get_submodule(blocks).named_modules()
        if hasattr(module, "processor")
    ]


def _plain_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    """Return the arguments of a plain attention. UnsupportedError for causal attention and dropout,
    which would be computed wrongly. enable_gqa is seen from the heads.
    """
    if is_causal or dropout_p:
        raise UnsupportedError(
            "backend 'xdit' cannot distribute causal attention or dropout over ranks. Use "
            "--use_cfg_parallel alone, or another backend."
        )
    return {"query": query, "key": key, "value": value, "scale": scale, "mask": attn_mask}
