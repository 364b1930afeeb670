"""The files that launch arguments name: paths on this machine, and names on a model hub. Imports no
torch.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from backends.errors import ConfigError
from backends.files.checkpoint import is_pipeline, require_checkpoint
from backends.files.fit import needed_components
from backends.files.recognition import (
    components_in,
    configuration_of,
    recognize,
    unread_encoders,
    upscaler_scale,
)
from backends.files.weight_headers import GGUF, PICKLES, SAFETENSORS, read_header
from backends.hub.cache import Found, Wanted
from backends.hub.choice import INDEX
from backends.hub.client import TellBytes, download, download_command, locate, size_text
from backends.hub.names import DEFAULT_REVISION, WEIGHT_SUFFIXES, parse_name
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
WEIGHT_OPTIONS = (
    "vae",
    "unet",
    "transformer",
    "gguf_model",
    "motion_adapter",
    "motion_module",
)
SCALED_PATHS = ("lora", "motion_adapter_lora", "control_net", "ip_adapter")
SINGLE_FILES = (*SAFETENSORS, *PICKLES, GGUF)
WEIGHT_FILES = tuple(suffix for suffix in WEIGHT_SUFFIXES if suffix != GGUF)
UPSCALER_FILES = (".safetensors", ".pth", ".pt")
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
_PARTS = ("kind", "revision", "path")
_ADDRESS = re.compile(
    r"https?://(?:(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/?#]+/[^/?#]+)"
    r"(?:/(?P<kind>tree|blob|resolve)/(?P<revision>[^/?#]+)(?P<path>/[^?#]+)?)?)?"
)
TEXT_ENCODERS = frozenset({"text_encoder", "text_encoder_2", "text_encoder_3"})
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
            if option == "checkpoint" and name.path.endswith(PICKLES) and found[-1].listing:
                raise ConfigError(
                    f"--checkpoint={text} is a pickle, and its contents are known only after a "
                    f"download. Run `{download_command(wanted)}`, and start again, or give a "
                    ".safetensors file."
                )
            paths[text] = str(found[-1].path)
        if any(paths.values()) and isinstance(given, Mapping):
            values[option] = {paths[text] or text: scale for text, scale in given.items()}
        elif any(paths.values()):
            values[option] = paths[given]
    return replace(settings, **values), HubFiles(found=tuple(found))


def locate_configuration(
    settings: Settings, spec: ModelSpec, hub: HubFiles
) -> tuple[Settings, HubFiles, str]:
    """Return the same with the folder of the configuration of a single-file checkpoint, and what
    comes from there if that is not obvious.

    --checkpoint_config, else the folder beside the file, else the hub's for its architecture. Of
    that, weights are needed only for components that the file lacks. The denoiser of a GGUF file
    stays packed.
    """
    path, given = Path(checkpoint_path(settings, spec)), settings.checkpoint_config
    named = f"--checkpoint={settings.checkpoint}" if settings.checkpoint else "the demo model"
    if path.is_dir() and given is not None:
        raise ConfigError(
            f"--checkpoint_config={given} was given, but {named} is a "
            "folder with a configuration of its own. Leave it out."
        )
    if path.is_dir() or not spec.single_file or path.suffix not in SINGLE_FILES:
        return settings, hub, ""  # require_components refuses other files
    if path.suffix == GGUF:
        _require_one_denoiser(settings, spec)
    folder = path.with_suffix("")
    if given is not None and Path(given).expanduser().exists():
        folder = Path(existing_path("checkpoint_config", given))
        if not (folder / INDEX).is_file():
            raise ConfigError(
                f"--checkpoint_config={given} holds no {INDEX}. Give a folder in diffusers layout; "
                "it needs no weights that the file holds."
            )
    elif given is not None or not (folder / INDEX).is_file():
        require_checkpoint(path)
        found = _locate_repository(settings, spec, path)
        folder, hub = found.path, replace(hub, found=(*hub.found, found))
    if path.suffix != GGUF:
        settings = replace(settings, checkpoint_config=str(folder))
        return settings, hub, _unread(path, spec, folder)
    held = _components_read_of(path, spec)
    settings = replace(settings, gguf_model=str(path))
    if len(held) > 1:
        settings = replace(settings, checkpoint_config=str(folder))
        return settings, hub, f"{path.name} holds {', '.join(held)}"
    settings = replace(settings, checkpoint=str(folder), checkpoint_config=None)
    why = f"{path.name} is the {spec.denoiser}; all other components are those of {folder}"
    return settings, hub, hub.named(why)


def _unread(path: Path, spec: ModelSpec, folder: Path) -> str:
    """Say which part of a file is not used. Files of other names are refused (open_checkpoint)."""
    header = read_header(path, option="--checkpoint")
    if spec.file_encoders or header is None or not unread_encoders(header, spec):
        return ""
    return f"{path.name} holds a text encoder too, which is not read: that of {folder} is used"


def _require_one_denoiser(settings: Settings, spec: ModelSpec) -> None:
    for option in ("gguf_model", spec.denoiser):
        if getattr(settings, option) is not None:
            raise ConfigError(
                f"--checkpoint={settings.checkpoint} is a {spec.denoiser} in GGUF, and --{option} "
                "gives another one. Give the folder or name of a whole model as --checkpoint, or "
                f"leave --{option} out."
            )


def _locate_repository(settings: Settings, spec: ModelSpec, path: Path) -> Found:
    """Return the hub repository with the configuration of a file: the given, or its architecture's.

    ConfigError names the file, if nobody has asked for the repository.
    """
    header, given = read_header(path, option="--checkpoint"), settings.checkpoint_config
    name = parse_name(given or (configuration_of(header, spec) if header else None) or "")
    if name is None:
        existing_path("checkpoint_config", given or str(path.with_suffix("")))
    absent = TEXT_ENCODERS - {*needed_components(spec), *spec.fits.get("optional", [])}
    wanted = Wanted(
        option="checkpoint_config",
        name=name,
        kind="pipeline",
        without=_replaced(settings).union(_components_read_of(path, spec), absent),
    )
    try:
        return locate(wanted, offline=settings.offline)
    except ConfigError as error:
        if given is not None:
            raise
        raise ConfigError(
            f"--checkpoint={settings.checkpoint} is one file, and its configuration is not here: "
            f"{str(error).removeprefix('--checkpoint_config=')} Or give it with "
            "--checkpoint_config=FOLDER."
        ) from error


def _components_read_of(path: Path, spec: ModelSpec) -> Collection[str]:
    """Return the components whose weights are read from a single file."""
    header = read_header(path, option="--checkpoint")
    return components_in(header, spec) if header is not None else (spec.denoiser,)


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
        raise ConfigError(f"--{name}={value} {_why_missing(value)}")
    if name in WEIGHT_OPTIONS and path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
        raise ConfigError(
            f"--{name}={value} is not a file of weights. Allowed: {', '.join(WEIGHT_SUFFIXES)}."
        )
    return str(path)


def _why_missing(text: str) -> str:
    """Return why a text names nothing on this machine, and what to give."""
    address = _ADDRESS.match(text)
    if address is None:
        return (
            "does not exist. Give the path of a file or folder on this machine, or ORG/NAME of a "
            "model on the hub."
        )
    repo, kind, revision, path = address["repo"], *(address[part] or "" for part in _PARTS)
    if not repo:
        return "is an address. Download the file, and give its path."
    at = f"@{revision}" if kind and revision != DEFAULT_REVISION else ""
    return f"is an address. Give the name: {repo}{at}{path}."


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
        yield path, scale


def _require_upscaler(file: Path) -> None:
    """Raise ConfigError for a file that is known to be something else."""
    header = read_header(file, option="--upscalers")
    found = recognize(header) if header is not None else None
    if found is not None and found.part in ("checkpoint", "vae", "lora", "controlnet"):
        raise ConfigError(
            f"--upscalers={file} is {found.title}. Give a network that enlarges images, such as "
            "an ESRGAN."
        )


@cache
def upscaler_files(given: tuple[str, ...] | None) -> Mapping[str, str]:
    """Return name -> absolute path of the upscalers, as they are when this is asked first."""
    found: dict[str, str] = {}
    for text in given or ():
        path = Path(existing_path("upscalers", text))
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in files if file.suffix in UPSCALER_FILES]
        for file in files:
            _require_upscaler(file)
        if not files:
            raise ConfigError(
                f"--upscalers={text} is neither a file of weights nor a folder of them. Allowed: "
                f"{', '.join(UPSCALER_FILES)}."
            )
        for file in files:
            if file.stem in found:
                raise ConfigError(
                    f"--upscalers has {found[file.stem]} and {file}, which would both be named "
                    f"{file.stem!r}. Rename one of them."
                )
            found[file.stem] = str(file)
    return found


@cache
def upscaler_scales(given: tuple[str, ...] | None) -> Mapping[str, int | None]:
    """Return name -> factor of the upscalers; None where a file's header does not say it."""
    headers = {
        name: read_header(path, option="--upscalers")
        for name, path in upscaler_files(given).items()
    }
    return {name: upscaler_scale(header) if header else None for name, header in headers.items()}


