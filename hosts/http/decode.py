"""Decodes request fields with diffusers' names into a GenerateRequest. Imports no torch.

Images are base64 of an image file, arrays base64 of a .npy file. Nothing is unpickled here: only
hosts/compat reads the pickles of existing clients.
"""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image
from pydantic import ValidationError

from backends.errors import RequestError, UnsupportedError
from backends.generation.emphasis import parse_emphasis
from backends.generation.schedulers import parse_requested
from backends.model_table import ModelSpec
from backends.request import GenerateRequest
from hosts.http import images, media
from hosts.http.dialect import is_empty
from hosts.http.limits import DEFAULT_LIMITS, MAX_IMAGES, DecodeLimits, Limits
from hosts.launch.settings import Settings

IMAGES = ("image", "init_image", "mask_image", "control_image", "ip_adapter_image")
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
CONTROL = ("control_image", "controlnet_conditioning_scale", "control_guidance_start")
CONTROL += ("control_guidance_end",)
"""Fields that only a ControlNet reads."""
_decoding = threading.BoundedSemaphore(4)
"""Limits concurrent decoding: an image briefly takes 20 bytes per pixel."""

ALWAYS_USED = ("seed", "scheduler", "warmup_steps", "quality")
"""Fields that are no arguments of a pipeline's call."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Inputs that this host accepts from requests."""

    image_dirs: tuple[str, ...] = ()
    """Folders from which requests may name image files."""
    lora_dirs: tuple[str, ...] = ()
    """Folders from which requests may name LoRA files."""
    image_scale: float | None = None
    """Default percentage by which images are scaled."""
    takes_control_image: bool = False
    """Whether a ControlNet is loaded."""
    takes_ip_image: bool = False
    """Whether an IP-Adapter is loaded."""
    takes_compel: bool = False
    """Whether Compel is available for prompts."""
    limits: Limits = DEFAULT_LIMITS
    """The operator's limits."""

    @classmethod
    def by(cls, settings: Settings) -> "Accepted":
        return cls(
            image_dirs=_folders(settings.image_dirs),
            lora_dirs=_folders(settings.lora_dir),
            image_scale=settings.image_scale,
            takes_control_image=bool(settings.control_net),
            takes_ip_image=bool(settings.ip_adapter),
            takes_compel=settings.compel,
            limits=Limits.by(settings),
        )

    @property
    def decode_limits(self) -> DecodeLimits:
        return DecodeLimits(max_pixels=self.limits.max_image_megapixels * 10**6)

    def unused(self, spec: ModelSpec) -> dict[str, str]:
        """Return the request fields that this host does not use, each with the reason."""
        if spec.is_generic:
            return {
                field: f"{spec.title} does not take it"
                for field in GenerateRequest.model_fields
                if field not in (*ALWAYS_USED, *spec.takes)
            }
        no_image = f"{spec.title} starts from no image of this kind"
        no_control = "no ControlNet is loaded (--control_net)"
        no_adapter = "no IP-Adapter is loaded (--ip_adapter)"
        no_frames, no_ramp = f"{spec.title} makes one image", f"{spec.title} has no such setting"
        is_video, is_ramp = spec.output == "video", spec.guidance == "frame_ramp"
        inpaints = spec.supports("single", "inpainting").status != "unsupported"
        facts = {
            "image": (spec.most_images > 0, no_image),
            "init_image": (spec.returns_latents, no_image),
            "latents": (spec.returns_latents, no_image),
            "latent_space": (spec.returns_latents, no_image),
            "first_step": (spec.returns_latents, no_image),
            "mask_image": (inpaints, f"{spec.title} cannot inpaint"),
            **dict.fromkeys(CONTROL, (self.takes_control_image, no_control)),
            "ip_adapter_image": (self.takes_ip_image, no_adapter),
            "ip_adapter_scale": (self.takes_ip_image, no_adapter),
            "num_frames": (is_video, no_frames),
            "fps": (is_video, no_frames),
            "decode_chunk_size": (is_video, no_frames),
            "motion_bucket_id": (is_ramp, no_ramp),
            "noise_aug_strength": (is_ramp, no_ramp),
            "compel": (self.takes_compel, "the host was started without --compel"),
            "prompt_syntax": (spec.has_clip_prompts, f"{spec.title} has no weights of words"),
            "lora": (bool(self.lora_dirs), "the host was started without --lora_dir"),
            "negative_prompt": (
                spec.guidance != "distilled",
                f"{spec.title} is distilled and follows the prompt only",
            ),
        }
        return {field: reason for field, (is_used, reason) in facts.items() if not is_used}


def _folders(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (text or "").split(":")))


