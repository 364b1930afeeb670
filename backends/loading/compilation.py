"""torch.compile for the parts of a pipeline in which no rank waits for another, chosen before a
backend is attached.

Exchanges inside a compiled graph would tie it to one kind of step; so the backend's hooks stay
outside: whole denoisers on one rank or under the CFG split, single units under AsyncDiff, and what
lies between attentions and convolutions elsewhere.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from backends.model_table import ModelSpec
from backends.parallel import hooks
from backends.request import WITH_GRAPHS, CompileSettings

logger = logging.getLogger(__name__)

NAME = "compiled"
MANY_SIZES = 64
"""Graphs that torch keeps per function unless told otherwise; its own 8 would be used up by eight
image sizes.
"""


class Compilation:
    """What was compiled, so that it can be undone."""

    def __init__(self, settings: CompileSettings) -> None:
        self._settings = settings
        self._modules: list[nn.Module] = []

    def attach(self, pipe: Any, spec: ModelSpec, regions: list[nn.Module]) -> None:
        """Compile the regions of the denoiser and the other targets of the settings. Nothing is
        traced before the first call.
        """
        settings = self._settings
        _set_limits(settings)
        has_graphs = len(regions) == 1 and settings.targets == ("denoiser",)
        if settings.mode in WITH_GRAPHS and not has_graphs:
            # each call of a recorded graph frees what the last one returned, whichever that was,
            # and a VAE's change of dtype records anew
            logger.warning(
                "several parts are compiled, so mode %s is used without CUDA graphs", settings.mode
            )
            self._settings = settings = replace(settings, mode=WITH_GRAPHS[settings.mode])
        if "denoiser" in settings.targets:
            self._compile(regions)
            logger.info(
                "compiling %d part(s) of %s",
                len(regions),
                type(getattr(pipe, spec.denoiser)).__name__,
            )
        if "vae" in settings.targets:
            self._compile(
                [pipe.vae.decoder]
            )  # pipelines call vae.decode, so compiling the VAE itself would compile nothing
        if "encoders" in settings.targets:
            encoders = [
                module
                for name, module in pipe.components.items()
                if "text_encoder" in name and isinstance(module, nn.Module)
            ]
            # inside them it records through hooks: the graph breaks there
            self._compile(
                [block for encoder in encoders for block in _blocks(encoder)], fullgraph=False
            )

    def detach(self) -> None:
        while self._modules:
            hooks.detach(self._modules.pop(), NAME)

    def _compile(self, modules: list[nn.Module], *, fullgraph: bool = True) -> None:
        settings = replace(self._settings, fullgraph=self._settings.fullgraph and fullgraph)
        for module in modules:
            hooks.attach(module, NAME, _compiled(settings))
            self._modules.append(module)


def _compiled(settings: CompileSettings) -> hooks.Around:
    arguments: dict[str, Any] = {
        "backend": settings.backend or "inductor",
        "fullgraph": settings.fullgraph,
        "dynamic": False,
    }
    if settings.options:
        arguments["options"] = settings.options  # torch takes options or a mode, not both
    elif settings.mode:
        arguments["mode"] = settings.mode
    compiled: list[Callable[..., Any]] = []

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(forward, **arguments))
        with (
            torch._C.DisableTorchFunction()
        ):  # a backend may intercept operators around this call; here is nothing for it
            if settings.mode not in WITH_GRAPHS:
                return compiled[0](*args, **kwargs)
            torch.compiler.cudagraph_mark_step_begin()
            return tree_map_only(
                torch.Tensor, torch.clone, compiled[0](*args, **kwargs)
            )  # the next call overwrites what this returns

    return around


def _set_limits(settings: CompileSettings) -> None:
    """Process-wide: torch keeps these in one place."""
    config = torch._dynamo.config
    config.recompile_limit = MANY_SIZES if settings.cache_limit is None else settings.cache_limit
    if settings.accumulated_cache_limit is not None:
        config.accumulated_recompile_limit = settings.accumulated_cache_limit
    else:
        config.accumulated_recompile_limit = max(
            config.accumulated_recompile_limit, 16 * MANY_SIZES
        )
    config.capture_scalar_outputs = settings.capture_scalar


def _blocks(encoder: nn.Module) -> Iterator[nn.Module]:
    """The repeated layers of a text encoder. Around them transformers records hidden states behind
    a lock, which no graph can hold.
    """
    for child in encoder.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
