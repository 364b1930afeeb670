"""Recognise a denoiser's family by the names and shapes of its tensors. Imports no torch.

The names are those by which diffusers distinguishes families (`infer_diffusers_model_type`), but
not the published widths. So files in diffusers' own names, files without the prefix
`model.diffusion_model.` and GGUF files are recognised too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from backends.files.weight_headers import Header, Shape
from backends.model_table import read_table

DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.")
Part = Literal[
    "checkpoint",
    "denoiser",
    "vae",
    "controlnet",
    "ip_adapter",
    "motion",
    "lora",
    "encoder",
    "embedding",
    "other",
]
OPTIONS = {
    "checkpoint": "--checkpoint",
    "vae": "--vae",
    "controlnet": "--control_net",
    "ip_adapter": "--ip_adapter",
    "motion": "--motion_module",
    "lora": "--lora",
}
"""Part -> the option that takes it. A denoiser's depends on its kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a file was recognised as."""

    title: str
    """In words, with an article: 'a ControlNet of Stable Diffusion XL'."""
    part: Part
    types: tuple[str, ...] = ()
    """Rows of the model table that run it; empty if none does."""
    denoiser: str = ""
    """'unet' or 'transformer', for a denoiser."""
    reason: str = ""
    """Why no type runs it, if known."""

    @property
    def option(self) -> str:
        """The option that takes such a file; empty if there is none."""
        if self.part == "denoiser":
            return f"--{self.denoiser}" if self.types else ""
        return OPTIONS.get(self.part, "")


def recognize_denoiser(header: Header) -> Found | None:
    """Return the family of the denoiser in this file; None for unknown names."""
    inner = header.without(*DENOISER_PREFIXES)
    return next((found for found in _denoisers(inner) if found is not None), None)


def _denoisers(header: Header) -> Iterator[Found | None]:
    yield _unet(header)
    for title, class_name, names in _TRANSFORMERS:
        if header.has(*names):
            yield _of_transformer(header, title, class_name)


def _of_transformer(header: Header, title: str, class_name: str) -> Found:
    """Describe a transformer. Other types run variants with more input channels or other
    metadata.
    """
    first = header.shape_of("img_in.weight", "x_embedder.weight", "patch_embedding.weight") or (
        0,
        0,
    )
    keys = ("modelspec.architecture", "modelspec.title", "general.name")
    about = " ".join(header.metadata.get(key, "") for key in keys).lower()
    word = next((word for word in _SPECIAL if word in about), None)
    reason, types = "", _types_of(class_name)
    if title in _UNGUIDED and not header.has(*_GUIDANCE):
        types = tuple(sorted(types, key=lambda name: name != _UNGUIDED[title]))
    if word is not None:
        title, (reason, types) = f"{title} ({word})", _SPECIAL[word]
    else:
        reason, types = _WIDER.get((title, first[1])) or _WIDER.get((title, None)) or ("", types)
    return Found(
        title=f"a denoiser of {title}",
        part="denoiser",
        types=types,
        denoiser="transformer",
        reason=reason if types or reason else "no type runs this family",
    )


def _types_of(class_name: str) -> tuple[str, ...]:
    """Return the types of this class, without those whose denoisers are wider."""
    wider = {name for _, names in _WIDER.values() for name in names}
    return tuple(
        name
        for name, spec in read_table().items()
        if class_name in spec.fits.get("denoiser", ()) and name not in wider
    )


_GUIDANCE = (
    "guidance_in.in_layer.weight",
    "time_guidance_embed.guidance_embedder.linear_1.weight",
)
_UNGUIDED = {"FLUX.2": "flux2_klein"}
"""Title -> the type of a file without an input for guidance."""

_WIDER: dict[tuple[str, int | None], tuple[str, tuple[str, ...]]] = {
    ("FLUX.1", 384): ("it is made for inpainting (Fill) and also takes a mask", ("flux_fill",)),
    ("FLUX.1", 128): (
        "it is made for depth or edges beside the latents, and no type has its pipeline",
        (),
    ),
    ("Wan", 36): ("it needs a first frame", ("wan22_i2v",)),
    ("Wan image to video", None): ("it needs a first frame", ("wan_i2v",)),
}
"""(title, input channels or all) -> (why the type with the same names does not run it, types)."""

