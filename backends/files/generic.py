"""The spec of a checkpoint whose pipeline class has no row in the model table. Imports no torch.

Everything is read: the class from model_index.json, its arguments and its result from the source of
diffusers (pipeline_calls.py), the denoisers from the classes of the components.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backends import WITHOUT_ROW
from backends.errors import ConfigError, RequestError
from backends.files.call_rules import attributes_of
from backends.files.checkpoint import (
    Checkpoint,
    Config,
    is_modular,
    read_config,
    read_index,
    read_json,
    with_article,
)
from backends.files.modular import modular_call_of
from backends.files.pipeline_calls import (
    IMAGES,
    VIDEOS,
    PipelineCall,
    needed_components,
    pipeline_call,
    size_multiple,
)
from backends.model_table import FEATURES, GENERIC, BackendSpec, Cell, ModelSpec

DENOISER = re.compile(r"Transformer|UNet|DiT|UVit|UniDiffuser")
NO_DENOISER = re.compile(r"ControlNet|Vae|VAE|Adapter|TemporalModel")
"""Class names of models that are called once in each step, and of others that look like them."""
FALLBACK_SIDE = 1024
"""In pixels, where neither the class nor the checkpoint has a default. For estimates only."""
FLOAT32_VAES = frozenset({"AutoencoderKLWan", "AutoencoderKLAllegro"})
"""VAEs that lose too much in half precision: diffusers' own examples load them in float32."""
MAX_REFERENCES = 10
FRAMES_PER_S = 16
"""Speed of a video whose class takes none."""
LISTED_IMAGES = frozenset({"GlmImagePipeline"})
"""Classes that want a list even of one image, though they declare both."""
GRID = ("task_prompt", "content_prompt", "image")
"""What classes need whose images are examples in rows, with an empty place for the one to make."""
GUIDED_BY = ("guidance_scale", "true_cfg_scale", "max_guidance_scale", "prior_guidance_scale")
STEPS = ("num_inference_steps", "prior_num_inference_steps")
CARRIED = {
    "prompt": ("prompt",),
    "negative_prompt": ("negative_prompt",),
    "height": ("height",),
    "width": ("width",),
    "num_frames": ("num_frames", "video_length"),
    "fps": ("fps", "frame_rate"),
    "num_inference_steps": STEPS,
    "guidance_scale": GUIDED_BY,
    "clip_skip": ("clip_skip",),
    "image": ("image", "input_image", "input_images", "example_image", "reference_image"),
    "init_image": ("image",),
    "mask_image": ("mask_image",),
    "strength": ("strength",),
    "control_image": (
        "control_image",
        "conditioning_image",
        "condtioning_image",
        "conditioning_frames",
    ),
    "video": ("video", "control_video"),
    "controlnet_conditioning_scale": ("controlnet_conditioning_scale",),
    "control_guidance_start": ("control_guidance_start",),
    "control_guidance_end": ("control_guidance_end",),
    "denoising_end": ("denoising_end",),
    "decode_chunk_size": ("decode_chunk_size",),
    "motion_bucket_id": ("motion_bucket_id",),
    "noise_aug_strength": ("noise_aug_strength",),
}
"""Request field -> the arguments of a pipeline that may carry it, the best first."""
PLAIN = re.compile(r"Tensor|ndarray|Image|\b(int|float|str|bool)\b")
"""Types of arguments that a request can bring. Others are functions and objects of diffusers."""
OWN = "arguments."
"""Before the name of an argument that comes in the field `arguments`."""
NOT_ASKED = re.compile(r"generator|output_type|return_dict|callback|num_(images|videos)_per_prompt")
"""Arguments that the host decides."""
_NO_ROW = "a class without a row in the model table runs as diffusers has it"
_UNAVAILABLE = frozenset(FEATURES) - {"quantization", "offload"}


def generic_spec(folder: Path) -> ModelSpec:
    """Return what can be read of a checkpoint folder.

    ConfigError if its class makes no images or videos, or needs what no request field carries.
    """
    index = read_index(folder)
    name, call = modular_call_of(folder) if is_modular(folder) else _call_of(folder, index)
    if reason := why_not(call):
        raise ConfigError(
            f"--checkpoint={folder} is {with_article(name)}, which {reason}. Give a checkpoint of "
            "another class."
        )
    carriers = _carriers(call)
    denoisers = tuple(_denoisers(index))
    scale = _guidance_argument(call)
    height, width = _nominal_size(folder, call, denoisers)
    return ModelSpec(
        name=GENERIC,
        title=name,
        pipeline=name,
        denoiser=denoisers[0] if denoisers else "",
        other_denoisers=denoisers[1:],
        output="video" if _is_video(call) else "image",
        returns_latents=False,
        latents="spatial",
        height=height,
        width=width,
        num_inference_steps=_number(call, carriers.get("num_inference_steps"), 50),
        guidance_scale=float(_number(call, scale, 1.0)),
        guidance_argument=scale or "",
        num_frames=int(_number(call, carriers.get("num_frames"), 1)),
        frames_per_s=int(_number(call, carriers.get("fps"), FRAMES_PER_S)),
        size_multiple=size_multiple(name),
        flow_matching=_is_flow(folder),
        variant="bf16" if any(map(_is_transformer, denoisers)) else "fp16",
        vae_variant="fp32" if (index.get("vae") or ("", ""))[1] in FLOAT32_VAES else "",
        requires=tuple(_required(call, carriers)),
        images=MAX_REFERENCES if name in LISTED_IMAGES else _most_images(call, carriers),
        takes=tuple(_taken(call, carriers, scale)),
        parameters=MappingProxyType({**dict.fromkeys(call.required), **call.defaults}),
        attributes={} if is_modular(folder) else attributes_of(name, folder, index),
        backends=_backends(
            denoisers, _UNAVAILABLE | ({"offload"} if is_modular(folder) else set())
        ),
    )


