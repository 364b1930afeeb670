"""Recognise a weight file by the names and shapes of its tensors. Imports no torch."""

from collections.abc import Callable
from dataclasses import replace

from backends.files.denoiser_families import (
    DENOISER_PREFIXES,
    FIRST_GENERATION,
    SECOND_GENERATION,
    Found,
    Part,
    recognize_denoiser,
)
from backends.files.weight_headers import Header
from backends.model_table import ModelSpec

NOTES = ("v_pred", "ztsnr", "edm_mean", "edm_std")
"""Tensors beside the weights that say how to sample the model."""
VAE_PREFIXES = ("first_stage_model.", "vae.")
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")


def recognize(header: Header) -> Found | None:
    """Return what the file is; None for unknown names."""
    return next(
        (
            found
            for look in (_adapter, _checkpoint, recognize_denoiser, _vae, _encoder)
            if (found := look(header))
        ),
        None,
    )


def has_text_encoders(header: Header) -> bool:
    """Return whether the file holds text encoders beside a denoiser."""
    return any(name.startswith(TEXT_PREFIXES) for name in header.shapes)


def has_vae(header: Header) -> bool:
    """Return whether the file holds a VAE beside a denoiser."""
    return any(name.startswith(VAE_PREFIXES) for name in header.shapes)


def components_in(header: Header, spec: ModelSpec) -> dict[str, str]:
    """Return the components that a single-file checkpoint holds, with the prefix of encoders."""
    encoders = {
        component: prefix
        for component, prefix in spec.file_encoders.items()
        if any(name.startswith(prefix) for name in header.shapes)
    }
    return {spec.denoiser: "", **({"vae": ""} if has_vae(header) else {}), **encoders}


def unread_encoders(header: Header, spec: ModelSpec) -> list[str]:
    """Return the tensors of text encoders in a single file that the type does not read there."""
    known = tuple(spec.file_encoders.values())
    encoders = [name for name in header.shapes if name.startswith(TEXT_PREFIXES)]
    return [name for name in encoders if not name.startswith(known)]


def configuration_of(header: Header, spec: ModelSpec) -> str | None:
    """Return the hub repository with the configuration of a single-file checkpoint, if known."""
    inner = header.without(*DENOISER_PREFIXES)
    return next(
        (repo for tensor, repo in spec.configuration.items() if not tensor or inner.has(tensor)),
        None,
    )


def _adapter(header: Header) -> Found | None:
    """Recognise adapters, in an order in which no pattern hides a later one."""
    for title, part, reason, is_one in _ADAPTERS:
        if is_one(header):
            return Found(title=title, part=part, reason=reason)
    return None


def _is_lora(header: Header) -> bool:
    endings = (
        ".lora_down.weight",
        ".lora_A.weight",
        ".lora_up.weight",
        ".lora.down.weight",
        ".lora_A.default.weight",
    )
    others = (
        ".hada_w1_a",
        ".lokr_w1",
        ".lokr_w1_a",
        ".diff",
        ".diff_b",
        ".oft_blocks",
        "_lora.down.weight",
    )
    return any(name.endswith(endings + others) for name in header.shapes)


def _is_ip_adapter(header: Header) -> bool:
    return header.has_part("ip_adapter.", "ip_adapter_double_stream", "ip_adapter_proj_model")


def _is_face_id(header: Header) -> bool:
    """Return whether the projection takes a face recogniser's vectors."""
    names = header.shapes
    has_own_layers = any(
        name.startswith("image_proj.proj.0.") for name in names
    ) and not header.has("image_proj.proj.3.weight")
    return (
        header.has_part("perceiver_resampler")
        or any("ip_adapter." in name and "_lora." in name for name in names)
        or has_own_layers
    )


def _is_t2i_adapter(header: Header) -> bool:
    is_original = (
        header.has("conv_in.weight", "adapter.conv_in.weight")
        and header.has_part("body.0.")
        and not header.has_part("down_blocks")
    )
    return is_original or any(name.startswith("adapter.body.") for name in header.shapes)


def _is_union(header: Header) -> bool:
    return header.has_part(
        "task_embedding", "controlnet_mode_embedder", "control_add_embedding", "spatial_ch_projs"
    )


def _is_sparse(header: Header) -> bool:
    return header.has("controlnet_cond_embedding.weight") or (
        header.has_part("motion_modules.") and header.has_part("controlnet_")
    )


def _is_controlnet(header: Header) -> bool:
    return header.has_part(
        "control_model.",
        "controlnet_cond_embedding",
        "controlnet_x_embedder",
        "controlnet_blocks.",
        "control_layers.",
        "controlnet_down_blocks.",
    )


def _is_taesd(header: Header) -> bool:
    is_original = bool(header.shapes) and all(
        name.split(".")[0].isdigit() for name in header.shapes
    )
    is_text = header.has_part("text_model", "self_attn")
    return is_original or (
        header.has_part("decoder.layers.", "encoder.layers.0.conv") and not is_text
    )


