"""Tiny checkpoints of pipeline classes without a row in the model table, made of the parts of those
that have one.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.checkpoints.cache import cached
from tests.checkpoints.factory import NAMES, checkpoint

DENOISERS: Mapping[str, dict[str, object]] = {
    "StableDiffusionInstructPix2PixPipeline": {"in_channels": 8},
    "StableDiffusionXLInstructPix2PixPipeline": {"in_channels": 8},
    "LatentConsistencyModelPipeline": {"time_cond_proj_dim": 32},
    "LatentConsistencyModelImg2ImgPipeline": {"time_cond_proj_dim": 32},
    "FluxFillPipeline": {"in_channels": 384, "out_channels": 64},
    "FluxControlPipeline": {"in_channels": 128, "out_channels": 64},
    "FluxControlImg2ImgPipeline": {"in_channels": 128, "out_channels": 64},
    "FluxControlInpaintPipeline": {"in_channels": 128, "out_channels": 64},
    "WanImageToVideoPipeline": {"in_channels": 36},
    "LucyEditPipeline": {"in_channels": 32},
    "QwenImageLayeredPipeline": {"use_additional_t_cond": True, "use_layer3d_rope": True},
}
"""Pipeline class -> what differs in its denoiser's configuration."""
MODULAR = {
    "FluxModularPipeline": "flux",
    "QwenImageModularPipeline": "qwenimage",
    "StableDiffusion3ModularPipeline": "sd3",
    "StableDiffusionXLModularPipeline": "sdxl",
    "WanModularPipeline": "wan_t2v",
    "ZImageModularPipeline": "zimage",
}
"""Modular pipeline -> the type whose components it takes."""
ANY = inspect.Parameter.empty


def variant(name: str) -> Path:
    """Return the folder of a tiny checkpoint of this pipeline class. LookupError if there are no
    parts for it.
    """
    if name in MODULAR:
        base = MODULAR[name]
        return cached(name, {"base": base}, lambda folder: _save_modular(checkpoint(base), folder))
    base = base_of(name)
    if base is None:
        return cached(name, {}, lambda folder: _assemble(name, folder))
    config = DENOISERS.get(name, {})
    recipe = {"base": base, "config": config}
    return cached(name, recipe, lambda folder: _build(name, checkpoint(base, **config), folder))


def base_of(name: str) -> str | None:
    """Return the type whose components fit this pipeline class best; None if none does."""
    import diffusers

    needed = _components(getattr(diffusers, name))
    fitting = [base for base in NAMES if _fits(needed, _index(base))]
    return max(fitting, key=lambda base: len(_index(base).keys() & needed.keys()), default=None)


def _components(pipeline: type) -> dict[str, inspect.Parameter]:
    skipped = ("self", "requires_safety_checker", "args", "kwargs")
    parameters = inspect.signature(pipeline.__init__).parameters
    return {name: value for name, value in parameters.items() if name not in skipped}


def _index(base: str) -> dict[str, str]:
    """Return component -> class name of a type's checkpoint."""
    from backends.files.checkpoint import read_json

    index = read_json(checkpoint(base) / "model_index.json")
    return {
        name: entry[1]
        for name, entry in index.items()
        if isinstance(entry, list) and entry[1] is not None
    }


def _fits(needed: Mapping[str, inspect.Parameter], index: Mapping[str, str]) -> bool:
    for name, parameter in needed.items():
        is_optional = parameter.default is not ANY or name in OPTIONAL
        if name in index:
            is_model = name in ("unet", "transformer", "vae") or name.startswith("text_encoder")
            declared = str(parameter.annotation)
            is_open = "PreTrainedModel" in declared or parameter.annotation is ANY
            if is_model and not is_open and index[name] not in declared:
                return False
        elif not is_optional and name not in EXTRA:
            return False
    return any(name in index and name in needed for name in ("unet", "transformer"))


def _assemble(name: str, folder: Path) -> None:
    import torch

    from tests.checkpoints.assembled import assemble
    from tests.checkpoints.saving import save

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = assemble(name)
    save(pipe, folder)


def _build(name: str, base: Path, folder: Path) -> None:
    import diffusers
    import torch

    from tests.checkpoints.saving import save

    plain = diffusers.DiffusionPipeline.from_pretrained(base, local_files_only=True)
    made = getattr(diffusers, name)
    needed = _components(made)
    parts = {part: value for part, value in plain.components.items() if part in needed}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in needed:
            if parts.get(part) is None and part in EXTRA:
                parts[part] = EXTRA[part](parts)
    missing = [part for part in needed if part not in parts and needed[part].default is ANY]
    parts |= dict.fromkeys(missing)
    if "scheduler" in parts and name.startswith("LatentConsistency"):
        parts["scheduler"] = diffusers.LCMScheduler.from_config(parts["scheduler"].config)
    save(made(**parts), folder)


def _controlnet(parts: Mapping[str, Any]) -> Any:
    """Return a ControlNet whose residuals are not zero, as a new one's are."""
    import diffusers

    denoiser = parts.get("unet") if parts.get("unet") is not None else parts["transformer"]
    if isinstance(denoiser, diffusers.UNet2DConditionModel | diffusers.UNetMotionModel):
        from tests.checkpoints.denoisers import unet

        plain = denoiser if isinstance(denoiser, diffusers.UNet2DConditionModel) else unet()
        made = diffusers.ControlNetModel.from_unet(
            plain, conditioning_embedding_out_channels=(8, 8)
        )
    else:
        # from_transformer of some classes has the sizes of published models as defaults
        made = getattr(diffusers, CONTROLNETS[type(denoiser).__name__]).from_config(
            dict(denoiser.config) | {"num_layers": 2, "num_single_layers": 1}
        )
    for parameter in made.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.02)
    return made


CONTROLNETS = {
    "FluxTransformer2DModel": "FluxControlNetModel",
    "SD3Transformer2DModel": "SD3ControlNetModel",
    "QwenImageTransformer2DModel": "QwenImageControlNetModel",
    "HunyuanDiT2DModel": "HunyuanDiT2DControlNetModel",
}


def _adapter(parts: Mapping[str, Any]) -> Any:
    """Return a T2I-Adapter whose features have the widths of the UNet's levels."""
    import diffusers

    channels = list(parts["unet"].config.block_out_channels)
    kind = "full_adapter_xl" if "text_encoder_2" in parts else "full_adapter"
    return diffusers.T2IAdapter(channels=channels, num_res_blocks=1, adapter_type=kind)


def _image_encoder(parts: Mapping[str, Any]) -> Any:
    from tests.checkpoints.parts import clip_vision

    return clip_vision()


def _image_processor(parts: Mapping[str, Any]) -> Any:
    from tests.checkpoints.parts import image_processor

    return image_processor()


OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
EXTRA: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "controlnet": _controlnet,
    "adapter": _adapter,
    "image_encoder": _image_encoder,
    "image_processor": _image_processor,
}
"""Component that no base has -> how it is made for the others."""


def _save_modular(base: Path, folder: Path) -> None:
    """Write what diffusers makes of an ordinary folder: modular_model_index.json."""
    from diffusers import ModularPipeline

    pipe = ModularPipeline.from_pretrained(str(base), local_files_only=True)
    there = [name for name in pipe.pretrained_component_names if (base / name).is_dir()]
    pipe.load_components(there)
    pipe.save_pretrained(str(folder), overwrite_modular_index=True)
