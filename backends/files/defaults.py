"""Defaults that follow from the checkpoint: distilled and few-step ones have their own in the model
table. Imports no torch.

A checkpoint is recognised by its configuration where that differs, else by words in its names: of
the repository, file or folder, and in the file's metadata.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backends.errors import ConfigError
from backends.files.adapter_fit import require_fit
from backends.files.checkpoint import (
    Checkpoint,
    Config,
    component_folder,
    read_config,
    read_index,
    read_json,
    width_of,
)
from backends.files.fit import needed_components
from backends.files.pipeline_calls import pipeline_call
from backends.model_table import CHECKPOINT_SIGNS, ModelSpec
from backends.request import LoadRequest

TITLES = ("modelspec.title", "modelspec.architecture", "general.name", "ss_output_name")
"""Metadata in which trainers and publishers write a model's name."""


OPTIONAL_KINDS = frozenset({"encoder_hid_dim_type"})
"""Settings that a row asks of its denoiser, and without which diffusers runs it too."""


def misfit_of(spec: ModelSpec, folder: Path) -> str:
    """Return why a folder of a class that the row runs is not run by it, but as diffusers has it;
    empty if the row fits.

    A class that the row runs too may have other components, such as a denoiser that takes a mask.
    One of the row's own class may do without some, or read another number of an encoder's layers.
    """
    index = read_index(folder)
    name = index.get("_class_name")
    if name == spec.pipeline:
        absent = [part for part in needed_components(spec) if index.get(part) == [None, None]]
        if absent:
            return f"the checkpoint does without {' and '.join(absent)}"
        checkpoint = Checkpoint(spec=spec, path=folder, folder=folder, index=index)
        return _other_kind(checkpoint) or _other_layers(checkpoint)
    if name not in spec.also or spec.components:
        return ""
    load = LoadRequest(model_type=spec.name, checkpoint=str(folder), variant="fp32")
    try:
        require_fit(spec, load)
    except ConfigError as error:
        return str(error)
    return ""


def _other_kind(checkpoint: Checkpoint) -> str:
    """Return what the denoiser lacks of its row's: Kolors also runs without a projection of texts,
    if they have the width of its UNet.
    """
    spec = checkpoint.spec
    config = checkpoint.config(spec.denoiser)
    for key in OPTIONAL_KINDS & spec.fits.get("is", {}).keys():
        if config and config.get(key) is None:
            return f"its {spec.denoiser} has no {key}"
    return ""


def _other_layers(checkpoint: Checkpoint) -> str:
    """Return how many layers of an encoder the denoiser reads, if not as many as the row says."""
    spec = checkpoint.spec
    config = checkpoint.config(spec.denoiser)
    for key, paths in spec.fits.get("text", {}).items():
        times, is_several, path = paths[0].partition(" * ")
        wanted, width = config.get(key), width_of(path, checkpoint, config) if is_several else None
        if isinstance(wanted, int) and width and wanted % width == 0:
            layers = wanted // width
            if len(paths) == 1 and layers != int(times):
                return f"its {spec.denoiser} reads {layers} layers of the encoder, not {times}"
    return ""


def with_own_defaults(
    spec: ModelSpec, checkpoint: Checkpoint, names: Iterable[str]
) -> tuple[ModelSpec, str]:
    """Return the type with the defaults of this checkpoint, and why they are others; '' if not.

    names: of the checkpoint and of the files that replace its denoiser, without their folders.
    """
    metadata = checkpoint.header.metadata if checkpoint.header is not None else {}
    own_name = checkpoint.index.get("_name_or_path")
    texts = [*names, *(metadata.get(key, "") for key in TITLES)]
    words = "".join(_plain(text) for text in (*texts, own_name) if isinstance(text, str))
    for title, row in spec.checkpoints.items():
        if not _is_one(row, checkpoint, words):
            continue
        facts = {key: value for key, value in row.items() if key not in CHECKPOINT_SIGNS}
        if (steps := re.search(r"-(\d{1,2})-?steps?(?=-)", words)) and "words" in row:
            facts["num_inference_steps"] = int(steps[1])
        typed = {
            key: MappingProxyType(value)
            if isinstance(value, dict)
            else type(getattr(spec, key))(value)
            for key, value in facts.items()
        }
        told = ", ".join(f"{key}={value}" for key, value in facts.items())
        return replace(spec, **typed), f"{told}: the checkpoint is {title}"
    return spec, ""


