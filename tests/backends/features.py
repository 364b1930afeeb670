"""What every feature of the model table means for every model type: launch values, request values,
and how it shows.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from PIL import Image

from backends import backend_class, planner
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.groups.mesh import Mesh
from backends.model_table import ModelSpec, read_table
from backends.parallel.base import Backend
from backends.quantization_spec import parse_quantization
from backends.request import CompileSettings, GenerateRequest, LoadRequest
from backends.step_cache_spec import KINDS, parse_step_cache
from tests.checkpoints import (
    IP_ADAPTER_FILE,
    checkpoint,
    controlnet,
    gguf,
    ip_adapter,
    lora,
    sample_image,
)

TABLE = read_table()
CPU = torch.device("cpu")
STEPS, HEIGHT, WIDTH = 2, 128, 64
EXACT_OPTIONS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "asyncdiff": {"unet": {}, "transformer": {}},
    "distrifuser": {
        mode: {"sync_mode": "full_sync", "no_split_batch": True} for mode in ("unet", "transformer")
    },
    "xdit": {"unet": {"use_cfg_parallel": True}, "transformer": {"ulysses_degree": 2}},
}
"""Launch settings with which a backend computes what one device does, by kind of denoiser; a
warm-up over all steps comes on top.
"""

OWN_ARGUMENTS: Mapping[str, Mapping[str, object]] = {
    # the class has the block of published models, and a tiny one ends before it
    "ltx2": {"spatio_temporal_guidance_blocks": [1]},
    # and its image is compressed as a video's by a package that is not installed for the tests
    "ltx2_i2v": {"spatio_temporal_guidance_blocks": [1], "image_crf": 0},
    # its text encoder would write a prompt of up to 512 tokens first
    "longcat": {"enable_prompt_rewrite": False},
}
"""Type -> arguments of its class that a request of the tests brings."""
OWN_SIZES: Mapping[str, Mapping[str, int]] = {
    # it scales all sizes to one area, and its patches divide the sides of this shape's latents
    "hidream": {"height": 128, "width": 32},
}
"""Type -> size that a request of the tests asks for."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """load, request: what switches it on. changes_result: whether the image differs from one
    without it.

    visible: smallest change of any latent or pixel by which it is seen to act. steps: how many it
    needs for that.
    """

    load: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    changes_result: bool = True
    visible: float = 0.02
    steps: int = STEPS


def feature(name: str, spec: ModelSpec) -> Feature:
    """How `spec` gets this feature in the tests."""
    match name:
        case "lora":
            return Feature(
                load={
                    "lora": {
                        str(lora(spec.name)): 0.8,
                        str(lora(spec.name, seed=1, style="dora")): -0.5,
                    }
                }
            )
        case "controlnet":
            net = str(controlnet("sd1" if spec.name == "ad" else spec.name))
            return Feature(
                load={"control_net": {net: 0.9}}, request={"control_image": sample_image(48)}
            )
        case "ip_adapter":
            return Feature(
                load={"ip_adapter": {str(ip_adapter(spec.name) / IP_ADAPTER_FILE): 0.7}},
                request={"ip_adapter_image": sample_image(48)},
            )
        case "inpainting" if "mask_image" in spec.requires:
            return Feature(
                request={"mask_image": half_mask().transpose(Image.Transpose.ROTATE_180)}
            )
        case "inpainting":
            return Feature(
                request={"init_image": sample_image(48), "mask_image": half_mask(), "strength": 0.8}
            )
        case "gguf":
            return Feature(load={"gguf_model": str(gguf(spec.name, "Q4_0"))})
        case "quantization":
            int4 = parse_quantization("int4", option="quantize_to")
            return Feature(load={"quantize": {"denoiser": int4, "encoders": int4}})
        case "compile":
            return Feature(
                load={"compile": CompileSettings(targets=("denoiser",), backend="eager")},
                changes_result=False,
            )
        case "offload":
            return Feature(changes_result=False)
        case "step_cache":
            return Feature(
                load={"step_cache": parse_step_cache(KINDS[spec.denoiser][0] + ",4", spec)},
                steps=4,
                visible=0.01,
            )
        case "prediction":
            cache = parse_step_cache("prediction,3", spec)
            # a second denoiser begins a line of its own
            steps = 8 if len(spec.denoisers) > 1 else 5
            # its own sampler adds noise, so nothing would be skipped
            asked = {"scheduler": "euler"} if spec.name == "hy" else {}
            return Feature(load={"step_cache": cache}, request=asked, steps=steps, visible=0.001)
        case "compel":
            return Feature(
                load={"compel": True}, request={"prompt": "a (red)1.6 photo of a (cat)0.5"}
            )
    raise ValueError(name)


def half_mask(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """White in the left half, where an image may change."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def combined(names: list[str], spec: ModelSpec) -> Feature:
    """One feature, or several at once."""
    parts = [feature(name, spec) for name in names]
    return Feature(
        load={key: value for part in parts for key, value in part.load.items()},
        request={key: value for part in parts for key, value in part.request.items()},
        changes_result=any(part.changes_result for part in parts),
        visible=max(part.visible for part in parts),
        steps=max(part.steps for part in parts),
    )