def _is_motion(header: Header) -> bool:
    return header.has_part("motion_modules.") and not header.has_part("resnets.", "conv_in.")


def _is_embedding(header: Header) -> bool:
    return len(header.shapes) <= 4 and header.has(
        "emb_params", "string_to_param", "clip_l", "clip_g", "<concept>"
    )


_NO_UNION = "a union ControlNet needs the kind of each control image, which requests cannot give"
_ADAPTERS: tuple[tuple[str, Part, str, Callable[[Header], bool]], ...] = (
    (
        "a FaceID IP-Adapter",
        "other",
        ("it needs the identity vectors of a face recogniser, which are not computed here"),
        lambda header: _is_ip_adapter(header) and _is_face_id(header),
    ),
    ("an IP-Adapter", "ip_adapter", "", _is_ip_adapter),
    (
        "a control-LoRA",
        "other",
        "it is a low-rank ControlNet, which diffusers cannot load",
        lambda header: header.has("lora_controlnet"),
    ),
    (
        "a ControlNet-LLLite",
        "other",
        "it changes the UNet's own layers, and no type loads that",
        lambda header: header.has_part("lllite_"),
    ),
    ("a union ControlNet", "other", _NO_UNION, _is_union),
    (
        "a ControlNetXS",
        "other",
        "its layers run inside the UNet's, and no type has that pipeline",
        lambda header: header.has_part(
            "ctrl_cross_attn",
            "ctrl_to_base",
            "base_to_ctrl",
            "down_connections.",
            "enc_zero_convs",
            "c_to_base",
        ),
    ),
    (
        "a SparseCtrl ControlNet",
        "other",
        ("it is for AnimateDiff's sparse control, which no type runs"),
        _is_sparse,
    ),
    ("a ControlNet", "controlnet", "", _is_controlnet),
    ("a LoRA", "lora", "", _is_lora),
    (
        "a T2I-Adapter",
        "other",
        "it is not a ControlNet, and no type has its pipeline",
        _is_t2i_adapter,
    ),
    ("a motion module of AnimateDiff", "motion", "", _is_motion),
    (
        "a textual inversion",
        "embedding",
        "it is an embedding for prompts, not a component of a pipeline",
        _is_embedding,
    ),
    (
        "a tiny VAE (TAESD)",
        "other",
        "its latents lack the mean and scale that this pipeline uses",
        _is_taesd,
    ),
)


def _checkpoint(header: Header) -> Found | None:
    """Recognise a denoiser with other components beside it."""
    if not (has_text_encoders(header) or has_vae(header)):
        return None
    found = recognize_denoiser(header)
    if found is None:
        what = "text encoders" if has_text_encoders(header) else "a VAE"
        return Found(
            title=f"a file with {what} and no denoiser",
            part="vae" if what == "a VAE" else "encoder",
        )
    if not found.types:
        return found
    is_open_clip = any(name.startswith("cond_stage_model.model.") for name in header.shapes)
    types = (
        SECOND_GENERATION.types
        if is_open_clip and found.types == FIRST_GENERATION.types
        else found.types
    )
    return replace(
        found,
        title=found.title.replace("a denoiser", "a checkpoint"),
        part="checkpoint",
        types=types,
    )


def _vae(header: Header) -> Found | None:
    inner = header.without(*VAE_PREFIXES)
    if inner.has_part("decoder.up_blocks.", "decoder.up.", "decoder.upsamples.", "decoder.middle."):
        return Found(title="a VAE", part="vae")
    return None


def _encoder(header: Header) -> Found | None:
    if header.has_part("vision_model.encoder", "visual.transformer"):
        return Found(title="an image encoder", part="encoder")
    is_text = header.has_part(
        "text_model.encoder",
        "token_embd",
        "encoder.block.0.layer.0",
        "layers.0.self_attn",
        "embeddings.token_embedding",
        "encoder.layer.0.attention",
    )
    return Found(title="a text encoder or language model", part="encoder") if is_text else None


def prediction_of(header: Header) -> dict[str, object]:
    """Return the file's own scheduler settings, from empty tensors or trainers' metadata."""
    if header.has("v_pred"):
        settings: dict[str, object] = {"prediction_type": "v_prediction"}
        return settings | ({"rescale_betas_zero_snr": True} if header.has("ztsnr") else {})
    text = header.metadata.get("modelspec.prediction_type", "").lower()
    name = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(text)
    return {"prediction_type": name} if name is not None else {}


UPSCALER_CHANNELS = {3: 4, 12: 2, 48: 1}
"""Channels of the first layer of an ESRGAN -> the factor by which it enlarges. It folds pixels into
channels before, and doubles the sides twice.
"""


def upscaler_scale(header: Header) -> int | None:
    """Return the factor of an ESRGAN's network; None for other networks."""
    first = header.first_shape("conv_first.weight", "model.0.weight")
    return UPSCALER_CHANNELS.get(first[1]) if first is not None and len(first) == 4 else None
