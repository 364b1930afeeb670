"""The files that launch arguments name: paths on this machine, and names on a model hub. Imports no
torch.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.errors import ConfigError
from backends.files.recognition import configuration_of, has_text_encoders, has_vae
from backends.files.weight_headers import Header, read_header
from backends.hub.cache import Found, Wanted
from backends.hub.choice import INDEX
from backends.hub.client import TellBytes, download, locate, size_text
from backends.hub.names import WEIGHT_SUFFIXES, parse_name
from backends.model_table import ModelSpec
from hosts.launch.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
PATH_OPTIONS = (
    "vae",
    "vae_config",
    "gguf_model",
    "motion_adapter",
    "motion_module",
    "motion_config",
    "control_net_config",
)
SCALED_PATHS = ("lora", "motion_adapter_lora", "control_net", "ip_adapter")
WEIGHT_FILES = tuple(suffix for suffix in WEIGHT_SUFFIXES if suffix != ".gguf")
KINDS = {
    "checkpoint": "pipeline",
    **dict.fromkeys(("vae", "unet", "transformer", "motion_adapter", "control_net"), "component"),
    **dict.fromkeys(("gguf_model", "motion_module", "lora", "motion_adapter_lora"), "file"),
    **dict.fromkeys(("ip_adapter", "vae_config", "unet_config", "transformer_config"), "file"),
    **dict.fromkeys(("motion_config", "control_net_config"), "file"),
}
"""Option -> what it needs of a hub's repository (backends/hub/choice.py)."""
NAMED_OPTIONS = ("checkpoint", "unet", "transformer", "gguf_model")
NAMED_OPTIONS += ("motion_adapter", "motion_module")
"""Options whose file's name tells few-step models from others."""
REPLACED_BY = {"vae": ("vae",), "unet": ("unet", "gguf_model")}
REPLACED_BY |= {"transformer": ("transformer", "gguf_model")}
"""Component of a checkpoint -> options whose file is loaded instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFiles:
    """What the names on a hub among the launch arguments mean on this machine."""

    found: tuple[Found, ...] = ()
    missing: tuple[tuple[Found, Mapping[str, int]], ...] = ()
    """What must still be downloaded: file -> bytes."""

    def for_variant(self, variant: str, denoiser: str) -> "HubFiles":
        """Return the same with the files that are missing to compute in `variant`."""
        missing = ((one, one.missing(variant=variant, denoiser=denoiser)) for one in self.found)
        return replace(self, missing=tuple((one, files) for one, files in missing if files))

    @property
    def names(self) -> dict[str, str]:
        """Path on this machine -> ORG/NAME@COMMIT, as users know it."""
        return {str(one.path): _name_at_commit(one) for one in self.found}

    def named(self, text: str) -> str:
        """Return a text with names in place of the cache's paths, the longest first."""
        for path, name in sorted(self.names.items(), key=lambda item: -len(item[0])):
            text = text.replace(path, name)
        return text

    def short_names(self, settings: Settings) -> list[str]:
        """Return the names of the files that decide on a model's defaults, without folders."""
        names = {
            str(one.path): f"{one.wanted.name.repo.partition('/')[2]} {one.scope.path}"
            for one in self.found
        }
        paths = [text for option in NAMED_OPTIONS if (text := getattr(settings, option))]
        return [names.get(path, Path(path).name) for path in paths]

    def facts(self) -> dict[str, str]:
        """For --check and GET /settings: what is still to be downloaded."""
        total = sum(size for _, files in self.missing for size in files.values())
        return {"download": size_text(None, total)} if total else {}

    def download(self, tell: TellBytes) -> None:
        """Download what is missing. ConfigError says what to do."""
        download(self.missing, tell)


