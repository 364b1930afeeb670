"""What can be refused of a request before any rank sees it. Imports no torch.

The HTTP side calls require_possible for every request that it reads, and each rank once more for
the requests that reach it otherwise. What only loaded weights can tell is checked on the ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backends.errors import RequestError, UnsupportedError
from backends.files.adapter_fit import require_own_lora
from backends.files.generic import OWN, require_own_arguments
from backends.files.pipeline_calls import pipeline_call
from backends.generation.own_class.checks import require_accepted
from backends.generation.possible_steps import require_own_steps, require_steps
from backends.model_table import ModelSpec
from backends.request import GenerateRequest, asks, listed

NO_NAMES: Mapping[str, str] = MappingProxyType({})
SIDES, STEPS = ("height", "width"), "num_inference_steps"
_WINDOW = {"control_guidance_start": 0.0, "control_guidance_end": 1.0}
_MASKS = ("prompt_attention_mask", "prompt_embeds_mask", "prompt_embeds_2")
"""Arguments that embeddings need beside them, and that no field carries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtLaunch:
    """What was given at launch and decides what requests may ask for."""

    loras: tuple[str, ...] = ()
    fixed_loras: str = ""
    """Why requests cannot choose LoRAs; empty if they can."""
    control_nets: int = 0
    ip_adapters: int = 0
    compel: bool = False
    scheduler: Mapping[str, Any] | None = None
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """height, width and num_inference_steps, where they were given."""

    @classmethod
    def of(cls, options: Any, fixed_loras: str = "") -> "AtLaunch":
        """options: a LoadRequest, or the host's Settings, which have the same names."""
        return cls(
            fixed_loras=fixed_loras,
            loras=tuple(str(Path(path).resolve()) for path in options.lora or ()),
            control_nets=len(options.control_net or ()),
            ip_adapters=len(options.ip_adapter or ()),
            compel=bool(options.compel),
            scheduler=options.scheduler,
            defaults={name: getattr(options, name, None) for name in (*SIDES, STEPS)},
        )


def require_possible(
    request: GenerateRequest,
    spec: ModelSpec,
    launch: AtLaunch,
    names: Mapping[str, str] = NO_NAMES,
) -> None:
    """Raise RequestError or UnsupportedError for a request that cannot be done.

    names: field -> the name under which the client sent it.
    """
    spec = spec.serving([name for name, value in request if asks(name, value)])
    if spec.runs_as_is:
        _require_generic_inputs(request, spec, names)
        require_accepted(request, spec, launch.defaults, names)
        require_own_steps(
            request, spec, defaults=launch.defaults, scheduler=launch.scheduler, names=names
        )
    else:
        _require_inputs(request, spec, names)
        require_steps(
            request, spec, defaults=launch.defaults, scheduler=launch.scheduler, names=names
        )
        _require_embeds(request, spec, names)
        _require_latents(request, spec, names)
    _require_images(request, spec, names)
    _require_control(request, spec, launch, names)
    _require_window(request, spec, launch, names)
    _require_ip_images(request, spec, launch, names)
    _require_extent(request, spec, launch, names)
    _require_compel(request, launch, names)
    if launch.fixed_loras and (request.lora or (request.lora is not None and launch.loras)):
        raise UnsupportedError(
            f"lora in a request is not available on a host that {launch.fixed_loras}.",
            field="lora",
        )
    for path in request.lora or {}:
        if str(Path(path).resolve()) not in launch.loras:
            require_own_lora(path, spec)


def require_exact(given: Mapping[str, Any], spec: ModelSpec, names: Mapping[str, str]) -> None:
    """Raise RequestError for a size or length that the model cannot make; name the two nearest.

    given: field -> value. names: as in require_possible.
    """
    multiple = spec.size_multiple
    for field_name in (*SIDES, "num_frames"):
        value, is_side = given.get(field_name), field_name in SIDES
        if not isinstance(value, int) or value <= 0:
            continue
        below = value // multiple * multiple
        around = (below, below + multiple) if is_side else lengths_around(value, given, spec)
        if value in around:
            continue
        name = names.get(field_name, field_name)
        where = "" if name == field_name else f"{name}: "  # OpenAI's size has both
        what = "a size" if is_side else "a length of a video"
        raise RequestError(
            f"{where}{field_name}={value} is not {what} of {spec.title}. Allowed: "
            f"{f'multiples of {multiple}' if is_side else _lengths(spec)}; the nearest "
            f"{'are' if around[0] else 'is'} {' and '.join(str(each) for each in around if each)}.",
            field=name,
        )


