"""Load a diffusers pipeline into main memory: the checkpoint and replaced components. Offline."""

import importlib.util
import inspect
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from backends.errors import ConfigError
from backends.files.adapter_fit import require_fit
from backends.files.checkpoint import (
    Checkpoint,
    component_folder,
    configuration_folder,
    is_pipeline,
    read_index,
)
from backends.files.denoiser_families import DENOISER_PREFIXES
from backends.files.fit import denoiser_channels, has_scales, prediction_settings
from backends.files.recognition import components_in
from backends.files.weight_headers import read_folder_header, read_header
from backends.loading.conversion import stored_dtype
from backends.loading.key_check import require_encoder, require_weights
from backends.loading.model_files import components_of_file, model_from_file, read_weights
from backends.loading.plain_weights import (
    plain_weights,
    read_gguf,
    require_finite,
    unpack_beside_linears,
)
from backends.loading.processors import pipeline_from_folder
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


def load_pipe(spec: ModelSpec, load: LoadRequest) -> Any:
    """Return the pipeline of this type, or its ControlNet variant. ConfigError names the component.

    All files are checked against their purpose before any weight is read.
    """
    checkpoint = require_fit(spec, load)
    with _fitting_configuration(checkpoint, load) as folder:
        checkpoint = replace(checkpoint, folder=folder)
        stored = _require_checkpoint_weights(checkpoint, load)
        pipe = _load_pipe(checkpoint, load, stored)
    if (vae := getattr(pipe, "vae", None)) is not None:
        given = f"--vae={load.vae}" if load.vae is not None else f"--checkpoint={load.checkpoint}"
        require_finite(vae, given, vae_dtype(spec, load))
    if settings := prediction_settings(spec, load, checkpoint):
        logger.info("scheduler settings from the checkpoint: %s", settings)
        pipe.scheduler = _scheduler_with(pipe.scheduler, settings)
    return pipe


