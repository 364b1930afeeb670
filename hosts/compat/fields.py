"""The body of an existing client's POST /generate -> GenerateRequest.

Only hosts/compat knows their names and encodings; docs/compat.md lists them.
"""

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from PIL import Image

from backends.errors import RequestError
from backends.model_table import ModelSpec
from backends.request import GenerateRequest, asks
from hosts.compat import codec
from hosts.http import decode, dialect
from hosts.http.decode import Accepted

logger = logging.getLogger(__name__)

__all__ = ["Accepted", "read_request"]

OLD_NAMES = {
    "prompt": ("positive",),
    "negative_prompt": ("negative",),
    "num_inference_steps": ("steps",),
    "guidance_scale": ("cfg",),
    "strength": ("denoise", "denoising_start"),
    "num_frames": ("frames",),
    "controlnet_conditioning_scale": ("controlnet_scale",),
    "compel": ("use_compel",),
    "latents": ("latent",),
    "ip_adapter_image": ("ip_image",),
}
"""Request field -> names that existing clients use. The first one present wins."""
NAMES = {field: (*OLD_NAMES.get(field, ()), field) for field in GenerateRequest.model_fields}
EMBEDS = {
    "positive_embeds": ("prompt_embeds", "pooled_prompt_embeds"),
    "negative_embeds": ("negative_prompt_embeds", "negative_pooled_prompt_embeds"),
}
"""Name of a conditioning -> the fields for its two parts."""
NPY, PICKLE = "k05VTVBZ", "gA"
"""Prefixes of base64 text: of a .npy file and of a pickle."""
MAX_IMAGE_SCALE = 1000.0
SCALES = {f"{name}_scale" for name in (*decode.IMAGES, "ip_image")}
RULES = dict.fromkeys(
    {name for names in NAMES.values() for name in names} | set(EMBEDS) | SCALES | {"keep", "model"},
    dialect.DONE,
)
"""The fields of POST /generate. They bind every client except the existing ones."""


def read_request(
    body: Any,
    *,
    spec: ModelSpec,
    accepted: Accepted,
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> GenerateRequest:
    """Return the request. null counts as absent. renamed: field -> the client's name, for messages,
    where `body` has another one.

    An existing client's unknown keys are ignored, and fields that this host cannot use stay
    undecoded. For other clients both are errors. RequestError names the client's field, its value
    and what is allowed.
    """
    if not isinstance(body, Mapping):
        raise RequestError(f"the body must be one JSON object, not {type(body).__name__}.")
    given = {key: value for key, value in body.items() if value is not None and value != ""}
    is_strict = not is_existing_client(body) and dialect.is_strict(body)
    if is_strict:
        dialect.require_known(body, RULES)
    if is_strict:
        for names in NAMES.values():
            dialect.require_once(body, *names)
    sent_as = _names(given)
    if not is_strict and spec.most_images == 0:
        _find_oldest(sent_as)
    fields = {field: given[name] for field, name in sent_as.items()}
    unused = accepted.unused(spec)
    for field in (*decode.IMAGES, *decode.ARRAYS, *decode.LISTS):
        if field in fields and field not in unused:
            fields[field] = _decoded(fields[field], field, sent_as[field], given, accepted)
    for name, parts in EMBEDS.items():
        if name in given:
            conditioning = codec.decode_conditioning(given[name], field=name)
            fields |= dict(zip(parts, (conditioning.embeds, conditioning.pooled), strict=True))
            sent_as |= dict.fromkeys(parts, name)
    idle = [sent_as[field] for field in unused.keys() & fields.keys() if asks(field, fields[field])]
    if idle and not is_strict:
        logger.info("without effect on %s: %s", spec.title, ", ".join(sorted(idle)))
    absent = {field: old[0] for field, old in OLD_NAMES.items()} if is_existing_client(body) else {}
    return decode.read_request(
        fields,
        spec=spec,
        accepted=accepted,
        sent_as={**absent, **sent_as, **renamed},
        is_strict=is_strict,
    )


def is_existing_client(body: Mapping[str, Any]) -> bool:
    """Whether the body is from an existing client.

    It uses their names and none of diffusers' names for the same fields.
    """
    old = {name for names in OLD_NAMES.values() for name in names} | set(EMBEDS)
    new = set(OLD_NAMES) | {field for fields in EMBEDS.values() for field in fields}
    return bool(old & body.keys()) and not new & body.keys()


def _names(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the request fields that are present -> the name under which each was sent."""
    found: dict[str, str] = {}
    for field, names in NAMES.items():
        name = next((name for name in names if name in given), None)
        if name is not None:
            found[field] = name
    return found


def _find_oldest(sent_as: dict[str, str]) -> None:
    """Rename the IP-Adapter image, which the oldest clients send as `image`."""
    if "image" in sent_as and "ip_adapter_image" not in sent_as:
        sent_as["ip_adapter_image"] = sent_as.pop("image")


def _decoded(
    value: Any, field: str, name: str, given: Mapping[str, Any], accepted: Accepted
) -> Any:
    """Return the value with its pickles read.

    hosts/http/decode.py reads everything else.
    """
    if field == "mask_image" and isinstance(value, str) and not value.startswith(PICKLE):
        return value  # its alpha channel marks what may change
    if field in decode.IMAGES:
        key = "ip_image_scale" if field == "ip_adapter_image" else f"{field}_scale"
        percent = _percent(given[key], key) if key in given else accepted.image_scale
        if not isinstance(value, list):
            return _image(value, name, percent, key, accepted)
        if len(value) > decode.MAX_IMAGES:
            return value  # refused unread
        return [_image(one, name, percent, key, accepted) for one in value]
    if isinstance(value, str) and not value.startswith(NPY):
        return codec.decode_tensor(value, field=name)
    return value


def _image(
    value: Any, name: str, percent: float | None, key: str, accepted: Accepted
) -> Image.Image:
    limits = accepted.decode_limits
    image = codec.decode_image_or_path(
        value, field=name, allowed_dirs=accepted.image_dirs, limits=limits
    )
    return image if percent is None else decode.scaled(image, percent, field=key, limits=limits)


def _percent(value: Any, field: str) -> float:
    """Return a percentage of the image size. One client sends it as a list of one number."""
    percent = value[0] if isinstance(value, list) and len(value) == 1 else value
    is_number = isinstance(percent, int | float) and not isinstance(percent, bool)
    if not is_number or not 1 <= percent <= MAX_IMAGE_SCALE:
        raise RequestError(
            f"{field}={percent!r} is not allowed. Send a percentage from 1 to {MAX_IMAGE_SCALE:g}.",
            field=field,
        )
    return float(percent)
