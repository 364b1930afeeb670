"""Decodes request fields with diffusers' names into a GenerateRequest. Imports no torch.

Images are base64 of an image file, arrays base64 of a .npy file. Nothing is unpickled here: only
hosts/compat reads the pickles of existing clients.
"""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from PIL import Image
from pydantic import ValidationError

from backends.errors import RequestError, UnsupportedError
from backends.generation.admission import require_companions, require_exact, require_possible
from backends.generation.schedulers import (
    SampledModel,
    parse_requested,
    require_effect,
    require_sampler,
)
from backends.generation.text.emphasis import parse_emphasis
from backends.model_table import ModelSpec
from backends.request import (
    GenerateRequest,
    asks,
    enlarges_only,
    require_room,
    whole_number,
)
from hosts.http import images, media
from hosts.http.limits import MAX_IMAGES, Accepted, DecodeLimits

IMAGES = ("image", "init_image", "mask_image", "control_image", "ip_adapter_image", "video")
FRAMES = ("control_image", "video")
"""Fields that may hold an image for each frame of a video."""
SINGLE = ("init_image", "mask_image")
"""Fields that take at most one image."""
ARRAYS = (
    "latents",
    "prompt_embeds",
    "pooled_prompt_embeds",
    "negative_prompt_embeds",
    "negative_pooled_prompt_embeds",
)
LISTS = ("sigmas", "timesteps")
INTEGERS = frozenset(
    name
    for name, field in GenerateRequest.model_fields.items()
    if int in (field.annotation, *get_args(field.annotation))
    and float not in get_args(field.annotation)
)
WORDS = {
    name: [word for kind in get_args(field.annotation) for word in get_args(kind) or (kind,)]
    for name, field in GenerateRequest.model_fields.items()
    if "Literal" in str(field)
}
"""Field -> the few words that it may have."""
MAX_ARGUMENT = 10_000
"""Of a number among the arguments: some of them are lengths."""
_decoding = threading.BoundedSemaphore(4)
"""Limits concurrent decoding: an image briefly takes 20 bytes per pixel."""

T = TypeVar("T")


def read_request(
    fields: Mapping[str, Any],
    *,
    spec: ModelSpec,
    accepted: Accepted,
    sent_as: Mapping[str, str] | None = None,
    is_strict: bool = True,
) -> GenerateRequest:
    """Return a request that can be done as far as it is known here. null and "" count as absent.

    Of `fields`, `sent_as` and `is_strict` see decode_request. Raises RequestError or
    UnsupportedError.
    """
    request = decode_request(
        fields, spec=spec, accepted=accepted, sent_as=sent_as, is_strict=is_strict
    )
    require_possible(request, spec, accepted.launch, sent_as or {})
    return request


def decode_request(
    fields: Mapping[str, Any],
    *,
    spec: ModelSpec,
    accepted: Accepted,
    sent_as: Mapping[str, str] | None = None,
    is_strict: bool = True,
) -> GenerateRequest:
    """Return the request, of which inputs may still be missing. null and "" count as absent.

    `model` is that of `accepted`: the caller has found the host's model by the client's name.

    sent_as: field -> name that the client used, for messages. is_strict: refuse fields that this
    host cannot use and sizes that the model does not support; otherwise such fields stay undecoded.
    Raises RequestError or UnsupportedError.
    """
    names = sent_as or {}
    known = (name for name in GenerateRequest.model_fields if name in fields)
    given = {name: _plain(name, fields[name]) for name in known if not _is_absent(fields[name])}
    spec = spec.serving([name for name, value in given.items() if asks(name, value)])
    unused = accepted.unused(spec)
    if is_strict:
        _require_used(given, unused, names)
        require_companions(given, spec, names)
        require_exact(given, spec, names)
    if "image" not in unused:
        _require_count(given.get("image"), spec, names.get("image", "image"))
    if spec.output != "video" and not spec.is_generic:
        # one for each frame makes sense for videos only
        accepted = replace(accepted, limits=replace(accepted.limits, max_frames=MAX_IMAGES))
    values = {
        field: _value(field, value, names.get(field, field), accepted)
        for field, value in given.items()
        if field not in unused or field in _READ_ANYWHERE
    }
    scheduler = values.get("scheduler")
    if isinstance(scheduler, str | Mapping):  # another type is refused below
        choice, sampled = parse_requested(scheduler), SampledModel.by(spec)
        require_sampler(choice, sampled)
        if is_strict:
            require_effect(choice, sampled)
    try:
        request = GenerateRequest(**values)
    except ValidationError as error:
        raise _as_request_error(error, names) from error
    if request.model != accepted.model:
        request = request.model_copy(update={"model": accepted.model})
    if request.upscaler is not None and request.upscaler not in accepted.upscalers:
        raise RequestError(
            f"upscaler={request.upscaler[:80]!r} is not an upscaler of this host. Allowed: "
            f"{', '.join(accepted.upscalers)}.",
            field="upscaler",
        )
    if is_strict:
        _require_size_of_latents(request, spec, names)
    _require_room(request, spec, accepted)
    accepted.limits.check(request, names, upscale=spec.upscale)
    if request.prompt_syntax is not None:
        for field in ("prompt", "negative_prompt"):
            parse_emphasis(getattr(request, field) or "", field=names.get(field, field))
    return request


