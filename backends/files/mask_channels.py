"""Denoisers made for inpainting: beside the latents they read the mask and the masked image.

Imports no torch.
"""

from dataclasses import replace

from backends.errors import ConfigError
from backends.files.checkpoint import Config
from backends.model_table import ModelSpec
from backends.request import LoadRequest


def latent_channels(config: Config) -> int | None:
    """Return the channels of a VAE's latents."""
    value = config.get("latent_channels", config.get("z_dim"))
    return value if isinstance(value, int) else None


def special_channels(channels: int, latents: int) -> str:
    """Return why a denoiser that takes an image beside the latents is refused; empty if unknown."""
    if channels == 2 * latents + 1:
        return (
            ": it is made for inpainting and also takes a mask; mask_image works with ordinary "
            "checkpoints"
        )
    if channels == 2 * latents:
        return (
            ": it also takes an image, to edit it or to start from it, and runs with a pipeline of "
            "its own"
        )
    return ""


def with_mask_inputs(
    spec: ModelSpec, load: LoadRequest, *, channels: int | None, latents: int | None
) -> tuple[ModelSpec, str]:
    """Return the type as a denoiser of so many input channels is called, and why; the type itself
    and '' if it reads no mask. latents: the VAE's channels.

    ConfigError for a ControlNet, whose pipeline gives all input channels to it too.
    """
    if "masked" not in spec.fits or channels is None or latents is None:
        return spec, ""
    times, more = spec.fits["masked"]
    if channels != times * latents + more:
        return spec, ""
    if load.control_net:
        raise ConfigError(
            f"--control_net={next(iter(load.control_net))} is not available with a {spec.denoiser} "
            f"made for inpainting ({channels} input channels): diffusers' pipeline would give the "
            "mask to the ControlNet too. Leave it out, or give an ordinary checkpoint, which "
            "takes mask_image as well."
        )
    masked = replace(
        spec,
        reads_mask=True,
        is_batchable=False,  # each job has an image
        requires=(*spec.requires, "init_image", "mask_image"),
    )
    return masked, f"requests need init_image and mask_image: the {spec.denoiser} reads a mask"
