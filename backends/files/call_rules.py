"""What a pipeline class of diffusers refuses of its arguments, read from its source: the checks of
its call, as far as they depend on nothing but the arguments and the configurations of its parts.

Imports no torch.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backends.files.checkpoint import Config, read_config
from backends.files.pipeline_calls import source_of
from backends.files.source.interpreter import Interpreter, RaisedError
from backends.files.source.values import Component

SCALE, GUIDES = "_guidance_scale", "do_classifier_free_guidance"
"""Where pipeline classes keep their scale, and their property that says whether it acts."""
STEPS_OF_STRENGTH = "get_timesteps"
KEPT = (int, float, str, bool, Component, MappingProxyType)
"""What an attribute may be that is told of a class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a class would raise."""

    message: str
    """Its own, with the arguments filled in."""
    arguments: tuple[str, ...]
    """Those that its condition reads, in its order."""


def refusal_of(
    name: str, arguments: Mapping[str, Any], attributes: Mapping[str, Any] | None = None
) -> Refusal | None:
    """Return why the call of a pipeline class would refuse these arguments before it does anything
    else; None if it would not, or if that cannot be told.

    Values are those of backends/files/source/values.py. attributes: as attributes_of returns them.
    """
    methods, own, constants = source_of(name)
    if "__call__" not in methods:
        return None
    interpreter = Interpreter(methods, {**own, **(attributes or {})}, constants)
    try:
        interpreter.follow("__call__", arguments)
    except RaisedError as error:
        return Refusal(message=" ".join(str(error).split()), arguments=error.sources)
    return None


@lru_cache(maxsize=1024)
def first_step_of(name: str, *, num_inference_steps: int, strength: float) -> int | None:
    """Return the step at which a pipeline class begins that starts from an image or a video; None
    if that cannot be told.
    """
    methods, own, constants = source_of(name)
    if STEPS_OF_STRENGTH not in methods:
        return None
    given = {"num_inference_steps": num_inference_steps, "strength": strength}
    interpreter = Interpreter(methods, own, constants)
    found = interpreter.variable("t_start", STEPS_OF_STRENGTH, given)
    return int(found) if isinstance(found, int | float) else None


@lru_cache(maxsize=512)
def is_guided_at(name: str, scale: float) -> bool | None:
    """Return whether a pipeline class guides at this scale, as its property says; None if it does
    not, or asks for more than the scale.
    """
    methods, own, constants = source_of(name)
    interpreter = Interpreter(methods, {**own, SCALE: scale}, constants)
    found = interpreter.attribute(GUIDES)
    return found if isinstance(found, bool) else None


def attributes_of(name: str, folder: Path, index: Config) -> Mapping[str, Any]:
    """Return what is known of a pipeline object that is made of a folder: its parts with their
    configurations, and the numbers that it computes of them.
    """
    parts = {
        part: Component(config=MappingProxyType(read_config(folder / part)))
        for part, entry in index.items()
        if isinstance(entry, list) and None not in entry
    }
    settings = {
        setting: value
        for setting, value in index.items()
        if not setting.startswith("_") and not isinstance(value, list)
    }
    methods, own, constants = source_of(name)
    known = {**own, **parts, "config": MappingProxyType(settings)}
    interpreter = Interpreter(methods, known, constants)
    if "__init__" in methods:
        with contextlib.suppress(RaisedError):
            interpreter.follow("__init__", {**settings, **parts})
    return MappingProxyType(
        {key: value for key, value in interpreter.attributes.items() if isinstance(value, KEPT)}
    )
