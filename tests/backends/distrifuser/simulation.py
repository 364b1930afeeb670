"""One process plays all ranks of a stale schedule, without patches, halos, buffers or messages: the
reference for the stale modes.

The network runs once per step on the whole image, in a batch of one copy ("view") per rank. In view
i only the rows (or tokens) of rank i's patch mean anything. Where an operator looks beyond them,
the other patches are put in from what rank i knows about them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backends.distrifuser.modes import SyncMode
from backends.step_cache_spec import StepCacheSpec


class Simulation(TorchFunctionMode):
    """bounds: patch bounds at the full resolution, in rows (or tokens). attentions: names of the
    modules that see all patches.

    text: whether text tokens come "first" or "last" in these attentions; None where there are none.
    step_cache: the network's; in steps that it skips all ranks see each other's values, and none is
    kept.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mode: SyncMode,
        bounds: Sequence[int],
        synchronous_steps: int,
        attentions: Callable[[str], bool],
        text: str | None = None,
        extrapolates: bool = False,
        step_cache: StepCacheSpec | None = None,
    ) -> None:
        super().__init__()
        self.mode, self.bounds, self.synchronous_steps = mode, bounds, synchronous_steps
        self.num_ranks, self.step, self.text, self.extrapolates = (
            len(bounds) - 1,
            0,
            text,
            extrapolates,
        )
        self._step_cache = step_cache
        self.known: dict[int, list[list[Tensor]]] = {}
        self.known_before: dict[int, list[list[Tensor]]] = {}
        self._sees_all = False
        self._handles = [
            module.register_forward_pre_hook(self._enter)
            for name, module in network.named_modules()
            if attentions(name)
        ]

    def close(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()

    def run(
        self, call: Callable[..., Tensor], sample: Tensor, *, dim: int, **batched: Tensor
    ) -> Tensor:
        """One step: call(sample, **batched) with every tensor repeated for all views; the patches
        of the result, put together.
        """
        self.operator = 0
        repeated = {
            name: tensor.repeat(self.num_ranks, *[1] * (tensor.dim() - 1))
            for name, tensor in batched.items()
        }
        with self:
            whole = call(sample.repeat(self.num_ranks, *[1] * (sample.dim() - 1)), **repeated)
        views = whole.unflatten(0, (self.num_ranks, -1))
        self.total = views.shape[dim]
        patches = [
            _part(views[rank], self._bounds(views.shape[dim]), self._patch(rank), dim)
            for rank in range(self.num_ranks)
        ]
        result = torch.cat(
            [patches[self._ranks_by_band()[patch]] for patch in range(self.num_ranks)], dim=dim
        )
        self.step += 1
        return result

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d and args[1].shape[-1] == 3:
            return func(self._complete("halo", args[0], dim=-2), *args[1:], **kwargs)
        if func is F.group_norm:
            return self._group_norm(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self._sees_all:
            self._sees_all = False
            query, key, value = args[:3] or (kwargs[name] for name in ("query", "key", "value"))
            key, value = self._complete_tokens(torch.stack((key, value), dim=1)).unbind(1)
            return func(query, key, value)
        return func(*args, **kwargs)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._sees_all = True

    def _is_skipped(self) -> bool:
        return self._step_cache is not None and self._step_cache.skips(self.step)

    def _is_fresh(self) -> bool:
        return self.step < max(1, self.synchronous_steps) or self._is_skipped()

    def _patch(self, rank: int) -> int:
        turn = self.step if self.mode.takes_turns and not self._is_fresh() else 0
        return (rank + turn) % self.num_ranks

    def _ranks_by_band(self) -> list[int]:
        return sorted(range(self.num_ranks), key=self._patch)

    def _bounds(self, size: int) -> list[int]:
        """The bounds for a tensor whose whole extent is `size`: rows at a lower resolution, or
        tokens.
        """
        if size >= self.bounds[-1]:
            return [bound * size // self.bounds[-1] for bound in self.bounds]
        return [-(-bound * size // self.bounds[-1]) for bound in self.bounds]

    def _exchange(self, kind: str, own: list[Tensor]) -> list[list[Tensor]]:
        """own: by rank, its patch's value. Returns for each rank the value of every patch that it
        uses; updates what it knows.
        """
        index, self.operator = self.operator, self.operator + 1
        action = "now" if self._is_fresh() else self.mode.action(kind)
        fresh = [own[self._ranks_by_band()[patch]] for patch in range(self.num_ranks)]
        if self._is_skipped():
            return [list(fresh) for _ in own]
        known = self.known.get(index)
        if action == "now":
            used = [list(fresh) for _ in own]
        else:
            used = [self._expected(index, rank) for rank in range(self.num_ranks)]
            for rank, values in enumerate(used):
                values[self._patch(rank)] = own[rank]
        self.known_before[index] = known
        if action == "keep":
            self.known[index] = [
                [
                    own[rank] if patch == self._patch(rank) else value
                    for patch, value in enumerate(known[rank])
                ]
                for rank in range(self.num_ranks)
            ]
        else:
            self.known[index] = [list(fresh) for _ in own]
        return used

    def _expected(self, index: int, rank: int) -> list[Tensor]:
        now, before = self.known[index][rank], self.known_before.get(index)
        if not self.extrapolates or before is None:
            return list(now)
        return [2 * value - old for value, old in zip(now, before[rank], strict=True)]

    def _complete(self, kind: str, x: Tensor, dim: int) -> Tensor:
        views, bounds = x.unflatten(0, (self.num_ranks, -1)), self._bounds(x.shape[dim])
        own = [_part(views[rank], bounds, self._patch(rank), dim) for rank in range(self.num_ranks)]
        return torch.stack(
            [torch.cat(values, dim=dim) for values in self._exchange(kind, own)]
        ).flatten(0, 1)

    def _complete_tokens(self, x: Tensor) -> Tensor:
        """Keys and values (N * B, 2, H, L, D): the image's from what each rank knows, the text's as
        they are.
        """
        length = self.bounds[-1] if self.text else x.shape[-2]
        start = x.shape[-2] - length if self.text == "first" else 0
        image = self._complete("attention", x.narrow(-2, start, length), dim=-2)
        return torch.cat((x.narrow(-2, 0, start), image, x[..., start + length :, :]), dim=-2)

    def _group_norm(
        self, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        """Mean and variance of the patches; put together as E[x] and E[x^2], which is how the paper
        has them.
        """
        views, bounds = x.unflatten(0, (self.num_ranks, -1)), self._bounds(x.shape[-2])
        grouped = [
            _part(views[rank], bounds, self._patch(rank), -2)
            .unflatten(1, (num_groups, -1))
            .flatten(2)
            for rank in range(self.num_ranks)
        ]
        own = [torch.stack((part.mean(-1), part.var(-1, correction=0))) for part in grouped]
        shares = [
            (end - start) / bounds[-1] for start, end in zip(bounds, bounds[1:], strict=False)
        ]
        before = self.known.get(self.operator)
        if not self._is_fresh() and self.mode.statistics == "local":
            moments = [_squares([part], [1.0]) for part in own]
            self.operator += 1
        else:
            moments = [_squares(used, shares) for used in self._exchange("statistics", own)]
            if self.mode.is_corrected and not self._is_fresh():
                stale = [_squares(before[rank], shares) for rank in range(self.num_ranks)]
                moments = [
                    stale[rank]
                    + _squares([own[rank]], [1.0])
                    - _squares([before[rank][self._patch(rank)]], [1.0])
                    for rank in range(self.num_ranks)
                ]
        results = []
        for rank, (mean, square) in enumerate(moments):
            var = square - mean**2
            var = torch.where(var < 0, own[rank][1], var)
            normal = (views[rank].unflatten(1, (num_groups, -1)).flatten(2) - mean[..., None]) / (
                var[..., None] + eps
            ).sqrt()
            normal = normal.reshape(views[rank].shape)
            results.append(normal * weight[:, None, None] + bias[:, None, None])
        return torch.stack(results).flatten(0, 1)


def _squares(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """E[x] and E[x^2] of a whole from the means and variances of its parts."""
    return sum(
        share * torch.stack((part[0], part[1] + part[0] ** 2))
        for share, part in zip(shares, parts, strict=True)
    )


def _part(x: Tensor, bounds: Sequence[int], patch: int, dim: int) -> Tensor:
    return x.narrow(dim, bounds[patch], bounds[patch + 1] - bounds[patch])
