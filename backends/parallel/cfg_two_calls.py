"""CFG split for pipelines that call their denoiser once for each half of guidance.

Each rank makes one of a step's two calls and returns empty tensors for the other. At the second
call the ranks exchange results and fill those tensors in. The first step is computed whole, to
learn what each call returns and whether the pipeline waits with the first result until it has both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from backends.groups.collectives import all_gather
from backends.groups.mesh import Axis, Mesh
from backends.parallel import hooks
from backends.parallel.hooks import output_parts, rebuilt

NAME = "cfg pairs"
READS_VALUES = frozenset({"item", "tolist", "numpy", "__float__", "__int__", "__bool__"})
"""Functions that use the numbers of a tensor and return none."""


class GuidanceChanged(Exception):
    """The pipeline does not make two calls in this step, or uses the first before the second. What
    this generation has computed since is wrong.
    """


@dataclass(frozen=True, slots=True)
class _Form:
    """What the calls of a step return, without the numbers."""

    outputs: tuple[Any, ...]
    is_split: bool


class PairSplit:
    """Splits the two calls of each step of one denoiser, while guidance is on."""

    def __init__(self, denoiser: nn.Module, mesh: Mesh, *, is_sure: bool = True) -> None:
        """is_sure: whether it is known that a step with guidance makes two calls. Otherwise each
        generation learns it, and every step is watched (GuidanceChanged).
        """
        self._denoiser = denoiser
        self._mesh = mesh
        self._is_sure = is_sure
        # the stages of PipeFusion give predictions that are under way: nobody may look at them
        self._assumes = is_sure and mesh.plan.degree("stage") > 1
        self._is_on = False
        self._learned: dict[Any, _Form] = {}
        self._forget_step()

    def attach(self) -> None:
        hooks.attach(self._denoiser, NAME, self.call)

    def detach(self) -> None:
        hooks.detach(self._denoiser, NAME)
        hooks.set_call_number(self._denoiser, None)

    def begin(self, *, is_on: bool) -> None:
        self._is_on = is_on
        if not self._is_sure:
            self._learned.clear()
        self._forget_step()

    def step_done(self) -> None:
        """Raise RuntimeError (or GuidanceChanged) if the step made only one call, since the
        pipeline then used an empty result. After the first step, decide whether to split.
        """
        self._stop_watching()
        calls, outputs, key = self._calls, tuple(self._outputs), self._key
        was_touched, form = self._was_touched, self._learned.get(key)
        self._forget_step()
        if not self._is_on or calls == 0:
            return
        if self._is_sure and calls == 1:
            raise RuntimeError(
                f"the pipeline called its {type(self._denoiser).__name__} once in a step with "
                "guidance, but two calls were expected. Run it without --use_cfg_parallel."
            )
        if self._assumes:
            return
        if form is None:
            self._learned[key] = _Form(outputs, is_split=calls == 2 and not was_touched)
        elif form.is_split and (calls != 2 or was_touched):
            raise GuidanceChanged

    def end(self) -> None:
        self._is_on = False
        self._forget_step()
        hooks.set_call_number(self._denoiser, None)

    @property
    def is_split(self) -> bool:
        """Whether the calls of the last steps were split."""
        return any(form.is_split for form in self._learned.values())

    def call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser's `forward`, or leave this call to the other rank."""
        if not self._is_on:
            return forward(*args, **kwargs)
        sample = args[0] if args else next(iter(kwargs.values()))
        number, self._calls = self._calls, self._calls + 1
        hooks.set_call_number(self._denoiser, number)
        if number == 0:
            self._key = _signature(sample)
        else:
            self._stop_watching()
        form = self._learned.get(self._key)
        if self._assumes:
            form = _Form((_empty((sample,)),) * 2, is_split=True)
        if form is None or not form.is_split:
            output = forward(*args, **kwargs)
            if form is None:
                self._outputs.append(_empty(output))
                if number == 0:
                    self._watch(output)
            return output
        if number > 1:
            raise GuidanceChanged
        return self._shared(number, form, lambda: forward(*args, **kwargs))

    def _shared(self, number: int, form: _Form, forward: Callable[[], Any]) -> Any:
        axis = self._mesh.axis("cfg")
        output = forward() if number == axis.rank else _filled(form.outputs[number])
        if self._assumes and not isinstance(output, tuple):
            output = (output[0],)
        if number == 0:
            self._first = output
            if not self._is_sure:
                self._watch(output)
        else:
            for pair in zip(_leaves(self._first), _leaves(output), strict=True):
                _swap(*pair, axis=axis, mesh=self._mesh)
        return output

    def _watch(self, output: Any) -> None:
        if not self._assumes:
            self._watched = _Watch([leaf for leaf in _leaves(output) if isinstance(leaf, Tensor)])
            self._watched.__enter__()

    def _stop_watching(self) -> None:
        if self._watched is not None:
            self._watched.__exit__(None, None, None)
            self._was_touched |= self._watched.was_touched
            self._watched = None

    def _forget_step(self) -> None:
        if getattr(self, "_watched", None) is not None:
            self._watched.__exit__(None, None, None)
        self._watched: _Watch | None = None
        self._calls = 0
        self._outputs: list[Any] = []
        self._key: Any = None
        self._was_touched = False
        self._first: Any = None