def require_named(checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless the index names all components that its class needs.

    Some models are published without an encoder whose licence is another one.
    """
    name = str(checkpoint.index.get("_class_name"))
    missing = [
        f"{part} ({made})" if made else part
        for part, made in needed_components(name).items()
        if part not in checkpoint.index
    ]
    if missing:
        raise ConfigError(
            f"--checkpoint={checkpoint.path} lacks {', '.join(missing)}: its model_index.json does "
            f"not name what {with_article(name)} needs. Download the model to a folder, add each "
            "in a folder of its name, and add its library and class to model_index.json as the "
            "others have them."
        )


def own_class(checkpoint: Checkpoint) -> ModelSpec | None:
    """Return the facts of the checkpoint's own class, where the row is of another one or takes no
    arguments; None if a request gets nothing from them.
    """
    spec, name = checkpoint.spec, checkpoint.index.get("_class_name")
    is_row_of = name == spec.pipeline and not spec.runs_as_is
    if not is_row_of and (name not in spec.also or checkpoint.header is not None):
        return None
    try:
        own = generic_spec(checkpoint.folder)
    except ConfigError:  # it needs what no request can bring, and the row does without
        return None
    if is_row_of:
        own = replace(own, empty_negative=spec.empty_negative)
    return own if own.output == spec.output else None


def carrier(names: Mapping[str, Any] | frozenset[str], field: str) -> str | None:
    """Return the argument among `names` that carries a request field; None if there is none."""
    return next((name for name in CARRIED[field] if name in names), None)


def _call_of(folder: Path, index: Config) -> tuple[str, PipelineCall]:
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ConfigError(
            f"--checkpoint={folder} names no class of diffusers in its model_index.json "
            f"(_class_name={name!r}). Code that comes with a checkpoint is not run. Give a folder "
            "in diffusers layout."
        )
    call = pipeline_call(name)
    if call is None:
        raise ConfigError(
            f"--checkpoint={folder} is {with_article(name)}, which the installed diffusers does "
            "not have. Install a version that has it, or give another checkpoint."
        )
    return name, call


def why_not(call: PipelineCall) -> str:
    """Return why a class cannot be asked over HTTP; empty if it can."""
    if call.returns and not set(call.returns) & {*IMAGES, *VIDEOS}:
        made = ", ".join(dict.fromkeys(call.returns))
        return f"makes {made} and neither images nor videos"
    if call.continues:
        return "edits what a call of another of its methods has left, and a request makes one call"
    missing = [
        f"{parameter} ({call.annotations[parameter]})"
        for parameter in _without_field(call)
        if not PLAIN.search(call.annotations.get(parameter, "Tensor"))
    ]
    if missing:
        return f"needs {', '.join(missing)}, and no field of a request carries that"
    return ""


def _without_field(call: PipelineCall) -> list[str]:
    """Return the arguments that every request must bring, and that no field of it carries."""
    carried = set(_carriers(call).values())
    needed = (*call.required, *(GRID if _is_grid(call) else ()))
    return [parameter for parameter in needed if parameter not in carried]


def require_own_arguments(given: Mapping[str, Any], spec: ModelSpec) -> None:
    """Raise RequestError for arguments that are not the class's, or that have a field."""
    if not given:
        return
    call = pipeline_call(spec.pipeline) if not spec.parameters else None
    names = call.names if call is not None else spec.parameters
    own = {name for name in names if not NOT_ASKED.search(name)}
    fields = {carrier(own, field): field for field in CARRIED if field in spec.takes}
    fields |= {spec.guidance_argument: "guidance_scale"}
    for name in given:
        if name in fields:
            raise RequestError(
                f"{OWN}{name} has a field of its own. Send it as {fields[name]}.", field=OWN + name
            )
        if name not in own:
            allowed = ", ".join(sorted(own - fields.keys()))
            raise RequestError(
                f"{OWN}{name} is no argument of {spec.title}. Allowed: {allowed}.",
                field=OWN + name,
            )


def facts_of(call: PipelineCall) -> tuple[str, tuple[str, ...]]:
    """Return what the class makes, image or video, and the request fields that it takes.

    The arguments that every request must bring are named.
    """
    *taken, _ = _taken(call, _carriers(call), _guidance_argument(call))
    needed = ", ".join(_without_field(call))
    taken.append(f"arguments ({needed})" if needed else "arguments")
    return ("video" if _is_video(call) else "image"), tuple(taken)


def _carriers(call: PipelineCall) -> dict[str, str]:
    """Return request field -> the argument that carries it. No field has rows of images."""
    names = call.names - set(GRID) if _is_grid(call) else call.names
    return {field: found for field in CARRIED if (found := carrier(names, field))}


def _is_grid(call: PipelineCall) -> bool:
    return call.names >= set(GRID)


def _taken(call: PipelineCall, carriers: Mapping[str, str], scale: str | None) -> Iterator[str]:
    """Yield the request fields that have an effect.

    Some classes read the negative prompt only with a true_cfg_scale above 1, which is not theirs by
    default and which no field carries.
    """
    is_deaf = "true_cfg_scale" in call.names and scale != "true_cfg_scale"
    if _is_video(call) and "fps" not in carriers:
        yield "fps"  # of the file
    for field in carriers:
        if not (field == "negative_prompt" and is_deaf):
            yield field
    yield "arguments"


def _most_images(call: PipelineCall, carriers: Mapping[str, str]) -> int:
    """Return how many images a request may bring. For most classes a list of images is a batch."""
    if "last_image" in call.names:
        return 2  # the first frame and the last one
    declared = call.annotations.get(carriers.get("image", ""), "")
    is_list = "list[" in declared and "Tensor" not in declared
    return MAX_REFERENCES if is_list else int("image" in carriers)


def _required(call: PipelineCall, carriers: Mapping[str, str]) -> Iterator[str]:
    """Yield the request fields that every request must bring."""
    if "prompt" in carriers:
        yield "prompt"
    for field in ("image", "mask_image", "control_image", "video"):
        if carriers.get(field) in call.required:
            yield field
    for parameter in _without_field(call):
        yield OWN + parameter


def _is_video(call: PipelineCall) -> bool:
    return any(name in VIDEOS for name in call.returns)


def _denoisers(index: Config) -> Iterator[str]:
    """Yield the components that are denoisers: those that are called in each step."""
    for component, entry in index.items():
        is_model = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
        if not is_model or entry[0] == "transformers":
            continue
        if (DENOISER.search(entry[1]) and not NO_DENOISER.search(entry[1])) or (
            entry[1] == "PriorTransformer"
        ):
            yield component


def _is_transformer(component: str) -> bool:
    return component.startswith("transformer")


def _guidance_argument(call: PipelineCall) -> str | None:
    """Return the argument for the scale: the one of true guidance if that is on by default."""
    default = call.defaults.get("true_cfg_scale")
    if isinstance(default, int | float) and default > 1:
        return "true_cfg_scale"
    return carrier(call.names, "guidance_scale")


def _number(call: PipelineCall, name: str | None, otherwise: float) -> Any:
    value = call.defaults.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def _nominal_size(folder: Path, call: PipelineCall, denoisers: tuple[str, ...]) -> tuple[int, int]:
    """Return height and width by the call's defaults, else by the checkpoint's configurations."""
    side = FALLBACK_SIDE
    if denoisers:
        sample = read_config(folder / denoisers[0]).get("sample_size")
        channels = read_config(folder / "vae").get("block_out_channels")
        if isinstance(sample, int):
            side = sample * (2 ** (len(channels) - 1) if isinstance(channels, list) else 1)
    return int(_number(call, "height", side)), int(_number(call, "width", side))


def _is_flow(folder: Path) -> bool:
    """Return whether the checkpoint's scheduler is for flow matching."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    is_named = str(config.get("_class_name", "")).startswith(("FlowMatch", "LTXEulerAncestralRF"))
    return is_named or bool(config.get("use_flow_sigmas"))


def _backends(denoisers: tuple[str, ...], unavailable: frozenset[str]) -> Mapping[str, BackendSpec]:
    features = MappingProxyType(
        {
            feature: Cell(status="unsupported", reason=_NO_ROW)
            if feature in unavailable
            else Cell(status="untested")
            for feature in FEATURES
        }
    )
    able = Cell(status="untested")
    none = Cell(status="unsupported", reason="it has no denoiser to cut")
    only = Cell(status="unsupported", reason="it spreads a single transformer, and this has none")
    cells = {
        "": able,
        "denoiser": able if denoisers else none,
        "transformer": able if denoisers == ("transformer",) else only,
    }
    return MappingProxyType(
        {
            name: BackendSpec(cell=cells[divided], features=features)
            for name, divided in WITHOUT_ROW.items()
        }
    )