PUBLISHED_SCALE = 8
"""Pixels on a side of one latent, in the published checkpoints of the classes below."""
LEVELS = {
    "AutoencoderKL": "block_out_channels",
    "AutoencoderKLFlux2": "block_out_channels",
    "AutoencoderKLQwenImage": "temperal_downsample",
}
"""Class of a VAE -> the setting that lists its levels, between which the sides are halved."""


def with_own_sizes(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """Return the type with its sizes for this checkpoint's VAE, which may scale by another factor
    than published ones: as many latents on a side, and as many latent frames.
    """
    if spec.is_generic or spec.upscale > 1:
        return spec
    if checkpoint.config("vae").get("spatio_temporal_scaling"):
        return _with_sizes_of_ltx(spec, checkpoint)
    scale = _pixels_of_latent(checkpoint)
    if scale == PUBLISHED_SCALE:
        return spec
    sizes: dict[str, Any] = {
        name: max(getattr(spec, name) * scale // PUBLISHED_SCALE, 1)
        for name in ("height", "width", "size_multiple")
    }
    times, more = spec.fits.get("channels", (1, 0))
    if more and spec.latents == "packed":  # the pixels of a mask, as many as a token has
        more = more * scale**2 // PUBLISHED_SCALE**2
        sizes["fits"] = MappingProxyType({**spec.fits, "channels": [times, more]})
    return replace(spec, **sizes)


def _with_sizes_of_ltx(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """LTX's pipelines take multiples of the published scale only, whatever the VAE's is."""
    vae, multiple = checkpoint.config("vae"), spec.size_multiple
    scale = vae.get("spatial_compression_ratio") or (
        vae["patch_size"] * 2 ** sum(vae["spatio_temporal_scaling"])
    )
    sides = {
        side: math.ceil(getattr(spec, side) * scale / multiple**2) * multiple
        for side in ("height", "width")
    }
    latent_frames = (spec.num_frames - 1) // spec.frame_step
    return replace(spec, num_frames=latent_frames * (_frames_of_latent(vae) or 1) + 1, **sides)


POSITIONS: Mapping[str, Callable[[Config], Any]] = MappingProxyType(
    {
        "SD3Transformer2DModel": lambda config: config.get("pos_embed_max_size"),
        "CogView3PlusTransformer2DModel": lambda config: config.get("pos_embed_max_size"),
        "OmniGenTransformer2DModel": lambda config: config.get("pos_embed_max_size"),
        "AuraFlowTransformer2DModel": lambda config: math.isqrt(
            config.get("pos_embed_max_size") or 0
        ),
        "Kandinsky5Transformer3DModel": lambda config: 128,
    }
)
"""Class of a denoiser -> patches along a side for which it has positions, and no more."""
FRAME_STEPS = ("scale_factor_temporal", "temporal_compression_ratio")
"""Settings of VAEs: frames that a latent frame holds."""


def with_own_extent(
    spec: ModelSpec, checkpoint: Checkpoint, *, motion: str | None = None
) -> ModelSpec:
    """Return the type with the sizes and lengths for which the checkpoint has positions, the layers
    that its text encoders can skip, and the shapes of latents and embeddings.

    motion: folder of a motion adapter that is given apart.
    """
    config, vae = checkpoint.config(spec.denoiser), checkpoint.config("vae")
    scale = _pixels_of_latent(checkpoint)
    extent: dict[str, tuple[int, int]] = {}
    step = _frames_of_latent(vae) or spec.frame_step
    patches = POSITIONS.get(str(config.get("_class_name")), lambda config: None)(config)
    if patches:
        patch = config.get("patch_size", 1)
        patch = patch[-1] if isinstance(patch, list) else patch
        extent |= dict.fromkeys(("height", "width"), (1, patches * patch * scale))
    if patches and spec.output == "video":
        extent["num_frames"] = (1, (patches - 1) * step + 1)
    if config.get("use_learned_positional_embeddings"):
        for side in ("height", "width"):
            fixed = config[f"sample_{side}"] * scale
            extent[side] = (fixed, fixed)
    if "motion_adapter" in spec.components:
        adapter = read_config(component_folder(motion, "motion_adapter")) if motion else {}
        adapter = adapter or checkpoint.config("motion_adapter")
        if frames := adapter.get("motion_max_seq_length"):
            extent["num_frames"] = (1, frames)
    call = pipeline_call(spec.pipeline)
    if call is not None and "clip_skip" in call.names:
        encoders = (checkpoint.config(name) for name in ("text_encoder", "text_encoder_2"))
        layers = [each["num_hidden_layers"] for each in encoders if "num_hidden_layers" in each]
        extent |= {"clip_skip": (0, min(layers) - 1)} if layers else {}
    return replace(
        spec,
        extent=MappingProxyType(extent),
        frame_step=step if spec.frame_step > 1 else 1,
        latent_channels=int(vae.get("latent_channels") or vae.get("z_dim") or 0),
        latent_pixels=scale,
        embeds_widths=embeds_widths(config),
    )


def embeds_widths(config: Config) -> tuple[int | None, int | None]:
    """Return the channels of prompt and pooled embeddings from a denoiser's config, or None."""
    names = ("joint_attention_dim", "cross_attention_dim", "cap_feat_dim", "text_dim")
    if config.get("encoder_hid_dim_type") == "text_proj":  # Kolors projects what it gets
        names = ("encoder_hid_dim", *names)
    width = next((config[name] for name in names if config.get(name) is not None), None)
    pooled = config.get("pooled_projection_dim")
    if config.get("addition_embed_type") == "text_time":
        # SDXL concatenates six embedded sizes with the pooled text
        pooled = (
            config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        )
    return width if isinstance(width, int) else None, pooled


def _frames_of_latent(vae: Config) -> int | None:
    """Return the frames that a latent frame holds; None if the configuration does not say."""
    if scaling := vae.get("spatio_temporal_scaling"):  # LTX halves by level
        return vae.get("temporal_compression_ratio") or vae["patch_size_t"] * 2 ** sum(scaling)
    return next((int(vae[key]) for key in FRAME_STEPS if vae.get(key)), None)


def _pixels_of_latent(checkpoint: Checkpoint) -> int:
    """Return the pixels on a side of one latent."""
    setting = LEVELS.get(str(checkpoint.class_of("vae")))
    levels = checkpoint.config("vae").get(setting) if setting is not None else None
    if not isinstance(levels, list) or not levels:
        return PUBLISHED_SCALE
    return 2 ** (len(levels) - (setting == "block_out_channels"))


def _is_one(row: Mapping[str, Any], checkpoint: Checkpoint, words: str) -> bool:
    """Return whether the configuration, or a word in the names, is this row's."""
    if "is" in row:
        return all(_field(checkpoint, path) == value for path, value in row["is"].items())
    return any(f"-{word}" in words for word in row["words"])


def _field(checkpoint: Checkpoint, path: str) -> Any:
    component, _, key = path.rpartition(".")
    if not component:
        return checkpoint.index.get(key)
    folder = checkpoint.folder / component
    if component == "scheduler" and (folder / "scheduler_config.json").is_file():
        return read_json(folder / "scheduler_config.json").get(key)
    return checkpoint.config(component).get(key)


def _plain(text: str) -> str:
    """'dreamshaperXL_Lightning.v1' -> '-dreamshaper-xl-lightning-v1-'."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", text)
    return f"-{re.sub(r'[^a-z0-9]+', '-', parts.lower())}-"