class _Watch(TorchFunctionMode):
    """Notes whether anything is computed with some tensors. Views of them are no use yet."""

    def __init__(self, watched: list[Tensor]) -> None:
        super().__init__()
        self._watched = watched  # else their memory, by which they are known, may be used again
        self._storages = {tensor.untyped_storage().data_ptr() for tensor in watched}
        self._is_inside = False
        self.was_touched = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name != "__get__" and self._owns(pytree.tree_leaves((args, dict(kwargs or {})))):
            made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            is_change = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
            is_use = name in READS_VALUES or name == "__setitem__" or is_change
            self.was_touched |= is_use or not all(self._owns([leaf]) for leaf in made)
        return result

    def _owns(self, leaves: list[Any]) -> bool:
        return any(
            isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in self._storages
            for leaf in leaves
        )


def _leaves(output: Any) -> list[Any]:
    return pytree.tree_leaves(output_parts(output))


def _empty(output: Any) -> Any:
    """Return the same output without its numbers. It takes no memory."""
    return _with_leaves(
        output, lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf
    ), [leaf.device if isinstance(leaf, Tensor) else None for leaf in _leaves(output)]


def _filled(form: tuple[Any, list[Any]]) -> Any:
    """Return an output of this form with memory for its tensors."""
    output, devices = form
    places = iter(devices)

    def room(leaf: Any) -> Any:
        device = next(places)
        return torch.empty_like(leaf, device=device) if isinstance(leaf, Tensor) else leaf

    return _with_leaves(output, room)


def _with_leaves(output: Any, change: Callable[[Any], Any]) -> Any:
    leaves, form = pytree.tree_flatten(output_parts(output))
    return rebuilt(output, pytree.tree_unflatten([change(leaf) for leaf in leaves], form))


def _swap(first: Any, second: Any, *, axis: Axis, mesh: Mesh) -> None:
    """Exchange the two calls' results of one tensor: this rank has one, and fills in the other."""
    if not isinstance(first, Tensor):
        return
    mine, theirs = (first, second) if axis.rank == 0 else (second, first)
    halves = all_gather(mine, dim=0, axis=axis, traffic=mesh.traffic).chunk(2)
    theirs.copy_(halves[1 - axis.rank])


def _signature(sample: Any) -> Any:
    if isinstance(sample, Tensor):
        return tuple(sample.shape), sample.dtype
    return tuple(map(_signature, sample)) if isinstance(sample, list | tuple) else None