_READ_ANYWHERE = {name for name in GenerateRequest.model_fields if name not in (*IMAGES, *ARRAYS)}
_READ_ANYWHERE -= {"num_frames", "fps"}
"""Fields that are validated even without effect, since existing clients send them."""


def _plain(field: str, value: Any) -> Any:
    """Return a number or word as this field has it, however it is written: 3.0, "3" or "HIGH"."""
    if field in INTEGERS and (number := whole_number(value)) is not None:
        return number
    if field in WORDS and isinstance(value, str) and value.strip().lower() in WORDS[field]:
        return value.strip().lower()
    return value


def _value(field: str, value: Any, name: str, accepted: Accepted) -> Any:
    if field == "arguments":
        return _arguments(value, name, accepted)
    if field in IMAGES:
        return _images(value, field, name=name, accepted=accepted)
    if field in ARRAYS:
        return read_array(value, field=name)
    if field in LISTS:
        return _numbers(value, field, name=name)
    if field == "lora":
        return _loras(value, accepted.lora_dirs)
    _require_text(value, name)
    return value


def _require_used(
    given: Mapping[str, Any], unused: Mapping[str, str], names: Mapping[str, str]
) -> None:
    """Refuse fields that would have no effect. Default values pass."""
    for field, value in given.items():
        name = names.get(field, field)
        if field in unused and asks(field, value):
            raise UnsupportedError(
                f"{name} is not available: {unused[field]}. Leave it out.", field=name
            )
        if isinstance(value, bool) and field != "compel":
            raise RequestError(
                f"{name}={value} is not allowed. Send a value that is not a boolean.", field=name
            )


def _require_count(images: Any, spec: ModelSpec, name: str) -> None:
    """Refuse more images than the pipeline takes."""
    if isinstance(images, list) and len(images) > spec.most_images:
        raise RequestError(
            f"{name} holds {len(images)} images. {spec.title} takes {spec.most_images}"
            f"{' at most' if spec.most_images > 1 else ''}. Leave the others out.",
            field=name,
        )


def _require_size_of_latents(
    request: GenerateRequest, spec: ModelSpec, names: Mapping[str, str]
) -> None:
    """Refuse a size beside latents of another one, which decide the size of the image."""
    if request.latents is None or request.latents.ndim != 4:
        return
    for side, length in zip(("height", "width"), request.latents.shape[-2:], strict=True):
        asked, made = getattr(request, side), length * spec.latent_pixels
        if asked not in (None, made):
            name = names.get(side, side)
            raise RequestError(
                f"{name}={asked} contradicts {names.get('latents', 'latents')}, which are for a "
                f"{side} of {made}. Leave {name} out, or send that.",
                field=name,
            )


def _require_room(request: GenerateRequest, spec: ModelSpec, accepted: Accepted) -> None:
    """Refuse an upscaler that would make too large an image, as far as its factor is known."""
    scale = accepted.upscalers.get(request.upscaler or "")
    if scale is None:
        return
    defaults, image = accepted.launch.defaults, request.init_image
    size = [
        getattr(request, side) or defaults.get(side) or getattr(spec, side)
        for side in ("width", "height")
    ]
    if request.latents is not None:
        size = [side * spec.latent_pixels for side in reversed(request.latents.shape[-2:])]
    elif image is not None and (
        enlarges_only(request) or (request.width is None and request.height is None)
    ):
        size = list(image.size)
    require_room(*size, scale)


