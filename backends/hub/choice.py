"""Which files of a repository an option needs. Decides by names alone. Imports no torch.

Only what a pipeline loads: components that the index names, weights of one variant, safetensors
before torch's pickles. Nothing that is made for ONNX, Flax or TensorFlow, and no code.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from backends.errors import ConfigError
from backends.hub.names import WEIGHT_SUFFIXES

Kind = Literal["pipeline", "component", "file"]
INDEX = "model_index.json"
INDEXES = (INDEX, "modular_model_index.json")
"""A repository that has both is read by the first."""
SMALL = (".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken", ".merges")
WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "feature_extractor", "image_processor", "processor")
"""Beginnings of the names of components that have none."""
UNUSED = ("safety_checker",)
"""Components that are never loaded."""
_WEIGHTS = re.compile(
    r"(?P<stem>model|pytorch_model|diffusion_pytorch_model)"
    r"(?P<shard>-\d{5}-of-(?P<count>\d{5}))?(?:\.(?P<variant>[^.]+?))?"
    r"(?P<later>-\d{5}-of-(?P<later_count>\d{5}))?\.(?P<suffix>safetensors|bin)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """The part of a repository that an option needs."""

    path: str = ""
    """What the option gets: a file or folder of the repository; empty for all of it."""
    folders: Mapping[str, bool] = field(default_factory=dict)
    """Component's folder -> whether its weights are needed. The repository itself is ''."""
    files: tuple[str, ...] = ()
    """Single files."""


def scope_of(
    names: Collection[str],
    index: Mapping[str, Any],
    *,
    kind: Kind,
    option: str,
    path: str,
    without: Collection[str] = (),
) -> Scope | None:
    """Return what an option needs of these files; None if they do not hold it.

    index: content of the one in INDEXES. without: components whose weights come from elsewhere.
    """
    if kind == "pipeline" and not path.endswith(WEIGHT_SUFFIXES):
        folders = {
            name: not name.startswith(WITHOUT_WEIGHTS) and name not in without
            for name, entry in index.items()
            if isinstance(entry, list) and entry and entry[0] is not None and name not in UNUSED
        }
        found = index_in(names)
        return Scope(folders=folders, files=(found,)) if found and not path else None
    if kind == "component" and not path.endswith(WEIGHT_SUFFIXES):
        folder = _component(names, path, option)
        return Scope(path=path, folders={folder: True}) if folder is not None else None
    if path and path not in names:
        return None
    file = path or _only_file(names, option)
    return Scope(path=file, folders=_encoders(names, file, option), files=(file,)) if file else None


def index_in(names: Collection[str]) -> str | None:
    """Return the name of the repository's index; None if it has none."""
    return next((name for name in INDEXES if name in names), None)


def small_files(scope: Scope, names: Iterable[str]) -> list[str]:
    """Return configurations, tokenizers and the like."""
    single = [name for name in scope.files if not name.endswith(WEIGHT_SUFFIXES)]
    found = [
        name
        for name in names
        if name.endswith(SMALL) and any(_is_below(name, folder) for folder in scope.folders)
    ]
    return list(dict.fromkeys([*single, *found]))


def weight_files(scope: Scope, names: Collection[str]) -> list[str]:
    """Return the weights of all variants."""
    single = [name for name in scope.files if name.endswith(WEIGHT_SUFFIXES)]
    found = [
        name
        for folder, has_weights in scope.folders.items()
        if has_weights
        for files in _variants(names, folder).values()
        for name in files
    ]
    return list(dict.fromkeys([*single, *found]))


def chosen_weights(
    scope: Scope, names: Collection[str], *, variant: str, denoiser: str
) -> list[str]:
    """Return the weights that will be loaded when `variant` is computed in.

    denoiser: the component whose files decide on the variant of the others.
    """
    single = [name for name in scope.files if name.endswith(WEIGHT_SUFFIXES)]
    main = variant_of(_variants(names, denoiser), variant) if denoiser in scope.folders else variant
    found: list[str] = []
    for folder, has_weights in scope.folders.items():
        if has_weights and (groups := _variants(names, folder)):
            found += groups[variant_of(groups, main)]
    return [*single, *found]


