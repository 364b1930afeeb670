"""What a host accepts: which fields it uses, how much one request may ask for, how many values its
JSON may hold, how many requests one client may send. Imports no torch.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from backends.errors import BusyError, RequestError
from backends.generation.admission import AtLaunch, call_takes
from backends.model_table import ALWAYS_USED, ModelSpec
from backends.request import GenerateRequest
from hosts.launch.files import upscaler_scales
from hosts.launch.settings import Settings

MAX_IMAGES = 16
"""Images in one field. Each may be small to send and large to hold."""
MAX_CLIENTS = 10_000
"""Clients whose rates are remembered. Beyond that the least recent one is forgotten."""
MAX_JSON_VALUES = 200_000
"""Values in one body. Each takes up to a hundred bytes of memory for its two bytes in the body."""
MAX_JSON_DEPTH = 16
"""Lists and objects inside each other, without the body. Code that reads or sends a value may
recurse once per level.
"""
MAX_JSON_NAME = 1024
"""Characters of an object's key: some are paths."""
MAX_JSON_NUMBER = 2**64
VALUE_MARKS = (b",", b"[", b"{")
"""Every value but the first begins after one of these."""
PIXELS_OF_LATENT = 8
"""Pixels of the image along one latent, at least."""
TEXTS = ("prompt", "negative_prompt")
BOUNDS = {
    "num_inference_steps": "max_steps",
    "first_step": "max_steps",
    "stop_step": "max_steps",
    "warmup_steps": "max_steps",
    "height": "max_side",
    "width": "max_side",
    "num_frames": "max_frames",
    **dict.fromkeys(TEXTS, "max_prompt_chars"),
}
"""Request field -> the launch argument that bounds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The operator's bounds. Each field is the launch argument of the same name."""

    max_steps: int
    max_side: int
    max_frames: int
    max_prompt_chars: int
    max_image_megapixels: int

    @classmethod
    def by(cls, settings: Settings) -> "Limits":
        return cls(**{name: getattr(settings, name) for name in cls.__slots__})

    def check(
        self, request: GenerateRequest, names: Mapping[str, str], *, upscale: int = 1
    ) -> None:
        """RequestError for the first value that is too large. Defaults are the operator's choice
        and are not checked. names: field -> the name by which the client sent it. upscale: sides
        of the result / sides of `image`.
        """
        steps = max(
            request.num_inference_steps or 0,
            len(request.sigmas or ()) - 1,
            len(request.timesteps or ()),
        )
        found = {each: getattr(request, each) or 0 for each in BOUNDS if each not in TEXTS}
        for each, given in {**found, "num_inference_steps": steps}.items():
            self._require(given, BOUNDS[each], names.get(each, each))
        self._check_sides(request, names, upscale)
        for each in TEXTS:
            name = names.get(each, each)
            if (given := len(getattr(request, each) or "")) > self.max_prompt_chars:
                raise RequestError(
                    f"{name} has {given} characters, more than this host allows: "
                    f"{self.max_prompt_chars} (--max_prompt_chars). Send less.",
                    field=name,
                )

    def _check_sides(
        self, request: GenerateRequest, names: Mapping[str, str], upscale: int
    ) -> None:
        """RequestError if the result takes a side from latents or an image, and it is too long."""
        sizes = {}
        if request.latents is not None:
            sizes["latents"] = [side * PIXELS_OF_LATENT for side in request.latents.shape[-2:]]
        if request.init_image is not None and request.height is None and request.width is None:
            sizes["init_image"] = request.init_image.size
        if request.image is not None and upscale > 1:
            sizes["image"] = [side * upscale for side in request.image.size]
        for each, sides in sizes.items():
            if max(sides) > self.max_side:
                raise RequestError(
                    f"{names.get(each, each)} makes a result with a side of {max(sides)} pixels, "
                    f"more than this host allows: {self.max_side} (--max_side). Send a smaller "
                    "one.",
                    field=names.get(each, each),
                )

    def _require(self, given: int, limit: str, field: str) -> None:
        allowed = getattr(self, limit)
        if given > allowed:
            raise RequestError(
                f"{field}={given} is more than this host allows: {allowed} (--{limit}). Ask for "
                "less.",
                field=field,
            )


