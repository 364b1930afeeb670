"""Requests, results and errors <-> JSON and named arrays, as the job store writes them. No pickle;
imports no torch.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from backends import errors
from backends.errors import HostError, RankError, RequestError
from backends.request import Array, GenerateRequest, GenerateResult

Arrays = dict[str, Array]
KINDS = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, HostError)
}


def pack_request(request: GenerateRequest) -> tuple[str, Arrays]:
    """Return JSON of the plain fields, and the arrays and images by name."""
    plain: dict[str, Any] = {}
    images: dict[str, int | None] = {}
    arrays: Arrays = {}
    for name in sorted(request.model_fields_set):
        value = getattr(request, name)
        if isinstance(value, np.ndarray):
            arrays[name] = value
        elif isinstance(value, Image.Image):
            arrays[name], images[name] = _pixels(value), None
        elif isinstance(value, list) and value and isinstance(value[0], Image.Image):
            arrays |= {f"{name}.{index}": _pixels(image) for index, image in enumerate(value)}
            images[name] = len(value)
        else:
            plain[name] = value
    tensors = [name for name in arrays if name.partition(".")[0] not in images]
    return json.dumps(
        {"plain": plain, "tensors": tensors, "images": images}, sort_keys=True
    ), arrays


def unpack_request(text: str, read: Callable[[str], Array] | None) -> GenerateRequest:
    """Return the packed request. read: returns the array of a name; None leaves arrays and images
    out, for a job that is over.
    """
    packed = json.loads(text)
    values = dict(packed["plain"])
    if read is not None:
        values |= {name: read(name) for name in packed["tensors"]}
        for name, count in packed["images"].items():
            names = [name] if count is None else [f"{name}.{index}" for index in range(count)]
            images = [Image.fromarray(read(each), mode="RGB") for each in names]
            values[name] = images[0] if count is None else images
    return GenerateRequest(**values)


def fingerprint(request: GenerateRequest) -> str:
    """Return a hash that is equal exactly for equal requests."""
    text, arrays = pack_request(request)
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\0{name} {array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def pack_result(result: GenerateResult) -> tuple[str, Arrays]:
    facts = {
        name: getattr(result, name)
        for name in ("seed", "num_steps", "exactness", "seconds", "report", "resolved")
    }
    arrays = {
        "frames": result.frames,
        **({"latents": result.latents} if result.latents is not None else {}),
    }
    return json.dumps({**facts, "arrays": list(arrays)}, default=str), arrays


def unpack_result(text: str, read: Callable[[str], Array]) -> GenerateResult:
    facts = json.loads(text)
    arrays = {name: read(name) for name in facts.pop("arrays")}
    return GenerateResult(**{"latents": None, **facts, **arrays})


def pack_error(error: HostError) -> str:
    kind = next(each for each in type(error).__mro__ if each.__name__ in KINDS)
    facts: dict[str, Any] = {"kind": kind.__name__, "message": str(error)}
    if isinstance(error, RankError):
        facts["rank"] = error.rank
    if isinstance(error, RequestError):
        facts["field"] = error.field
    return json.dumps(facts)


def unpack_error(text: str) -> HostError:
    facts: Mapping[str, Any] = json.loads(text)
    kind = KINDS.get(facts["kind"], HostError)
    extras = {RankError: "rank", RequestError: "field"}
    names = [name for of, name in extras.items() if issubclass(kind, of) and name in facts]
    return kind(facts["message"], **{name: facts[name] for name in names})


def _pixels(image: Image.Image) -> Array:
    """Return uint8 (h, w, 3). Images of requests are RGB."""
    return np.asarray(image.convert("RGB"))
