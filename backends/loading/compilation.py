"""torch.compile for the parts of a pipeline that exchange nothing between ranks.

An exchange inside a compiled graph would tie the graph to one kind of step, so the backend's hooks
stay outside. The units are: the whole denoiser on one rank or under the CFG split (its blocks, if
it cannot be one graph), single units under AsyncDiff, and the regions between attentions and
convolutions elsewhere. They are chosen before the backend is attached.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from backends.errors import ConfigError
from backends.model_table import ModelSpec
from backends.parallel import hooks
from backends.parallel.gathered_weights import blocks_of
from backends.request import WITH_GRAPHS, CompileSettings

logger = logging.getLogger(__name__)

NAME = "compiled"
MANY_SIZES = 64
"""Graphs per function unless the user sets a limit. torch's default is 8: eight image sizes."""


class Compilation:
    """The compiled modules of a pipeline, so that compilation can be undone."""

    def __init__(self, settings: CompileSettings) -> None:
        self._settings = settings
        self._modules: list[nn.Module] = []

    def attach(self, pipe: Any, spec: ModelSpec, regions: list[nn.Module]) -> None:
        """Compile the denoiser's regions and the other targets. The first call traces them."""
        settings = self._settings
        _require_options(settings)
        _set_limits(settings)
        has_graphs = len(regions) == 1 and settings.targets == ("denoiser",)
        if settings.mode in WITH_GRAPHS and not has_graphs:
            # replaying one graph frees the outputs of the previous one, and a VAE that changes its
            # dtype would be recorded again
            logger.warning(
                "several parts are compiled, so mode %s is used without CUDA graphs", settings.mode
            )
            self._settings = settings = replace(settings, mode=WITH_GRAPHS[settings.mode])
        if "denoiser" in settings.targets:
            denoisers = {getattr(pipe, name, None) for name in spec.denoisers}
            self._compile([part for part in regions if part not in denoisers])
            self._compile([part for part in regions if part in denoisers], or_blocks=True)
            logger.info(
                "compiling %d part(s) of %s",
                len(regions),
                type(getattr(pipe, spec.denoiser)).__name__,
            )
        if "vae" in settings.targets:
            # pipelines call vae.decode, so compiling the VAE's own forward has no effect
            self._compile([pipe.vae.decoder])
        if "encoders" in settings.targets:
            encoders = [
                module
                for name, module in pipe.components.items()
                if "text_encoder" in name and isinstance(module, nn.Module)
            ]
            # hooks that record hidden states break the graph
            self._compile(
                [block for encoder in encoders for block in _blocks(encoder)], fullgraph=False
            )

    def detach(self) -> None:
        """Undo compilation."""
        while self._modules:
            hooks.detach(self._modules.pop(), NAME)

    def _compile(
        self, modules: list[nn.Module], *, fullgraph: bool = True, or_blocks: bool = False
    ) -> None:
        """or_blocks: compile the blocks of a module instead that cannot be one graph."""
        settings = replace(self._settings, fullgraph=self._settings.fullgraph and fullgraph)
        for module in modules:
            around = _compiled(settings)
            hooks.attach(module, NAME, self._or_blocks(module, around) if or_blocks else around)
            self._modules.append(module)

    def _or_blocks(self, module: nn.Module, whole: hooks.Around) -> hooks.Around:
        is_whole = True

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal is_whole
            if is_whole:
                try:
                    return whole(forward, *args, **kwargs)
                except torch._dynamo.exc.TorchDynamoException as error:
                    if not (blocks := blocks_of(module)):
                        raise
                    logger.warning(
                        "%s cannot be compiled as one graph (%s), so its %d blocks are compiled",
                        type(module).__name__,
                        str(error).partition("\n")[0],
                        len(blocks),
                    )
                    is_whole = False
                    mode = self._settings.mode
                    self._settings = replace(self._settings, mode=WITH_GRAPHS.get(mode, mode))
                    self._compile(blocks)
            return forward(*args, **kwargs)

        return around


def _arguments(settings: CompileSettings) -> dict[str, Any]:
    """Return what torch.compile is called with."""
    arguments: dict[str, Any] = {
        "backend": settings.backend or "inductor",
        "fullgraph": settings.fullgraph,
        "dynamic": False,
    }
    if settings.options:
        arguments["options"] = settings.options  # torch takes options or a mode, not both
    elif settings.mode:
        arguments["mode"] = settings.mode
    return arguments


def _require_options(settings: CompileSettings) -> None:
    """Raise ConfigError for options that torch refuses. It would do so in the first call only."""
    try:
        torch.compile(nn.Identity(), **_arguments(settings))
    except RuntimeError as error:
        reason = str(error).partition(", known options are")[0]
        given = f"--compile_options={json.dumps(settings.options)}"
        raise ConfigError(f"{given}: {reason}. Correct it, or leave it out.") from error


def _compiled(settings: CompileSettings) -> hooks.Around:
    arguments = _arguments(settings)
    compiled: list[Callable[..., Any]] = []

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(forward, **arguments))
        # a backend may intercept operators around this call; none of those is inside it
        with torch._C.DisableTorchFunction():
            if settings.mode not in WITH_GRAPHS:
                return compiled[0](*args, **kwargs)
            torch.compiler.cudagraph_mark_step_begin()
            # clone, because the next call overwrites these outputs
            return tree_map_only(torch.Tensor, torch.clone, compiled[0](*args, **kwargs))

    return around


def _set_limits(settings: CompileSettings) -> None:
    """Set torch's limits, which hold for the whole process."""
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
    """Yield the repeated layers of a text encoder.

    transformers records hidden states around them behind a lock, which no graph can hold.
    """
    for child in encoder.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
