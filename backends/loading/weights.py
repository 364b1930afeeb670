"""Load a diffusers pipeline into main memory: the checkpoint and replaced components. Offline."""

import importlib.util
import inspect
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from backends.errors import ConfigError
from backends.files.adapter_fit import require_fit
from backends.files.checkpoint import (
    Checkpoint,
    component_folder,
    configuration_folder,
    read_config,
)
from backends.files.denoiser_families import DENOISER_PREFIXES
from backends.files.fit import has_scales, prediction_settings
from backends.files.recognition import VAE_PREFIXES, has_text_encoders, has_vae
from backends.files.weight_headers import SAFETENSORS, Header, read_folder_header
from backends.loading.conversion import stored_dtype
from backends.loading.key_check import require_encoder, require_weights
from backends.loading.plain_weights import (
    fill_model,
    is_plain,
    plain_file,
    plain_weights,
    read_any_header,
    read_gguf,
    require_finite,
    unpack_beside_linears,
)
from backends.model_table import ModelSpec
from backends.request import LoadRequest

logger = logging.getLogger(__name__)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    RuntimeError,
    AttributeError,
    TypeError,
    ZeroDivisionError,
)
"""Exceptions that diffusers and transformers raise for broken or wrong files."""

PREFIXES = {"vae": VAE_PREFIXES, "unet": DENOISER_PREFIXES, "transformer": DENOISER_PREFIXES}
"""Option -> prefixes of such a model's tensors in files with several models."""

Weights = dict[str, Tensor]


def load_pipe(spec: ModelSpec, load: LoadRequest) -> Any:
    """Return the pipeline of this type, or its ControlNet variant. ConfigError names the component.

    All files are checked against their purpose before any weight is read.
    """
    checkpoint = require_fit(spec, load, read=read_any_header)
    stored = _require_checkpoint_weights(checkpoint, load)
    pipe = _load_pipe(spec, load, stored)
    if (vae := getattr(pipe, "vae", None)) is not None:
        given = f"--vae={load.vae}" if load.vae is not None else f"--checkpoint={load.checkpoint}"
        require_finite(vae, given, vae_dtype(spec, load))
    if settings := prediction_settings(spec, load, checkpoint):
        logger.info("scheduler settings from the checkpoint: %s", settings)
        pipe.scheduler = _scheduler_with(pipe.scheduler, settings)
    return pipe


def _scheduler_with(scheduler: Any, settings: Mapping[str, object]) -> Any:
    """Return the scheduler with these settings.

    A class that lacks one of them, and so cannot start from pure noise, is replaced by Euler's.
    """
    knows_all = settings.keys() <= inspect.signature(type(scheduler).__init__).parameters.keys()
    scheduler_class = type(scheduler) if knows_all else diffusers.EulerDiscreteScheduler
    return scheduler_class.from_config(scheduler.config, **settings)


def _load_pipe(spec: ModelSpec, load: LoadRequest, stored: Mapping[str, torch.dtype]) -> Any:
    path = Path(load.checkpoint)
    pipeline_class = getattr(
        diffusers, spec.controlnet["pipeline"] if load.control_net else spec.pipeline
    )
    given = {**_without_safety_checker(pipeline_class), **_replaced_components(spec, load)}
    arguments: dict[str, Any] = {"dtype": DTYPES[load.variant], "local_files_only": True, **given}
    try:
        if path.is_dir():
            own = {"default": DTYPES[load.variant]}
            if spec.vae_variant:
                own["vae"] = vae_dtype(spec, load)
            # without conversion the weights are pages of the files; convert_pipe does the rest
            arguments["dtype"] = {**own, **stored}
            return pipeline_class.from_pretrained(
                path, variant=_file_variant(path / spec.denoiser, load.variant), **arguments
            )
        if spec.single_file:
            folder = _configuration_folder(load)
            return _from_single_file(spec, pipeline_class, path, folder, arguments)
    except (*LOADING_ERRORS, ImportError) as error:
        raise ConfigError(
            f"checkpoint={path} does not load as {pipeline_class.__name__}: {error}"
            f"{_missing_package(path)}"
        ) from error
    raise ConfigError(
        f"checkpoint={path} is a file, but type {spec.name!r} loads from a diffusers folder only. "
        "Give the folder."
    )


