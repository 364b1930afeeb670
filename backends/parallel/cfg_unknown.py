"""CFG split of a denoiser of which nothing is known: both halves in one batch, in two calls, or no
halves at all.

What is not known is tried on the first call of each form: it is computed whole and in halves, and
split from then on only if both agree.
"""

import inspect
import logging
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from backends.groups.collectives import all_gather
from backends.groups.mesh import Mesh
from backends.parallel import hooks
from backends.parallel.cfg_split import cut_batch, gather_batch
from backends.parallel.cfg_two_calls import PairSplit
from backends.parallel.hooks import output_parts

logger = logging.getLogger(__name__)

NAME = "guidance split"
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest difference between whole and halves, as a part of the largest value. Kernels may sum in
another order for another batch size.
"""
HALF_TOLERANCE = 5e-2
PLAIN = (Tensor, int, float, bool, str, bytes, torch.dtype, torch.device, type(None))
"""Arguments that a call cannot change for the next one. Others, such as caches, forbid a trial."""
MISFITS = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError)


class GuidanceSplit:
    """Splits the calls of one denoiser over the `cfg` axis, where that gives the same."""

    def __init__(self, denoiser: nn.Module, mesh: Mesh) -> None:
        self._denoiser = denoiser
        self._mesh = mesh
        self._pairs = PairSplit(denoiser, mesh, is_sure=False)
        self._fits: dict[Any, bool] = {}
        self._is_refused = False
        self._is_read: bool | None = None
        self.kind = "whole"
        """How the last generation was computed: 'batch', 'calls' or 'whole'."""

    def attach(self) -> None:
        hooks.attach(self._denoiser, NAME, self._around)

    def detach(self) -> None:
        hooks.detach(self._denoiser, NAME)

    def begin(self) -> None:
        self.kind, self._is_read = "whole", None
        self._pairs.begin(is_on=not self._is_refused)

    def step_done(self) -> None:
        """Raise GuidanceChanged if the pipeline has used a result that the other rank has."""
        self._pairs.step_done()
        if self._pairs.is_split:
            self.kind = "calls"

    def end(self) -> None:
        self._pairs.end()

    def refuse(self) -> None:
        """Compute two calls whole from now on."""
        logger.warning(
            "%s is called differently from step to step: both calls are computed on every rank",
            type(self._denoiser).__name__,
        )
        self._is_refused = True

    def _around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        names = [
            name
            for name in inspect.signature(type(self._denoiser).forward).parameters
            if name != "self"
        ]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        arguments = {name: arguments[name] for name in (*names, *arguments) if name in arguments}
        if self._is_read is None:
            self._is_read = _is_read_inside(self._denoiser)
            if self._is_read:
                logger.warning("the pipeline reads inside %s: no rank computes a part", self._name)
        if self._is_read:
            return forward(**arguments)
        first = next(iter(arguments.values()))
        axis = self._mesh.axis("cfg")
        batch = len(first) if isinstance(first, Tensor | list) else 1
        if batch % axis.size:
            return self._pairs.call(forward, **arguments)
        key = _form_of(arguments)
        if key not in self._fits:
            return self._tried(forward, arguments, key, batch)
        if not self._fits[key]:
            return forward(**arguments)
        self.kind = "batch"
        return self._in_halves(forward, arguments, batch)

    def _in_halves(self, forward: Callable[..., Any], arguments: dict[str, Any], batch: int) -> Any:
        own = self._own_half(forward, arguments, batch)
        return gather_batch(own, self._mesh, self._mesh.axis("cfg"))

    def _own_half(self, forward: Callable[..., Any], arguments: dict[str, Any], batch: int) -> Any:
        axis = self._mesh.axis("cfg")
        return forward(**cut_batch(arguments, batch, parts=axis.size, part=axis.rank))

    def _tried(
        self, forward: Callable[..., Any], arguments: dict[str, Any], key: Any, batch: int
    ) -> Any:
        """Return the whole result, and note whether the halves give the same.

        Nothing is gathered before all ranks have a half of the same form: the halves differ, and
        one may fail alone.
        """
        is_plain = all(isinstance(leaf, PLAIN) for leaf in pytree.tree_leaves(arguments))
        whole = forward(**_copied(arguments))
        own, form = None, 0
        if is_plain:
            try:
                own = self._own_half(forward, _copied(arguments), batch)
                form = 1 + zlib.crc32(repr(_form_of({"output": output_parts(own)})).encode())
            except torch.OutOfMemoryError:
                raise
            except MISFITS as error:
                logger.info("the batch of %s cannot be split: %s", self._name, error)
        fits = self._is_common(form)
        if fits:
            joined = gather_batch(own, self._mesh, self._mesh.axis("cfg"))
            fits = self._is_common(int(_agree(whole, joined)))
        self._fits[key] = fits
        if not fits:
            logger.warning("the batch of %s is computed whole on every rank", self._name)
        return whole

    def _is_common(self, number: int) -> bool:
        """Return whether all ranks have the same number, and it is not 0."""
        own = torch.tensor([number], dtype=torch.int64, device=self._mesh.device)
        numbers = all_gather(own, dim=0, axis=self._mesh.axis("cfg")).tolist()
        return number != 0 and numbers.count(number) == len(numbers)

    @property
    def _name(self) -> str:
        return type(self._denoiser).__name__


def _is_read_inside(denoiser: nn.Module) -> bool:
    """Return whether the pipeline watches parts of the denoiser, such as attention maps: then its
    output is not all that counts, and a rank with one half would show the pipeline that half.
    """
    return any(
        module._forward_hooks
        or type(getattr(module, "processor", None)).__module__.startswith("diffusers.pipelines.")
        for module in denoiser.modules()
    )


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """Copy lists and dicts among the arguments: some denoisers take items out of them."""
    return pytree.tree_map(lambda leaf: leaf, arguments)


def _form_of(arguments: dict[str, Any]) -> Any:
    leaves, form = pytree.tree_flatten(arguments)
    shapes = tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)
        for leaf in leaves
    )
    return shapes, str(form)


def _agree(whole: Any, joined: Any) -> bool:
    """Return whether two results of the denoiser are the same but for rounding."""
    one, two = (pytree.tree_leaves(output_parts(output)) for output in (whole, joined))
    if len(one) != len(two):
        return False
    for a, b in zip(one, two, strict=True):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape:
            return False
        tolerance = TOLERANCES.get(a.dtype, HALF_TOLERANCE)
        if a.numel() and float((a - b).abs().max()) > tolerance * float(a.abs().max()):
            return False
    return True