def read_request(
    fields: Mapping[str, Any],
    *,
    spec: ModelSpec,
    accepted: Accepted,
    sent_as: Mapping[str, str] | None = None,
    is_strict: bool = True,
) -> GenerateRequest:
    """Return the request. null and "" count as absent.

    sent_as: field -> name that the client used, for messages. is_strict: refuse fields that this
    host cannot use and sizes that the model does not support; otherwise such fields stay undecoded.
    Raises RequestError or UnsupportedError.
    """
    names = sent_as or {}
    known = (name for name in GenerateRequest.model_fields if name in fields)
    given = {name: fields[name] for name in known if not _is_absent(fields[name])}
    unused = accepted.unused(spec)
    if is_strict:
        _require_used(given, unused, names)
        _require_size(given, spec, names)
    if "image" not in unused:
        _require_count(given.get("image"), spec, names.get("image", "image"))
    values = {
        field: _value(field, value, names.get(field, field), accepted)
        for field, value in given.items()
        if field not in unused or field in _READ_ANYWHERE
    }
    scheduler = values.get("scheduler")
    if isinstance(scheduler, str | Mapping):  # another type is refused below
        parse_requested(scheduler)
    try:
        request = GenerateRequest(**values)
    except ValidationError as error:
        raise _as_request_error(error, names) from error
    accepted.limits.check(request, names, upscale=spec.upscale)
    if request.prompt_syntax is not None:
        for field in ("prompt", "negative_prompt"):
            parse_emphasis(getattr(request, field) or "", field=names.get(field, field))
    return request


_READ_ANYWHERE = {name for name in GenerateRequest.model_fields if name not in (*IMAGES, *ARRAYS)}
_READ_ANYWHERE -= {"num_frames", "fps"}
"""Fields that are validated even without effect, since existing clients send them."""


def _value(field: str, value: Any, name: str, accepted: Accepted) -> Any:
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
        default = _NEUTRAL.get(field, GenerateRequest.model_fields[field].default)
        name = names.get(field, field)
        is_neutral = is_empty(value) or _is_default(value, default) or field in _HARMLESS
        if field in unused and not is_neutral:
            raise UnsupportedError(f"{name} is not available: {unused[field]}. Leave it out.")
        if isinstance(value, bool) and field != "compel":
            raise RequestError(
                f"{name}={value} is not allowed. Send a value that is not a boolean.", field=name
            )


_NEUTRAL = {"num_frames": 1, "compel": False}
"""Values besides the defaults that have no effect."""
_HARMLESS = {"latent_space"}
"""Fields that only modify the meaning of another field."""


def _is_default(value: Any, default: Any) -> bool:
    return isinstance(value, int | float | str) and value == default


def _require_count(images: Any, spec: ModelSpec, name: str) -> None:
    """Refuse more images than the pipeline takes."""
    if isinstance(images, list) and len(images) > spec.most_images:
        raise RequestError(
            f"{name} holds {len(images)} images. {spec.title} takes {spec.most_images}"
            f"{' at most' if spec.most_images > 1 else ''}. Leave the others out.",
            field=name,
        )


def _require_size(given: Mapping[str, Any], spec: ModelSpec, names: Mapping[str, str]) -> None:
    """Refuse a size that the model does not support, and name the two nearest."""
    multiple = spec.size_multiple
    for side in ("height", "width"):
        value = given.get(side)
        if isinstance(value, int) and value > 0 and value % multiple:
            below = value // multiple * multiple
            nearest = [str(size) for size in (below, below + multiple) if size]
            name = names.get(side, side)
            where = "" if name == side else f"{name}: "  # OpenAI's size has both
            raise RequestError(
                f"{where}{side}={value} is not a size of {spec.title}. Allowed: multiples of "
                f"{multiple}; the nearest are {' and '.join(nearest)}.",
                field=name,
            )


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
    if not 1 <= len(many) <= MAX_IMAGES:
        raise RequestError(
            f"{name} holds {len(many)} images. Allowed: 1 to {MAX_IMAGES}.", field=name
        )
    if field in SINGLE and len(many) > 1:
        raise RequestError(
            f"{name} holds {len(many)} images. Allowed: one. Images for an IP-Adapter are "
            "ip_adapter_image.",
            field=name,
        )
    read = read_mask if field == "mask_image" else read_image
    found = [read(one, field=name, accepted=accepted) for one in many]
    return found if isinstance(value, list) and field not in SINGLE else found[0]


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
    return [round(v) for v in value] if field == "timesteps" else [float(v) for v in value]


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
    return RequestError(f"{name}={given[:80]} is not allowed: {first['msg']}.", field=name)