def _missing_package(folder: Path) -> str:
    """Return what to install for processors that this installation cannot load; empty if none."""
    if importlib.util.find_spec("torchvision") is not None or not folder.is_dir():
        return ""
    names = [
        name
        for name, entry in read_config(folder / "model_index.json").items()
        if isinstance(entry, list) and len(entry) == 2 and "Processor" in str(entry[1])
    ]
    if not names:
        return ""
    return (
        f" Its {' and '.join(names)} may need torchvision, which is not installed. Install the "
        f"version for torch {torch.__version__}."
    )


def _require_checkpoint_weights(
    checkpoint: Checkpoint, load: LoadRequest
) -> dict[str, torch.dtype]:
    """Raise ConfigError unless every diffusers model in the checkpoint has exactly its weights.

    Replaced components are skipped. Returns component -> dtype of its files, where it is one.
    """
    spec = checkpoint.spec
    replaced = {
        "vae": load.vae,
        spec.denoiser: load.denoiser or load.gguf_model,
        "motion_adapter": load.motion_adapter or load.motion_module,
    }
    given = f"--checkpoint={checkpoint.path}"
    advice = "Download the checkpoint again, or give another one."
    stored = {}
    for component, entry in checkpoint.index.items():
        if not isinstance(entry, list) or entry[0] is None or replaced.get(component) is not None:
            continue
        header, prefixes = _checkpoint_header(checkpoint, component, load)
        folder = checkpoint.folder / component
        if header is None or not (folder / "config.json").is_file():
            continue
        model, named = _model_class(entry, spec), f"{given} ({component})"
        if isinstance(model, type) and issubclass(model, diffusers.ModelMixin):
            require_weights(model, folder, header, given=named, advice=advice, prefixes=prefixes)
        elif isinstance(model, type) and issubclass(model, transformers.PreTrainedModel):
            require_encoder(model, folder, header, given=named, advice=advice)
        # a UNet is converted to the motion adapter's dtype when they are put together
        if (dtype := stored_dtype(header)) and "motion_adapter" not in spec.components:
            stored[component] = dtype
    return stored


def _model_class(entry: list[str], spec: ModelSpec) -> Any:
    """Return a component's class. Old PixArt checkpoints name the predecessor of theirs."""
    library = {"diffusers": diffusers, "transformers": transformers}.get(entry[0])
    is_old = entry[1] == "Transformer2DModel" and "denoiser" in spec.fits
    return getattr(library, spec.fits["denoiser"][0] if is_old else entry[1], None)


def _checkpoint_header(
    checkpoint: Checkpoint, component: str, load: LoadRequest
) -> tuple[Header | None, tuple[str, ...]]:
    """Return a component's header, from its own folder or its part of a single file."""
    if checkpoint.header is None:
        variant = _file_variant(checkpoint.folder / checkpoint.spec.denoiser, load.variant)
        return read_folder_header(
            checkpoint.folder / component,
            option="--checkpoint",
            variant=variant,
            read=checkpoint.read,
        ), ()
    if component == checkpoint.spec.denoiser:
        return checkpoint.header, DENOISER_PREFIXES
    return (
        checkpoint.header if component == "vae" and has_vae(checkpoint.header) else None
    ), VAE_PREFIXES


def vae_dtype(spec: ModelSpec, load: LoadRequest) -> torch.dtype:
    """Return the dtype of the VAE's weights."""
    return DTYPES[spec.vae_variant or load.variant]


def read_weights(path: str | Path, *, option: str) -> Weights:
    """Return the tensors of a .safetensors file or a torch pickle, whose code is not executed.

    ConfigError names the option.
    """
    try:
        if Path(path).suffix in (".safetensors", ".sft"):
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, safetensors and pickle raise a dozen types
        kind = "safetensors" if isinstance(error, SafetensorError) else type(error).__name__
        raise ConfigError(
            f"{option}={path} cannot be read ({kind}): {' '.join(str(error).split())[:200]}"
        ) from error
    return content.get("state_dict", content)


def _without_safety_checker(pipeline_class: type) -> dict[str, Any]:
    """Return arguments that leave out the safety checker.

    The pipeline returns latents, so a checker at its end would see no image.
    """
    parameters = inspect.signature(pipeline_class.__init__).parameters
    return {
        name: value
        for name, value in (("safety_checker", None), ("requires_safety_checker", False))
        if name in parameters
    }


