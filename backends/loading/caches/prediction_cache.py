"""The step cache `prediction` (--step_cache=prediction,2): in most steps the denoiser does not run,
and its prediction is continued along the line through the last two computed ones.

It is around every parallel method, so a skipped step sends nothing and methods are not told of it:
to them the sampler has fewer steps. A ControlNet is not run either, since its residuals would not
be read. A line through predictions needs samplers that go one way: those that call the denoiser
once in each step and add no noise. With others every step is computed.

Linear multistep solvers continue predictions likewise (Liu et al., arXiv:2202.09778).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from backends.groups.mesh import Mesh
from backends.parallel import hooks
from backends.step_cache_spec import StepCacheSpec

NAME = "prediction cache"


@dataclass(slots=True)
class _Computed:
    """What one call of a step returned, at the last two steps that were computed."""

    last: Any
    at: int
    older: Any = None
    older_at: int = -1

    def after(self, output: Any, step: int) -> "_Computed":
        return _Computed(last=output, at=step, older=self.last, older_at=self.at)

    def continued(self, step: int) -> Any:
        weight = 1.0 + (step - self.at) / (self.at - self.older_at)

        def follow(older: Any, last: Any) -> Any:
            return torch.lerp(older, last, weight) if isinstance(last, Tensor) else last

        return pytree.tree_map(follow, self.older, self.last)


class PredictionCache:
    """The cache of one pipeline: of all its denoisers, each of which may run in some of the steps.

    The same interface as StepCache.
    """

    def __init__(
        self, cache: StepCacheSpec, denoisers: list[nn.Module], controlnet: nn.Module | None
    ) -> None:
        self.spec = cache
        self._denoisers = denoisers
        self._controlnet = controlnet
        self._computed: dict[tuple[int, int], _Computed] = {}
        self._residuals: dict[int, Any] = {}
        self._is_on = False
        self._step = self._num_steps = 0
        self._begin_step()
        self.num_calls = self.num_skipped = 0

    def attach(self) -> None:
        """Hook the denoisers and the ControlNet, around whatever is attached later."""
        for index, denoiser in enumerate(self._denoisers):
            hooks.attach(denoiser, NAME, self._around(index), stays_outside=True)
        if self._controlnet is not None:
            hooks.attach(self._controlnet, NAME, self._around_controlnet, stays_outside=True)

    def detach(self) -> None:
        """Remove the hooks, and forget what is kept."""
        self.end()
        for module in filter(None, (*self._denoisers, self._controlnet)):
            hooks.detach(module, NAME)

    def share(self, mesh: Mesh | None) -> None:
        """Do nothing: the number of a step says the same on every rank."""

    def begin(self, *, is_on: bool) -> None:
        """Begin a generation. is_on: whether steps may be skipped."""
        self.end()
        self._is_on = is_on
        self.num_calls = self.num_skipped = 0

    def step_done(self, num_steps: int) -> bool:
        """Count a finished step of so many. Return whether a denoiser ran in it."""
        ran = self._ran
        for computed in self._computed.values():
            if computed.at == self._step:  # a compiled denoiser may write over what it returned
                computed.last = pytree.tree_map_only(Tensor, torch.clone, computed.last)
        self._step, self._num_steps = self._step + 1, num_steps
        self._begin_step()
        return ran

    def end(self) -> None:
        """Drop everything that is kept between steps."""
        self._computed.clear()
        self._residuals.clear()
        self._is_on = False
        self._step = self._num_steps = 0
        self._begin_step()

    def _begin_step(self) -> None:
        self._number = self._number_controlled = 0
        self._ran = True  # until a call is skipped

    def report(self) -> Mapping[str, int]:
        """Return the denoisers' calls of the last generation, and how many were skipped."""
        return {"calls": self.num_calls, "skipped": self.num_skipped}

    def _around(self, index: int) -> hooks.Around:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self._is_on:
                return forward(*args, **kwargs)
            key, self._number = (index, self._number), self._number + 1
            self.num_calls += 1
            if self._skips(key):
                self.num_skipped += 1
                self._ran = False
                return self._computed[key].continued(self._step)
            output = forward(*args, **kwargs)
            known = self._computed.get(key)
            self._computed[key] = (
                _Computed(output, self._step)
                if known is None or _shapes(known.last) != _shapes(output)
                else known.after(output, self._step)
            )
            return output

        return around

    def _around_controlnet(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the last residuals in a step in which no denoiser will read them."""
        if not self._is_on:
            return forward(*args, **kwargs)
        key, self._number_controlled = self._number_controlled, self._number_controlled + 1
        if key not in self._residuals or not self._skips((0, 0)):
            self._residuals[key] = forward(*args, **kwargs)
        return self._residuals[key]

    def _skips(self, key: tuple[int, int]) -> bool:
        """Return whether this call of the present step is skipped: not before a line is known."""
        known = self._computed.get(key)
        is_known = known is not None and known.older is not None
        return is_known and self.spec.skips_whole(self._step, self._num_steps)


def _shapes(output: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
