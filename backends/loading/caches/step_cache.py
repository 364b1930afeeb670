"""Step caches (--step_cache): run little of the denoiser in some steps and reuse an earlier step.

first_block: each step runs the first block. If its residual is close to that of the last full step,
the other blocks' residual is reused. ParaAttention's first-block cache, after TeaCache
(arXiv:2411.19108, section 3).

taylor: every n-th step is full. In between, the residual of all blocks after the first is
extrapolated linearly from the last two full steps. TaylorSeer (arXiv:2503.06923, section 3), first
order.

deep: every n-th step is full. In between, a UNet runs only its outermost level. DeepCache
(arXiv:2312.00858, section 3).

prediction: see prediction_cache.py.

diffusers' own hooks (diffusers.hooks) are not used. They decide on each rank by that rank's data,
so ranks would disagree; they add a ControlNet's residuals twice in a skipped step; they do not
support HunyuanDiT's and PixArt's blocks, and fail on FLUX.2's.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from backends.groups.collectives import all_sum
from backends.groups.mesh import Mesh
from backends.loading.caches.prediction_cache import PredictionCache
from backends.model_table import ModelSpec
from backends.parallel import hooks
from backends.parallel.transformers import transformer_of
from backends.plan import is_met
from backends.request import GenerateRequest
from backends.step_cache_spec import StepCacheSpec

NAME = "step cache"


@dataclass(slots=True)
class _Residual:
    """What the blocks after the first added to its output, at the last two full steps."""

    last: Tensor
    at: int
    older: Tensor | None = None
    older_at: int = 0

    def after(self, last: Tensor, at: int) -> "_Residual":
        return _Residual(last=last, at=at, older=self.last, older_at=self.at)

    def continued(self, step: int) -> Tensor:
        """Extrapolate linearly to this step."""
        if self.older is None:
            return self.last
        return torch.lerp(self.older, self.last, 1.0 + (step - self.at) / (self.at - self.older_at))


@dataclass(slots=True)
class _Call:
    """The state of the n-th denoiser call of each step, kept between steps.

    Some pipelines make two calls per step, one per half of guidance.
    """

    is_full: bool = True  # this step is computed in full
    image: Tensor | None = None  # tokens after the first block
    other: Tensor | None = None  # the same of the text, or of what runs beside the image
    effect: Tensor | None = None  # residual of the first block at the last full step
    residual: _Residual | None = None  # residual of the other blocks at that step
    other_residual: _Residual | None = None  # the same of `other`, where the result shows it
    kept: dict[int, Any] | None = None  # outputs of a UNet's inner modules at that step
    shape: tuple[int, ...] = ()  # of the denoiser's input


@dataclass(frozen=True, slots=True)
class _Form:
    """How a block takes and returns its tokens."""

    names: tuple[str, ...]
    """Of its arguments. The first is the image tokens."""
    other: str
    """Argument with what runs beside them: text, or sound."""
    place: int | None
    """Place of the image in what the block returns; None: by its number of tokens."""
    keeps_other: bool
    """The result shows the other stream too."""
    is_text_first: bool
    """Where a block takes the image and the text as one tensor."""

    @classmethod
    def of(cls, denoiser: nn.Module, blocks: str, block: nn.Module) -> "_Form":
        """blocks: name of the denoiser's list with this block."""
        _, *names = inspect.signature(type(block).forward).parameters
        row = transformer_of(denoiser)
        cut = row.cuts.get(blocks) if row is not None else None
        returns = cut.returns if cut is not None else ("text", "image")
        keeps_other = "whole" in returns
        return cls(
            names=tuple(names),
            other=names[1] if keeps_other else "encoder_hidden_states",
            place=returns.index("image") if row is not None else None,
            keeps_other=keeps_other,
            is_text_first=row is None
            or row.is_text_first
            or any(each.is_text_first for each in row.cuts.values()),
        )

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the tokens of the image and what runs beside them."""
        values = dict(zip(self.names, args, strict=False)) | kwargs
        return values[self.names[0]], values.get(self.other)

    def image_of(self, output: Any, tokens: Tensor) -> int | None:
        """Return the place of the image in what a block made of these tokens; None: it is all."""
        if not isinstance(output, tuple):
            return None
        return int(output[0].shape != tokens.shape) if self.place is None else self.place

    def joined(self, image: Tensor, text: Tensor) -> Tensor:
        """Return both as one tensor."""
        return torch.cat([text, image] if self.is_text_first else [image, text], dim=1)

    def image_in(self, tokens: Tensor, num_image: int) -> Tensor:
        """Return the image of what may be both as one tensor."""
        return tokens[:, -num_image:] if self.is_text_first else tokens[:, :num_image]


class StepCache:
    """The cache of one denoiser. Its hooks are innermost, so that they see this rank's computation.

    Cleared after every generation.
    """

    def __init__(self, cache: StepCacheSpec, spec: ModelSpec, denoiser: nn.Module) -> None:
        self.spec = cache
        self._model = spec
        self._denoiser = denoiser
        self._mesh: Mesh | None = None
        self._hooked: list[nn.Module] = []
        self._places: dict[int, int | None] = {}
        self._is_on = False
        self._calls: dict[int, _Call] = {}
        self._call: _Call | None = None
        self._step = self._number = self.num_calls = self.num_skipped = 0

    def detach(self) -> None:
        """Remove all hooks, and forget what is kept."""
        self.end()
        for module in reversed(self._hooked):
            hooks.detach(module, NAME)
        self._hooked.clear()

    def attach(self) -> None:
        """Hook the denoiser and its blocks."""
        if self.spec.kind == "deep":
            inner = inner_modules(self._denoiser)
            for index, module in enumerate(inner):
                self._hook(module, self._around_inner(index, is_last=index == len(inner) - 1))
        else:
            blocks = [
                (block, _Form.of(self._denoiser, name, block))
                for name in self._model.blocks
                for block in getattr(self._denoiser, name)
            ]
            for index, (block, form) in enumerate(blocks):
                is_last = index == len(blocks) - 1
                self._hook(
                    block,
                    self._around_rest(index, form, is_last=is_last)
                    if index
                    else self._around_first(form),
                )
        self._hook(self._denoiser, self._around_denoiser)

    def share(self, mesh: Mesh | None) -> None:
        """Let all ranks of a mesh decide together; None: alone. Collective."""
        self._mesh = mesh
        if mesh is not None:
            mesh.axis(*self._axes(mesh))

    def begin(self, *, is_on: bool) -> None:
        """Begin a generation. is_on: whether steps may be skipped."""
        self.end()
        self._is_on = is_on
        self.num_calls = self.num_skipped = 0

    def step_done(self, num_steps: int) -> bool:
        """Count a finished step of so many. Return whether the denoiser ran in it: a part always
        does.
        """
        self._step += 1
        self._number = 0
        return True

    def end(self) -> None:
        """Drop everything that is kept between steps."""
        self._calls.clear()
        self._call, self._is_on = None, False
        self._step = self._number = 0

    def report(self) -> Mapping[str, int]:
        """Return this rank's denoiser calls of the last generation, and how many were skipped."""
        return {"calls": self.num_calls, "skipped": self.num_skipped}

    def _hook(self, module: nn.Module, around: hooks.Around) -> None:
        hooks.attach(module, NAME, around)
        self._hooked.append(module)

    def _around_denoiser(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._is_on:
            return forward(*args, **kwargs)
        number = hooks.call_number(self._denoiser, counted=self._number)
        self._call = self._calls.setdefault(number, _Call())
        self._number += 1
        self.num_calls += 1
        if self.spec.is_regular:
            self._call.is_full = not self.spec.skips(self._step)
        try:
            return forward(*args, **kwargs)
        finally:
            self.num_skipped += not self._call.is_full
            self._call = None

    def _around_first(self, form: _Form) -> hooks.Around:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            call = self._call
            if call is None:
                return output
            before, _ = form.given(args, kwargs)
            call.image, call.other = _split(output, form.image_of(output, before))
            effect = call.image - before
            # the first step, or the size has changed
            if call.residual is None or call.residual.last.shape != effect.shape:
                call.is_full, call.residual, call.effect = True, None, None
                call.other_residual = None
            elif self.spec.kind == "first_block":
                call.is_full = self._change(effect, call.effect) > self.spec.value
            if call.is_full:
                call.effect = effect
            return output

        return around

    def _around_rest(self, index: int, form: _Form, *, is_last: bool) -> hooks.Around:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = self._call
            if call is None:
                return forward(*args, **kwargs)
            tokens, other = form.given(args, kwargs)
            if call.is_full:
                output = forward(*args, **kwargs)
                self._places[index] = place = form.image_of(output, tokens)
                if is_last:
                    self._remember(call, *_split(output, place), form)
                return output
            # the cached residual already includes a ControlNet's
            if is_last:
                image = call.image + self._residual(call.residual)
                is_joint = tokens.shape != image.shape
                tokens = form.joined(image, call.other) if is_joint else image
                if call.other_residual is not None:
                    other = call.other + self._residual(call.other_residual)
            place = self._places[index]
            if place is None:
                return tokens
            return (other, tokens) if place else (tokens, other)

        return around

    def _residual(self, residual: _Residual) -> Tensor:
        return residual.continued(self._step if self.spec.kind == "taylor" else residual.at)

    def _remember(self, call: _Call, tokens: Tensor, other: Tensor | None, form: _Form) -> None:
        """Store the blocks' residual. tokens: (B, N, D), or (B, T + N, D) with the text."""
        residual = form.image_in(tokens, call.image.shape[1]) - call.image
        call.residual = self._next(call.residual, residual)
        if form.keeps_other:
            call.other_residual = self._next(call.other_residual, other - call.other)

    def _next(self, before: _Residual | None, residual: Tensor) -> _Residual:
        if before is None or self.spec.kind != "taylor":
            return _Residual(last=residual, at=self._step)
        return before.after(residual, self._step)

    def _around_inner(self, index: int, *, is_last: bool) -> hooks.Around:
        """Reuse the last inner module's output; of the others only the shapes matter."""

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = self._call
            if call is None:
                return forward(*args, **kwargs)
            if index == 0:
                shape = tuple((args[0] if args else kwargs["hidden_states"]).shape)
                if call.kept is None or call.shape != shape:
                    call.is_full, call.kept, call.shape = True, {}, shape
            if not call.is_full:
                return call.kept[index]
            output = forward(*args, **kwargs)
            call.kept[index] = (
                output if is_last else pytree.tree_map_only(Tensor, _stand_in, output)
            )
            return output

        return around

    def _change(self, effect: Tensor, before: Tensor) -> float:
        """Return mean absolute change / mean absolute value, over all ranks of a call."""
        sums = torch.stack(
            [
                (effect - before).abs().sum(dtype=torch.float32),
                before.abs().sum(dtype=torch.float32),
            ]
        )
        if self._mesh is not None:
            sums = all_sum(sums, axis=self._mesh.axis(*self._axes(self._mesh)))
        return float(sums[0] / sums[1])

    def _axes(self, mesh: Mesh) -> tuple[str, ...]:
        """Return the axes over which one denoiser call is spread.

        Pipelines with one call per half of guidance decide separately for each.
        """
        return tuple(
            name for name, _ in mesh.plan.axes if name != "cfg" or self._model.guidance_calls == 1
        )


AnyCache = StepCache | PredictionCache


def attached_cache(cache: StepCacheSpec, spec: ModelSpec, pipe: Any) -> AnyCache:
    """Return a new cache of this kind, attached to the pipeline's denoiser."""
    if cache.skips_whole_steps:
        denoisers = [part for name in spec.denoisers if (part := getattr(pipe, name, None))]
        made = PredictionCache(cache, denoisers, getattr(pipe, "controlnet", None))
    else:
        made = StepCache(cache, spec, getattr(pipe, spec.denoiser))
    made.attach()
    return made


def wanted_cache(
    cache: AnyCache | None,
    request: GenerateRequest,
    given: StepCacheSpec | None,
    *,
    is_smooth: bool,
    is_even: bool,
) -> StepCacheSpec | None:
    """Return the cache that a request uses: none if its quality allows no skipped steps.

    request: with its number of steps. given: the cache that the launch named. is_smooth: whether
    the predictions of the sampler change smoothly from step to step. is_even: whether its steps
    are evenly spaced; others come less close than a quality promises (docs/measurements.md).
    """
    if cache is None or (cache.spec.skips_whole_steps and not is_smooth):
        return None
    asked, num_steps = request.quality, request.num_inference_steps
    if (asked is not None or cache.spec != given) and not is_even:
        return None
    is_used = asked is None or is_met(asked, "high", num_steps=num_steps)
    return cache.spec if is_used else None


def inner_modules(unet: nn.Module) -> list[nn.Module]:
    """Return all blocks of a UNet except its outermost level, in order of execution."""
    middle = [unet.mid_block] if unet.mid_block is not None else []
    return [*unet.down_blocks[1:], *middle, *unet.up_blocks[:-1]]


def _split(output: Any, place: int | None) -> tuple[Tensor, Tensor | None]:
    """Return (image, other) of what a block returned. place: of the image; None: it is all."""
    return (output, None) if place is None else (output[place], output[1 - place])


def _stand_in(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape that takes no memory. Nothing reads its values."""
    return tensor.new_zeros(()).expand(tensor.shape)
