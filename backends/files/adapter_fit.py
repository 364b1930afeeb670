"""Whether ControlNets, IP-Adapters and motion modules fit the checkpoint. Imports no torch.

Only configurations and headers are read.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from backends.errors import ConfigError, RequestError
from backends.files.checkpoint import (
    Checkpoint,
    Config,
    component_folder,
    open_checkpoint,
    read_component_header,
    read_config,
    refuse,
    with_article,
)
from backends.files.fit import require_files
from backends.files.recognition import recognize
from backends.files.weight_headers import Header, read_header
from backends.model_table import ModelSpec
from backends.request import LoadRequest

ENCODER_FOLDERS = ("image_encoder", "../models/image_encoder", "../image_encoder")
"""Where published IP-Adapters keep their image encoder, relative to the weights' folder."""
OF_UNETS = re.compile(r"(?:down|up|input|output)_blocks[._]\d|mid(?:dle)?_block[._]")
OF_TRANSFORMERS = re.compile(
    r"(?:double|single|joint)_blocks[._]\d|(?:^|transformer[._]|diffusion_model\.|lora_unet_)"
    r"(?:single_transformer_|transformer_)?(?:blocks|layers)[._]\d",
    re.MULTILINE,
)
"""Parts of a layer's name in a LoRA. A UNet has transformer blocks inside others."""
_FACTOR = r"\.(?:lora_A|lora_down|lora\.down)(?:\.[^.]+)?\.weight$"
TEXT_KEYS = re.compile(r"attn2[._](?:processor[._])?to_k(?:_lora)?" + _FACTOR)
"""Of a LoRA of a UNet: the layers that read the text, whose width is cross_attention_dim."""
QUERIES = re.compile(
    r"(?:blocks|layers)[._]\d+[._](?:attn1?|self_attn|attention|img_attn)[._](?:to_)?q(?:kv)?"
    + _FACTOR
)
"""Of a LoRA of a transformer: layers that read its hidden states."""
ARCHITECTURES = ("modelspec.architecture", "ss_base_model_version")
"""Metadata of a LoRA that names the model that it was trained on."""
FAMILIES = {
    r"stable-diffusion-v?1|sd-?v?1(?!\d)": ("sd1", "ad", "pix2pix"),
    r"stable-diffusion-v?2|sd-?v?2(?!\d)": ("sd2", "sdup"),
    r"stable-diffusion-xl|sdxl|pony|illustrious|noobai": ("sdxl",),
    r"stable-diffusion-v?3|sd-?v?3": ("sd3",),
    r"kolors": ("kolors",),
    r"flux-?2": ("flux2", "flux2_klein"),
    r"flux": ("flux", "flux_kontext", "flux_fill"),
    r"chroma": ("chroma",),
    r"qwen": ("qwenimage", "qwenimage_edit", "qwenimage_edit_plus"),
    r"z-?image": ("zimage",),
    r"wan": ("wan_t2v", "wan22_t2v", "wan_i2v", "wan22_i2v", "wan_vace", "skyreels"),
    r"skyreels": ("skyreels", "hunyuanvideo"),
    r"hunyuan-?video-?1-?5": ("hunyuanvideo15",),
    r"hunyuan-?video|framepack": ("hunyuanvideo",),
    r"hunyuan-?dit|hydit": ("hy",),
    r"pixart-?sigma": ("pixs",),
    r"pixart-?alpha": ("pixa",),
    r"ltx-?(?:video-?)?2": ("ltx2", "ltx2_i2v"),
    r"ltx": ("ltx", "ltx_i2v"),
    r"lumina-?(?:image-?)?2": ("lumina2",),
    r"sana": ("sana",),
    r"hi-?dream": ("hidream",),
    r"cogvideox": ("cogvideox", "cogvideox_i2v"),
    r"mochi": ("mochi",),
    r"svd|stable-video": ("svd",),
}
"""Words of such a name, the most exact first -> the types that it is for."""
SAME_WIDTHS = (
    "cross_attention_dim",
    "cross_attention_dim_t5",
    "joint_attention_dim",
    "pooled_projection_dim",
    "block_out_channels",
    "layers_per_block",
    "in_channels",
    "hidden_size",
    "dim",
)
"""Config fields that must be equal in a ControlNet and its denoiser."""


def require_fit(spec: ModelSpec, load: LoadRequest) -> Checkpoint:
    """Return the checkpoint of a load request. ConfigError for the first file that does not fit."""
    checkpoint = open_checkpoint(spec, load.checkpoint, config=load.checkpoint_config)
    require_files(spec, load, checkpoint)
    require_adapters(spec, load, checkpoint)
    return checkpoint


