"""Refuses what the pipeline class itself would, before any rank sees it. Imports no torch."""

import io
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from backends.errors import RequestError
from backends.files.call_rules import refusal_of
from backends.files.generic import CARRIED, OWN, carrier
from backends.files.pipeline_calls import pipeline_call
from backends.files.source.values import UNKNOWN, Generator, Tensor
from backends.generation.own_class.arguments import asked_arguments, resolve_generic, with_files
from backends.model_table import ModelSpec
from backends.request import GenerateRequest, asks

LONGEST = 400
"""Characters of the class's own words that a client reads."""
SHOWN = (int, float, str)
SIDES = ("height", "width")


def require_accepted(
    request: GenerateRequest,
    spec: ModelSpec,
    defaults: Mapping[str, Any],
    names: Mapping[str, str],
) -> None:
    """Raise RequestError if the class, which runs as it is, would raise an error for the arguments
    that this request becomes. Its words say what is allowed.

    defaults: given at launch, by field. names: field -> the name under which the client sent it.
    """
    call = pipeline_call(spec.pipeline)
    if call is None:
        return
    if not spec.parameters:
        found = MappingProxyType({**dict.fromkeys(call.required), **call.defaults})
        spec = replace(spec, parameters=found)
    resolved = resolve_generic(request, spec, defaults=defaults)
    arguments = asked_arguments(resolved, spec, generator=Generator, read=_known)
    if request.guidance_scale is None and spec.guidance_argument:
        arguments[spec.guidance_argument] = UNKNOWN  # a loaded pipeline may have one of its own
    refusal = refusal_of(spec.pipeline, arguments, spec.attributes)
    if refusal is None:
        return
    said = f"{refusal.message[:LONGEST].removesuffix('.')}."
    brought = _given(request, spec)
    given = [brought[each] for each in refusal.arguments if each in brought]
    if not given:
        missing = _field_of(refusal.arguments, spec)
        name = names.get(missing, missing)
        raise RequestError(f"{name} is missing: {spec.title} says: {said}", field=name)
    shown = dict.fromkeys(_shown(field, value, names) for field, value in given)
    does = "does" if len(shown) == 1 else "do"
    raise RequestError(
        f"{' and '.join(shown)} {does} not fit {spec.title}: {said}",
        field=names.get(given[0][0], given[0][0]),
    )


def _shown(field: str, value: Any, names: Mapping[str, str]) -> str:
    """Return a field as it was sent, with its value where that is short."""
    name = names.get(field, field)
    where = f"{name}: {field}" if field in SIDES and name != field else name  # OpenAI's size
    return f"{where}={str(value)[:80]}" if isinstance(value, SHOWN) else where


def _given(request: GenerateRequest, spec: ModelSpec) -> dict[str, tuple[str, Any]]:
    """Return argument -> the field that brings it, and its value there."""
    found = {}
    for field in CARRIED:
        name = _argument(field, spec)
        if name and asks(field, value := getattr(request, field)):
            found[name] = field, value
    own = request.arguments or {}
    return found | {name: (OWN + name, value) for name, value in own.items()}


def _field_of(arguments: tuple[str, ...], spec: ModelSpec) -> str:
    """Return the field that would bring the first of these arguments that a request can bring."""
    fields = {_argument(field, spec): field for field in reversed(CARRIED)}
    known = next((fields[each] for each in arguments if each in fields), None)
    return known or (OWN + arguments[0] if arguments else "arguments")


def _argument(field: str, spec: ModelSpec) -> str | None:
    is_guidance = field == "guidance_scale"
    return spec.guidance_argument if is_guidance else carrier(spec.parameters, field)


def _known(value: Any) -> Any:
    """Return what stands for a value among the request's `arguments`."""
    return with_files(value, _stand_in)


def _stand_in(kind: str, file: io.BytesIO) -> Any:
    return Image.open(file) if kind == "image" else Tensor(np.load(file, allow_pickle=False).shape)