def _require_text(value: Any, name: str) -> None:
    """Refuse text with a lone surrogate, which cannot be encoded."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            _require_text(key, name)
            _require_text(each, name)
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{name} holds {value[error.start]!r}, half of a surrogate pair. "
                "Send whole characters.",
                field=name,
            ) from error


def read_image(value: object, *, field: str, accepted: Accepted) -> Image.Image:
    """Return an RGB image from base64 or an allowed path. An image is returned as it is."""
    return value if isinstance(value, Image.Image) else _read(value, field, accepted, images.as_rgb)


def read_mask(
    value: object,
    *,
    field: str,
    accepted: Accepted,
    changes: Literal["opaque", "transparent"] = "opaque",
) -> Image.Image:
    """Return a mask in mode RGB, white where the image may change.

    changes: which parts of an alpha channel may change.
    """
    if isinstance(value, Image.Image):
        return value
    return _read(value, field, accepted, partial(images.as_mask, changes=changes))


def read_transparency(value: object, *, field: str, accepted: Accepted) -> Image.Image | None:
    """Return a mask in mode RGB, white where an image is transparent; None if it is opaque."""
    if isinstance(value, Image.Image):
        return None
    found: list[Image.Image | None] = []

    def look(image: Image.Image) -> Image.Image:
        found.append(images.transparent_parts(image))
        return found[0] or image

    mask = _read(value, field, accepted, look)
    return mask if found[0] is not None else None


def _read(
    value: object, field: str, accepted: Accepted, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    limits, percent = accepted.decode_limits, accepted.image_scale

    def read() -> Image.Image:
        return convert(images.from_text(value, accepted.image_dirs, limits))

    image = decoded(read, field=field, wanted="Send base64 of a PNG, JPEG or WebP file")
    if percent is None:
        return image
    return scaled(image, percent, field="--image_scale", limits=limits)


def read_array(value: object, *, field: str) -> np.ndarray:
    """Return a finite, non-empty float32 array from base64 of a .npy file.

    An array is returned as it is.
    """
    if isinstance(value, np.ndarray):
        return value
    return decoded(
        lambda: media.from_npy(images.bytes_from_text(value, DecodeLimits()), DecodeLimits()),
        field=field,
        wanted="Send base64 of a .npy file of numbers",
    )


def decoded(read: Callable[[], T], *, field: str, wanted: str) -> T:
    """Return the result of `read`; at most four run at a time.

    Its errors become a RequestError that says what to send instead.
    """
    try:
        with _decoding:
            return read()
    except MemoryError as error:
        raise RequestError(
            f"{field}: too large for this machine's memory. Send less data.", field=field
        ) from error
    except images.Unreadable as error:
        raise RequestError(f"{field}: {error}. {wanted}.", field=field) from error


def scaled(image: Image.Image, percent: float, *, field: str, limits: DecodeLimits) -> Image.Image:
    """Return the image at this percentage of its size. RequestError if it gets too many pixels."""
    if percent == 100:
        return image
    width, height = (max(1, round(side * percent / 100)) for side in image.size)
    if width * height > limits.max_pixels:
        raise RequestError(
            f"{field}={percent:g} gives an image of {width}x{height}, more than "
            f"{limits.max_pixels} pixels (--max_image_megapixels). Send a smaller one.",
            field=field,
        )
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value == "")


def _images(value: Any, field: str, *, name: str, accepted: Accepted) -> Any:
    """Return the image of a field, or a list of images if a list was sent."""
    many = value if isinstance(value, list) else [value]
    most = max(MAX_IMAGES, accepted.limits.max_frames) if field in FRAMES else MAX_IMAGES
    if not 1 <= len(many) <= most:
        raise RequestError(f"{name} holds {len(many)} images. Allowed: 1 to {most}.", field=name)
    if field in SINGLE and len(many) > 1:
        raise RequestError(
            f"{name} holds {len(many)} images. Allowed: one. Images for an IP-Adapter are "
            "ip_adapter_image.",
            field=name,
        )
    read = read_mask if field == "mask_image" else read_image
    found = [read(one, field=name, accepted=accepted) for one in many]
    is_list = field == "video" or (isinstance(value, list) and field not in SINGLE)
    return found if is_list else found[0]


def _arguments(given: Any, name: str, accepted: Accepted) -> dict[str, Any]:
    """Return arguments of the pipeline's own call: what they hold is checked, and stays JSON."""
    if not isinstance(given, Mapping):
        raise RequestError(
            f'{name} must be an object such as {{"max_sequence_length": 256}}.', field=name
        )
    return {key: _argument(value, f"{name}.{key}", accepted) for key, value in given.items()}


