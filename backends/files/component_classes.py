"""Whether the classes that a checkpoint names exist, and whether its scheduler's settings can be
read. Imports neither diffusers nor transformers: their sources are read.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from backends.errors import ConfigError
from backends.files.pipeline_calls import exported_names

TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "None": ()}
"""Annotation -> types of JSON values. Any other annotation allows all."""
CHOICES = (
    "algorithm_type",
    "beta_schedule",
    "final_sigmas_type",
    "interpolation_type",
    "prediction_type",
    "solver_type",
    "time_shift_type",
    "timestep_spacing",
    "timestep_type",
    "variance_type",
)
"""Settings that a scheduler compares with the values that it knows."""


SAVED_FROM = ("pipelines/**/*.py", "schedulers/**/*.py")
"""Files of diffusers with classes of components that it saves, and does not all export."""
WITH_TORCHVISION = ("models/**/*.py", "pipelines/**/*.py")
"""Files of diffusers that may compute with torchvision."""


def require_known_class(library: str, name: str, *, given: str, component: str) -> None:
    """Raise ConfigError for a class that the installed diffusers or transformers lacks.

    given: the option and its value. Only models of transformers are looked up: its tokenizers and
    processors have other names besides those of their classes.
    """
    if library == "diffusers":
        known = exported_names()
        is_known = not known or name in known or defining_module(name) is not None
    elif library == "transformers" and component.startswith(("text_encoder", "image_encoder")):
        is_known = _is_model_of_transformers(name)
    else:
        return
    if not is_known:
        raise ConfigError(
            f"{given} has a {component} of class {name}, which the installed {library} does not "
            f"have. Install a newer {library}, or give another checkpoint."
        )


def defining_module(name: str) -> str | None:
    """Return the module of diffusers that defines a component's class; None if there is none."""
    found = (_file("diffusers", pattern, name) for pattern in SAVED_FROM)
    file = next((file for file in found if file is not None), None)
    if file is None:
        return None
    root = next(parent for parent in file.parents if parent.name == "diffusers")
    return ".".join(file.relative_to(root.parent).with_suffix("").parts)


def require_torchvision(name: str, *, given: str) -> None:
    """Raise ConfigError if torchvision is missing and this class of diffusers uses it.

    Such a class loads without it, and fails in its first call.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return
    sources = (_source("diffusers", pattern, name) for pattern in WITH_TORCHVISION)
    if any(source is not None and "if is_torchvision_available():" in source for source in sources):
        raise ConfigError(
            f"{given} has a {name}, which needs torchvision, and that is not installed. Install "
            "the version of torchvision that belongs to the installed torch."
        )


def require_scheduler_settings(name: str, config: Mapping[str, Any], *, given: str) -> None:
    """Raise ConfigError for the first setting that the scheduler's class could not work with.

    name: of the class. config: of scheduler_config.json. given: the option and its value.
    """
    source = _source("diffusers", "schedulers/**/*.py", name)
    if source is None:
        if name in exported_names():
            raise ConfigError(
                f"{given} names {name} as its scheduler, which is none. Correct its "
                "model_index.json, or download the checkpoint again."
            )
        return
    for key, annotation in _annotations(source, name).items():
        value = config.get(key)
        if value is None:
            continue
        told = f"{given} has a scheduler ({name}) with {key}={value!r}"
        allowed = [TYPES.get(part, (object,)) for part in annotation.split(" | ")]
        if not any(type(value) in types or object in types for types in allowed):
            raise ConfigError(
                f"{told}, and {key} must be {annotation.replace(' | ', ' or ')}. Correct "
                "scheduler/scheduler_config.json, or download the checkpoint again."
            )
        if key in CHOICES and isinstance(value, str) and f'"{value}"' not in source:
            raise ConfigError(
                f"{told}, which the installed diffusers does not know. Correct "
                "scheduler/scheduler_config.json, or install a newer diffusers."
            )


@lru_cache(maxsize=64)
def settings_of(scheduler: str) -> frozenset[str]:
    """Return the settings that a scheduler class of diffusers takes; none if there is no such."""
    source = _source("diffusers", "schedulers/**/*.py", scheduler)
    return frozenset(_annotations(source, scheduler)) if source is not None else frozenset()


@lru_cache(maxsize=64)
def timestep_arguments(scheduler: str) -> frozenset[str]:
    """Return the arguments of a scheduler class's set_timesteps; none if there is no such."""
    source = _source("diffusers", "schedulers/**/*.py", scheduler)
    methods = _methods(source, scheduler, "set_timesteps") if source is not None else ()
    return frozenset(argument.arg for item in methods for argument in _arguments(item))


@lru_cache(maxsize=64)
def methods_of(scheduler: str) -> frozenset[str]:
    """Return the names of a scheduler class's own methods; none if there is no such class."""
    source = _source("diffusers", "schedulers/**/*.py", scheduler)
    return frozenset(item.name for item in _methods(source, scheduler)) if source else frozenset()


@lru_cache(maxsize=64)
def _is_model_of_transformers(name: str) -> bool:
    is_installed = importlib.util.find_spec("transformers") is not None
    return not is_installed or bool(_source("transformers", "models/*/modeling_*.py", name))


def _source(library: str, pattern: str, name: str) -> str | None:
    """Return the source that defines the class; None if there is none."""
    file = _file(library, pattern, name)
    return file.read_text(encoding="utf-8") if file is not None else None


@lru_cache(maxsize=256)
def _file(library: str, pattern: str, name: str) -> Path | None:
    """Return the file of an installed library that defines the class; None if there is none."""
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        return None
    begins = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
    for file in sorted(Path(spec.origin).parent.glob(pattern)):
        if begins.search(file.read_text(encoding="utf-8")):
            return file
    return None


def _annotations(source: str, name: str) -> dict[str, str]:
    """Return the parameters of a class's constructor, with their types as the source has them."""
    return {
        argument.arg: ast.unparse(argument.annotation)
        for item in _methods(source, name, "__init__")
        for argument in _arguments(item)
        if argument.annotation is not None
    }


def _methods(source: str, class_name: str, name: str | None = None) -> Iterator[ast.FunctionDef]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and name in (None, item.name):
                    yield item


def _arguments(function: ast.FunctionDef) -> tuple[ast.arg, ...]:
    return (*function.args.args, *function.args.kwonlyargs)
