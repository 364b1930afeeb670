"""Load one model from a file: in diffusers' names or original ones, alone or beside others."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from backends.errors import ConfigError
from backends.files.checkpoint import Checkpoint
from backends.files.denoiser_families import DENOISER_PREFIXES
from backends.files.recognition import VAE_PREFIXES, components_in
from backends.files.weight_headers import GGUF, SAFETENSORS, Header, read_header
from backends.loading.conversion import stored_dtype
from backends.loading.key_check import require_weights
from backends.loading.plain_weights import (
    fill_model,
    is_plain,
    plain_weights,
    read_gguf,
    scaled_weights,
    unpacked,
)

PREFIXES = {"vae": VAE_PREFIXES, "unet": DENOISER_PREFIXES, "transformer": DENOISER_PREFIXES}
"""Component -> prefixes of its tensors in files with several models."""
OPEN_CLIP = "model."
"""Prefix of a text encoder in OpenCLIP's names, after that of its component."""
PROJECTION = "text_projection.weight"

Weights = dict[str, Tensor]


def read_weights(path: str | Path, *, option: str) -> Weights:
    """Return the tensors of a .safetensors or .gguf file (packed as they are), or of a torch
    pickle, whose code is not executed.

    They are pages of the file, unless it is a pickle of torch before 1.6. ConfigError names the
    option.
    """
    path = Path(path)
    try:
        if path.suffix in SAFETENSORS:
            return load_file(path)
        if path.suffix == GGUF:
            return read_gguf(str(path))
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # torch, safetensors and pickle raise a dozen types
        kind = "safetensors" if isinstance(error, SafetensorError) else type(error).__name__
        raise ConfigError(
            f"{option}={path} cannot be read ({kind}): {' '.join(str(error).split())[:200]}"
        ) from error
    return content.get("state_dict", content)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def model_from_file(
    model: Any, source: Path, config: Path, *, given: str, component: str, dtype: torch.dtype
) -> Any:
    """Load a model of diffusers from one file of weights.

    config: config.json, or its folder. given: the option with its value, for errors. component:
    which model, if the file holds several. dtype: of weights that must be computed to be loaded.
    """
    config = config if config.is_file() else config / "config.json"
    option = given.partition("=")[0]
    prefixes, header = PREFIXES.get(component, ()), read_header(source, option=option)
    advice = (
        f"Give the file's own configuration with --{component}_config=CONFIG.JSON, or a file "
        "made for this checkpoint."
    )
    has_own_names = require_weights(
        model, config, header, given=given, advice=advice, prefixes=prefixes
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").symlink_to(config)
        weights = Path(folder) / "diffusion_pytorch_model.safetensors"
        stored = stored_dtype(header) if source.suffix != GGUF else None
        if has_own_names and is_plain(header) and source.suffix in SAFETENSORS:
            weights.symlink_to(source)
            return model.from_pretrained(folder, dtype=stored or dtype, local_files_only=True)
        tensors = plain_weights(
            read_weights(source, option=option),
            given=given,
            dtype=None if has_own_names else dtype,
            prefixes=prefixes,
        )
        if source.suffix == GGUF:
            tensors = {name: unpacked(tensor, dtype) for name, tensor in tensors.items()}
        if has_own_names:
            return fill_model(model, Path(folder), tensors, dtype)
        _unpack_8_bits(tensors, dtype)
        return model.from_single_file(
            tensors, config=folder, dtype=None if stored else dtype, local_files_only=True
        )


def _unpack_8_bits(tensors: Weights, dtype: torch.dtype) -> None:
    """Convert float8 in place: the conversion of names copies weights, and would hold both."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.element_size() == 1:
            tensors[name] = tensor.to(dtype)


def components_of_file(checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """Return the models that a single-file checkpoint holds, by component.

    dtypes: component -> dtype of weights that must be computed to be loaded, for all that are
    wanted.
    """
    spec, path, folder = checkpoint.spec, checkpoint.path, checkpoint.folder
    held = components_in(checkpoint.header, spec)
    found: dict[str, Any] = {}
    for component, dtype in dtypes.items():
        name, given = checkpoint.class_of(component), f"--checkpoint={path} ({component})"
        if component not in held or name is None:
            continue
        if component in PREFIXES:
            found[component] = model_from_file(
                getattr(diffusers, name),
                path,
                folder / component,
                given=given,
                component=component,
                dtype=dtype,
            )
        else:
            found[component] = _encoder_from_file(
                getattr(transformers, name),
                path,
                folder / component,
                given=given,
                prefix=held[component],
                dtype=dtype,
            )
    return found


def _encoder_from_file(
    model: Any, source: Path, config: Path, *, given: str, prefix: str, dtype: torch.dtype
) -> nn.Module:
    """Load a text encoder whose tensors have this prefix, in the names of transformers or OpenCLIP.

    ConfigError lists what is missing: transformers would draw it at random.
    """
    weights = {
        name: tensor
        for name, tensor in read_weights(source, option="--checkpoint").items()
        if name.startswith(prefix)
    }
    header = read_header(source, option="--checkpoint")
    if source.suffix == GGUF:
        weights = {name: unpacked(tensor, dtype) for name, tensor in weights.items()}
    else:
        own = Header(shapes={}, dtypes={name: header.dtypes[name] for name in weights})
        dtype = stored_dtype(own) or dtype
    weights = scaled_weights(weights, given=given, dtype=dtype)
    settings = model.config_class.from_pretrained(config, local_files_only=True)
    if any(name.startswith(prefix + OPEN_CLIP) for name in weights):
        with torch.device("meta"):
            empty = model(settings)
        weights = convert_open_clip_checkpoint(empty, weights, prefix=prefix + OPEN_CLIP)
    else:
        weights = {
            name.removeprefix(prefix).removeprefix("transformer."): tensor
            for name, tensor in weights.items()
        }
    loaded, info = model.from_pretrained(
        None, config=settings, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing == [PROJECTION]:  # of SD3's first encoder, whose file leaves out the identity
        nn.init.eye_(loaded.get_parameter(PROJECTION))
    elif missing:
        raise ConfigError(
            f"{given} lacks {len(missing)} tensors ({missing[0]}). Download the file again."
        )
    return loaded.eval()
