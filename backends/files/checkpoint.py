"""A checkpoint without its weights: pipeline, type and configurations. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.errors import ConfigError
from backends.files.component_classes import (
    require_known_class,
    require_scheduler_settings,
    require_torchvision,
)
from backends.files.denoiser_families import Found
from backends.files.recognition import recognize, unread_encoders
from backends.files.weight_headers import (
    PICKLES,
    SAFETENSORS,
    Header,
    read_folder_header,
    read_header,
)
from backends.model_table import GENERIC, ModelSpec, ModelTable, read_table

Config = Mapping[str, Any]
MODULAR_INDEX = "modular_model_index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A folder in diffusers layout, or a single file with its configuration folder beside it."""

    spec: ModelSpec
    path: Path
    folder: Path
    index: Config = field(default_factory=dict)
    header: Header | None = None
    """Of a single file; None for a folder."""

    def config(self, component: str) -> Config:
        """Return a component's configuration; empty if the checkpoint lacks the component."""
        return read_config(self.folder / component) if self.has(component) else {}

    def class_of(self, component: str) -> str | None:
        """Return the class name that the index gives for a component; None if it gives none."""
        entry = self.index.get(component)
        return entry[1] if isinstance(entry, list) and len(entry) == 2 else None

    def has(self, component: str) -> bool:
        """Return whether the index names the component with a class, or else its folder exists."""
        if component in self.index:
            return self.class_of(component) is not None
        return (self.folder / component).is_dir()


def sampler_config(checkpoint: Checkpoint) -> Config:
    """Return the configuration of the checkpoint's scheduler; empty if there is none."""
    return read_json(checkpoint.folder / "scheduler" / "scheduler_config.json")


def configuration_folder(path: str | Path, config: str | None) -> Path:
    """Return the folder with model_index.json: the checkpoint itself, or that of a single file.

    config: of a single file; None for the folder of the same name beside it.
    """
    if Path(path).is_dir():
        return Path(path)
    return Path(config) if config is not None else Path(path).with_suffix("")


def open_checkpoint(spec: ModelSpec, path: str, *, config: str | None = None) -> Checkpoint:
    """Return the checkpoint without its weights. ConfigError if it is of another type.

    config: configuration folder of a single file.
    """
    found = Path(path)
    if found.is_dir():
        _require_readable(found)
        checkpoint = Checkpoint(spec=spec, path=found, folder=found, index=read_index(found))
        _require_class(checkpoint)
        _require_known_parts(checkpoint)
        return checkpoint
    header, folder = read_header(found, option="--checkpoint"), configuration_folder(found, config)
    _require_readable(folder)
    checkpoint = Checkpoint(
        spec=spec, path=found, folder=folder, index=read_index(folder), header=header
    )
    if header is not None:
        _require_single_file(checkpoint)
    _require_class(checkpoint)
    _require_known_parts(checkpoint)
    return checkpoint


def _require_readable(folder: Path) -> None:
    """Raise ConfigError for the first configuration that is not JSON."""
    for file in sorted(folder.glob("*/*config.json")):
        read_json(file)


def infer_type(path: Path, table: ModelTable, *, has_motion: bool = False) -> tuple[str, str]:
    """Return the type that runs this checkpoint, and why: GENERIC for a folder whose class has no
    row. ConfigError if none does.

    has_motion: motion modules of AnimateDiff were given.
    """
    if path.is_dir():
        name = read_index(path).get("_class_name")
        if not isinstance(name, str):
            raise ConfigError(
                f"--checkpoint={path} holds no model_index.json that names a pipeline. Give a "
                "folder in diffusers layout."
            )
        types = types_of_class(name, table, folder=path, has_motion=has_motion)
        if not types:
            return GENERIC, f"type={GENERIC}: {with_article(name)} has no row in the model table"
        return _first_type(path, types, with_article(name), table)
    header = read_header(path, option="--checkpoint")
    if header is None:
        raise ConfigError(
            f"--checkpoint={path} is not a file of weights. Allowed: a folder in diffusers layout, "
            f"{', '.join((*SAFETENSORS, *PICKLES, '.gguf'))}."
        )
    found = recognize(header)
    if found is None:
        raise ConfigError(
            f"--type is missing, and --checkpoint={path} does not say what it is. Allowed: "
            f"{', '.join(table)}."
        )
    _require_checkpoint(path, found)
    singles = [name for name in found.types if table[name].single_file]
    if found.types and not singles:
        raise ConfigError(
            f"--checkpoint={path} is {found.title}, which loads from a folder in diffusers layout "
            f"only. Give such a folder, and this file with --{found.denoiser or 'transformer'}."
        )
    return _first_type(path, singles, found.title, table, reason=found.reason)


