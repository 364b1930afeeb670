"""The fields of A1111's txt2img and img2img: their /v1/jobs counterparts and their rules."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageFilter, ImageOps

from backends.errors import RequestError, UnsupportedError
from backends.generation.own_class.guidance import above_scale, own_scale
from backends.model_table import ModelSpec
from backends.request import whole_number
from hosts.dialects.a1111_control import NAMES as CONTROLNET
from hosts.dialects.a1111_control import control_fields
from hosts.dialects.a1111_options import CLIP_LAYERS, NO_CHURN, NOT_SAVED, SETTINGS
from hosts.dialects.a1111_passes import FILL, ORIGINAL, MaskedArea, filled, masked_area
from hosts.dialects.a1111_prompt import read_prompt
from hosts.dialects.a1111_samplers import scheduler_of
from hosts.http.decode import Accepted, read_image, read_mask
from hosts.http.dialect import (
    DONE,
    OFF,
    Rule,
    choice,
    contradiction,
    harmless,
    is_empty,
    is_strict,
    neutral,
    refused,
    require_known,
    shown,
    truth,
    whole,
)
from hosts.http.media import FORMATS

MASK_BLUR = 4
"""A1111's default, in pixels."""
MAX_BLUR = 64
MAX_PADDING = 4096
ON = (True, "true", "on", "yes", "1")
NO_FIRST_SIZE = "width and height are those of the first pass"
NO_SCRIPT = "scripts of the web interface cannot run here"
ONLY_PIX2PIX = "only InstructPix2Pix models use it"
NOTES = dict.fromkeys(
    (
        "url", "auth",  # SillyTavern
        "selection_info", "mode", "mask_expansion", "expanded_mask", "use_sharp_mask",  # Photoshop
        "original_prompt", "original_negative_prompt", "use_prompt_shortcut",
        "prompt_shortcut_ui_dict", "uniqueDocumentId",
        "use_deprecated_controlnet",  # stable-diffusion-api of npm
        "image_similarity",  # AI Render of Blender, beside denoising_strength
    ),
    harmless("a program's own note, which A1111 does not read either"),
)  # fmt: skip
"""What programs send along that asks for nothing. Answers do not repeat it: SillyTavern's `auth` is
a password.
"""
COMMON: dict[str, Rule] = {
    "prompt": DONE,
    "negative_prompt": DONE,
    "seed": DONE,
    "steps": DONE,
    "cfg_scale": DONE,
    "distilled_cfg_scale": DONE,
    "width": DONE,
    "height": DONE,
    "sampler_name": DONE,
    "sampler_index": DONE,
    "sampler": DONE,
    "scheduler": DONE,
    "batch_size": DONE,
    "n_iter": DONE,
    "lora": DONE,
    "closeness": DONE,
    "alwayson_scripts": DONE,
    "controlnet_units": DONE,
    "override_settings": DONE,
    "disable_extra_networks": DONE,
    "send_images": DONE,
    "styles": neutral(["None"], reason="styles are not supported. Write them into the prompt"),
    "subseed": harmless("subseed_strength decides whether it is used"),
    "subseed_strength": neutral(0, reason="seeds are not mixed here"),
    "seed_resize_from_h": neutral(-1, 0, reason="noise is generated for the requested size"),
    "seed_resize_from_w": neutral(-1, 0, reason="noise is generated for the requested size"),
    "restore_faces": neutral(*OFF, reason="face restoration is not supported"),
    "tiling": neutral(*OFF, reason="tiling images are not supported"),
    "do_not_save_samples": harmless(NOT_SAVED),
    "do_not_save_grid": harmless(NOT_SAVED),
    "save_images": harmless(NOT_SAVED),
    "eta": neutral(0, 1, reason="samplers have their own eta"),
    "s_min_uncond": neutral(0, reason="guidance is computed at every step"),
    "s_churn": neutral(0, reason=NO_CHURN),
    "s_tmax": neutral(0, reason=NO_CHURN),
    "s_tmin": neutral(0, reason=NO_CHURN),
    "s_noise": neutral(1, reason=NO_CHURN),
    "override_settings_restore_afterwards": harmless("settings act for one request only"),
    "refiner_checkpoint": neutral("none", reason="one model is loaded"),
    "refiner_switch_at": harmless("there is no refiner"),
    "comments": harmless("they are notes"),
    "force_task_id": harmless("it names the task"),
    "script_name": neutral("none", reason=NO_SCRIPT),
    "script_args": harmless("script_name decides whether they are used"),
    "infotext": refused("send the fields themselves"),
    "clip_skip": DONE,
    **NOTES,
}
HIRES = (
    "enable_hr", "denoising_strength", "hr_scale", "hr_upscaler", "hr_second_pass_steps",
    "hr_resize_x", "hr_resize_y", "hr_sampler_name", "hr_scheduler", "hr_prompt",
    "hr_negative_prompt", "hr_cfg", "hr_distilled_cfg",
)  # fmt: skip
"""Read if enable_hr is on (hosts/dialects/a1111_passes.py)."""
FIRST_PASS = (
    "hr_checkpoint_name", "hr_additional_modules", "firstphase_width", "firstphase_height",
)  # fmt: skip
OF_AN_IMAGE = (
    "mask_blur", "mask_blur_x", "mask_blur_y", "inpainting_mask_invert",
    "mask_round", "resize_mode", "image_cfg_scale", "inpainting_fill", "inpaint_full_res",
    "inpaint_full_res_padding", "initial_noise_multiplier",
)  # fmt: skip
"""How img2img treats its image. Programs send one body to both calls."""
TXT2IMG: dict[str, Rule] = {
    **COMMON,
    **dict.fromkeys(HIRES, DONE),
    "hr_checkpoint_name": neutral("use same checkpoint", "none", reason="one model is loaded"),
    "hr_additional_modules": neutral(["Use same choices"], reason="one model is loaded"),
    "firstphase_width": neutral(0, reason=NO_FIRST_SIZE),
    "firstphase_height": neutral(0, reason=NO_FIRST_SIZE),
    **dict.fromkeys(OF_AN_IMAGE, harmless("there is no image to start from")),
    "include_init_images": DONE,
    **dict.fromkeys(("init_images", "mask"), refused("send it to /sdapi/v1/img2img")),
    "firstpass_image": refused("the first pass is generated. Send the image to img2img"),
}
IMG2IMG: dict[str, Rule] = {
    **COMMON,
    **dict.fromkeys((*HIRES, *FIRST_PASS), harmless("enable_hr decides whether it is used")),
    "enable_hr": neutral(*OFF, reason="only txt2img has a second pass"),
    "denoising_strength": DONE,
    "init_images": DONE,
    "include_init_images": DONE,
    "mask": DONE,
    "mask_blur": DONE,
    "mask_blur_x": DONE,
    "mask_blur_y": DONE,
    "inpainting_mask_invert": DONE,
    "mask_round": neutral(*ON, reason="masks are black and white here"),
    "resize_mode": neutral(0, reason="images are scaled to the size"),
    "image_cfg_scale": harmless(ONLY_PIX2PIX),
    "inpainting_fill": neutral(
        FILL,
        ORIGINAL,
        reason=f"masked parts start from their surroundings ({FILL}) or the image ({ORIGINAL})",
    ),
    "inpaint_full_res": DONE,
    "inpaint_full_res_padding": DONE,
    "initial_noise_multiplier": neutral(1, reason="noise has the sampler's strength"),
    "latent_mask": refused("send mask instead"),
}
OVERRIDES: dict[str, Rule] = {
    **SETTINGS,
    "sd_model_checkpoint": DONE,
    CLIP_LAYERS: DONE,
    "samples_format": DONE,
}
"""Settings in a request."""
NOTHING = " "
"""An empty prompt, which A1111 allows: CLIP reads a space as no token."""
SENT_AS = {
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "denoising_strength": "strength",
    "closeness": "quality",
}
PLAIN = ("prompt", "negative_prompt", "seed", "width", "height")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The contents of a request."""

    fields: dict[str, Any]
    """With the names of /v1/jobs."""
    sent_as: dict[str, str]
    """Field -> A1111's name, where it differs."""
    number: int
    """Number of images."""
    batch_size: int
    """Images per batch, as the client counts them."""
    content_type: str = "image/png"
    """Of the images in the response."""
    above_scale: float = 0.0
    """By how much cfg_scale is above the model's own scale."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the client on how its request was read."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further settings for the infotext."""