NOTHING_GIVEN = AtLaunch()
DEFAULT_LIMITS = Limits.by(Settings())


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    """Upper bounds for one field; every one is a positive integer.

    The defaults admit what the clients send at the largest sizes the models make (a 4096 x 4096
    image or its latents, embeds of 512 tokens) with room to spare, and no more than a request body
    may hold.
    """

    max_encoded_bytes: int = 256 * 2**20
    """Characters of base64, or bytes of an image file."""
    max_pixels: int = 24 * 2**20
    """Width times height of one image. Decoding takes up to 20 bytes per pixel for a moment."""
    max_tensor_elements: int = 32 * 2**20
    """Elements of one tensor after its strides are applied."""
    max_depth: int = 32
    """Containers inside containers."""
    max_opcodes: int = 100_000
    """Pickle instructions; an image takes about 25, with a palette 800."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"DecodeLimits.{each.name}={value!r} is not allowed. Give a positive integer."
                )


class RateLimit:
    """Limit the requests per minute of each client: a bucket holds a minute's worth and refills
    evenly.
    """

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """per_minute: 0 for any number."""
        self._per_minute = per_minute
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = (
            OrderedDict()
        )  # client -> requests left, as of when

    def take(self, client: str) -> None:
        """Count one request of the client. BusyError, with the seconds to wait, if none is left."""
        if self._per_minute == 0:
            return
        with self._lock:
            now = self._clock()
            left, since = self._buckets.pop(client, (float(self._per_minute), now))
            left = min(self._per_minute, left + (now - since) * self._per_minute / 60)
            self._buckets[client] = (left - 1 if left >= 1 else left, now)
            if len(self._buckets) > MAX_CLIENTS:
                self._buckets.popitem(last=False)
        if left < 1:
            wait_s = (1 - left) * 60 / self._per_minute
            raise BusyError(
                f"more than {self._per_minute} requests in a minute from one client "
                f"(--rate_limit). Try again in {wait_s:.0f} s.",
                retry_after_s=wait_s,
            )


def require_few_values(body: bytes) -> None:
    """RequestError if a body, which is not parsed yet, may hold more values than any request needs.
    Marks within texts count too.
    """
    if sum(body.count(mark) for mark in VALUE_MARKS) > MAX_JSON_VALUES:
        raise RequestError(
            f"the body holds more than {MAX_JSON_VALUES} values. Send large data as base64 text, "
            "and prompts with fewer commas."
        )


def require_plain(body: Mapping[str, Any]) -> None:
    """RequestError, with its field, for the first value that is nested too deeply, is no finite
    number within bounds, or is no text that can be encoded.
    """
    for name, value in body.items():
        _require_name(name)
        _require_plain(value, name, depth=0)


def _require_plain(value: Any, field: str, *, depth: int) -> None:
    if isinstance(value, dict | list):
        if depth == MAX_JSON_DEPTH:
            raise RequestError(
                f"{field} is nested deeper than {MAX_JSON_DEPTH} lists and objects. Send a flatter "
                "value.",
                field=field,
            )
        for name in value if isinstance(value, dict) else ():
            _require_name(name)
        for part in value.values() if isinstance(value, dict) else value:
            _require_plain(part, field, depth=depth + 1)
    elif isinstance(value, str):
        _require_text(value, field)
    elif isinstance(value, int | float) and not abs(value) <= MAX_JSON_NUMBER:
        raise RequestError(
            f"{field} holds a number that is beyond 2^64 or not finite. Send a finite number.",
            field=field,
        )


def _require_name(name: str) -> None:
    if len(name) > MAX_JSON_NAME or any(ord(character) < 32 for character in name):
        raise RequestError(
            f"{name[:40]!r} is not allowed as a name. Allowed: up to {MAX_JSON_NAME} characters, "
            "none of them a control character."
        )
    _require_text(name, "a name")


def _require_text(text: str, field: str) -> None:
    """RequestError for half a surrogate pair: neither tokenizers nor files accept one."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{field} holds {text[error.start]!r}, half of a surrogate pair. Send text as UTF-8.",
            field=field,
        ) from error