def variant_of(variants: Collection[str | None], wanted: str | None) -> str | None:
    """Return the variant of the files to load, such as 'fp16'; None for files without one.

    The requested one if it exists. Otherwise files without a variant, or else the first variant.
    """
    if wanted in variants:
        return wanted
    return None if None in variants else min(variants, default=None)


def is_complete(scope: Scope, names: Collection[str]) -> bool:
    """Return whether these files are all that is needed, in one variant or another.

    Shards are counted. The small files of a folder are taken as complete if there is one.
    """
    if any(file not in names for file in scope.files):
        return False
    for folder, has_weights in scope.folders.items():
        if not any(_is_below(name, folder) for name in names):
            return False
        if has_weights and not any(_is_whole(files) for files in _variants(names, folder).values()):
            return False
    return True


def _is_below(name: str, folder: str) -> bool:
    """Return whether a file is directly in the folder; '' is the repository."""
    return name.rpartition("/")[0] == folder


def _component(names: Collection[str], path: str, option: str) -> str | None:
    """Return the folder of a component: this one, or its subfolder in a whole checkpoint."""
    folders = [path] if path else ["", option, "controlnet"]
    for folder in folders:
        if f"{folder}/config.json".lstrip("/") in names:
            return folder
    return None


def _only_file(names: Collection[str], option: str) -> str:
    """Return the repository's one file of weights. ConfigError lists them if there are several."""
    suffixes = (".gguf",) if option == "gguf_model" else WEIGHT_SUFFIXES
    found = sorted(name for name in names if name.endswith(suffixes))
    tensors = [name for name in found if name.endswith(".safetensors")]
    usual = [name for name in tensors if name == "pytorch_lora_weights.safetensors"]
    for choice in (usual, tensors, found):
        if len(choice) == 1:
            return choice[0]
    if found:
        listed = ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")
        raise ConfigError(f"holds {len(found)} files of weights. Add one of them: {listed}.")
    return ""


def _encoders(names: Collection[str], file: str, option: str) -> dict[str, bool]:
    """Return the image encoder that an IP-Adapter's file will use, where published ones keep it."""
    if option != "ip_adapter":
        return {}
    beside = PurePosixPath(file).parent
    folders = (beside / "image_encoder", beside.parent / "models/image_encoder")
    folders = (*folders, beside.parent / "image_encoder")
    found = (str(folder) for folder in folders if f"{folder}/config.json" in names)
    return dict.fromkeys(list(found)[:1], True)


def _variants(names: Collection[str], folder: str) -> dict[str | None, list[str]]:
    """Return variant -> its files, of safetensors or else of torch's pickles."""
    prefix = f"{folder}/" if folder else ""
    for suffix in ("safetensors", "bin"):
        groups: dict[str | None, list[str]] = {}
        for name in sorted(names):
            found = _WEIGHTS.fullmatch(name.removeprefix(prefix))
            if found and name.startswith(prefix) and found["suffix"] == suffix:
                groups.setdefault(found["variant"], []).append(name)
        if groups:
            return {variant: _one_copy(files) for variant, files in groups.items()}
    return {}


def _one_copy(files: list[str]) -> list[str]:
    """Return the whole file or its shards, as the library that reads them prefers."""
    shards = [name for name in files if "-of-" in name]
    whole = [name for name in files if "-of-" not in name]
    if shards and whole:
        return shards if "diffusion_pytorch_model" in whole[0] else whole
    return files


def _is_whole(files: list[str]) -> bool:
    found = _WEIGHTS.fullmatch(files[0].rpartition("/")[2])
    count = found["count"] or found["later_count"]
    return count is None or len(files) == int(count)