def require_adapters(spec: ModelSpec, load: LoadRequest, checkpoint: Checkpoint) -> None:
    """Raise ConfigError for the first adapter that does not fit the checkpoint's denoiser."""
    denoiser = _denoiser_config(spec, load, checkpoint)
    for path in load.control_net:
        _require_controlnet(path, load.control_net_config, spec, denoiser)
    for path in (*load.lora, *load.motion_lora):
        header = read_header(path, option="--lora")
        found = recognize(header) if header is not None else None
        if found is not None and found.part not in ("lora", "embedding"):
            raise refuse(f"--lora={path}", found, spec, "a LoRA")
        if header is not None:
            _require_lora(f"--lora={path}", header, spec, denoiser if path in load.lora else {})
    for path in load.ip_adapter:
        if (header := read_header(path, option="--ip_adapter")) is not None:
            _require_ip_adapter(f"--ip_adapter={path}", header, spec, denoiser)
            _require_encoder(f"--ip_adapter={path}", header, spec, _encoder(path, load, checkpoint))
    if spec.components and load.motion_adapter is not None:
        _require_motion(load.motion_adapter, "motion_adapter", None, spec, denoiser)
    if spec.components and load.motion_module is not None:
        _require_motion(
            load.motion_module,
            "motion_module",
            load.motion_config,
            spec,
            denoiser,
        )


def _denoiser_config(spec: ModelSpec, load: LoadRequest, checkpoint: Checkpoint) -> Config:
    if load.denoiser is not None and Path(load.denoiser).is_dir():
        return read_config(component_folder(load.denoiser, spec.denoiser))
    if load.denoiser_config is not None:
        return read_config(load.denoiser_config)
    return checkpoint.config(spec.denoiser)


def foreign_architecture(metadata: Mapping[str, str], spec: ModelSpec) -> str:
    """Return what a LoRA says that it was trained on, if that is a model of other types; else ''.

    Its layers may fit all the same: FLUX's do fit Chroma.
    """
    for key in ARCHITECTURES:
        words = re.sub(r"[^a-z0-9]+", "-", metadata.get(key, "").lower())
        types = next((types for part, types in FAMILIES.items() if re.search(part, words)), None)
        if types is not None:
            return "" if spec.name in types else f"{key} {metadata[key][:60]!r}"
    return ""


def require_own_lora(path: str, spec: ModelSpec) -> None:
    """Raise RequestError if the file of a request's LoRA is none, or says that it was trained on
    another model. Nobody reads a warning of a request; at launch it is told (foreign_loras).
    """
    try:
        header = read_header(path, option="--lora")
        found = recognize(header) if header is not None else None
        if found is not None and found.part not in ("lora", "embedding"):
            raise refuse(f"lora={path}", found, spec, "a LoRA")
    except ConfigError as error:
        raise RequestError(str(error).replace("--lora=", "lora="), field="lora") from error
    if header is not None and (foreign := foreign_architecture(header.metadata, spec)):
        raise RequestError(
            f"lora={path} says that it was trained on another model ({foreign}) than {spec.title}. "
            "Send one made for this model, or give this one at launch (--lora) to use its layers "
            "as far as they fit.",
            field="lora",
        )


def foreign_loras(load: LoadRequest, spec: ModelSpec) -> Iterator[str]:
    """Yield a sentence for each LoRA of the launch that names another model."""
    for path in load.lora:
        header = read_header(path, option="--lora")
        if header is not None and (found := foreign_architecture(header.metadata, spec)):
            yield (
                f"--lora={path} says that it was trained on another model ({found}) than "
                f"{spec.title}. Its layers are used as far as they fit"
            )