@contextmanager
def _fitting_configuration(checkpoint: Checkpoint, load: LoadRequest) -> Iterator[Path]:
    """Yield the configuration folder. For a single file made for inpainting it is a copy whose UNet
    has as many input channels, since the folder beside it may be an ordinary checkpoint's.
    """
    name = checkpoint.spec.denoiser
    if checkpoint.header is None or not checkpoint.spec.reads_mask:
        yield checkpoint.folder
        return
    settings = {**checkpoint.config(name), "in_channels": denoiser_channels(checkpoint, load)}
    with tempfile.TemporaryDirectory() as copy:
        for entry in checkpoint.folder.resolve().iterdir():
            if entry.name != name:
                (Path(copy) / entry.name).symlink_to(entry)
        (Path(copy) / name).mkdir()
        (Path(copy) / name / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        yield Path(copy)


def _scheduler_with(scheduler: Any, settings: Mapping[str, object]) -> Any:
    """Return the scheduler with these settings.

    A class that lacks one of them, and so cannot start from pure noise, is replaced by Euler's.
    """
    knows_all = settings.keys() <= inspect.signature(type(scheduler).__init__).parameters.keys()
    scheduler_class = type(scheduler) if knows_all else diffusers.EulerDiscreteScheduler
    return scheduler_class.from_config(scheduler.config, **settings)


def _load_pipe(checkpoint: Checkpoint, load: LoadRequest, stored: Mapping[str, torch.dtype]) -> Any:
    spec = checkpoint.spec
    path, folder = checkpoint.path, checkpoint.folder
    pipeline_class = getattr(
        diffusers, spec.controlnet["pipeline"] if load.control_net else spec.pipeline
    )
    own = {"default": DTYPES[load.variant]}
    if spec.vae_variant:
        own["vae"] = vae_dtype(spec, load)
    if not is_pipeline(folder):
        raise ConfigError(
            f"checkpoint={path} is a single file, and the folder {folder} with its configuration "
            "(model_index.json, tokenizers, config.json files) is not there. Put it beside the "
            "file, or give a diffusers folder."
        )
    given = {**_without_safety_checker(pipeline_class), **_replaced_components(spec, load)}
    try:
        if checkpoint.header is not None:
            wanted = {
                name: own.get(name, own["default"])
                for name in checkpoint.index
                if name not in given
            }
            given |= components_of_file(checkpoint, wanted)
        # without conversion the weights are pages of the files; convert_pipe does the rest
        return pipeline_from_folder(
            pipeline_class,
            folder,
            variant=_file_variant(checkpoint, load.variant),
            dtype={**own, **stored},
            local_files_only=True,
            **given,
        )
    except (*LOADING_ERRORS, ImportError) as error:
        raise ConfigError(
            f"checkpoint={path} does not load as {pipeline_class.__name__}: {error}"
            f"{_missing_package(folder)}"
        ) from error


def _missing_package(folder: Path) -> str:
    """Return what to install for processors that this installation cannot load; empty if none."""
    if importlib.util.find_spec("torchvision") is not None or not folder.is_dir():
        return ""
    names = [
        name
        for name, entry in read_index(folder).items()
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
    """Raise ConfigError unless every model in the checkpoint's folder has exactly its weights.

    Components that are replaced, or in a single file, are skipped. Returns component -> dtype of
    its files, where it is one.
    """
    spec = checkpoint.spec
    replaced = {
        "vae": load.vae,
        spec.denoiser: load.denoiser or load.gguf_model,
        "motion_adapter": load.motion_adapter or load.motion_module,
    }
    given = f"--checkpoint={checkpoint.path}"
    advice = "Download the checkpoint again, or give another one."
    elsewhere = {name for name, path in replaced.items() if path is not None}
    if checkpoint.header is not None:
        elsewhere |= components_in(checkpoint.header, spec).keys()
    variant = _file_variant(checkpoint, load.variant)
    stored = {}
    for component, entry in checkpoint.index.items():
        if not isinstance(entry, list) or entry[0] is None or component in elsewhere:
            continue
        folder = checkpoint.folder / component
        header = read_folder_header(folder, option="--checkpoint", variant=variant)
        if header is None or not (folder / "config.json").is_file():
            continue
        model, named = _model_class(entry, spec), f"{given} ({component})"
        if isinstance(model, type) and issubclass(model, diffusers.ModelMixin):
            require_weights(model, folder, header, given=named, advice=advice)
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


def vae_dtype(spec: ModelSpec, load: LoadRequest) -> torch.dtype:
    """Return the dtype of the VAE's weights."""
    return DTYPES[spec.vae_variant or load.variant]


def own_pipeline(
    pipe: Any, spec: ModelSpec, load: LoadRequest, *, device: torch.device, dtype: torch.dtype
) -> Any:
    """Return a pipeline of the folder's class with the components of `pipe`, and those that `pipe`
    has no place for.

    spec: of that class.
    """
    if type(pipe).__name__ == spec.pipeline:
        return pipe
    made_by = getattr(diffusers, spec.pipeline)
    names = inspect.signature(made_by.__init__).parameters
    shared = {
        name: part for name, part in pipe.components.items() if name in names and part is not None
    }
    made = pipeline_from_folder(
        made_by,
        Path(load.checkpoint),
        local_files_only=True,
        **{**_without_safety_checker(made_by), **shared},
    )
    for name, part in made.components.items():
        if isinstance(part, torch.nn.Module) and name not in shared:
            part.to(device, dtype)
    made.set_progress_bar_config(disable=True)
    return made


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
            variant = _variant_of(folder, load.variant)
            header = read_folder_header(folder, option=f"--{option}", variant=variant)
            if header is not None:
                require_weights(model, folder, header, given=given, advice=advice)
            files = sorted(folder.glob("*.safetensors"))
            if header is not None and has_scales(header) and len(files) == 1:
                found = model_from_file(
                    model, files[0], folder, given=given, component=option, dtype=dtype
                )
            else:
                options["dtype"] = stored_dtype(header) or dtype
                found = model.from_pretrained(folder, variant=variant, **options)
        elif config is None:
            raise ConfigError(
                f"--{option}={path} is a file, so its configuration is needed too. Give "
                f"--{option}_config=CONFIG.JSON."
            )
        else:
            found = model_from_file(
                model, source, Path(config), given=given, component=option, dtype=dtype
            )
    except LOADING_ERRORS as error:
        raise ConfigError(f"{option}={path} does not load as {model.__name__}: {error}") from error
    require_finite(found, given, dtype)
    return found


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
    header = read_header(load.gguf_model, option="--gguf_model")
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


def _file_variant(checkpoint: Checkpoint, wanted: str) -> str | None:
    """Return the variant of a checkpoint's files: the denoiser's, else any component's."""
    folders = [checkpoint.folder / name for name in (checkpoint.spec.denoiser, *checkpoint.index)]
    has_weights = (folder for folder in folders if _weights_in(folder))
    return _variant_of(next(has_weights, folders[0]), wanted)


def _variant_of(folder: Path, wanted: str) -> str | None:
    """Return the variant of a component's files to load, such as 'fp16'; None for those without.

    The requested one if it exists: others would be converted, in memory that ranks do not share.
    Otherwise files without a variant, or else the first variant.
    """
    variants = {
        name.split(".")[1].partition("-")[0] if name.count(".") >= 2 else None
        for name in _weights_in(folder)
    }
    if wanted in variants:
        return wanted
    return None if None in variants else min(variants, default=None)


def _weights_in(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("*.safetensors")] or [
        file.name for file in folder.glob("*.bin")
    ]
