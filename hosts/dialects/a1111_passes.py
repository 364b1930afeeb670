"""What A1111 does around one generation: hires fix, which generates a larger image from the first;
the masked area of img2img, which generates only a part of the image; and masked content, what the
masked parts start from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from backends.errors import RequestError, UnsupportedError
from backends.generation.own_class.guidance import own_scale
from backends.model_table import ModelSpec
from backends.request import GenerateResult
from hosts.dialects.a1111_prompt import read_prompt
from hosts.dialects.a1111_samplers import scheduler_of
from hosts.http.decode import Accepted
from hosts.http.dialect import is_empty, shown, whole

HIRES_STRENGTH = 0.75
"""A1111's default for denoising_strength of the second pass."""
_LINEAR, _CUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
LATENT_UPSCALERS = {
    "Latent": _LINEAR,
    "Latent (antialiased)": _LINEAR,
    "Latent (bicubic)": _CUBIC,
    "Latent (bicubic antialiased)": _CUBIC,
    "Latent (nearest)": Image.Resampling.NEAREST,
    "Latent (nearest-exact)": Image.Resampling.NEAREST,
}
"""Enlarge the latents. When enlarging, antialiasing changes nothing."""
IMAGE_UPSCALERS = {
    "None": Image.Resampling.LANCZOS,
    "Lanczos": Image.Resampling.LANCZOS,
    "Nearest": Image.Resampling.NEAREST,
}
"""Enlarge the decoded image."""
MAX_SCALE = 8
FILL, ORIGINAL = 0, 1
"""Values of inpainting_fill: masked parts start from their surroundings, or from the image."""
FILL_RADII = (256, 64, 16, 16, 4, 4, 4, 4, 2, 2, 0)
"""Pixels by which the surroundings are blurred, each blur over the one before."""
SAME = ("", "use same sampler", "use same scheduler")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hires:
    """The second pass of a request."""

    width: int
    height: int
    upscaler: str
    fields: dict[str, Any]
    """Of the second pass where they differ from the first one's, with the names of /v1/jobs."""
    sent_as: dict[str, str]
    facts: dict[str, Any]
    """For the infotext."""
    first: dict[str, Any] = field(default_factory=dict)
    """Fields that only the first pass has."""

    def start(self, first: GenerateResult) -> dict[str, Any]:
        """Return the fields that start the second pass from the first one's result."""
        size = {"width": self.width, "height": self.height, "seed": first.seed}
        if self.upscaler in LATENT_UPSCALERS:
            method = LATENT_UPSCALERS[self.upscaler]
            return {**size, "latents": self._enlarged(first, method), **self.fields}
        image = Image.fromarray(first.frames[0])
        method = IMAGE_UPSCALERS.get(self.upscaler, Image.Resampling.LANCZOS)
        enlarged = image.resize((self.width, self.height), method)
        return {**size, "init_image": enlarged, **self.fields}

    def _enlarged(self, first: GenerateResult, method: Image.Resampling) -> np.ndarray:
        """Return the latents (1, C, h, w) at the size of the second pass."""
        _, _, height, width = first.latents.shape
        _, pixels_high, pixels_wide, _ = first.frames.shape
        size = (width * self.width // pixels_wide, height * self.height // pixels_high)
        planes = [
            np.asarray(Image.fromarray(plane).resize(size, method))
            for plane in first.latents[0].astype(np.float32)
        ]
        return np.stack(planes)[None]


def hires_of(
    body: Mapping[str, Any],
    *,
    size: tuple[int, int],
    spec: ModelSpec,
    accepted: Accepted,
) -> Hires:
    """Return the second pass of a request with enable_hr. size: width and height of the first."""
    if not spec.returns_latents:
        raise UnsupportedError(
            f"enable_hr is not available: {spec.title} starts from no image. Leave it out.",
            field="enable_hr",
        )
    width, height, sent_as, facts = _target(body, size)
    upscaler = _upscaler(body.get("hr_upscaler"), accepted)
    is_network = upscaler in accepted.upscalers
    steps = whole(body, "hr_second_pass_steps", 0, low=0, high=accepted.limits.max_steps)
    strength = body.get("denoising_strength")
    fields: dict[str, Any] = {"strength": HIRES_STRENGTH if is_empty(strength) else strength}
    sent_as["strength"] = "denoising_strength"
    if steps:
        fields["num_inference_steps"], sent_as["num_inference_steps"] = (
            steps,
            "hr_second_pass_steps",
        )
    name = "hr_distilled_cfg" if spec.guidance == "distilled" else "hr_cfg"
    if body.get(name) not in (None, "", 0, "0"):
        fields["guidance_scale"] = own_scale(body[name], spec)
        sent_as["guidance_scale"] = name
    fields |= _prompts(body, spec, accepted) | _sampler(body, spec)
    facts |= {"Hires steps": steps or None, "Hires upscaler": upscaler}
    facts |= {"Denoising strength": fields["strength"]}
    return Hires(
        width=width,
        height=height,
        upscaler=upscaler,
        first={"upscaler": upscaler} if is_network else {},
        fields=fields,
        sent_as=sent_as,
        facts=facts,
    )


def _target(
    body: Mapping[str, Any], size: tuple[int, int]
) -> tuple[int, int, dict[str, str], dict[str, Any]]:
    """Return width and height of the second pass, their names in the request, and facts."""
    wanted = [whole(body, f"hr_resize_{axis}", 0, low=0, high=10**6) for axis in "xy"]
    facts: dict[str, Any] = {"Size": f"{size[0]}x{size[1]}"}
    if any(wanted):
        width = wanted[0] or size[0] * wanted[1] // size[1]
        height = wanted[1] or size[1] * wanted[0] // size[0]
        if abs(width / size[0] - height / size[1]) * min(size) > 1:
            raise UnsupportedError(
                f"hr_resize_x={width} and hr_resize_y={height} are not available: they change the "
                f"shape of {size[0]}x{size[1]}. Send one of them, or hr_scale.",
                field="hr_resize_x",
            )
        sent_as = {"width": "hr_resize_x", "height": "hr_resize_y"}
        return width, height, sent_as, facts | {"Hires resize": f"{wanted[0]}x{wanted[1]}"}
    scale = 2.0 if is_empty(body.get("hr_scale")) else _number(body["hr_scale"])
    width, height = (int(side * scale) for side in size)
    return (
        width,
        height,
        dict.fromkeys(("width", "height"), "hr_scale"),
        facts | {"Hires upscale": f"{scale:g}"},
    )


def _number(value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else 0.0
    except (TypeError, ValueError, OverflowError):
        number = 0.0
    if not 1 <= number <= MAX_SCALE:
        raise RequestError(
            f"hr_scale={shown(value)} is not allowed. Allowed: 1 to {MAX_SCALE}.", field="hr_scale"
        )
    return number


def _upscaler(value: Any, accepted: Accepted) -> str:
    known = (*LATENT_UPSCALERS, *IMAGE_UPSCALERS, *accepted.upscalers)
    names = {name.lower(): name for name in known}
    found = "Latent" if is_empty(value) else names.get(str(value).lower())
    if found is None:
        raise RequestError(
            f"hr_upscaler={shown(value)} is not an upscaler here. Allowed: "
            f"{', '.join(names.values())}.",
            field="hr_upscaler",
        )
    return found


def _prompts(body: Mapping[str, Any], spec: ModelSpec, accepted: Accepted) -> dict[str, Any]:
    """Return the second pass's own prompts, if it has any."""
    own = {
        name: body[f"hr_{name}"]
        for name in ("prompt", "negative_prompt")
        if not is_empty(body.get(f"hr_{name}"))
    }
    if not own:
        return {}
    texts = {name: body.get(name) for name in ("prompt", "negative_prompt")}
    prompt = read_prompt({**body, **texts, **own}, spec=spec, accepted=accepted)
    fields = own | prompt.fields | ({"prompt": prompt.text} if "prompt" in own else {})
    return fields | ({"lora": prompt.loras} if prompt.loras else {})


def _sampler(body: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Return the second pass's own scheduler, if it has one."""
    own = {
        theirs: body[f"hr_{theirs}"]
        for theirs in ("sampler_name", "scheduler")
        if str(body.get(f"hr_{theirs}") or "").strip().lower() not in SAME
    }
    sent_as = {theirs: f"hr_{theirs}" for theirs in own}
    scheduler = scheduler_of({**body, **own}, spec, sent_as=sent_as) if own else None
    return {} if scheduler is None else {"scheduler": scheduler}


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedArea:
    """The part of an image that is generated at the request's size and put back."""

    image: Image.Image
    """The whole image, RGB."""
    mask: Image.Image
    """Of the whole image, L, white where it changes."""
    box: tuple[int, int, int, int]
    """Left, upper, right and lower edge of the part."""

    def fields(self, size: tuple[int, int]) -> dict[str, Any]:
        """Return image and mask of the part, enlarged to the size that is generated."""
        part = self.image.crop(self.box).resize(size, Image.Resampling.LANCZOS)
        mask = self.mask.crop(self.box).resize(size, Image.Resampling.LANCZOS)
        return {"init_image": part, "mask_image": mask.convert("RGB")}

    def put_back(self, result: GenerateResult) -> GenerateResult:
        """Return the whole image with the generated part in its place, under the mask."""
        left, upper, right, lower = self.box
        part = Image.fromarray(result.frames[0])
        part = part.resize((right - left, lower - upper), Image.Resampling.LANCZOS)
        changed = self.image.copy()
        changed.paste(part, (left, upper))
        whole_image = Image.composite(changed, self.image, self.mask)
        return replace(result, frames=np.asarray(whole_image)[None], latents=None)


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Return the image with the colours of the surroundings where the mask is white.

    They are blurred the less, the nearer the edge is, because a blur of small radius reaches only
    there. image, mask: RGB, of one size.
    """
    opaque = image.convert("RGBA").convert("RGBa")
    nothing = Image.new("RGBa", image.size)
    around = Image.composite(nothing, opaque, mask.convert("L"))
    colours = Image.new("RGBA", image.size)
    for radius in FILL_RADII:
        colours.alpha_composite(around.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA"))
    return colours.convert("RGB")


def masked_area(
    image: Image.Image, mask: Image.Image, *, padding: int, size: tuple[int, int]
) -> MaskedArea | None:
    """Return the part around the white of the mask, in the shape of `size`. None if nothing is.

    image, mask: RGB. padding: pixels of the image around the white.
    """
    grey = ImageOps.grayscale(mask).resize(image.size, Image.Resampling.LANCZOS)
    if (white := grey.getbbox()) is None:
        return None
    box = [white[0] - padding, white[1] - padding, white[2] + padding, white[3] + padding]
    box = [max(0, box[0]), max(0, box[1]), min(image.width, box[2]), min(image.height, box[3])]
    wide, high = box[2] - box[0], box[3] - box[1]
    if wide * size[1] > high * size[0]:
        box[1], box[3] = _widened(box[1], box[3], wide * size[1] / size[0], image.height)
    else:
        box[0], box[2] = _widened(box[0], box[2], high * size[0] / size[1], image.width)
    return MaskedArea(image=image, mask=grey, box=(box[0], box[1], box[2], box[3]))


def _widened(low: int, high: int, wanted: float, limit: int) -> tuple[int, int]:
    """Widen a span on both sides to the wanted length, within 0 and `limit`."""
    length = min(max(round(wanted), high - low), limit)
    start = min(max(0, low - (length - (high - low)) // 2), limit - length)
    return start, start + length
