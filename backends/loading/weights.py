"""Weights -> a diffusers pipeline in main memory: the checkpoint, and the components that come from
elsewhere. Never asks a hub.
"""

import inspect
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends.errors import ConfigError
from backends.model_table import ModelSpec
from backends.request import LoadRequest

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    RuntimeError,
    AttributeError,
    TypeError,
)
"""What diffusers and transformers raise for files that are not what they should be."""

Weights = dict[str, Tensor]


def load_pipe(spec: ModelSpec, load: LoadRequest) -> Any:
    """The pipeline of this type, or its ControlNet variant. ConfigError names the component at
    fault.
    """
    path = Path(load.checkpoint)
    pipeline_class = getattr(
        diffusers, spec.controlnet["pipeline"] if load.control_net else spec.pipeline
    )
    given = {**_without_safety_checker(pipeline_class), **_replaced_components(spec, load)}
    arguments: dict[str, Any] = {"dtype": DTYPES[load.variant], "local_files_only": True, **given}
    try:
        if path.is_dir():
            return pipeline_class.from_pretrained(
                path, variant=_file_variant(path, spec), **arguments
            )
        if spec.single_file:
            return _from_single_file(spec, pipeline_class, path, arguments)
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"checkpoint={path} does not load as {pipeline_class.__name__}: {error}"
        ) from error
    raise ConfigError(
        f"checkpoint={path} is a file, but type {spec.name!r} loads from a diffusers folder only. "
        "Give the folder."
    )


def read_weights(path: str | Path, *, option: str) -> Weights:
    """The tensors of a .safetensors file or of a torch pickle (tensors only: nothing in it is
    executed). ConfigError names the option.
    """
    try:
        if Path(path).suffix in (".safetensors", ".sft"):
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen kinds, pickle's own among them
        kind = "safetensors" if isinstance(error, SafetensorError) else type(error).__name__
        raise ConfigError(
            f"{option}={path} cannot be read ({kind}): {' '.join(str(error).split())[:200]}"
        ) from error
    return content.get("state_dict", content)


def _without_safety_checker(pipeline_class: type) -> dict[str, Any]:
    """Results are latents as well as images, so a checker at the end of the pipeline would see
    nothing: do not load it.
    """
    parameters = inspect.signature(pipeline_class.__init__).parameters
    return {
        name: value
        for name, value in (("safety_checker", None), ("requires_safety_checker", False))
        if name in parameters
    }


def _replaced_components(spec: ModelSpec, load: LoadRequest) -> dict[str, Any]:
    """Components that come from elsewhere than the checkpoint."""
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
            _class_of("vae", load), load.vae, load, option="vae", config=config
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
    """The folder with model_index.json: the checkpoint, or the folder beside a single file."""
    path = Path(load.checkpoint)
    return path if path.is_dir() else path.with_suffix("")


def _class_of(component: str, load: LoadRequest) -> Any:
    """The class that the checkpoint names for this component."""
    index = _configuration_folder(load) / "model_index.json"
    try:
        return getattr(diffusers, json.loads(index.read_text(encoding="utf-8"))[component][1])
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"{index} names no class for the {component}: {error!r}. Give a checkpoint in "
            "diffusers layout."
        ) from error


def _component(
    model: Any, path: str, load: LoadRequest, *, option: str, config: str | None = None
) -> Any:
    """A model from its folder, from that folder in a whole checkpoint, or from one file and a
    configuration. ConfigError if it does not.
    """
    source = Path(path)
    options = {"dtype": DTYPES[load.variant], "local_files_only": True}
    try:
        if source.is_dir():
            inner = [
                source / name
                for name in (option, "controlnet")
                if (source / name / "config.json").is_file()
            ]
            return model.from_pretrained(
                inner[0] if inner and not (source / "config.json").is_file() else source, **options
            )
        if config is None:
            raise ConfigError(
                f"--{option}={path} is a file, so its configuration is needed too. Give "
                f"--{option}_config=CONFIG.JSON."
            )
        return _from_file(model, source, Path(config), options, option=option)
    except LOADING_ERRORS as error:
        raise ConfigError(f"{option}={path} does not load as {model.__name__}: {error}") from error


