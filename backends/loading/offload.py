"""Where a pipeline's weights live: on the device, or in main memory and moved when they are
needed.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from backends.errors import UnsupportedError
from backends.groups.control_group import control_axis
from backends.loading.gguf_constants import keep_constants
from backends.model_table import ModelSpec
from backends.request import LoadRequest

logger = logging.getLogger(__name__)

Offload = Literal["model", "sequential", "group"]


def place(pipe: Any, spec: ModelSpec, load: LoadRequest, *, device: torch.device) -> None:
    """Put the pipeline on its device, or prepare its weights for being moved there piece by
    piece.
    """
    if load.offload is not None and device.type == "cpu":
        logger.warning(
            "offload=%s has no effect: there is no accelerator, so everything is in main memory "
            "already",
            load.offload,
        )
    if load.offload is None or device.type == "cpu":
        pipe.to(device)
        if load.gguf_model is not None and device.type == "cuda" and load.compile is None:
            keep_constants(getattr(pipe, spec.denoiser))
    else:
        prefetches = control_axis().size == 1 and load.compile is None and load.step_cache is None
        offload(pipe, spec, load.offload, device=device, prefetches=prefetches)


def offload(
    pipe: Any, spec: ModelSpec, kind: Offload, *, device: torch.device, prefetches: bool = False
) -> None:
    """model: whole components are moved; sequential: single layers; group: groups of layers.

    prefetches: the next group while one computes. To find out their order diffusers watches the
    first call with hooks that it then takes off, and with them all that was attached around them:
    so only where nothing will be.
    Call it before anything is attached: what comes later wraps the hooks that move the weights.
    """
    if kind == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif kind == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        _offload_groups(pipe, spec, device, prefetches=prefetches)
    if kind != "group":
        # diffusers' own method takes the hooks off and puts them on again, and what was attached
        # around them would be lost with them
        pipe.maybe_free_model_hooks = lambda: [hook.offload() for hook in pipe._all_hooks]


def _offload_groups(pipe: Any, spec: ModelSpec, device: torch.device, *, prefetches: bool) -> None:
    """But for a VAE that works in float32 now and then: offloading gives it back the weights as
    they were loaded.
    """
    try:
        pipe.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=prefetches and device.type == "cuda",
            exclude_modules=["vae"] if overflows(pipe.vae) else None,
        )
    except ValueError as error:
        raise UnsupportedError(
            f"enable_group_offload is not available for {spec.title}: {error} Use "
            "--enable_model_cpu_offload."
        ) from error


def use_lean_attention(pipe: Any, load: LoadRequest) -> None:
    """Attention in slices, or by xformers: both replace the attention processors, so they come
    before everything that is attached.
    """
    if load.enable_attention_slicing:
        pipe.enable_attention_slicing()
    if load.xformers_efficient:
        try:
            pipe.enable_xformers_memory_efficient_attention()
        except ModuleNotFoundError:
            logger.warning(
                "xformers_efficient has no effect: xformers is not installed, and torch's own "
                "attention is used"
            )


def overflows(vae: Any) -> bool:
    """Whether it must not compute in its float16. The class says so of every VAE: only a checkpoint
    that says it itself is meant.
    """
    is_said = "force_upcast" not in (vae.config.get("_use_default_values") or ())
    return vae.dtype == torch.float16 and is_said and bool(vae.config.get("force_upcast", False))


@contextmanager
def without_overflow(vae: Any) -> Iterator[Any]:
    """A VAE that overflows in float16 (SDXL's) works in float32 meanwhile, as in diffusers."""
    dtype, needs_upcast = vae.dtype, overflows(vae)
    if needs_upcast:
        vae.to(torch.float32)
    try:
        yield vae
    finally:
        if needs_upcast:
            vae.to(dtype)