def lengths_around(num_frames: int, given: Mapping[str, Any], spec: ModelSpec) -> tuple[int, int]:
    """Return the lengths on both sides of this one that a request with these fields can have."""
    own = given.get("arguments")
    chunk = own.get("num_latent_frames_per_chunk") if isinstance(own, Mapping) else None
    return spec.lengths_around(num_frames, chunk if isinstance(chunk, int) and chunk > 0 else None)


def _lengths(spec: ModelSpec) -> str:
    if spec.latent_chunk:
        return f"videos made in pieces of {spec.latent_chunk} latent frames"
    return f"1 more than multiples of {spec.frame_step}"


def require_companions(given: Mapping[str, Any], spec: ModelSpec, names: Mapping[str, str]) -> None:
    """Raise RequestError for a field that has no effect without another one, which is missing.

    given and names: as in require_exact.
    """
    starts = ("init_image", "latents", *(("image", "video", "arguments") if spec.takes else ()))
    for field_name, companions, needed in (
        ("strength", starts, "init_image or latents"),
        ("first_step", ("latents", "init_image"), "init_image or latents"),
        ("pooled_prompt_embeds", ("prompt_embeds",), "prompt_embeds"),
        ("negative_prompt_embeds", ("prompt_embeds",), "prompt_embeds"),
        ("negative_pooled_prompt_embeds", ("negative_prompt_embeds",), "negative_prompt_embeds"),
    ):
        value, name = given.get(field_name), names.get(field_name, field_name)
        if value is None or str(value) in _NO_EFFECT.get(field_name, ()):
            continue
        if not any(each in given for each in companions):
            told = name if field_name.endswith("embeds") else f"{name}={str(value)[:80]}"
            image = " an image to start from" if companions[0] == "init_image" else f" {needed}"
            raise RequestError(
                f"{told} has no effect without{image}. Send {needed}, or leave {name} out.",
                field=name,
            )


_NO_EFFECT = {"strength": ("1", "1.0"), "first_step": ("0", "0.0")}
"""Values that ask for nothing."""


def call_takes(spec: ModelSpec, argument: str) -> bool:
    """Return whether the row's pipeline class takes this argument, as far as it is known."""
    call = pipeline_call(spec.pipeline)
    return call is None or argument in call.names


def _require_inputs(request: GenerateRequest, spec: ModelSpec, names: Mapping[str, str]) -> None:
    def named(field: str) -> str:
        return names.get(field, field)

    def error(message: str, field: str) -> RequestError:
        return RequestError(message, field=named(field))

    if "image" in spec.requires and request.image is None:
        raise error(
            f"image is missing. {spec.title} starts from an image: send one as {named('image')}.",
            "image",
        )
    for each, what in (("init_image", "the image to change"), ("mask_image", "what may change")):
        if each in spec.requires and getattr(request, each) is None:
            raise error(
                f"{named(each)} is missing. This checkpoint of {spec.title} is made for "
                f"inpainting: send {what} as {named(each)}.",
                each,
            )
    if "prompt" in spec.requires and not request.prompt and request.prompt_embeds is None:
        raise error(
            f"no prompt was given. Send a text as {named('prompt')}, or embeddings.",
            "prompt",
        )
    for text in ("prompt", "negative_prompt"):
        embeds = f"{text}_embeds"
        if getattr(request, text) and getattr(request, embeds) is not None:
            raise error(
                f"both {named(text)} and {named(embeds)} were given. Send one of them.", embeds
            )
    if request.init_image is not None and request.latents is not None:
        raise error(
            f"both {named('latents')} and {named('init_image')} were given. Send one of them.",
            "init_image",
        )
    if request.init_image is not None and not spec.returns_latents:
        raise UnsupportedError(
            f"{spec.title} cannot start from {named('init_image')}. Leave it out.",
            field=named("init_image"),
        )
    if request.mask_image is not None and request.init_image is None:
        raise error(
            f"{named('mask_image')} was given without {named('init_image')}, the image to change. "
            "Send both.",
            "mask_image",
        )


def _require_generic_inputs(
    request: GenerateRequest, spec: ModelSpec, names: Mapping[str, str]
) -> None:
    """Raise RequestError for missing or contradicting inputs of a class that runs as it is."""
    require_own_arguments(request.arguments or {}, spec)
    for each in spec.requires:
        nothing = (None,) if each.startswith(OWN) else (None, "")
        if all(value in nothing for value in _given(request, each)):
            name = names.get(each, each.removeprefix(OWN))
            sent = names.get(each, each)
            raise RequestError(
                f"{name} is missing. {spec.title} needs it: send one as {sent!r}.", field=sent
            )
    if request.image is not None and request.init_image is not None:
        raise RequestError(
            f"both image and init_image were given, and {spec.title} takes one image. Send one of "
            "them.",
            field=names.get("init_image", "init_image"),
        )