def _from_file(
    model: Any, source: Path, config: Path, options: Mapping[str, Any], *, option: str
) -> Any:
    """One file of weights, in diffusers' names or, where diffusers can convert them, the original
    ones.
    """
    config = config if config.is_file() else config / "config.json"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").symlink_to(config)
        weights = Path(folder) / "diffusion_pytorch_model.safetensors"
        if source.suffix == ".safetensors":
            weights.symlink_to(source)
        else:
            save_file(
                {
                    key: tensor.contiguous()
                    for key, tensor in read_weights(source, option=option).items()
                },
                weights,
            )
        found, info = model.from_pretrained(folder, output_loading_info=True, **options)
        strangers = (
            len(info["missing_keys"]) + len(info["unexpected_keys"]) + len(info["mismatched_keys"])
        )
        if not strangers:
            return found
        if hasattr(model, "from_single_file"):
            return model.from_single_file(str(weights), config=folder, **options)
    raise ConfigError(
        f"{option}={source} does not fit {config}: {strangers} keys are missing or unknown. Give "
        "the file's own config.json."
    )


def _motion_module(load: LoadRequest) -> Any:
    """AnimateDiff's motion weights in one file. Without a configuration, the one that the file's
    keys and the published models imply.
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
    """The denoiser with its linear weights kept in GGUF's blocks and unpacked as they are used."""
    model = _class_of(spec.denoiser, load)
    if not hasattr(model, "from_single_file"):
        raise ConfigError(
            f"gguf_model={load.gguf_model} cannot be read: diffusers has no GGUF loader for "
            f"{model.__name__}. Leave it out."
        )
    dtype = DTYPES[load.variant]
    try:
        return model.from_single_file(
            load.gguf_model,
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
            dtype=dtype,
            config=str(_configuration_folder(load)),
            subfolder=spec.denoiser,
            local_files_only=True,
        )
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"gguf_model={load.gguf_model} does not load as {model.__name__}: {error}"
        ) from error


def _from_single_file(
    spec: ModelSpec, pipeline_class: Any, path: Path, arguments: dict[str, Any]
) -> Any:
    """A single .safetensors in its original layout, and beside it the folder of its name that keeps
    diffusers offline.

    The folder holds the configuration. If it has weights of the text encoders too, the file is
    taken for the denoiser alone, as FLUX is published, and the rest comes from the folder.
    """
    folder = path.with_suffix("")
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"checkpoint={path} is a single file, and the folder {folder} with its configuration "
            "(model_index.json, tokenizers, "
            "config.json files; no weights needed) is not there. Put it beside the file, or give a "
            "diffusers folder."
        )
    if not any(folder.glob("text_encoder*/*.safetensors")):
        return pipeline_class.from_single_file(str(path), config=str(folder), **arguments)
    if spec.denoiser not in arguments:
        class_name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))[
            spec.denoiser
        ][1]
        arguments[spec.denoiser] = getattr(diffusers, class_name).from_single_file(
            str(path),
            config=str(folder),
            subfolder=spec.denoiser,
            dtype=arguments["dtype"],
            local_files_only=True,
        )
    return pipeline_class.from_pretrained(folder, **arguments)


def _file_variant(path: Path, spec: ModelSpec) -> str | None:
    """'fp16' where the folder holds only files such as diffusion_pytorch_model.fp16.safetensors."""
    folder = path / spec.denoiser
    names = [file.name for file in folder.glob("*.safetensors")] or [
        file.name for file in folder.glob("*.bin")
    ]
    variants = {name.split(".")[1] for name in names if name.count(".") >= 2}
    is_only_variants = bool(names) and all(name.count(".") >= 2 for name in names)
    return (
        sorted(variants)[0]
        if is_only_variants and not any("-of-" in variant for variant in variants)
        else None
    )
