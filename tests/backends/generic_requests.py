"""What each pipeline class is asked for, small, and what plain diffusers makes of it."""

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backends.files.generic import CARRIED, LISTED_IMAGES, NOT_ASKED, OWN, carrier
from backends.generation.generic_run import frames_of, own_argument
from backends.loading.offload import TILED_ONLY
from backends.loading.processors import pipeline_from_folder
from backends.model_table import ModelSpec
from hosts.http.media import npy, png
from tests.checkpoints import sample_image, upstream
from tests.checkpoints.variants import MODULAR, variant

SIZE, LENGTH, STEPS, SEED = 64, 5, 4, 3
LEAST_SIDE = {
    "AllegroPipeline": 32,
    "Flux2KleinInpaintPipeline": 64,
    "StableDiffusionLatentUpscalePipeline": 64,
}
"""Pipeline class -> smallest side of an image that it takes, or of which each of two ranks has more
than one token, where its test has a smaller one.
"""
LEFT_OUT = {"Kandinsky5I2IPipeline": "max_sequence_length"}
"""Pipeline class -> argument of its test that is too short for tokenizers that spell words."""
DECIDED = re.compile(r"guidance|prompt(?!_template)|embeds|latents")
"""Arguments of which the walk has its own values, or that follow from others."""


def checkpoint_of(name: str) -> Path:
    """Return a tiny checkpoint of this class. LookupError if there is none."""
    return upstream.checkpoint(name) if name in upstream.known() else variant(name)