def asked_for(
    body: Mapping[str, Any], *, spec: ModelSpec, accepted: Accepted, title: str, most: int
) -> Asked:
    """Return the fields that txt2img and img2img share.

    title: the model's title. most: largest number of images in a request.
    """
    overrides = _mapping(body, "override_settings")
    if is_strict(body):
        require_known(overrides, OVERRIDES)
        require_model(overrides.get("sd_model_checkpoint"), title)
    fields = {name: body[name] for name in PLAIN if not is_empty(body.get(name))}
    sent_as = {ours: theirs for theirs, ours in SENT_AS.items() if not is_empty(body.get(theirs))}
    fields |= {ours: body[theirs] for ours, theirs in sent_as.items()}
    prompt = read_prompt(body, spec=spec, accepted=accepted)
    if "prompt" in fields or spec.has_clip_prompts:
        fields["prompt"] = prompt.text or NOTHING
    fields |= {"lora": prompt.loras} if prompt.loras else {}
    fields |= prompt.fields
    if (scheduler := scheduler_of(body, spec)) is not None:
        fields["scheduler"] = scheduler
    _choose_guidance(fields, sent_as, body, spec)
    starts = body.get("init_images")
    start = starts[0] if isinstance(starts, list) and starts else None
    control, control_sent_as = control_fields(_scripts(body), accepted, start=start)
    batch_size = whole(body, "batch_size", 1, low=1, high=10**6)
    number = whole(body, "n_iter", 1, low=1, high=10**6) * batch_size
    if number > most:
        raise RequestError(
            f"n_iter x batch_size is {number}. Allowed: up to {most}.", field="n_iter"
        )
    return Asked(
        fields={**fields, **control, **_clip_skip(body, overrides)},
        sent_as={**sent_as, **control_sent_as},
        number=number,
        batch_size=batch_size,
        content_type=choice(overrides, "samples_format", FORMATS, "image/png"),
        above_scale=above_scale(spec),
        notes=prompt.notes,
    )