def _replaced_components(spec: ModelSpec, load: LoadRequest) -> dict[str, Any]:
    """Load the components that do not come from the checkpoint."""
    components: dict[str, Any] = {}
    if load.motion_adapter is not None and "motion_adapter" in spec.components:
        components["motion_adapter"] = _component(
            diffusers.MotionAdapter, load.motion_adapter, load, option="motion_adapter"
        )
    if load.motion_module is not None and "motion_adapter" in spec.components:
        components["motion_adapter"] = _motion_module(load)
    if load.vae is not None:
        config = load.vae_config or str(_configuration_folder(load) / "vae")
        components["vae"] = _component(
            _class_of("vae", load),
            load.vae,
            load,
            option="vae",
            config=config,
            dtype=vae_dtype(spec, load),
        )
    if load.denoiser is not None:
        config = load.denoiser_config or str(_configuration_folder(load) / spec.denoiser)
        denoiser = _class_of(spec.denoiser, load)
        components[spec.denoiser] = _component(
            denoiser, load.denoiser, load, option=spec.denoiser, config=config
        )
    if load.gguf_model is not None:
        components[spec.denoiser] = _from_gguf(spec, load)
    if load.control_net:
        model = getattr(diffusers, spec.controlnet["model"])
        nets = [
            _component(model, path, load, option="control_net", config=load.control_net_config)
            for path in load.control_net
        ]
        components["controlnet"] = nets if len(nets) > 1 else nets[0]
    return components


def _configuration_folder(load: LoadRequest) -> Path:
    """Return the folder with model_index.json: the checkpoint, or the one beside a single file."""
    return configuration_folder(load.checkpoint, load.checkpoint_config)


def _class_of(component: str, load: LoadRequest) -> Any:
    """Return the class that the checkpoint names for this component."""
    index = _configuration_folder(load) / "model_index.json"
    try:
        return getattr(diffusers, json.loads(index.read_text(encoding="utf-8"))[component][1])
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"{index} names no class for the {component}: {error!r}. Give a checkpoint in "
            "diffusers layout."
        ) from error