CONTROL = ("control_image", "controlnet_conditioning_scale", "control_guidance_start")
CONTROL += ("control_guidance_end",)
"""Fields that only a ControlNet reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Inputs that this host accepts from requests."""

    model: str | None = None
    """The model that requests get, on a host with several."""
    image_dirs: tuple[str, ...] = ()
    """Folders from which requests may name image files."""
    lora_dirs: tuple[str, ...] = ()
    """Folders from which requests may name LoRA files."""
    image_scale: float | None = None
    """Default percentage by which images are scaled."""
    launch: AtLaunch = NOTHING_GIVEN
    """What the host was started with: adapters, Compel, default sizes and sampler."""
    upscalers: Mapping[str, int | None] = field(default_factory=lambda: MappingProxyType({}))
    """Name of each of the host's upscalers -> its factor, if the file's header says it."""
    limits: Limits = DEFAULT_LIMITS
    """The operator's limits."""

    @classmethod
    def by(
        cls, settings: Settings, *, model: str | None = None, fixed_loras: str = ""
    ) -> "Accepted":
        return cls(
            model=model,
            image_dirs=_folders(settings.image_dirs),
            lora_dirs=_folders(settings.lora_dir),
            image_scale=settings.image_scale,
            launch=AtLaunch.of(settings, fixed_loras),
            upscalers=upscaler_scales(settings.upscalers),
            limits=Limits.by(settings),
        )

    @property
    def takes_control_image(self) -> bool:
        """Return whether a ControlNet is loaded."""
        return self.launch.control_nets > 0

    @property
    def takes_ip_image(self) -> bool:
        """Return whether an IP-Adapter is loaded."""
        return self.launch.ip_adapters > 0

    @property
    def decode_limits(self) -> DecodeLimits:
        return DecodeLimits(max_pixels=self.limits.max_image_megapixels * 10**6)

    def unused(self, spec: ModelSpec) -> dict[str, str]:
        """Return the request fields that this host does not use, each with the reason."""
        if spec.runs_as_is:
            lora = ("lora",) if self.lora_dirs and not spec.is_generic else ()
            return {
                field: f"{spec.title} does not take it"
                for field in GenerateRequest.model_fields
                if field not in (*ALWAYS_USED, *spec.takes, *lora)
            }
        no_image = f"{spec.title} starts from no image of this kind"
        no_control = "no ControlNet is loaded (--control_net)"
        no_adapter = "no IP-Adapter is loaded (--ip_adapter)"
        has_fields = f"{spec.title} has a field for each thing that it takes"
        no_frames, no_ramp = f"{spec.title} makes one image", f"{spec.title} has no such setting"
        no_upscaler = "the host was started without --upscalers"
        is_video, is_ramp = spec.output == "video", spec.guidance == "frame_ramp"
        inpaints = spec.supports("single", "inpainting").status != "unsupported"
        facts = {
            "image": (spec.most_images > 0, no_image),
            "init_image": (spec.returns_latents, no_image),
            "strength": (spec.returns_latents, no_image),
            "latents": (spec.returns_latents, no_image),
            "latent_space": (spec.returns_latents, no_image),
            "first_step": (spec.returns_latents, no_image),
            "mask_image": (inpaints, f"{spec.title} cannot inpaint"),
            **dict.fromkeys(CONTROL, (self.takes_control_image, no_control)),
            "ip_adapter_image": (self.takes_ip_image, no_adapter),
            "ip_adapter_scale": (self.takes_ip_image, no_adapter),
            "video": ("video" in spec.takes, f"{spec.title} starts from no video"),
            "arguments": (False, has_fields),
            "num_frames": (is_video, no_frames),
            "fps": (is_video, no_frames),
            "decode_chunk_size": (
                is_video and call_takes(spec, "decode_chunk_size"),
                f"{spec.title} decodes its frames itself" if is_video else no_frames,
            ),
            "clip_skip": (
                call_takes(spec, "clip_skip"),
                f"{spec.title} skips no layers of a text encoder",
            ),
            "motion_bucket_id": (is_ramp, no_ramp),
            "noise_aug_strength": (is_ramp, no_ramp),
            "compel": (self.launch.compel, "the host was started without --compel"),
            "prompt_syntax": (spec.has_clip_prompts, f"{spec.title} has no weights of words"),
            "lora": (bool(self.lora_dirs), "the host was started without --lora_dir"),
            "upscaler": (
                bool(self.upscalers) and not is_video,
                no_upscaler if not is_video else f"{spec.title} makes videos",
            ),
            "negative_prompt": (
                spec.guidance != "distilled",
                f"{spec.title} is distilled and follows the prompt only",
            ),
        }
        return {field: reason for field, (is_used, reason) in facts.items() if not is_used}


def _folders(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (text or "").split(":")))
