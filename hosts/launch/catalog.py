"""The models of a host: one, or those of --models, each planned like a host of its own. Imports no
torch.

A folder may hold files that are no models: what cannot be planned is left out, with the reason in
the log. What was named one by one must be right.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.errors import ConfigError, HostError
from backends.files.checkpoint import is_pipeline
from hosts.launch.files import SINGLE_FILES
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan

logger = logging.getLogger(__name__)

ONE_MODEL_ONLY = ("type", "checkpoint", "checkpoint_config", "unet", "transformer", "gguf_model")
"""Arguments that name a model, or weights of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """A model that the host can load."""

    settings: Settings
    """As for a host of this model alone."""
    start: StartPlan


Catalog = Mapping[str, PlannedModel]
"""Name -> model, the default first. The only model of a host has no name of its own: ''."""


def plan_models(settings: Settings, plan: Callable[[Settings], StartPlan]) -> Catalog:
    """Return the host's models. ConfigError or another HostError for what the user must change.

    plan: what settings mean on this machine.
    """
    if settings.models is None:
        if settings.models_memory is not None:
            raise ConfigError("--models_memory has no effect without --models. Leave it out.")
        return {"": PlannedModel(settings=settings, start=plan(settings))}
    _require_one_host(settings)
    folder = Path(settings.models[0]).expanduser()
    if len(settings.models) > 1 or not _is_collection(folder):
        return dict(_named_models(settings, plan))
    found = dict(_models_in(folder, settings, plan))
    if not found:
        raise ConfigError(
            f"--models={folder} holds no model that can be loaded here: a folder in diffusers "
            f"layout or a file ({', '.join(SINGLE_FILES)}). The log says what is wrong with each."
        )
    return found


def facts_of(models: Catalog) -> dict[str, Any]:
    """Return what --check --json prints."""
    if "" in models:
        return models[""].start.facts()
    return {"models": {name: model.start.facts() for name, model in models.items()}}


def describe(models: Catalog) -> str:
    """Return what --check prints."""
    lines = ([f"{'model':12} {name}"] if name else [] for name in models)
    return "\n\n".join(
        "\n".join([*line, model.start.describe()])
        for line, model in zip(lines, models.values(), strict=True)
    )


def _require_one_host(settings: Settings) -> None:
    if given := [name for name in ONE_MODEL_ONLY if getattr(settings, name) is not None]:
        raise ConfigError(
            f"--{given[0]} was given beside --models, but it is for one model. Leave out one of "
            "them."
        )
    if settings.nnodes > 1:
        raise ConfigError(
            f"--models is for one machine, not for --nnodes={settings.nnodes}. Leave out one of "
            "them."
        )


def _is_collection(path: Path) -> bool:
    """Whether a path is a folder of models, and not a model itself."""
    return path.is_dir() and not is_pipeline(path)


def _named_models(
    settings: Settings, plan: Callable[[Settings], StartPlan]
) -> Iterator[tuple[str, PlannedModel]]:
    seen: dict[str, str] = {}
    for text in settings.models or ():
        path = Path(text).expanduser()
        name = _name_of(path) if path.exists() else text
        if name in seen:
            raise ConfigError(
                f"--models has {seen[name]} and {text}, which would both be named {name!r}. "
                "Rename one of them."
            )
        seen[name] = text
        try:
            yield name, _planned(text, settings, plan)
        except HostError as error:
            raise ConfigError(f"--models, {name!r}: {error}") from error


def _models_in(
    folder: Path, settings: Settings, plan: Callable[[Settings], StartPlan]
) -> Iterator[tuple[str, PlannedModel]]:
    """Yield the models of a folder in alphabetical order: its folders in diffusers layout, then
    files. A folder beside a file of its name is a model too if it is whole; else it has what the
    file lacks. Files whose name is taken keep their ending.
    """
    entries = sorted(folder.iterdir(), key=lambda path: path.name.lower())
    files = [path for path in entries if path.suffix in SINGLE_FILES]
    beside = {path.with_suffix("") for path in files}
    found = []
    for path in (*(path for path in entries if path.is_dir()), *files):
        try:
            found.append((path, _planned(str(path), settings, plan)))
        except HostError as error:
            if path not in beside:
                logger.warning("%s is left out: %s", path, error)
    names = Counter(_name_of(path) for path, _ in found)
    for path, model in found:
        is_taken = path.is_file() and names[_name_of(path)] > 1
        yield (path.name if is_taken else _name_of(path)), model


def _planned(
    checkpoint: str, settings: Settings, plan: Callable[[Settings], StartPlan]
) -> PlannedModel:
    own = replace(settings, checkpoint=checkpoint, models=None, models_memory=None)
    return PlannedModel(settings=own, start=plan(own))


def _name_of(path: Path) -> str:
    name = path.absolute().name
    return name.removesuffix(path.suffix) if path.suffix in SINGLE_FILES else name