def _given(request: GenerateRequest, need: str) -> tuple[Any, ...]:
    """Return the values that answer a need of the class."""
    if need.startswith(OWN):
        return ((request.arguments or {}).get(need.removeprefix(OWN)),)
    return (request.image, request.init_image) if need == "image" else (getattr(request, need),)


def _require_embeds(request: GenerateRequest, spec: ModelSpec, names: Mapping[str, str]) -> None:
    """Raise UnsupportedError or RequestError for embeddings that the pipeline does not take."""
    if request.prompt_embeds is None and request.negative_prompt_embeds is None:
        return
    call = pipeline_call(spec.pipeline)
    taken = call.names if call is not None else frozenset()
    needs = [name for name in _MASKS if name in taken]
    if "prompt_embeds" not in taken or needs:
        field = "prompt_embeds" if request.prompt_embeds is not None else "negative_prompt_embeds"
        name = names.get(field, field)
        raise UnsupportedError(
            f"{name}: embeddings cannot be given to {spec.title}: it also needs "
            f"{', '.join(needs) or 'an image'}, which no request field carries. Send the prompt as "
            "text.",
            field=name,
        )
    for prefix in ("", "negative_"):
        embeds, pooled = (f"{prefix}{each}" for each in ("prompt_embeds", "pooled_prompt_embeds"))
        given, beside = (getattr(request, name) for name in (embeds, pooled))
        if given is None:
            continue
        name = names.get(embeds, embeds)
        if beside is None and "pooled_prompt_embeds" in taken:
            raise RequestError(
                f"{name} has no pooled_output ({pooled}), which {spec.title} needs. Send it with "
                "the embeddings.",
                field=name,
            )
        for array, num_dims, shape in ((given, 3, "(1, T, D)"), (beside, 2, "(1, P)")):
            if array is not None and (array.ndim != num_dims or array.shape[0] != 1):
                raise RequestError(
                    f"{name} has an array of shape {array.shape}. Allowed: {shape}, the embeddings "
                    "of one prompt.",
                    field=name,
                )
        for array, width, what in zip(
            (given, beside), spec.embeds_widths, ("", "pooled_output "), strict=True
        ):
            if array is not None and width is not None and array.shape[-1] != width:
                raise RequestError(
                    f"{name} has a {what}width of {array.shape[-1]}, but this checkpoint of "
                    f"{spec.title} takes {width}. Send embeddings of its own text encoders, or the "
                    "prompt as text.",
                    field=name,
                )


def _require_latents(request: GenerateRequest, spec: ModelSpec, names: Mapping[str, str]) -> None:
    """Raise RequestError for latents of another VAE, or of a size that the model cannot make."""
    if request.latents is None:
        return
    name, shape = names.get("latents", "latents"), request.latents.shape
    channels = spec.latent_channels
    if len(shape) != 4 or (channels and shape[1] != channels):
        raise RequestError(
            f"{name} has shape {shape}, but this checkpoint of {spec.title} takes (1, "
            f"{channels or 'channels'}, height / {spec.latent_pixels}, width / "
            f"{spec.latent_pixels}). Send latents of its own VAE, or leave the field out.",
            field=name,
        )
    height, width = (side * spec.latent_pixels for side in shape[-2:])
    if height % spec.size_multiple or width % spec.size_multiple:
        raise RequestError(
            f"{name} are for an image of {width}x{height}. Allowed for {spec.title}: multiples of "
            f"{spec.size_multiple} pixels on both sides.",
            field=name,
        )


def _require_images(request: GenerateRequest, spec: ModelSpec, names: Mapping[str, str]) -> None:
    """Raise RequestError for an image that is smaller or longer than the pipeline takes."""
    least, shape = (spec.image_limits.get(name) for name in ("least", "shape"))
    if least is None or shape is None:
        return
    for field_name in ("image", "init_image"):
        for image in listed(getattr(request, field_name)):
            name, (width, height) = names.get(field_name, field_name), image.size
            if min(width, height) < least or max(width, height) > shape * min(width, height):
                raise RequestError(
                    f"{name} has an image of {width}x{height}. Allowed for {spec.title}: at least "
                    f"{least} pixels on each side, and one side at most {shape} times the other. "
                    "Send another image.",
                    field=name,
                )


def _require_window(
    request: GenerateRequest, spec: ModelSpec, launch: AtLaunch, names: Mapping[str, str]
) -> None:
    """Raise RequestError if a ControlNet, of the class or loaded, would act at no step."""
    start, end = request.control_guidance_start, request.control_guidance_end
    if start >= end and (launch.control_nets or set(_WINDOW) <= {*spec.takes}):
        first, last = (names.get(each, each) for each in _WINDOW)
        raise RequestError(
            f"{first}={start} is not before {last}={end}. Send 0 <= start < end <= 1.", field=first
        )