def _require_lora(given: str, header: Header, spec: ModelSpec, denoiser: Config) -> None:
    """Raise ConfigError for a LoRA of a denoiser of another kind or width.

    Ranks compare all its layers.
    """
    names = "\n".join(header.shapes)
    kind = "unet" if OF_UNETS.search(names) else "transformer"
    is_known = kind == "unet" or OF_TRANSFORMERS.search(names)
    if is_known and kind != spec.denoiser:
        raise ConfigError(
            f"{given} is a LoRA of a {kind}, but --type={spec.name} has a {spec.denoiser}. Give a "
            f"LoRA made for {spec.title}."
        )
    layers, width, what = QUERIES, denoiser.get("hidden_size", denoiser.get("dim")), "hidden states"
    heads, size = (denoiser.get(key) for key in ("num_attention_heads", "attention_head_dim"))
    if isinstance(heads, int) and isinstance(size, int):
        width = heads * size
    if kind == "unet":
        layers, width, what = TEXT_KEYS, denoiser.get("cross_attention_dim"), "texts"
    found = {shape[1] for name, shape in header.shapes.items() if layers.search(name)}
    if found and isinstance(width, int) and width not in found:
        raise ConfigError(
            f"{given} is for a {kind} whose {what} have a width of "
            f"{' or '.join(map(str, sorted(found)))}, but in this checkpoint it is {width}. Give a "
            f"LoRA made for this size of {spec.title}."
        )


def _require_controlnet(
    path: str, config_path: str | None, spec: ModelSpec, denoiser: Config
) -> None:
    given, needed = f"--control_net={path}", with_article(spec.controlnet["model"])
    is_folder = Path(path).is_dir()
    header = read_component_header(path, option="control_net")
    found = recognize(header) if header is not None else None
    if found is not None and found.part != "controlnet":
        raise refuse(given, found, spec, needed)
    own = component_folder(path, "control_net") if is_folder else config_path
    if own is None:
        raise ConfigError(
            f"{given} is a file, so its configuration is needed too. Give "
            "--control_net_config=CONFIG.JSON."
        )
    config = read_config(own)
    if not config:
        raise ConfigError(
            f"{given} has no config.json in {own}. Give a ControlNet's folder in diffusers layout."
        )
    _require_class(given, config, spec)
    _require_no_mode(given, config, spec)
    _require_widths(given, config, denoiser, spec)
    width = header.first_shape("attn2.to_k.weight") if header is not None else None
    wanted = denoiser.get("cross_attention_dim")
    if width is not None and isinstance(wanted, int) and width[1] != wanted:
        raise _other_width(given, "cross_attention_dim", width[1], wanted, spec)


def _require_class(given: str, config: Config, spec: ModelSpec) -> None:
    wanted, name = spec.controlnet["model"], config.get("_class_name")
    if name is not None and name != wanted:
        raise ConfigError(
            f"{given} is {with_article(name)}, but --type={spec.name} needs "
            f"{with_article(wanted)}. Give a ControlNet made for {spec.title}."
        )


def _require_no_mode(given: str, config: Config, spec: ModelSpec) -> None:
    """Refuse union ControlNets, which need the kind of each image, and those that need a mask."""
    if config.get("num_mode"):
        raise ConfigError(
            f"{given} is a union ControlNet of {config['num_mode']} kinds of images, and requests "
            f"have no field for the kind. Give a ControlNet of one kind made for {spec.title}."
        )
    for key in ("extra_conditioning_channels", "extra_condition_channels"):
        if config.get(key):
            raise ConfigError(
                f"{given} takes {config[key]} more channels than an image ({key}), for a mask, "
                f"which no type passes to it. Give a ControlNet made for {spec.title}."
            )


def _require_widths(given: str, config: Config, denoiser: Config, spec: ModelSpec) -> None:
    for key in SAME_WIDTHS:
        own, wanted = config.get(key), denoiser.get(key)
        if own is not None and wanted is not None and own != wanted:
            raise _other_width(given, key, own, wanted, spec)
    for own, wanted in zip(_inner_width(config), _inner_width(denoiser), strict=False):
        if own != wanted:
            raise _other_width(given, "num_attention_heads * attention_head_dim", own, wanted, spec)
    if denoiser and config.get("addition_embed_type") != denoiser.get("addition_embed_type"):
        raise _other_width(
            given,
            "addition_embed_type",
            config.get("addition_embed_type"),
            denoiser.get("addition_embed_type"),
            spec,
        )


def _inner_width(config: Config) -> Iterator[int]:
    """Yield a transformer's attention width. UNets use these config fields for something else."""
    heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(width, int) and "block_out_channels" not in config:
        yield heads * width


def _other_width(given: str, key: str, own: object, wanted: object, spec: ModelSpec) -> ConfigError:
    return ConfigError(
        f"{given} has {key}={own}, but the {spec.denoiser} of --type={spec.name} has {wanted}. "
        f"Give one made for this checkpoint of {spec.title}."
    )