def denoiser_files(settings: Settings, spec: ModelSpec) -> tuple[str | None, str | None]:
    """Return the denoiser that replaces the checkpoint's, and its configuration. It may not come
    from two places.
    """
    paths = {"unet": settings.unet, "transformer": settings.transformer}
    configs = {"unet": settings.unet_config, "transformer": settings.transformer_config}
    for other, path in paths.items():
        if path is not None and other != spec.denoiser:
            own = f"has a {spec.denoiser}" if spec.denoiser else "denoises nothing"
            advice = f"Give --{spec.denoiser}" if spec.denoiser in paths else "Leave it out"
            raise ConfigError(f"--{other} was given, but type {spec.name!r} {own}. {advice}.")
    if spec.denoiser not in paths:
        return None, None
    if paths[spec.denoiser] is not None and settings.gguf_model is not None:
        raise ConfigError(
            f"--{spec.denoiser} and --gguf_model were given, and both replace the {spec.denoiser}. "
            "Give one of them."
        )
    gguf_model = existing_path("gguf_model", settings.gguf_model)
    if gguf_model is not None and Path(gguf_model).suffix != ".gguf":
        read_header(Path(gguf_model), option="--gguf_model")  # says what no file of weights is
        raise ConfigError(
            f"--gguf_model={gguf_model} is not a GGUF file (.gguf). Give it with --{spec.denoiser}."
        )
    return (
        existing_path(spec.denoiser, paths[spec.denoiser]),
        existing_path(f"{spec.denoiser}_config", configs[spec.denoiser]),
    )


def require_components(spec: ModelSpec, paths: Mapping[str, str | None]) -> None:
    """Raise ConfigError unless the checkpoint has the form that its type loads from."""
    checkpoint = Path(paths["checkpoint"] or "")
    if checkpoint.is_dir() and not is_pipeline(checkpoint):
        raise ConfigError(
            f"--checkpoint={checkpoint} holds no model_index.json. Give a folder in diffusers "
            "layout."
        )
    if checkpoint.is_file() and not (spec.single_file and checkpoint.suffix in SINGLE_FILES):
        ending = f"one of {', '.join(SINGLE_FILES)}, or " if spec.single_file else ""
        raise ConfigError(
            f"--checkpoint={checkpoint} is a file, but type {spec.name!r} needs {ending}a folder "
            "in diffusers layout."
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
