"""CFG split of a denoiser of which nothing is known: both halves in one batch, in two calls, or no
halves at all.

What is not known is tried on the first call of each form: it is computed whole and in halves, and
split from then on only if both agree.
"""

import inspect
import logging
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from backends.groups.collectives import all_gather
from backends.groups.mesh import Mesh
from backends.parallel import hooks
from backends.parallel.cfg_split import batched_in_second_dim, cut_batch, gather_batch
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


Cut = Callable[[dict[str, Any], int], dict[str, Any]]
"""Arguments and their batch -> the arguments of this rank's half."""


class GuidanceSplit:
    """Splits the calls of one denoiser over the `cfg` axis, where that gives the same."""

    def __init__(self, denoiser: nn.Module, mesh: Mesh) -> None:
        self._denoiser = denoiser
        self._mesh = mesh
        self._pairs = PairSplit(denoiser, mesh, is_sure=False)
        self._cuts: dict[Any, Cut | None] = {}
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
        if key not in self._cuts:
            return self._tried(forward, arguments, key, batch)
        if (cut := self._cuts[key]) is None:
            return forward(**arguments)
        self.kind = "batch"
        own = forward(**cut(arguments, batch))
        return gather_batch(own, self._mesh, axis)

    def _tried(
        self, forward: Callable[..., Any], arguments: dict[str, Any], key: Any, batch: int
    ) -> Any:
        """Return the whole result, and note how the arguments are cut for halves that give the
        same, if they can be.
        """
        axis = self._mesh.axis("cfg")
        whole = forward(**_copied(arguments))
        cuts = [partial(cut_batch, parts=axis.size, part=axis.rank)]
        if batched_in_second_dim(arguments, batch):
            cuts.append(partial(cuts[0], second_dim=True))
        fitting = (cut for cut in cuts if self._fits(cut, forward, arguments, batch, whole))
        self._cuts[key] = next(fitting, None)
        if self._cuts[key] is None:
            logger.warning("the batch of %s is computed whole on every rank", self._name)
        return whole

    def _fits(
        self,
        cut: Cut,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        batch: int,
        whole: Any,
    ) -> bool:
        """Return whether the halves of this cut give the whole result.

        Nothing is gathered before all ranks have a half of the same form: the halves differ, and
        one may fail alone.
        """
        own, form = None, 0
        if all(isinstance(leaf, PLAIN) for leaf in pytree.tree_leaves(arguments)):
            try:
                own = forward(**cut(_copied(arguments), batch))
                form = 1 + zlib.crc32(repr(_form_of({"output": output_parts(own)})).encode())
            except torch.OutOfMemoryError:
                raise
            except MISFITS as error:
                logger.info("the batch of %s cannot be split: %s", self._name, error)
        if not self._is_common(form):
            return False
        joined = gather_batch(own, self._mesh, self._mesh.axis("cfg"))
        return self._is_common(int(_agree(whole, joined)))

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