def locate_names(settings: Settings) -> tuple[Settings, HubFiles]:
    """Return the settings with a path for each name on a hub, and what these paths are.

    A path that exists wins over a name. ConfigError if a name cannot be found.
    """
    found: list[Found] = []
    values: dict[str, Any] = {}
    for option, kind in KINDS.items():
        given = getattr(settings, option)
        paths = dict.fromkeys(given if isinstance(given, Mapping) else [given] if given else [])
        for text in paths:
            if (name := _name(text)) is None:
                continue
            without = _replaced(settings) if option == "checkpoint" else frozenset()
            wanted = Wanted(option=option, name=name, kind=kind, without=without)
            found.append(locate(wanted, offline=settings.offline))
            paths[text] = str(found[-1].path)
        if any(paths.values()) and isinstance(given, Mapping):
            values[option] = {paths[text] or text: scale for text, scale in given.items()}
        elif any(paths.values()):
            values[option] = paths[given]
    return replace(settings, **values), HubFiles(found=tuple(found))


def locate_configuration(
    settings: Settings, spec: ModelSpec, hub: HubFiles
) -> tuple[Settings, HubFiles]:
    """Return the same with the folder of the configuration of a single-file checkpoint.

    --checkpoint_config, else the folder beside the file, else the hub's for its architecture. Of
    that, weights are needed only for components that the file lacks.
    """
    path, given = Path(checkpoint_path(settings, spec)), settings.checkpoint_config
    if path.is_dir() and given is not None:
        raise ConfigError(
            f"--checkpoint_config={given} was given, but --checkpoint={settings.checkpoint} is a "
            "folder with a configuration of its own. Leave it out."
        )
    if path.is_dir() or not spec.single_file or path.suffix != ".safetensors":
        return settings, hub  # require_components refuses other files
    beside = path.with_suffix("") / INDEX
    if given is None and beside.is_file():
        return settings, hub
    if given is not None and Path(given).expanduser().exists():
        folder = existing_path("checkpoint_config", given)
        if not (Path(folder) / INDEX).is_file():
            raise ConfigError(
                f"--checkpoint_config={given} holds no {INDEX}. Give a folder in diffusers layout; "
                "it needs no weights of what the file holds."
            )
        return replace(settings, checkpoint_config=folder), hub
    found = _locate_repository(settings, spec, path)
    settings = replace(settings, checkpoint_config=str(found.path))
    return settings, replace(hub, found=(*hub.found, found))


def _locate_repository(settings: Settings, spec: ModelSpec, path: Path) -> Found:
    """Return the hub repository with the configuration of a file: the given, or its architecture's.

    ConfigError names the file, if nobody has asked for the repository.
    """
    header, given = read_header(path, option="--checkpoint"), settings.checkpoint_config
    name = parse_name(given or (configuration_of(header, spec) if header else None) or "")
    if name is None:
        existing_path("checkpoint_config", given or str(path.with_suffix("")))
    wanted = Wanted(
        option="checkpoint_config",
        name=name,
        kind="pipeline",
        without=_replaced(settings) | _components_in(header, spec),
    )
    try:
        return locate(wanted, offline=settings.offline)
    except ConfigError as error:
        if given is not None:
            raise
        raise ConfigError(
            f"--checkpoint={settings.checkpoint} is one file, and its configuration is not here: "
            f"{error} Or give it with --checkpoint_config=FOLDER."
        ) from error


def _components_in(header: Header | None, spec: ModelSpec) -> frozenset[str]:
    """Return the components of which a single file has the weights."""
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    has_encoders = header is None or has_text_encoders(header)
    has_its_vae = header is None or has_vae(header)
    return frozenset(
        (spec.denoiser, *(encoders if has_encoders else ()), *(("vae",) if has_its_vae else ()))
    )


def _name(text: str) -> Any:
    """Return the name on a hub that a text can only be, since it is no path here."""
    return None if Path(text).expanduser().exists() else parse_name(text)


def _replaced(settings: Settings) -> frozenset[str]:
    return frozenset(
        component
        for component, options in REPLACED_BY.items()
        if any(getattr(settings, option) is not None for option in options)
    )


