"""Whether a checkpoint and replaced components fit the model type. Imports no torch.

Only configurations and headers are read. The launcher checks before it starts any process, so
`--check` reports it too. Ranks check again before loading, with torch's files. Adapters are in
backends/files/adapter_fit.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from backends.errors import ConfigError
from backends.files.checkpoint import (
    Checkpoint,
    Config,
    component_folder,
    read_component_header,
    read_json,
    refuse,
    replaced_config,
    require_component_header,
    types_as_text,
    width_of,
    with_article,
)
from backends.files.denoiser_families import DENOISER_PREFIXES, recognize_denoiser
from backends.files.generic import require_named
from backends.files.mask_channels import latent_channels, special_channels
from backends.files.pipeline_calls import pipeline_folders
from backends.files.recognition import (
    NOTES,
    VAE_PREFIXES,
    components_in,
    has_vae,
    prediction_of,
    recognize,
)
from backends.files.weight_headers import (
    Header,
    has_other_names,
    read_folder_header,
    read_header,
    require_same_shapes,
)
from backends.model_table import ModelSpec, read_table
from backends.request import LoadRequest

SCALES = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".comfy_quant")
MARKER = "scaled_fp8"
"""Names beside the weights in 8-bit files: scales of weights, and notes for the arithmetic."""
UNUSED = ("safety_checker", "watermark", "watermarker")
"""Components that are never loaded; an index may name old modules for them."""
WITHOUT_WEIGHTS = ("scheduler", "tokenizer")
"""Beginnings of the names of needed components that have no weights."""
UNKNOWN_SCALES = (
    ".weight_scale_2",
    ".weight_scale_inv",
    ".smooth_factor",
    ".qweight",
    ".absmax",
    ".quant_state",
)
"""Names in other packed formats: several 4-bit ones, and scales by blocks."""


def require_files(spec: ModelSpec, load: LoadRequest, checkpoint: Checkpoint) -> None:
    """Raise ConfigError for the first checkpoint, VAE or denoiser file that does not fit."""
    if checkpoint.header is not None:
        refuse_unknown_scales(checkpoint.header.shapes, f"--checkpoint={checkpoint.path}")
    if spec.is_generic:
        _require_whole(checkpoint)
        return
    _require_components(checkpoint, load)
    denoiser = _Part.denoiser(checkpoint, load)
    vae = _Part.vae(checkpoint, load)
    _require_denoiser(denoiser, checkpoint)
    _require_vae(vae, checkpoint)
    _require_channels(denoiser, vae, checkpoint)
    _require_texts(denoiser, checkpoint)


def refuse_unknown_scales(names: Iterable[str], given: str) -> None:
    """Raise ConfigError for packed weights that cannot be unpacked here."""
    strange = [name for name in names if name.endswith(UNKNOWN_SCALES)]
    if strange:
        raise ConfigError(
            f"{given} holds packed weights of an unsupported kind ({strange[0]}, {len(strange)} "
            "such tensors). Allowed: float8 with one scale for each weight or row, and GGUF. Give "
            "such a file, or the original and --quantize_to."
        )


def has_scales(header: Header) -> bool:
    """Return whether the file holds 8-bit weights with scales."""
    return any(name.endswith(SCALES) or name == MARKER for name in header.shapes)


def without_scales(header: Header) -> Header:
    """Return the header without the tensors of 8-bit scales and of sampling."""
    shapes = {
        name: shape
        for name, shape in header.shapes.items()
        if not name.endswith(SCALES) and name not in (MARKER, *NOTES)
    }
    return Header(shapes=shapes, dtypes=header.dtypes, metadata=header.metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A denoiser or VAE as it will be used: the checkpoint's own, or its replacement."""

    name: str  # of the component
    given: str  # the option and its value, for messages
    config: Config
    header: Header | None = None
    has_own_config: bool = False
    is_replaced: bool = False

    @classmethod
    def denoiser(cls, checkpoint: Checkpoint, load: LoadRequest) -> "_Part":
        """Return the denoiser that the load request will use."""
        name = checkpoint.spec.denoiser
        if load.gguf_model is not None:
            header = read_header(load.gguf_model, option="--gguf_model")
            return cls(
                name=name,
                given=f"--gguf_model={load.gguf_model}",
                config=checkpoint.config(name),
                header=header,
                is_replaced=True,
            )
        return cls._of(name, checkpoint, load.denoiser, load.denoiser_config)

    @classmethod
    def vae(cls, checkpoint: Checkpoint, load: LoadRequest) -> "_Part":
        """Return the VAE that the load request will use."""
        return cls._of("vae", checkpoint, load.vae, load.vae_config)

    @classmethod
    def _of(
        cls, name: str, checkpoint: Checkpoint, path: str | None, config: str | None
    ) -> "_Part":
        if path is None:
            header = None
            if checkpoint.header is None:
                header = read_folder_header(checkpoint.folder / name, option="--checkpoint")
            return cls(
                name=name,
                given=f"--checkpoint={checkpoint.path}",
                config=checkpoint.config(name),
                header=header,
            )
        own = component_folder(path, name) if Path(path).is_dir() else config
        return cls(
            name=name,
            given=f"--{name}={path}",
            config=replaced_config(checkpoint, name, path, own),
            header=require_component_header(path, option=name),
            has_own_config=own is not None,
            is_replaced=True,
        )