def fields_of(name: str, spec: ModelSpec) -> dict[str, Any]:
    """Return a small request with everything that the class takes, in the sizes of its test."""
    mask = Image.new("RGB", (SIZE, SIZE), "black")
    mask.paste("white", (0, 0, SIZE, SIZE // 2))
    asked: dict[str, Any] = {
        "prompt": "a photo of a cat",
        "negative_prompt": "a dog",
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "num_frames": LENGTH,
        "image": sample_image(SIZE),
        "mask_image": mask,
        "control_image": sample_image(SIZE, seed=1),
        "strength": 0.6,
    }
    if "video" in spec.requires:
        asked["video"] = [sample_image(SIZE, seed=seed) for seed in range(LENGTH)]
    if name in upstream.known():
        inputs = upstream.inputs(name)
        asked |= _sizes_of(name, inputs, spec)
        asked["arguments"] = _own_arguments(inputs, spec)
        asked["arguments"].pop(LEFT_OUT.get(name), None)
        if "use_resolution_binning" in spec.parameters:
            # else the size becomes the nearest of a list that starts at 512
            asked["arguments"]["use_resolution_binning"] = False
        if isinstance(inputs.get("prompt"), str) and inputs["prompt"]:
            asked["prompt"] = inputs["prompt"]  # some classes want JSON
    if name == "GlmImagePipeline":
        del asked["image"]  # its tiny language model cannot read one
    return {
        name: value for name, value in asked.items() if name in spec.takes and value is not None
    }


def _sizes_of(pipeline: str, inputs: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Return the sizes in the arguments of a test; None for those that the class chooses."""
    found: dict[str, Any] = {}
    for size in ("height", "width", "num_frames"):
        name = carrier(spec.parameters, size)
        found[size] = (inputs[name] or SIZE) if name in inputs else None
        if found[size] is not None and size != "num_frames":
            found[size] = max(found[size], LEAST_SIDE.get(pipeline, 0))
    for picture in ("image", "control_image", "mask_image", "video"):
        names = [name for name in CARRIED[picture] if name in inputs]
        if names and (side := _side(inputs[names[0]])):
            side = max(side, LEAST_SIDE.get(pipeline, 0))
            mask = Image.new("RGB", (side, side), "black")
            mask.paste("white", (0, 0, side, side // 2))
            found[picture] = mask if picture == "mask_image" else sample_image(side)
            is_list = isinstance(inputs[names[0]], list)
            if picture == "video" or (picture == "control_image" and is_list):
                count = len(inputs[names[0]]) if is_list else LENGTH
                found[picture] = [sample_image(side, seed=seed) for seed in range(count)]
    return found


def _own_arguments(inputs: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Return what has no field, as a request brings it: what the class needs, and settings."""
    carried = {carrier(spec.parameters, name) for name in CARRIED} | {spec.guidance_argument}
    needed = {field.removeprefix(OWN) for field in spec.requires if field.startswith(OWN)}
    return {
        name: _sendable(value)
        for name, value in inputs.items()
        if name in needed or (name not in carried and _is_setting(name, value))
    }


def _is_setting(name: str, value: Any) -> bool:
    return not (NOT_ASKED.search(name) or DECIDED.search(name)) and _is_sendable(value)


def _is_sendable(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(each is None or _is_sendable(each) for each in value)
    if isinstance(value, dict):
        return all(map(_is_sendable, value.values()))
    return isinstance(value, bool | int | float | str | Image.Image | Tensor)


def _sendable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_sendable(each) for each in value]
    if isinstance(value, dict):
        return {"object": {name: _sendable(each) for name, each in value.items()}}
    if isinstance(value, Image.Image):
        return {"image": png(value)}
    return {"npy": npy(value.numpy())} if isinstance(value, Tensor) else value


def _side(value: Any) -> int | None:
    """Return the width of an image, tensor or array, or of the first in a list of them."""
    if isinstance(value, list | tuple):
        return _side(value[0]) if value else None
    if isinstance(value, Image.Image):
        return value.width
    if isinstance(value, Tensor):
        return value.shape[-1]
    return value.shape[-2] if isinstance(value, np.ndarray) and value.ndim > 2 else None


class Guardrail:
    """Stands in for Cosmos's guardrail, a package of its own, which the host does not have."""

    def to(self, *_: Any) -> "Guardrail":
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return frames


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """Let this pipeline class load with the stand-in, if it wants a guardrail."""
    import diffusers

    if name in MODULAR:
        yield
        return
    module = sys.modules[getattr(diffusers, name).__module__]
    plain = getattr(module, "CosmosSafetyChecker", None)
    if plain is None:
        yield
        return
    module.CosmosSafetyChecker = Guardrail
    try:
        yield
    finally:
        module.CosmosSafetyChecker = plain


def plain_frames(name: str, spec: ModelSpec, fields: dict[str, Any]) -> np.ndarray:
    """uint8 (N, H, W, 3) of diffusers' own pipeline, called with the same values."""
    import diffusers

    if name in MODULAR:
        return frames_of(_plain_modular(name, fields), spec.output)
    with guarded(name):
        pipe = pipeline_from_folder(
            getattr(diffusers, spec.pipeline), checkpoint_of(name), local_files_only=True
        )
    pipe.set_progress_bar_config(disable=True)
    if type(getattr(pipe, "vae", None)).__name__ in TILED_ONLY:
        pipe.vae.enable_tiling()
    arguments = {
        spec.guidance_argument
        if name == "guidance_scale"
        else carrier(spec.parameters, name): value
        for name, value in fields.items()
        if name != "arguments"
    }
    own = fields.get("arguments") or {}
    arguments |= {name: own_argument(value) for name, value in own.items()}
    if "max_area" in spec.parameters:
        arguments["max_area"] = fields["height"] * fields["width"]
    if name.startswith("SanaSprint"):
        arguments["intermediate_timesteps"] = None  # by default the class takes two steps only
    if name in LISTED_IMAGES and "image" in arguments:
        arguments["image"] = [arguments["image"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        output = pipe(**arguments, generator=torch.Generator().manual_seed(SEED), output_type="np")
    return frames_of(output, spec.output)


def _plain_modular(name: str, fields: dict[str, Any]) -> SimpleNamespace:
    """Return the outputs of diffusers' own call of a modular pipeline."""
    from diffusers import ModularPipeline

    pipe = ModularPipeline.from_pretrained(str(checkpoint_of(name)), local_files_only=True)
    pipe.load_components(
        [each for each in pipe.pretrained_component_names if (checkpoint_of(name) / each).is_dir()]
    )
    given = dict(fields)
    if "guider" in pipe.components:
        pipe.update_components(guider=pipe.guider.new(guidance_scale=given.pop("guidance_scale")))
    given.pop("arguments", None)
    kind = "pil" if name == "QwenImageModularPipeline" else "np"  # for an image with a mask
    state = pipe(**given, generator=torch.Generator().manual_seed(SEED), output_type=kind)
    return SimpleNamespace(**{each: state.get(each) for each in pipe.blocks.output_names})


def largest_difference(one: np.ndarray, two: np.ndarray) -> float:
    if one.shape != two.shape:
        return float("inf")
    return float(np.abs(one.astype(int) - two.astype(int)).max())


def reason_of(error: BaseException) -> str:
    """Return what went wrong, and where in the product."""
    trace = traceback.extract_tb(error.__traceback__)
    places = [each for each in trace if "/backends/" in each.filename] or list(trace)
    where = f"{Path(places[-1].filename).name}:{places[-1].lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]} ({where})"