def _require_control(
    request: GenerateRequest, spec: ModelSpec, launch: AtLaunch, names: Mapping[str, str]
) -> None:
    """Raise RequestError or UnsupportedError if the request does not fit the loaded ControlNets."""
    number = launch.control_nets
    if not number:
        return

    def error(message: str, field: str) -> RequestError:
        return RequestError(message, field=names.get(field, field))

    if request.control_image is None:
        raise error(
            "control_image is missing, but a ControlNet is loaded. Send a control image.",
            "control_image",
        )
    images = listed(request.control_image)
    if len(images) not in (1, number):
        raise error(
            f"{len(images)} control images were sent for {number} ControlNets. Send one for all, "
            "or one for each.",
            "control_image",
        )
    scales = listed(request.controlnet_conditioning_scale)
    if len(scales) > number:
        raise error(
            f"{len(scales)} scales were sent for {number} ControlNets. Send at most {number}.",
            "controlnet_conditioning_scale",
        )
    class_name = spec.controlnet.get("pipeline", spec.pipeline)
    call = pipeline_call(class_name)
    for name, default in _WINDOW.items():
        is_taken = call is None or name in call.names
        if getattr(request, name) != default and not is_taken:
            sent = names.get(name, name)
            raise UnsupportedError(
                f"{sent} is not available for {spec.title}: diffusers' {class_name} applies its "
                "ControlNet at every step. Leave it out.",
                field=sent,
            )


def _require_ip_images(
    request: GenerateRequest, spec: ModelSpec, launch: AtLaunch, names: Mapping[str, str]
) -> None:
    """Raise RequestError or UnsupportedError if the images do not fit the loaded IP-Adapters."""
    name = names.get("ip_adapter_image", "ip_adapter_image")
    if launch.ip_adapters and not request.ip_adapter_image:
        raise RequestError(
            f"{name} is missing, but an IP-Adapter is loaded. Send a reference image.", field=name
        )
    images, most = listed(request.ip_adapter_image), spec.ip_adapter.get("max_images")
    if most and len(images) > most:
        raise UnsupportedError(
            f"{len(images)} images as {name} are too many for {spec.title}. Send {most}.",
            field=name,
        )


def _require_extent(
    request: GenerateRequest, spec: ModelSpec, launch: AtLaunch, names: Mapping[str, str]
) -> None:
    """Raise RequestError for values outside what the checkpoint allows, and for too small sizes."""
    sizes = {name: getattr(request, name) for name in {*SIDES, *spec.extent}}
    named = {name: names.get(name, name) for name in sizes}
    image = request.init_image
    if request.latents is not None and request.latents.ndim == 4:
        sides = (side * spec.latent_pixels for side in request.latents.shape[-2:])
        sizes |= dict(zip(SIDES, sides, strict=True))
        named |= dict.fromkeys(SIDES, names.get("latents", "latents"))
    elif image is not None and request.height is None and request.width is None:
        sizes |= {"height": image.height, "width": image.width}
        named |= dict.fromkeys(SIDES, names.get("init_image", "init_image"))
    for name, size in sizes.items():
        value = size or launch.defaults.get(name) or _default(spec, name)
        if not value:
            continue
        least, most = spec.extent.get(name, (0, value))
        given = f"{name}={value}" if named[name] == name else f"{named[name]}: {name}={value}"
        if not least <= value <= most:
            only = f"{least} to {most}" if least < most else f"{most} only"
            raise RequestError(
                f"{given} is not allowed: this checkpoint of {spec.title} can do {only}. Send "
                "such a value.",
                field=named[name],
            )
        if name in SIDES and value < spec.size_multiple:
            raise RequestError(
                f"{given} is too small for {spec.title}. Allowed: multiples of "
                f"{spec.size_multiple}.",
                field=named[name],
            )


def _default(spec: ModelSpec, name: str) -> int | None:
    """Return the row's default of a field. Of other classes nobody knows it before they run."""
    is_open = spec.is_generic or (spec.sizes_by_image and name in SIDES)
    return None if is_open else getattr(spec, name, None)


def _require_compel(request: GenerateRequest, launch: AtLaunch, names: Mapping[str, str]) -> None:
    is_read = launch.compel and request.compel is not False and request.prompt_syntax is None
    if is_read and request.clip_skip:
        name = names.get("clip_skip", "clip_skip")
        raise UnsupportedError(
            f"{name}={request.clip_skip} is not available on a host that was started with "
            "--compel. Leave one of them out.",
            field=name,
        )