def _name_at_commit(found: Found) -> str:
    path = found.scope.path
    return f"{found.wanted.name.repo}@{found.commit[:12]}{'/' if path else ''}{path}"


def checkpoint_path(settings: Settings, spec: ModelSpec) -> str:
    """Return the path of --checkpoint, or of the type's demo model."""
    return existing_path("checkpoint", settings.checkpoint) or str(
        REPOSITORY / spec.demo["checkpoint"]
    )


def existing_path(name: str, value: str | None) -> str | None:
    """Return the path absolute and normalized: clients send <root>/custom_nodes/../models/x.

    Links are kept: those in a cache of downloads lead to files whose names say nothing.
    """
    if value is None:
        return None
    path = Path(os.path.abspath(Path(value).expanduser()))
    if not path.exists():
        raise ConfigError(
            f"--{name}={value} does not exist. Give the path of a file or folder on this machine, "
            "or ORG/NAME of a model on the hub."
        )
    return str(path)


def existing_files(name: str, scales: Mapping[str, float] | None) -> dict[str, float]:
    """Return the files with absolute paths, in the same order. Only a ControlNet may be a
    folder.
    """
    return dict(_existing_files(name, scales or {}))


def _existing_files(name: str, scales: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    for value, scale in scales.items():
        path = existing_path(name, value)
        if Path(path).is_file() and Path(path).suffix not in WEIGHT_FILES:
            raise ConfigError(
                f"--{name}={value} is not a file of weights. Allowed: {', '.join(WEIGHT_FILES)}."
            )
        if Path(path).is_dir() and name != "control_net":
            raise ConfigError(
                f"--{name}={value} is a folder. Give the file of weights in it "
                f"({', '.join(WEIGHT_FILES)})."
            )
        if not math.isfinite(scale):
            raise ConfigError(f"--{name}={value} has scale {scale}. Give a finite number.")
        yield path, scale


def denoiser_files(settings: Settings, spec: ModelSpec) -> tuple[str | None, str | None]:
    """Return the denoiser that replaces the checkpoint's, and its configuration. It may not come
    from two places.
    """
    other = "transformer" if spec.denoiser == "unet" else "unet"
    paths = {"unet": settings.unet, "transformer": settings.transformer}
    configs = {"unet": settings.unet_config, "transformer": settings.transformer_config}
    if paths[other] is not None:
        raise ConfigError(
            f"--{other} was given, but type {spec.name!r} has a {spec.denoiser}. Give "
            f"--{spec.denoiser}."
        )
    if paths[spec.denoiser] is not None and settings.gguf_model is not None:
        raise ConfigError(
            f"--{spec.denoiser} and --gguf_model were given, and both replace the {spec.denoiser}. "
            "Give one of them."
        )
    return (
        existing_path(spec.denoiser, paths[spec.denoiser]),
        existing_path(f"{spec.denoiser}_config", configs[spec.denoiser]),
    )


def require_components(spec: ModelSpec, paths: Mapping[str, str | None]) -> None:
    """Raise ConfigError unless the checkpoint has the form that its type loads from."""
    checkpoint = Path(paths["checkpoint"] or "")
    if checkpoint.is_dir() and not (checkpoint / "model_index.json").is_file():
        raise ConfigError(
            f"--checkpoint={checkpoint} holds no model_index.json. Give a folder in diffusers "
            "layout."
        )
    if checkpoint.is_file() and not (spec.single_file and checkpoint.suffix == ".safetensors"):
        raise ConfigError(
            f"--checkpoint={checkpoint} is a file, but type {spec.name!r} needs a folder in "
            "diffusers layout."
        )
    for component in spec.components:
        if (
            paths.get(component) is None
            and paths.get("motion_module") is None
            and not (checkpoint / component).is_dir()
        ):
            raise ConfigError(
                f"type {spec.name!r} needs a {component}, and the checkpoint holds none. Give "
                f"--{component}=FOLDER or --motion_module=FILE."
            )