def require_checkpoint(path: Path) -> None:
    """Raise ConfigError for a file that belongs to another option, such as a LoRA."""
    header = read_header(path, option="--checkpoint")
    if header is not None and (found := recognize(header)) is not None:
        _require_checkpoint(path, found)


def _require_checkpoint(path: Path, found: Found) -> None:
    if found.part not in ("checkpoint", "denoiser") and found.option:
        raise ConfigError(
            f"--checkpoint={path} is {found.title}. Give it with {found.option}, and the model it "
            "was made for as --checkpoint."
        )


def types_of_class(
    name: str, table: ModelTable, *, folder: Path | None = None, has_motion: bool = False
) -> list[str]:
    """Return the types whose pipeline is this class or has its components; the best first."""
    own = [spec for spec in table.values() if spec.pipeline == name]
    shared = [spec for spec in table.values() if name in spec.also]
    first = [spec for spec in shared if spec.components] if has_motion else []
    signed = [s for s in (*own, *shared) if folder is not None and _has_signs(s, folder)]
    return list(dict.fromkeys(spec.name for spec in [*first, *signed, *own, *shared]))


def read_config(path: str | Path) -> Config:
    """Return a config.json, given the file or its folder; empty if there is none.

    ConfigError if it is not JSON.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    return read_json(file)


def replaced_config(
    checkpoint: Checkpoint, component: str, path: str, own: str | Path | None
) -> Config:
    """Return the configuration of a component that is given apart. ConfigError if there is none.

    own: where it has one of its own; None for the checkpoint's.
    """
    config = read_config(own) if own is not None else checkpoint.config(component)
    if not config:
        where = own if own is not None else checkpoint.folder / component
        raise ConfigError(
            f"--{component}={path} has no configuration: {where} holds none. Give a folder in "
            f"diffusers layout, or --{component}_config=CONFIG.JSON."
        )
    return config


def component_folder(path: str | Path, option: str) -> Path:
    """Return the folder of a component: this one, or its subfolder in a whole checkpoint."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    inner = (
        folder / name
        for name in (option, "controlnet")
        if (folder / name / "config.json").is_file()
    )
    return next(inner, folder)


def read_component_header(path: str | Path, *, option: str) -> Header | None:
    """Return the header of a component's file or folder; None if it has none."""
    if Path(path).is_dir():
        return read_folder_header(component_folder(path, option), option=f"--{option}")
    return read_header(path, option=f"--{option}")


def require_component_header(path: str | Path, *, option: str) -> Header:
    """Return the header of a component's file or folder. ConfigError if it holds no weights."""
    header = read_component_header(path, option=option)
    if header is None:
        raise ConfigError(
            f"--{option}={path} holds no weights ({', '.join(SAFETENSORS)}, {', '.join(PICKLES)}). "
            "Give a folder in diffusers layout, or the file of weights itself."
        )
    return header


def refuse(given: str, found: Found, spec: ModelSpec, needed: str) -> ConfigError:
    """Return the error for a file of a known kind in the wrong place."""
    reason = f": {found.reason}" if found.reason else ""
    types = [name for name in found.types if name in read_table()]
    if types and spec.name not in types:
        advice = f"Give {types_as_text(types)}, or {needed} made for {spec.title}."
    elif found.option and found.option != given.partition("=")[0]:
        advice = f"Give it with {found.option}, or {needed} here."
    else:
        advice = f"Give {needed} made for {spec.title}."
    return ConfigError(
        f"{given} is {found.title}{reason}; --type={spec.name} needs {needed} here. {advice}"
    )


def with_article(name: str) -> str:
    """Prefix a class name with 'a' or 'an'."""
    return f"an {name}" if name.startswith(("A", "E", "I", "O", "SD")) else f"a {name}"


def types_as_text(types: Sequence[str]) -> str:
    """Return '--type=sd1 or --type=sd2'."""
    return " or ".join(f"--type={name}" for name in types)


def width_of(path: str, checkpoint: Checkpoint, denoiser: Config) -> int | None:
    """Return the number that a path such as '3 * text_encoder.hidden_size' names; None if unknown.

    denoiser: configuration of the denoiser in use. Some published configurations of multimodal
    models keep the text model's fields one level higher.
    """
    times, _, name = path.rpartition(" * ")
    component, *fields = name.split(".")
    config: Any = (
        denoiser if component == checkpoint.spec.denoiser else checkpoint.config(component)
    )
    value = config
    for key in fields:
        value = value.get(key) if isinstance(value, Mapping) else None
    value = config.get(fields[-1]) if value is None else value
    return int(times or 1) * value if isinstance(value, int) else None