def require_model(name: Any, title: str) -> None:
    """Raise UnsupportedError if the request names a model that is not loaded."""
    if not is_empty(name) and name != title:
        raise UnsupportedError(
            f"sd_model_checkpoint={shown(name)} is not loaded. Allowed: {title!r}; start another "
            "host.",
            field="sd_model_checkpoint",
        )


def start_fields(
    body: Mapping[str, Any], *, spec: ModelSpec, accepted: Accepted, size: tuple[int, int]
) -> tuple[dict[str, Any], MaskedArea | None]:
    """Return the image of img2img and its mask, and the area if only the masked one is generated.

    size: width and height that are generated.
    """
    sources = body.get("init_images")
    most = max(1, spec.most_images)
    if isinstance(sources, list):
        sources = [each for each in sources if not is_empty(each)]
    if not isinstance(sources, list) or not 1 <= len(sources) <= most:
        raise RequestError(
            f"init_images must hold {'one image' if most == 1 else f'1 to {most} images'}, base64 "
            "of a PNG, JPEG or WebP file.",
            field="init_images",
        )
    if spec.most_images > 0 and is_empty(body.get("mask")):
        return {"image": sources if len(sources) > 1 else sources[0]}, None
    if len(sources) > 1:
        raise RequestError("init_images must hold one image beside a mask.", field="init_images")
    name = "image" if "image" in spec.requires else "init_image"
    if is_empty(body.get("mask")):
        return {name: sources[0]}, None
    mask = read_mask(body["mask"], field="mask", accepted=accepted)
    if truth(body, "inpainting_mask_invert", False):
        mask = ImageOps.invert(mask)
    mask = _blurred(mask, body)
    image = read_image(sources[0], field="init_images", accepted=accepted)
    area = None
    if truth(body, "inpaint_full_res", True) and name == "init_image":
        padding = whole(body, "inpaint_full_res_padding", 0, low=0, high=MAX_PADDING)
        area = masked_area(image, mask, padding=padding, size=size)
    fields = area.fields(size) if area else {name: image, "mask_image": mask}
    if whole(body, "inpainting_fill", FILL, low=0, high=3) == FILL:
        scaled = {key: each.resize(size, Image.Resampling.LANCZOS) for key, each in fields.items()}
        fields[name] = filled(scaled[name], scaled["mask_image"])
    return fields, area


