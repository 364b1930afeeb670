"""A checkpoint without its weights: pipeline, type and configurations. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.errors import ConfigError
from backends.files.denoiser_families import Found
from backends.files.recognition import has_text_encoders, recognize
from backends.files.weight_headers import Header, ReadHeader, read_folder_header, read_header
from backends.model_table import GENERIC, ModelSpec, ModelTable, read_table

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A folder in diffusers layout, or a single file with its configuration folder beside it."""

    spec: ModelSpec
    path: Path
    folder: Path
    index: Config = field(default_factory=dict)
    header: Header | None = None
    """Of a single file; None for a folder."""
    read: ReadHeader = read_header

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


def configuration_folder(path: str | Path, config: str | None) -> Path:
    """Return the folder with model_index.json: the checkpoint itself, or that of a single file.

    config: of a single file; None for the folder of the same name beside it.
    """
    if Path(path).is_dir():
        return Path(path)
    return Path(config) if config is not None else Path(path).with_suffix("")


def open_checkpoint(
    spec: ModelSpec, path: str, *, config: str | None = None, read: ReadHeader = read_header
) -> Checkpoint:
    """Return the checkpoint without its weights. ConfigError if it is of another type.

    config: configuration folder of a single file.
    """
    found = Path(path)
    if found.is_dir():
        checkpoint = Checkpoint(
            spec=spec, path=found, folder=found, index=_read_index(found), read=read
        )
        _require_class(checkpoint)
        return checkpoint
    header, folder = read(found, option="--checkpoint"), configuration_folder(found, config)
    checkpoint = Checkpoint(
        spec=spec, path=found, folder=folder, index=_read_index(folder), header=header, read=read
    )
    if header is not None:
        _require_single_file(checkpoint)
    _require_class(checkpoint)
    return checkpoint


def infer_type(path: Path, table: ModelTable, *, has_motion: bool = False) -> tuple[str, str]:
    """Return the type that runs this checkpoint, and why: GENERIC for a folder whose class has no
    row. ConfigError if none does.

    has_motion: motion modules of AnimateDiff were given.
    """
    if path.is_dir():
        name = _read_index(path).get("_class_name")
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
    found = recognize(header) if header is not None else None
    if found is None:
        raise ConfigError(
            f"--type is missing, and --checkpoint={path} does not say what it is. Allowed: "
            f"{', '.join(table)}."
        )
    singles = [name for name in found.types if table[name].single_file]
    if found.types and not singles:
        raise ConfigError(
            f"--checkpoint={path} is {found.title}, which loads from a folder in diffusers layout "
            f"only. Give such a folder, and this file with --{found.denoiser or 'transformer'}."
        )
    return _first_type(path, singles, found.title, table, reason=found.reason)


def types_of_class(
    name: str, table: ModelTable, *, folder: Path | None = None, has_motion: bool = False
) -> list[str]:
    """Return the types whose pipeline is this class or has its components; the best first."""
    own = [spec for spec in table.values() if spec.pipeline == name]
    shared = [spec for spec in table.values() if name in spec.also]
    first = [spec for spec in shared if spec.components] if has_motion else []
    signed = [spec for spec in own if folder is not None and _has_signs(spec, folder)]
    return list(dict.fromkeys(spec.name for spec in [*first, *signed, *own, *shared]))


def read_config(path: str | Path) -> Config:
    """Return a config.json, given the file or its folder; empty if there is none.

    ConfigError if it is not JSON.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    return read_json(file)


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


def read_component_header(
    path: str | Path, *, option: str, read: ReadHeader = read_header
) -> Header | None:
    """Return the header of a component's file or folder; None if only torch could read it."""
    if Path(path).is_dir():
        return read_folder_header(component_folder(path, option), option=f"--{option}", read=read)
    return read(path, option=f"--{option}")


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


def _require_single_file(checkpoint: Checkpoint) -> None:
    spec, header = checkpoint.spec, checkpoint.header
    given = f"--checkpoint={checkpoint.path}"
    found = recognize(header)
    if found is not None and (
        found.part not in ("checkpoint", "denoiser") or spec.name not in found.types
    ):
        raise refuse(given, found, spec, f"a checkpoint with a {spec.denoiser}")
    has_encoders = has_text_encoders(header) or any(
        checkpoint.folder.glob("text_encoder*/*.safetensors")
    )
    if checkpoint.index and not has_encoders:
        raise ConfigError(
            f"{given} holds no text encoders, and neither does {checkpoint.folder}. Put the "
            f"folders text_encoder* of {spec.title} there with their weights, or give a diffusers "
            f"folder as --checkpoint and this file as --{spec.denoiser}."
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


def _read_index(folder: Path) -> Config:
    return read_json(folder / "model_index.json")


def read_json(file: Path) -> Config:
    """Return a JSON object; empty if there is no such file. ConfigError if it is not one."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file} holds a {type(content).__name__} instead of an object. Download it again."
        )
    return content