def _require_class(checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless the type runs the folder's pipeline class.

    Other pipelines generate something else from the same components.
    """
    spec, name = checkpoint.spec, checkpoint.index.get("_class_name")
    if not isinstance(name, str) or name in (spec.pipeline, *spec.also):
        return
    types = types_of_class(name, read_table(), folder=checkpoint.folder)
    advice = (
        f"Give {types_as_text(types)}."
        if types
        else "Leave --type out to run it as diffusers has it, or give a checkpoint of "
        f"{spec.title}."
    )
    raise ConfigError(
        f"--checkpoint={checkpoint.path} is {with_article(name)}, but --type={spec.name} needs "
        f"{with_article(spec.pipeline)}. {advice}"
    )


def _require_known_parts(checkpoint: Checkpoint) -> None:
    """Raise ConfigError for the first component of a class that is not installed, and for settings
    with which its scheduler could not work.
    """
    given = f"--checkpoint={checkpoint.path}"
    require_torchvision(checkpoint.spec.pipeline, given=given)
    for component, entry in checkpoint.index.items():
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(x, str) for x in entry):
            require_known_class(*entry, given=given, component=component)
            if entry[0] == "diffusers" and component.startswith(("transformer", "controlnet")):
                require_torchvision(entry[1], given=given)
    if name := checkpoint.class_of("scheduler"):
        settings = read_json(checkpoint.folder / "scheduler" / "scheduler_config.json")
        require_scheduler_settings(name, settings, given=given)


def _require_single_file(checkpoint: Checkpoint) -> None:
    spec, header = checkpoint.spec, checkpoint.header
    given = f"--checkpoint={checkpoint.path}"
    found = recognize(header)
    if found is not None and (
        found.part not in ("checkpoint", "denoiser") or spec.name not in found.types
    ):
        raise refuse(given, found, spec, f"a checkpoint with a {spec.denoiser}")
    if spec.file_encoders and (unread := unread_encoders(header, spec)):
        raise ConfigError(
            f"{given} holds a text encoder under names that are not those of {spec.title} "
            f"({unread[0]}). Allowed: {', '.join(spec.file_encoders.values())}. Give a file in "
            "the published names (stable-diffusion.cpp keeps them without --convert-name)."
        )


def _has_signs(spec: ModelSpec, folder: Path) -> bool:
    """Return whether the folder has what distinguishes this type from others of the same class."""
    for path, wanted in spec.fits.get("sign", {}).items():
        component, key = path.split(".")
        if read_config(folder / component).get(key) != wanted:
            return False
    return bool(spec.fits.get("sign"))


def _first_type(
    path: Path, types: Sequence[str], what: str, table: ModelTable, reason: str = ""
) -> tuple[str, str]:
    if types:
        return types[0], f"type={types[0]}: the checkpoint is {what}"
    why = f": {reason}" if reason else ""
    raise ConfigError(
        f"--checkpoint={path} is {what}, which no type runs{why}. Allowed types: "
        f"{', '.join(table)}."
    )


RENAMED = {
    "Lumina2Text2ImgPipeline": "Lumina2Pipeline",
    "LuminaText2ImgPipeline": "LuminaPipeline",
}
"""Names of classes in published folders, which diffusers has dropped -> their names today."""


def read_index(folder: Path) -> Config:
    """Return model_index.json, or modular_model_index.json as if it were one: component ->
    [library, class]. Empty if the folder has neither.
    """
    if not is_modular(folder):
        index = read_json(folder / "model_index.json")
        name = index.get("_class_name")
        is_old = isinstance(name, str) and name in RENAMED
        return {**index, "_class_name": RENAMED[name]} if is_old else index
    entries = read_json(folder / MODULAR_INDEX)
    return {
        name: entry[:2] if isinstance(entry, list) else entry for name, entry in entries.items()
    }


def is_modular(folder: Path) -> bool:
    """Return whether a folder holds a modular pipeline only."""
    return (folder / MODULAR_INDEX).is_file() and not (folder / "model_index.json").is_file()


def is_pipeline(folder: Path) -> bool:
    """Return whether a folder has the index of a pipeline in diffusers layout."""
    return (folder / "model_index.json").is_file() or is_modular(folder)


def read_json(file: Path) -> Config:
    """Return a JSON object; empty if there is no such file. ConfigError if it is not one."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file} holds a {type(content).__name__} instead of an object. Download it again."
        )
    return content