def _require_components(checkpoint: Checkpoint, load: LoadRequest) -> None:
    """Raise ConfigError unless every needed component exists, with weights unless replaced."""
    spec = checkpoint.spec
    replaced = {"vae": load.vae, spec.denoiser: load.denoiser or load.gguf_model}
    if not checkpoint.index:
        return
    if checkpoint.index.get("requires_aesthetics_score"):
        raise ConfigError(
            f"--checkpoint={checkpoint.path} is the refiner of {spec.title}: it continues another "
            "model's latents, and no type does that. Give the base checkpoint."
        )
    _refuse_remote_code(checkpoint)
    _refuse_another_denoiser(checkpoint)
    for component in needed_components(spec):
        if replaced.get(component) is not None:
            continue
        if component.startswith("text_encoder") and component not in checkpoint.index:
            require_named(checkpoint)
        if not checkpoint.has(component):
            types = _types_of_denoisers(checkpoint) if component in spec.other_denoisers else ""
            raise ConfigError(
                f"--checkpoint={checkpoint.path} has no {component}, which --type={spec.name} "
                f"needs. Give {types or 'a whole checkpoint of ' + spec.title}."
            )
        if checkpoint.header is None:
            _require_complete(checkpoint, component)
        elif component not in components_in(checkpoint.header, spec):
            _require_beside(checkpoint, component)


def _refuse_another_denoiser(checkpoint: Checkpoint) -> None:
    """Raise ConfigError for a checkpoint with one more denoiser than the type runs."""
    spec = checkpoint.spec
    known = {spec.denoiser, *spec.other_denoisers}
    more = f"{spec.denoiser}_2"
    if checkpoint.has(more) and more not in known:
        types = _types_of_denoisers(checkpoint)
        raise ConfigError(
            f"--checkpoint={checkpoint.path} has a {more} beside its {spec.denoiser}, which "
            f"--type={spec.name} does not run. Give {types or 'a checkpoint of ' + spec.title}."
        )


def _types_of_denoisers(checkpoint: Checkpoint) -> str:
    """Return the types of the folder's class that run the denoisers which it has, as options."""
    name = checkpoint.index.get("_class_name")
    same = (spec for spec in read_table().values() if spec.pipeline == name)
    more = {each for each in checkpoint.index if each.startswith("transformer_")}
    more = {each for each in more if checkpoint.has(each)}
    return types_as_text([spec.name for spec in same if set(spec.other_denoisers) == more])


