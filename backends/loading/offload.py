"""Where a pipeline's weights are: on the device, or in main memory and moved when needed."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.models.embeddings import HunyuanDiTAttentionPool
from torch import nn

from backends.errors import UnsupportedError
from backends.groups.control_group import control_axis
from backends.loading.conversion import convert, defer
from backends.loading.packed_weights import keep_constants
from backends.loading.weights import DTYPES, vae_dtype
from backends.model_table import ModelSpec
from backends.request import LoadRequest

logger = logging.getLogger(__name__)

Offload = Literal["model", "sequential", "group"]
POOLS = (HunyuanDiTAttentionPool, nn.MultiheadAttention)
"""They use their layers' weights without calling the layers, so no hook of a layer moves them."""


def place(
    pipe: Any,
    spec: ModelSpec,
    load: LoadRequest,
    *,
    device: torch.device,
    in_main_memory: Collection[str] = (),
) -> None:
    """Convert the weights, and move them to the device or set up offloading.

    in_main_memory: components that stay where they were read.
    """
    if load.offload is not None and device.type == "cpu":
        logger.warning(
            "offload=%s has no effect: there is no accelerator, so all weights are in main memory",
            load.offload,
        )
    if load.offload is None or device.type == "cpu":
        convert_pipe(pipe, spec, load, device=device, in_main_memory=in_main_memory)
        if load.gguf_model is not None and device.type == "cuda" and load.compile is None:
            keep_constants(getattr(pipe, spec.denoiser))
    else:
        convert_pipe(pipe, spec, load)
        prefetches = control_axis().size == 1 and load.compile is None and load.step_cache is None
        offload(pipe, spec, load.offload, device=device, prefetches=prefetches)


def defer_denoisers(pipe: Any, spec: ModelSpec, load: LoadRequest, *, device: torch.device) -> None:
    """Leave denoisers that will be cut in their files until then. Does nothing if an option needs
    all of their weights while loading; LoRAs and IP-Adapters do with their shapes.
    """
    is_moved = load.offload is not None and device.type != "cpu"
    if is_moved or load.quantize or load.gguf_model:
        return
    for name in spec.denoisers:
        if isinstance(model := getattr(pipe, name, None), nn.Module):
            defer(model, DTYPES[load.variant], device=device)


def convert_pipe(
    pipe: Any,
    spec: ModelSpec,
    load: LoadRequest,
    *,
    device: torch.device | None = None,
    in_main_memory: Collection[str] = (),
) -> None:
    """Convert all models of a pipeline to the dtypes they compute in, and move them.

    device: None leaves the weights where they are. in_main_memory: components that are not moved.
    """
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            dtype = vae_dtype(spec, load) if name == "vae" else DTYPES[load.variant]
            for model in getattr(part, "nets", [part]):
                convert(model, dtype, device=None if name in in_main_memory else device)


def offload(
    pipe: Any, spec: ModelSpec, kind: Offload, *, device: torch.device, prefetches: bool = False
) -> None:
    """Offload whole components (model), single layers (sequential) or groups of layers (group).

    Call it before anything is attached: later hooks must wrap those that move the weights.
    prefetches: load the next group while one computes. diffusers learns the order in the first call
    with hooks that it then removes, and with them everything attached later; so only if nothing
    will be attached. Without it diffusers copies each group back to main memory too.
    """
    if kind == "group" and not prefetches:
        logger.warning(
            "enable_group_offload prefetches nothing with several ranks, torch.compile or a step "
            "cache: each layer is copied to the device and back while nothing computes. "
            "--enable_sequential_cpu_offload copies half as much"
        )
    if kind == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif kind == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        _offload_groups(pipe, spec, device, prefetches=prefetches)
    if kind != "model":
        _keep_pools(pipe, device)
    if kind != "group":
        # diffusers' own method removes its hooks and adds them again, which would drop everything
        # attached around them
        pipe.maybe_free_model_hooks = lambda: [hook.offload() for hook in pipe._all_hooks]


def _keep_pools(pipe: Any, device: torch.device) -> None:
    """Move the layers of attention pools to the device for good."""
    for part in pipe.components.values():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            for layer in module.children() if isinstance(module, POOLS) else ():
                remove_hook_from_module(layer, recurse=True)
                if hasattr(layer, "_diffusers_hook"):
                    layer._diffusers_hook.remove_hook("group_offloading", recurse=True)
                layer.to(device)


def _offload_groups(pipe: Any, spec: ModelSpec, device: torch.device, *, prefetches: bool) -> None:
    """Offload groups of layers, except a VAE that is upcast.

    Offloading would restore the VAE's old dtype.
    """
    vae = getattr(pipe, "vae", None)
    try:
        pipe.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=prefetches and device.type == "cuda",
            exclude_modules=["vae"] if vae is not None and overflows(vae) else None,
        )
    except ValueError as error:
        raise UnsupportedError(
            f"enable_group_offload is not available for {spec.title}: {error} Use "
            "--enable_model_cpu_offload."
        ) from error


def use_lean_attention(pipe: Any, load: LoadRequest) -> None:
    """Slice attention or use xformers. Both replace processors, so call it first."""
    if load.enable_attention_slicing:
        pipe.enable_attention_slicing()
    if load.xformers_efficient:
        try:
            pipe.enable_xformers_memory_efficient_attention()
        except ModuleNotFoundError:
            logger.warning(
                "xformers_efficient has no effect: xformers is not installed. Using torch's own "
                "attention"
            )


def overflows(vae: Any) -> bool:
    """Return whether the VAE must not compute in its float16.

    Only if the checkpoint sets force_upcast: the class default is true for every VAE.
    """
    is_said = "force_upcast" not in (vae.config.get("_use_default_values") or ())
    return vae.dtype == torch.float16 and is_said and bool(vae.config.get("force_upcast", False))


@contextmanager
def without_overflow(vae: Any) -> Iterator[Any]:
    """Run a VAE that overflows in float16 (SDXL's) in float32, as diffusers does."""
    dtype, needs_upcast = vae.dtype, overflows(vae)
    if needs_upcast:
        vae.to(torch.float32)
    try:
        yield vae
    finally:
        if needs_upcast:
            vae.to(dtype)


TILED_ONLY = frozenset({"AutoencoderKLAllegro"})
"""VAEs that diffusers decodes in tiles only."""


def apply_vae_options(pipe: Any, load: LoadRequest) -> None:
    """Decode in tiles or slices. UnsupportedError if the VAE's class cannot."""
    needs_tiles = type(getattr(pipe, "vae", None)).__name__ in TILED_ONLY
    for wanted, name in (
        (load.enable_vae_tiling or needs_tiles, "enable_tiling"),
        (load.enable_vae_slicing, "enable_slicing"),
    ):
        if wanted:
            try:
                getattr(pipe.vae, name)()
            except (AttributeError, NotImplementedError) as error:
                raise UnsupportedError(
                    f"{name} is not available for {type(pipe.vae).__name__}. Leave the option out."
                ) from error