def prepare(spec: ModelSpec, names: Iterator[str]) -> None:
    """Build all files in the test's own process: ranks would build them twice."""
    checkpoint(spec.name)
    for name in names:
        feature(name, spec)


def shrink_references() -> None:
    """Let classes that scale their images to a megapixel scale them to 64 x 64, also in ranks."""
    from diffusers.pipelines.flux import pipeline_flux_kontext
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = [(64, 64)]
    pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (64, 64, None)
    pipeline_qwenimage_edit_plus.calculate_dimensions = lambda area, ratio: (64, 64)


def loaded(spec: ModelSpec, **load: Any) -> LoadedPipeline:
    if spec.images and spec.latents == "packed":
        shrink_references()
    request = LoadRequest(
        model_type=spec.name, checkpoint=str(checkpoint(spec.name)), **({"variant": "fp32"} | load)
    )
    return load_pipeline(spec, request, device=CPU)


def request_for(spec: ModelSpec, **fields: Any) -> GenerateRequest:
    """A short generation; its warm-up covers all steps, so that approximate methods are exact."""
    base: dict[str, Any] = {
        "seed": 1,
        "num_inference_steps": STEPS,
        "height": HEIGHT,
        "width": WIDTH,
        "warmup_steps": STEPS,
    }
    if "prompt" in spec.requires:
        base["prompt"] = "a photo of a cat"
    if "image" in spec.requires:
        base["image"] = sample_image(HEIGHT // spec.upscale)
    if "mask_image" in spec.requires:
        base["mask_image"] = half_mask()
    if spec.output == "video":
        base["num_frames"] = 9 if spec.takes else 2
    if spec.name in OWN_ARGUMENTS:
        base["arguments"] = dict(OWN_ARGUMENTS[spec.name])
    return GenerateRequest(**(base | OWN_SIZES.get(spec.name, {}) | fields))


def result(pipe: LoadedPipeline, asked: GenerateRequest) -> torch.Tensor:
    """The latents, or for types that give none the frames in 0..1, as float32."""
    made = pipe.generate(asked)
    return (
        torch.from_numpy(made.latents)
        if made.latents is not None
        else torch.from_numpy(made.frames).float() / 255
    )


def meshes(spec: ModelSpec, backends: Iterator[str], rank: int, world_size: int) -> dict[str, Mesh]:
    """One mesh per backend, in its exact mode; the same for all features."""
    found = {}
    for name in backends:
        options = {**EXACT_OPTIONS[name][spec.denoiser], "checkpoint": str(checkpoint(spec.name))}
        found[name] = Mesh(planner(name)(spec, options, world_size), rank=rank, device=CPU)
    return found


def num_graphs() -> int:
    """How many graphs this process has compiled since the counters were cleared."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@contextmanager
def attached(pipe: LoadedPipeline, mesh: Mesh) -> Iterator[Backend]:
    backend = backend_class(mesh.plan.method)(spec=pipe.spec, plan=mesh.plan, mesh=mesh)
    if hasattr(backend, "costs_of"):
        backend.costs_of = parameter_counts
    pipe.attach(backend)
    try:
        yield backend
    finally:
        pipe.detach()


def parameter_counts(hooks: Any, call: Any, layout: Any, device: torch.device) -> list[float]:
    """Segments by size, so that no clock decides where asyncdiff cuts."""
    return [
        1.0 + sum(parameter.numel() for parameter in hooks.modules[unit.name].parameters())
        for unit in layout.units
    ]