def _refuse_remote_code(checkpoint: Checkpoint) -> None:
    """Raise ConfigError for a component whose class is not in diffusers or transformers."""
    for component, entry in checkpoint.index.items():
        if component in UNUSED or not isinstance(entry, list) or len(entry) != 2:
            continue
        if entry[0] not in (None, "diffusers", "transformers", *pipeline_folders()):
            raise ConfigError(
                f"--checkpoint={checkpoint.path} has a {component} of class {'.'.join(entry)}, "
                "which is code of its own. Code of a checkpoint is never run: give one whose "
                "classes are in diffusers or transformers."
            )


def _require_whole(checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless all components that the index names are there, with their weights.

    Of a class without a row nothing else is known.
    """
    _refuse_remote_code(checkpoint)
    require_named(checkpoint)
    for component in checkpoint.index:
        if checkpoint.class_of(component) is None or component in UNUSED:
            continue
        folder = checkpoint.folder / component
        if not folder.is_dir() or (folder / "config.json").is_file():
            _require_complete(checkpoint, component)


def needed_components(spec: ModelSpec) -> list[str]:
    """Return the denoiser, the VAE, the scheduler, and the encoders with their tokenizers."""
    paths = [
        path.rpartition(" * ")[2] for paths in spec.fits.get("text", {}).values() for path in paths
    ]
    encoders = [name for path in paths if "encoder" in (name := path.partition(".")[0])]
    tokenizers = [
        name.replace("text_encoder", "tokenizer")
        for name in encoders
        if name.startswith("text_encoder")
    ]
    optional = spec.fits.get("optional", [])
    names = dict.fromkeys([*spec.denoisers, "vae", "scheduler", *encoders, *tokenizers])
    return [name for name in names if name not in optional]


def _require_complete(checkpoint: Checkpoint, component: str) -> None:
    """Raise ConfigError unless the component's folder and all its weight files exist.

    An interrupted download leaves only some of them.
    """
    folder, given = checkpoint.folder / component, f"--checkpoint={checkpoint.path}"
    if not folder.is_dir():
        raise ConfigError(
            f"{given} names a {component}, but the folder {folder} is missing. Download the "
            "checkpoint again."
        )
    needed = "scheduler_config.json" if component == "scheduler" else "config.json"
    needed = "*.*" if component.startswith("tokenizer") else needed  # all of its files vary
    if not any(folder.glob(needed)):
        raise ConfigError(f"{given} lacks {component}/{needed}. Download the checkpoint again.")
    if component.startswith(WITHOUT_WEIGHTS):
        return
    for file in folder.glob("*.safetensors"):
        read_header(file, option="--checkpoint")
    missing = [_missing_shards(folder, index) for index in sorted(folder.glob("*.index*.json"))]
    is_whole = [
        file
        for kind in ("*.safetensors", "*.bin")
        for file in folder.glob(kind)
        if "-of-" not in file.name
    ]
    if missing and all(missing) and not is_whole:
        raise ConfigError(
            f"{given} lacks {component}/{missing[0][0]}, which its index names. Download the "
            "checkpoint again."
        )
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ConfigError(
            f"{given} holds no weights of its {component} in {folder}. Download the checkpoint "
            "again."
        )


def _require_beside(checkpoint: Checkpoint, component: str) -> None:
    """Raise ConfigError unless the configuration folder has what a single file lacks."""
    folder = checkpoint.folder / component
    if not component.startswith(WITHOUT_WEIGHTS) and not any(
        file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)
    ):
        raise ConfigError(
            f"--checkpoint={checkpoint.path} holds no {component}, and neither does "
            f"{checkpoint.folder}. Put the folder {component} of {checkpoint.spec.title} there "
            f"with its weights, or give a diffusers folder as --checkpoint and this file as "
            f"--{checkpoint.spec.denoiser}."
        )


def _missing_shards(folder: Path, index: Path) -> list[str]:
    """Return the files that an index names and that do not exist."""
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    return [name for name in names if not (folder / name).is_file()]


def _require_denoiser(part: _Part, checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless the denoiser has the type's class and family."""
    spec = checkpoint.spec
    classes = spec.fits.get("denoiser", [])
    name = part.config.get("_class_name")
    if isinstance(name, str) and classes and name not in classes:
        needed = " or ".join(map(with_article, classes))
        raise ConfigError(
            f"{part.given} has a {spec.denoiser} of class {name}, but --type={spec.name} needs "
            f"{needed}. Give one made for {spec.title}."
        )
    if part.header is not None:
        _require_family(part, checkpoint)
    for key, wanted in spec.fits.get("is", {}).items():
        if part.config and part.config.get(key) != wanted:
            raise ConfigError(
                f"{part.given} has a {spec.denoiser} with {key}={part.config.get(key)!r}, but "
                f"--type={spec.name} needs {wanted!r}. Give one made for {spec.title}."
            )
    if part.header is not None and part.is_replaced and not part.has_own_config:
        require_same_weights(part.given, part.header, checkpoint, part.name)


def _require_family(part: _Part, checkpoint: Checkpoint) -> None:
    """Check the names of the weights. Some transformer classes have the names of another family: a
    checkpoint's own one is known by its class, and a replacement by the names of that.

    A checkpoint's own denoiser of an unknown family is checked by its configuration alone.
    """
    spec = checkpoint.spec
    refuse_unknown_scales(part.header.shapes, part.given)
    if has_scales(part.header) and not part.is_replaced:
        raise ConfigError(
            f"{part.given} holds 8-bit weights with scales in its folder {part.name}, where the "
            f"scales would be ignored. Give that file as --{part.name}=FILE."
        )
    found = recognize_denoiser(part.header)
    if found is None:
        if (other := recognize(part.header)) is not None:
            raise refuse(part.given, other, spec, f"a {spec.denoiser}")
        return
    is_transformer = found.denoiser == "transformer"
    if spec.name in found.types or (is_transformer and _has_own_names(part, checkpoint)):
        return
    if part.is_replaced or found.types:
        raise refuse(part.given, found, spec, f"a {spec.denoiser}")


def _has_own_names(part: _Part, checkpoint: Checkpoint) -> bool:
    """Return whether nine of ten tensors are named as those of the checkpoint's own denoiser."""
    if not part.is_replaced:
        return part.config.get("_class_name") in checkpoint.spec.fits.get("denoiser", ())
    own = read_folder_header(checkpoint.folder / part.name, option="--checkpoint")
    names = without_scales(part.header.without(*DENOISER_PREFIXES)).shapes.keys()
    return own is not None and 10 * len(own.shapes.keys() ^ names) <= len(names)


def _require_vae(part: _Part, checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    wanted, name = spec.fits.get("vae"), part.config.get("_class_name")
    needed = f"a VAE ({wanted})"
    if isinstance(name, str) and wanted is not None and name != wanted:
        raise ConfigError(
            f"{part.given} has a VAE of class {name}, but --type={spec.name} needs "
            f"{with_article(wanted)}. Give one made for {spec.title}."
        )
    if part.header is None:
        return
    found = recognize(part.header)
    if found is not None and found.part not in ("vae", "checkpoint") and not has_vae(part.header):
        raise refuse(part.given, found, spec, needed)
    inner = part.header.without(*VAE_PREFIXES)
    for half, other in (("encoder", "decoder"), ("decoder", "encoder")):
        if not any(key.startswith(f"{half}.") for key in inner.shapes):
            raise ConfigError(
                f"{part.given} is a VAE with no {half}, only its {other}; --type={spec.name} "
                f"needs both. Give a whole VAE made for {spec.title}."
            )
    latents = latent_channels(part.config)
    shape = inner.shape_of("decoder.conv_in.weight", "decoder.conv1.weight")
    if latents is not None and shape is not None and shape[1] != latents:
        raise ConfigError(
            f"{part.given} has {shape[1]} latent channels in its weights, but {latents} by its "
            f"configuration. Give a VAE made for {spec.title}, or --vae_config=CONFIG.JSON if the "
            "file has its own."
        )
    if part.is_replaced and not part.has_own_config:
        require_same_weights(part.given, inner, checkpoint, part.name)


def require_same_weights(
    given: str, header: Header, checkpoint: Checkpoint, component: str
) -> None:
    """Compare a file in diffusers' names with the checkpoint's component, whose config it uses.

    Files in other names are compared by the ranks, after conversion
    (backends/loading/key_check.py).
    """
    own = read_folder_header(checkpoint.folder / component, option="--checkpoint")
    shapes = without_scales(header.without(*DENOISER_PREFIXES)).shapes
    if own is None or has_other_names(shapes, own.shapes):
        return
    advice = (
        f"Give --{component}_config=CONFIG.JSON if the file has its own, or a file made for "
        "this checkpoint."
    )
    if given.startswith("--gguf_model"):
        advice = "Give a file made for this checkpoint."
    require_same_shapes(given, shapes, own.shapes, advice)


def denoiser_channels(checkpoint: Checkpoint, load: LoadRequest) -> int | None:
    """Return the input channels of the denoiser that the load request will use; None if unknown."""
    return _input_channels(_Part.denoiser(checkpoint, load), checkpoint)


def _input_channels(denoiser: _Part, checkpoint: Checkpoint) -> int | None:
    """Return the input channels by the weights of a single file's UNet, else by the configuration:
    that beside the file may be an ordinary checkpoint's.
    """
    if checkpoint.header is not None and not denoiser.is_replaced:
        header = checkpoint.header.without(*DENOISER_PREFIXES)
        if (shape := header.shape_of("input_blocks.0.0.weight")) is not None:
            return shape[1]
    channels = denoiser.config.get("in_channels")
    return channels if isinstance(channels, int) else None


def _require_channels(denoiser: _Part, vae: _Part, checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless the denoiser's input channels match the VAE's latents."""
    spec = checkpoint.spec
    latents, channels = latent_channels(vae.config), _input_channels(denoiser, checkpoint)
    if "channels" not in spec.fits or latents is None or channels is None:
        return
    times, more = spec.fits["channels"]
    allowed = [(times, more), *filter(None, [spec.fits.get("masked")])]
    if channels in [each * latents + rest for each, rest in allowed]:
        return
    if vae.is_replaced and not denoiser.is_replaced:
        wanted = (channels - more) // times
        raise ConfigError(
            f"{vae.given} has {latents} latent channels, but the checkpoint's {spec.denoiser} "
            f"needs {wanted}. Give a VAE made for {spec.title}."
        )
    special = special_channels(channels, latents)
    raise ConfigError(
        f"{denoiser.given} has a {spec.denoiser} with {channels} input channels, but "
        f"--type={spec.name} needs {times * latents + more}{special}. Give a {spec.denoiser} made "
        f"for {spec.title}."
    )


def _require_texts(denoiser: _Part, checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless the denoiser reads what the encoders give: all together, or each."""
    spec = checkpoint.spec
    for key, paths in spec.fits.get("text", {}).items():
        wanted = denoiser.config.get(key)
        widths = [width_of(path, checkpoint, denoiser.config) for path in paths]
        if not isinstance(wanted, int | list) or None in widths:
            continue
        made, join = (widths, ", ") if isinstance(wanted, list) else (sum(widths), " + ")
        if made == wanted:
            continue
        raise ConfigError(
            f"{denoiser.given} has a {spec.denoiser} with {key}={wanted}, but the checkpoint's "
            f"parts give {made} ({join.join(paths)}). Give a {spec.denoiser} and encoders that "
            "were made for each other."
        )


def prediction_settings(
    spec: ModelSpec, load: LoadRequest, checkpoint: Checkpoint
) -> dict[str, object]:
    """Return the scheduler settings in the denoiser's file; none for a folder.

    A folder has a scheduler of its own.
    """
    header = checkpoint.header
    replaced = load.gguf_model or load.denoiser
    if replaced is not None:
        option = spec.denoiser if load.gguf_model is None else "gguf_model"
        header = read_component_header(replaced, option=option)
    return prediction_of(header) if header is not None and not spec.flow_matching else {}