_SPECIAL: dict[str, tuple[str, tuple[str, ...]]] = {
    "kontext": ("it edits a reference image", ("flux_kontext",)),
    "qwen-image-edit-25": ("it edits reference images", ("qwenimage_edit_plus",)),
    "qwen-image-edit": (
        "it edits a reference image",
        ("qwenimage_edit", "qwenimage_edit_plus"),
    ),
    "qwen-image-layered": ("it generates layers, and no type has its pipeline", ()),
}
"""Word in the metadata -> (why the type with the same names and shapes does not run it, types)."""

_TRANSFORMERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "FLUX.2",
        "Flux2Transformer2DModel",
        ("single_stream_modulation.lin.weight", "single_stream_modulation.linear.weight"),
    ),
    ("FLUX.3", "", ("early_stream_modulations.image.lin.weight",)),
    ("Chroma", "ChromaTransformer2DModel", ("distilled_guidance_layer.in_proj.bias",)),
    (
        "FLUX.1",
        "FluxTransformer2DModel",
        (
            "double_blocks.0.img_attn.norm.key_norm.scale",
            "double_blocks.0.img_attn.qkv.weight",
            "single_transformer_blocks.0.proj_mlp.weight",
        ),
    ),
    (
        "Stable Diffusion 3",
        "SD3Transformer2DModel",
        (
            "joint_blocks.0.context_block.adaLN_modulation.1.bias",
            "transformer_blocks.0.norm1_context.linear.weight",
        ),
    ),
    ("Z-Image", "ZImageTransformer2DModel", ("layers.0.adaLN_modulation.0.weight",)),
    (
        "Lumina 2",
        "Lumina2Transformer2DModel",
        ("cap_embedder.0.weight", "time_caption_embed.caption_embedder.0.weight"),
    ),
    ("Qwen-Image 2.1", "QwenImage21Transformer2DModel", ("txt_in.text_norm.weight",)),
    ("Qwen-Image", "QwenImageTransformer2DModel", ("transformer_blocks.0.img_mod.1.weight",)),
    ("Helios", "HeliosTransformer3DModel", ("patch_short.weight",)),
    (
        "Wan VACE",
        "WanVACETransformer3DModel",
        ("vace_blocks.0.after_proj.bias", "vace_blocks.0.proj_out.bias"),
    ),
    ("Wan Animate", "WanAnimateTransformer3DModel", ("motion_encoder.dec.direction.weight",)),
    (
        "Wan image to video",
        "WanTransformer3DModel",
        (
            "img_emb.proj.0.bias",
            "img_emb.proj.0.weight",
            "condition_embedder.image_embedder.norm1.weight",
        ),
    ),
    (
        "Wan",
        "WanTransformer3DModel",
        ("head.modulation", "condition_embedder.text_embedder.linear_1.weight"),
    ),
    (
        "HunyuanDiT",
        "HunyuanDiT2DModel",
        ("mlp_t5.0.weight", "time_extra_emb.pooler.positional_embedding"),
    ),
    ("LTX-2", "LTX2VideoTransformer3DModel", ("audio_patchify_proj.weight",)),
    ("LTX-Video", "LTXVideoTransformer3DModel", ("patchify_proj.weight",)),
    (
        "PixArt",
        "PixArtTransformer2DModel",
        ("y_embedder.y_proj.fc1.weight", "caption_projection.linear_1.weight"),
    ),
    (
        "HunyuanVideo 1.5",
        "HunyuanVideo15Transformer3DModel",
        ("cond_type_embed.weight", "cond_type_embedding.weight"),
    ),
    (
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",),
    ),
    ("CogVideoX", "CogVideoXTransformer3DModel", ("patch_embed.text_proj.weight",)),
    (
        "Kandinsky 5",
        "Kandinsky5Transformer3DModel",
        ("visual_transformer_blocks.0.self_attention.to_query.weight",),
    ),
    ("AuraFlow", "AuraFlowTransformer2DModel", ("double_layers.0.attn.w2q.weight",)),
    ("Mochi", "MochiTransformer3DModel", ("blocks.0.attn.qkv_x.weight",)),
    ("Sana", "SanaTransformer2DModel", ("blocks.0.cross_attn.q_linear.weight",)),
    (
        "HiDream",
        "HiDreamImageTransformer2DModel",
        ("double_stream_blocks.0.block.adaLN_modulation.1.bias",),
    ),
    ("Cosmos", "CosmosTransformer3DModel", ("x_embedder.proj.1.weight",)),
    ("Krea 2", "Krea2Transformer2DModel", ("txtfusion.projector.weight",)),
    ("ERNIE-Image", "ErnieImageTransformer2DModel", ("layers.0.adaLN_sa_ln.weight",)),
    ("MiniMax", "", ("token_refiner.blocks.0.attn.qkv_proj.weight",)),
    (
        "Stable Cascade",
        "StableCascadeUNet",
        ("clip_txt_mapper.weight", "down_blocks.1.0.channelwise.0.weight"),
    ),
)
"""(title, diffusers class, tensors of which one must exist). First match wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _UNetFamily:
    """One architecture of UNets."""

    title: str
    types: tuple[str, ...]
    reason: str = ""
    has_only_latents: bool = True  # the ordinary form takes no image beside the latents
    masked_types: tuple[str, ...] = ()  # that run its form with channels for a mask
    editing_types: tuple[str, ...] = ()  # that run its form with channels for an image


FIRST_GENERATION = _UNetFamily(
    title="Stable Diffusion 1",
    types=("sd1", "sd2", "ad"),
    masked_types=("sd1", "sd2"),
    editing_types=("pix2pix",),
)
SECOND_GENERATION = _UNetFamily(
    title="Stable Diffusion 2", types=("sd2", "sd1", "ad"), masked_types=("sd2", "sd1")
)
_KOLORS = _UNetFamily(title="Kolors", types=("kolors",))
_SDXL = _UNetFamily(title="Stable Diffusion XL", types=("sdxl",), masked_types=("sdxl",))
_REFINER = _UNetFamily(
    title="the Stable Diffusion XL refiner",
    types=(),
    reason="it continues another model's latents, and no type does that",
)
_UPSCALER = _UNetFamily(
    title="the Stable Diffusion x4 upscaler", types=("sdup",), has_only_latents=False
)
_VIDEO = _UNetFamily(title="Stable Video Diffusion", types=("svd",), has_only_latents=False)
_MORE_CHANNELS = {
    9: "it is made for inpainting and also takes a mask",
    8: "it is made for editing (InstructPix2Pix) and also takes an image",
    5: "it is made for depth maps and also takes one, and no type has its pipeline",
}
"""Input channels of a UNet with four latent channels -> why it is no ordinary one."""


def _unet(header: Header) -> Found | None:
    """Recognise a UNet in the original names (input_blocks) or diffusers' (down_blocks)."""
    first = header.shape_of("input_blocks.0.0.weight", "conv_in.weight")
    has_blocks = header.has_part("input_blocks.1.", "down_blocks.0.resnets.")
    if (
        first is None
        or not has_blocks
        or not header.has("time_embed.0.weight", "time_embedding.linear_1.weight")
    ):
        return None
    family = _unet_family(header)
    title = f"a denoiser of {family.title}"
    if family.has_only_latents and first[1] in _MORE_CHANNELS:
        title, reason = f"{title} with {first[1]} input channels", _MORE_CHANNELS[first[1]]
        types = {9: family.masked_types, 8: family.editing_types}.get(first[1], ())
        return Found(title=title, part="denoiser", types=types, denoiser="unet", reason=reason)
    return Found(
        title=title, part="denoiser", types=family.types, denoiser="unet", reason=family.reason
    )


def _unet_family(header: Header) -> _UNetFamily:
    if header.has_part("time_stack.", "temporal_transformer_blocks."):
        return _VIDEO
    if header.has("label_emb.0.0.weight", "add_embedding.linear_1.weight"):
        if header.has("encoder_hid_proj.weight"):
            return _KOLORS
        return _REFINER if header.has_part("input_blocks.9.", "down_blocks.3.") else _SDXL
    if header.has("label_emb.weight", "class_embedding.weight"):
        return _UPSCALER
    widths = header.first_shape("attn2.to_k.weight"), header.first_shape(".proj_in.weight")
    return SECOND_GENERATION if _is_second_generation(*widths) else FIRST_GENERATION


def _is_second_generation(key: Shape | None, projection: Shape | None) -> bool:
    """Return whether the text encoder is OpenCLIP, 1024 wide, or the projections are linear."""
    if key is not None and key[1] in (768, 1024):
        return key[1] == 1024
    return projection is not None and len(projection) == 2