def _argument(value: Any, name: str, accepted: Accepted) -> Any:
    if isinstance(value, list):
        return [_argument(each, name, accepted) for each in value]
    if not isinstance(value, Mapping):
        _require_text(value, name)
        if _is_number(value) and not abs(value) <= MAX_ARGUMENT:
            raise RequestError(
                f"{name}={str(value)[:40]} is not allowed. Send a number between -{MAX_ARGUMENT} "
                f"and {MAX_ARGUMENT}.",
                field=name,
            )
        return value
    if value.keys() == {"image"}:
        image = read_image(value["image"], field=name, accepted=accepted)
        return {"image": media.png(image)}
    if value.keys() == {"npy"}:
        return {"npy": media.npy(read_array(value["npy"], field=name))}
    if value.keys() == {"object"}:
        return {"object": _arguments(value["object"], name, accepted)}
    raise RequestError(
        f'{name} must be a number, a text, {{"image": base64 of a PNG}}, {{"npy": base64 of a .npy '
        'file}}, {{"object": {{...}}}} with these, or a list of these.',
        field=name,
    )


def _loras(given: Any, folders: tuple[str, ...]) -> dict[str, float]:
    """Return {path: scale}. Paths must be inside the allowed folders, in which relative ones are
    looked up.
    """
    if not isinstance(given, Mapping) or not all(map(_is_number, given.values())):
        raise RequestError(
            'lora must be an object such as {"style.safetensors": 0.8}.', field="lora"
        )
    found = {}
    for name, scale in given.items():
        path = _lora_file(name, folders)
        if path is None:
            where = ", ".join(folders) or "no folder: the host was started without --lora_dir"
            raise RequestError(
                f"lora={name[:200]!r} is not a file that requests may use. Allowed: files in "
                f"{where}.",
                field="lora",
            )
        if not _is_finite(scale):
            raise RequestError(
                f"lora={name!r} has scale {str(scale)[:80]}. Send a finite number.", field="lora"
            )
        found[str(path)] = float(scale)
    return found


def _lora_file(name: str, folders: tuple[str, ...]) -> Path | None:
    if (
        not name.isprintable() or len(name) > 4096
    ):  # lone surrogates and NUL cannot be in a file name
        return None
    for folder in folders:
        try:
            inside, path = Path(folder).resolve(), (Path(folder) / name).resolve()
            if path.is_relative_to(inside) and path.is_file():
                return path
        except OSError:  # a part of the name is too long for the file system
            continue
    return None


def _numbers(value: Any, field: str, *, name: str) -> list[float] | list[int]:
    """Return the numbers of a JSON list or a 1-D array."""
    if isinstance(value, str | np.ndarray):
        array = read_array(value, field=name)
        if array.ndim != 1:
            raise RequestError(
                f"{name} must be a list of numbers or a 1-D tensor, not of shape {array.shape}.",
                field=name,
            )
        value = array.tolist()
    if not isinstance(value, list) or not all(_is_number(v) and _is_finite(v) for v in value):
        raise RequestError(
            f"{name} must be a list of numbers or an encoded 1-D tensor, all of them finite.",
            field=name,
        )
    if field != "timesteps":
        return [float(each) for each in value]
    if broken := [each for each in value if each != int(each)]:
        raise RequestError(
            f"{name} holds {broken[0]:g}. Send whole numbers, or noise levels as sigmas.",
            field=name,
        )
    return [int(each) for each in value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float
        return False


def _as_request_error(error: ValidationError, names: Mapping[str, str]) -> RequestError:
    """Return the first validation error with the client's field names."""
    first = error.errors()[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    name = names.get(field, field)
    given = repr(first["input"])
    # a side may come from a field that has both, or a factor
    where = f"{name}: {field}" if field in ("height", "width") and name != field else name
    return RequestError(f"{where}={given[:80]} is not allowed: {first['msg']}.", field=name)