def find_encoder(weights: Path) -> Path:
    """Return the folder of an IP-Adapter's image encoder. ConfigError lists those searched."""
    folders = [weights.parent / name for name in ENCODER_FOLDERS]
    found = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if found is None:
        looked = ", ".join(str(folder.resolve()) for folder in folders)
        raise ConfigError(
            f"ip_adapter={weights} has no image encoder beside it. Put its folder with a "
            f"config.json at one of: {looked}."
        )
    return found


def _encoder(path: str, load: LoadRequest, checkpoint: Checkpoint) -> Path:
    """Return the folder of the checkpoint's image encoder, else that of the first IP-Adapter."""
    if checkpoint.index.get("image_encoder") is not None and checkpoint.has("image_encoder"):
        return checkpoint.folder / "image_encoder"
    return find_encoder(Path(next(iter(load.ip_adapter), path)))


def _require_ip_adapter(given: str, header: Header, spec: ModelSpec, denoiser: Config) -> None:
    """Raise ConfigError unless the file is an IP-Adapter for this denoiser."""
    found = recognize(header)
    if found is None:
        raise ConfigError(
            f"{given} holds no IP-Adapter: keys with image_proj and ip_adapter are missing. Give "
            "another file."
        )
    if found.part != "ip_adapter":
        raise refuse(given, found, spec, "an IP-Adapter")
    key = spec.ip_adapter["width"]
    wanted, width = denoiser.get(key), header.first_shape("to_k_ip.weight", "k_proj.weight")
    if width is not None and isinstance(wanted, int) and width[1] != wanted:
        raise _other_width(given, key, width[1], wanted, spec)


def _require_encoder(given: str, header: Header, spec: ModelSpec, encoder: Path) -> None:
    """Raise ConfigError unless the projection's input is as wide as the encoder's output."""
    config, wanted = read_config(encoder), spec.ip_adapter["image_encoder"]
    if ("siglip" in str(config.get("model_type"))) != wanted.startswith("Siglip"):
        raise ConfigError(
            f"{given} comes with the image encoder {encoder} of kind {config.get('model_type')}, "
            f"but {spec.title} needs a {wanted}. Give an IP-Adapter made for {spec.title}."
        )
    for key, name in _PROJECTIONS.items():
        shape, width = header.first_shape(key), config.get(name)
        if shape is not None and isinstance(width, int) and shape[-1] != width:
            raise ConfigError(
                f"{given} takes image embeddings of width {shape[-1]}, but the image encoder "
                f"{encoder} has {width} ({name}). Put the encoder that it was trained with there "
                "(ViT-H has 1024 and 1280, ViT-bigG 1280 and 1664)."
            )


_PROJECTIONS = {
    "image_proj.proj.weight": "projection_dim",
    "ip_adapter_proj_model.proj.weight": "projection_dim",
    "image_proj.proj.0.weight": "hidden_size",
    "image_proj.proj_in.weight": "hidden_size",
}
"""First layer of an IP-Adapter's projection -> the encoder's config field with its input width."""


def _require_motion(
    path: str,
    option: str,
    config_path: str | None,
    spec: ModelSpec,
    denoiser: Config,
) -> None:
    given = f"--{option}={path}"
    header = read_component_header(path, option=option)
    found = recognize(header) if header is not None else None
    if found is not None and found.part != "motion":
        raise refuse(given, found, spec, "a motion module of AnimateDiff")
    own = component_folder(path, option) if Path(path).is_dir() else config_path
    config = read_config(own) if own is not None else {}
    if config.get("_class_name", "MotionAdapter") != "MotionAdapter":
        raise ConfigError(
            f"{given} is a {config['_class_name']}, but --type={spec.name} needs a MotionAdapter. "
            "Give its folder."
        )
    if config.get("conv_in_channels"):
        raise ConfigError(
            f"{given} brings a first layer for {config['conv_in_channels']} channels (PIA), and no "
            "type has its pipeline. Give an ordinary motion adapter."
        )
    _require_levels(given, config, header, spec, denoiser)


def _require_levels(
    given: str, config: Config, header: Header | None, spec: ModelSpec, denoiser: Config
) -> None:
    levels, wanted = config.get("block_out_channels"), denoiser.get("block_out_channels")
    if levels is not None and wanted is not None and levels != wanted:
        raise _other_width(given, "block_out_channels", levels, wanted, spec)
    first = (
        header.first_shape("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight")
        if header is not None
        else None
    )
    if first is not None and wanted is not None and first[0] != wanted[0]:
        raise _other_width(given, "block_out_channels[0]", first[0], wanted[0], spec)