def _component(
    model: Any,
    path: str,
    load: LoadRequest,
    *,
    option: str,
    config: str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a model from its folder, a whole checkpoint's folder, or a file and its config.

    ConfigError if it does not load.
    """
    source = Path(path)
    dtype = dtype or DTYPES[load.variant]
    options = {"dtype": dtype, "local_files_only": True}
    given, advice = f"--{option}={path}", f"Give a {model.__name__} made for this checkpoint."
    try:
        if source.is_dir():
            folder = component_folder(source, option)
            variant = _file_variant(folder, load.variant)
            header = read_folder_header(
                folder, option=f"--{option}", variant=variant, read=read_any_header
            )
            if header is not None:
                require_weights(model, folder, header, given=given, advice=advice)
            files = sorted(folder.glob("*.safetensors"))
            if header is not None and has_scales(header) and len(files) == 1:
                found = _from_file(model, files[0], folder, options, option=option)
            else:
                options["dtype"] = stored_dtype(header) or dtype
                found = model.from_pretrained(folder, variant=variant, **options)
        elif config is None:
            raise ConfigError(
                f"--{option}={path} is a file, so its configuration is needed too. Give "
                f"--{option}_config=CONFIG.JSON."
            )
        else:
            found = _from_file(model, source, Path(config), options, option=option)
    except LOADING_ERRORS as error:
        raise ConfigError(f"{option}={path} does not load as {model.__name__}: {error}") from error
    require_finite(found, given, dtype)
    return found


def _from_file(
    model: Any, source: Path, config: Path, options: Mapping[str, Any], *, option: str
) -> Any:
    """Load one file of weights, in diffusers' names or original ones that diffusers can convert."""
    config = config if config.is_file() else config / "config.json"
    given, prefixes = f"--{option}={source}", PREFIXES.get(option, ())
    header = read_any_header(source, option=f"--{option}")
    advice = (
        f"Give the file's own configuration with --{option}_config=CONFIG.JSON, or a file "
        "made for this checkpoint."
    )
    has_own_names = require_weights(
        model, config, header, given=given, advice=advice, prefixes=prefixes
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").symlink_to(config)
        weights = Path(folder) / "diffusion_pytorch_model.safetensors"
        if has_own_names and is_plain(header) and source.suffix in SAFETENSORS:
            weights.symlink_to(source)
            as_stored = {"dtype": stored_dtype(header) or options["dtype"]}
            return model.from_pretrained(folder, **{**options, **as_stored})
        tensors = plain_weights(
            read_weights(source, option=option),
            given=given,
            dtype=None if has_own_names else options["dtype"],
            prefixes=prefixes,
        )
        if has_own_names:
            return fill_model(model, Path(folder), tensors, options["dtype"])
        return model.from_single_file(tensors, config=folder, **options)


def _motion_module(load: LoadRequest) -> Any:
    """Load AnimateDiff's motion weights from one file.

    Without a configuration, derive it from the file's keys and the published models.
    """
    path = Path(load.motion_module)
    beside = path.with_name("config.json")
    if load.motion_config is not None or beside.is_file():
        return _component(
            diffusers.MotionAdapter,
            str(path),
            load,
            option="motion_module",
            config=load.motion_config or str(beside),
        )
    with tempfile.TemporaryDirectory() as folder:
        has_mid_block = any(
            "mid_block" in key for key in read_weights(path, option="motion_module")
        )
        diffusers.MotionAdapter(use_motion_mid_block=has_mid_block).save_config(folder)
        return _component(
            diffusers.MotionAdapter, str(path), load, option="motion_module", config=folder
        )


def _from_gguf(spec: ModelSpec, load: LoadRequest) -> Any:
    """Load the denoiser with linear weights kept in GGUF blocks and unpacked when used."""
    model = _class_of(spec.denoiser, load)
    dtype, folder = DTYPES[load.variant], _configuration_folder(load)
    given, options = f"--gguf_model={load.gguf_model}", {"prefixes": DENOISER_PREFIXES}
    header = read_any_header(load.gguf_model, option="--gguf_model")
    require_weights(
        model,
        folder / spec.denoiser,
        header,
        given=given,
        advice="Give a file made for this checkpoint.",
        **options,
    )
    try:
        denoiser = model.from_single_file(
            plain_weights(read_gguf(load.gguf_model), given=given, dtype=dtype, **options),
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
            dtype=dtype,
            config=str(folder),
            subfolder=spec.denoiser,
            local_files_only=True,
        )
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"gguf_model={load.gguf_model} does not load as {model.__name__}: {error}"
        ) from error
    unpack_beside_linears(denoiser, dtype)
    return denoiser


def _from_single_file(
    spec: ModelSpec, pipeline_class: Any, path: Path, folder: Path, arguments: dict[str, Any]
) -> Any:
    """Load a single .safetensors in its original layout, with its configuration folder.

    A file without text encoders is read as the denoiser alone, as FLUX is published, if the folder
    has their weights.
    """
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"checkpoint={path} is a single file, and the folder {folder} with its configuration "
            "(model_index.json, tokenizers, config.json files; no weights needed) is not there. "
            "Put it beside the file, or give a diffusers folder."
        )
    given, dtype = f"--checkpoint={path}", arguments["dtype"]
    header = read_any_header(path, option="--checkpoint")
    if has_text_encoders(header) or not any(folder.glob("text_encoder*/*.safetensors")):
        with plain_file(path, header, given=given, dtype=dtype) as plain:
            return pipeline_class.from_single_file(str(plain), config=str(folder), **arguments)
    if spec.denoiser not in arguments:
        class_name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))[
            spec.denoiser
        ][1]
        tensors = plain_weights(
            read_weights(path, option="checkpoint"),
            given=given,
            dtype=dtype,
            prefixes=DENOISER_PREFIXES,
        )
        arguments[spec.denoiser] = getattr(diffusers, class_name).from_single_file(
            tensors, config=str(folder), subfolder=spec.denoiser, dtype=dtype, local_files_only=True
        )
    return pipeline_class.from_pretrained(folder, **arguments)


def _file_variant(folder: Path, wanted: str) -> str | None:
    """Return the variant of a component's files to load, such as 'fp16'; None for those without.

    The requested one if it exists: others would be converted, in memory that ranks do not share.
    Otherwise files without a variant, or else the first variant.
    """
    names = [file.name for file in folder.glob("*.safetensors")] or [
        file.name for file in folder.glob("*.bin")
    ]
    variants = {
        name.split(".")[1].partition("-")[0] if name.count(".") >= 2 else None for name in names
    }
    if wanted in variants:
        return wanted
    return None if None in variants else min(variants, default=None)