def _blurred(mask: Image.Image, body: Mapping[str, Any]) -> Image.Image:
    both = whole(body, "mask_blur", MASK_BLUR, low=0, high=MAX_BLUR)
    radius = [whole(body, f"mask_blur_{axis}", both, low=0, high=MAX_BLUR) for axis in "xy"]
    return mask.filter(ImageFilter.GaussianBlur(radius)) if any(radius) else mask


def _choose_guidance(
    fields: dict[str, Any], sent_as: dict[str, str], body: Mapping[str, Any], spec: ModelSpec
) -> None:
    """Set the guidance as the model counts it, or that of a distilled model.

    Forge's clients send it as distilled_cfg_scale, with a cfg_scale of 1 for no further guidance.
    """
    if "guidance_scale" in fields:
        fields["guidance_scale"] = own_scale(fields["guidance_scale"], spec)
    if spec.guidance != "distilled":
        return
    distilled, plain = body.get("distilled_cfg_scale"), body.get("cfg_scale")
    is_off = whole_number(plain) == 1
    if not (is_empty(distilled) or is_empty(plain) or is_off):
        raise UnsupportedError(
            f"cfg_scale={shown(plain)} is not available beside distilled_cfg_scale: {spec.title} "
            "has one guidance. Send cfg_scale 1.",
            field="cfg_scale",
        )
    if not is_empty(distilled):
        fields["guidance_scale"], sent_as["guidance_scale"] = distilled, "distilled_cfg_scale"
    elif is_off:
        fields.pop("guidance_scale")


def _scripts(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return alwayson_scripts, with the units that older programs send beside it."""
    scripts, units = _mapping(body, "alwayson_scripts"), body.get("controlnet_units")
    is_sent = is_empty(units) or any(name.lower() in CONTROLNET for name in scripts)
    return scripts if is_sent else {**scripts, CONTROLNET[0]: units}


def _clip_skip(body: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Convert CLIP skip: A1111 counts from 1, so its 1 skips no layer. SD.Next's programs send it
    as clip_skip, which may be 0 or -1 for none.
    """
    layers = whole(overrides, CLIP_LAYERS, 1, low=1, high=12)
    same = whole(body, "clip_skip", layers, low=-1, high=12)
    if not is_empty(overrides.get(CLIP_LAYERS)) and max(same, 1) != layers and is_strict(body):
        raise contradiction({**body, **overrides}, CLIP_LAYERS, "clip_skip")
    layers = max(layers, same)
    return {"clip_skip": layers - 1} if layers > 1 else {}


def _mapping(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name)
    if is_empty(value):
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(f"{name}={shown(value)} is not allowed. Send an object.", field=name)
    return value
