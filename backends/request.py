"""What a loaded pipeline is asked for and returns, in diffusers' names. Imports no torch.

Rank 0 sends requests to all ranks as they are, so they hold only plain values, numpy arrays and PIL
images.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from backends.errors import RequestError
from backends.plan import Exactness, ParallelPlan, Quality
from backends.quantization_spec import QuantizationSpec
from backends.step_cache_spec import StepCacheSpec

Array = np.ndarray
MAX_SIDE = 8192
MAX_STEPS = 1000
MAX_FPS = 120
Weight = Annotated[float, Field(ge=-10, le=10)]
IMAGE_STRENGTH = 0.8
"""Default `strength` with init_image. At 1 nothing of the image would remain."""
CALL_DEFAULTS = {"decode_chunk_size": 8, "motion_bucket_id": 127, "noise_aug_strength": 0.02}
"""Arguments for pipelines that accept them, if a request leaves them out."""


WHOLE = re.compile(r"\s*([+-]?\d{1,30})(\.0*)?\s*", re.ASCII)


def whole_number(value: Any) -> int | None:
    """Return the integer that 5, 5.0, "5" and "5.0" mean, else None."""
    if isinstance(value, str) and (found := WHOLE.fullmatch(value)):
        return int(found[1])
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def listed(value: Any) -> list[Any]:
    """Return None as [], and a single value as [value]."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileSettings:
    """Settings of torch.compile. None leaves torch's default."""

    targets: tuple[Literal["denoiser", "vae", "encoders"], ...]
    backend: str | None = None
    mode: str | None = None
    options: dict[str, Any] | None = None  # override `mode`: torch takes only one of the two
    fullgraph: bool = True  # refuse graph breaks
    cache_limit: int | None = None  # graphs kept per function
    accumulated_cache_limit: int | None = None  # graphs kept in total
    capture_scalar: bool = False  # capture scalar outputs in the graph


WITH_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""torch.compile modes that record CUDA graphs -> the same mode without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """Everything that is fixed at load time. Paths are absolute.

    None means the checkpoint's own value, or the model table's default.
    """

    model_type: str  # a row of the model table
    checkpoint: str  # folder in diffusers layout, or one file
    checkpoint_config: str | None = None  # configuration folder of one file
    variant: Literal["fp16", "bf16", "fp32"]  # dtype of weights and arithmetic
    scheduler: dict[str, Any] | None = None  # name and settings
    vae: str | None = None  # folder or file
    vae_config: str | None = None
    denoiser: str | None = None  # folder or file in place of the UNet or transformer
    denoiser_config: str | None = None
    gguf_model: str | None = None  # the same in GGUF
    motion_adapter: str | None = None  # folder
    motion_module: str | None = None  # the same as one file
    motion_config: str | None = None
    # Folder or file -> scale; a request may change the scale.
    control_net: dict[str, float] = field(default_factory=dict)
    control_net_config: str | None = None
    # File -> scale; a request may change the scale.
    ip_adapter: dict[str, float] = field(default_factory=dict)
    # File -> scale; a request may replace the whole set.
    lora: dict[str, float] = field(default_factory=dict)
    # Name -> file of an upscaler.
    upscalers: dict[str, str] = field(default_factory=dict)
    # File -> scale, in every generation.
    motion_lora: dict[str, float] = field(default_factory=dict)
    # Group of components (quantization_spec.GROUPS) -> how their weights are stored.
    quantize: dict[str, QuantizationSpec] = field(default_factory=dict)
    compile: CompileSettings | None = None  # None: nothing is compiled
    compel: bool = False  # Compel reads the prompts
    step_cache: StepCacheSpec | None = None  # None: every step is computed in full
    # Groups of components whose weights are divided among the ranks: denoiser, encoders.
    divided: tuple[Literal["denoiser", "encoders"], ...] = ()
    # Where the text encoders are: on every rank, on rank 0, one on each in turn, in main memory.
    encoder_placement: Literal["every", "one", "spread", "cpu"] = "every"
    offload: Literal["model", "sequential", "group"] | None = None  # None: weights stay on the GPU
    enable_attention_slicing: bool = False
    xformers_efficient: bool = False  # attention by xformers
    enable_vae_tiling: bool = False
    enable_vae_slicing: bool = False
    parallel_vae: bool = True  # all ranks decode an image together
    height: int | None = None  # this and the next three: defaults for requests
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    prewarm_steps: int = 0  # steps of a throw-away image before the host is ready; 0: none

    @property
    def can_be_fused(self) -> bool:
        """Whether LoRAs can become part of the denoiser's weights: not of packed ones, nor of those
        that are offloaded layer by layer, which are not in their modules.
        """
        is_packed = bool(self.quantize) or self.gguf_model is not None
        return not is_packed and self.offload in (None, "model")


class GenerateRequest(BaseModel):
    """One image (or one video) to generate. Fields left out take the model table's defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    model: Annotated[
        str | None, Field(description="Name of the model, on a host with several.")
    ] = None
    prompt: Annotated[str | None, Field(description="What the image shows.")] = None
    negative_prompt: Annotated[str | None, Field(description="What it must not show.")] = None
    seed: Annotated[
        int | None,
        Field(
            ge=-(2**63),
            le=2**63 - 1,
            description="Same seed, same image. Absent or negative: chosen at random.",
        ),
    ] = None
    num_inference_steps: Annotated[
        int | None, Field(ge=1, le=MAX_STEPS, description="Sampling steps.")
    ] = None
    guidance_scale: Annotated[
        float | None,
        Field(
            ge=0, le=1000, description="How closely to follow the prompt; 0 is off, and for most 1."
        ),
    ] = None
    height: Annotated[int | None, Field(ge=8, le=MAX_SIDE, description="Pixels.")] = None
    width: Annotated[int | None, Field(ge=8, le=MAX_SIDE, description="Pixels.")] = None
    clip_skip: Annotated[
        int | None,
        Field(ge=0, le=12, description="Layers of the CLIP text encoder to skip at its end."),
    ] = None
    scheduler: Annotated[
        dict[str, Any] | str | None, Field(description="Sampler name, or its name and settings.")
    ] = None
    latents: Annotated[
        Array | None,
        Field(
            description="float32 (1, C, height / 8, width / 8), unscaled VAE space: where to start."
        ),
    ] = None
    init_image: Annotated[
        Image.Image | None,
        Field(description="The image to start from, scaled to the size; see strength."),
    ] = None
    mask_image: Annotated[
        Image.Image | None,
        Field(description="White where init_image may change, black where it stays."),
    ] = None
    strength: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description=(
                "How much of latents or init_image may change: 1 is all, 0 nothing. Absent: 0.8 "
                "with init_image, else 1."
            ),
        ),
    ] = 1.0
    denoising_end: Annotated[
        float, Field(ge=0, le=1, description="Stop after this share of the noise levels.")
    ] = 1.0
    first_step: Annotated[
        int,
        Field(
            ge=0,
            le=MAX_STEPS,
            description="Begin at this step, with latents of a run that ended there.",
        ),
    ] = 0
    stop_step: Annotated[
        int | None,
        Field(ge=1, le=MAX_STEPS, description="End before this step; what comes out is noisy."),
    ] = None
    latent_space: Annotated[
        Literal["vae", "model"],
        Field(
            description="What latents mean, both ways: the VAE's unscaled ones, or the denoiser's."
        ),
    ] = "vae"
    sigmas: Annotated[
        list[float] | None,
        Field(description="Noise levels, descending, the last one 0; overrides the steps."),
    ] = None
    timesteps: Annotated[
        list[int] | None,
        Field(description="The model's timesteps, descending; overrides the steps."),
    ] = None
    prompt_embeds: Annotated[
        Array | None, Field(description="float32 (1, T, D), in place of the prompt.")
    ] = None
    pooled_prompt_embeds: Annotated[Array | None, Field(description="float32 (1, P).")] = None
    negative_prompt_embeds: Annotated[Array | None, Field(description="float32 (1, T, D).")] = None
    negative_pooled_prompt_embeds: Annotated[Array | None, Field(description="float32 (1, P).")] = (
        None
    )
    image: Annotated[
        Image.Image | list[Image.Image] | None,
        Field(description="The image to edit, animate or enlarge, or several to refer to."),
    ] = None
    video: Annotated[
        list[Image.Image] | None,
        Field(description="Frames of a video to change, continue or follow, in order."),
    ] = None
    ip_adapter_image: Annotated[
        Image.Image | list[Image.Image] | None,
        Field(description="Image or images for the IP-Adapter."),
    ] = None
    ip_adapter_scale: Annotated[
        float | None, Field(ge=-10, le=10, description="Weight of the IP-Adapter.")
    ] = None
    control_image: Annotated[
        Image.Image | list[Image.Image] | None,
        Field(description="Image for the ControlNet (or each)."),
    ] = None
    controlnet_conditioning_scale: Annotated[
        Weight | list[Weight] | None, Field(description="Weight of the ControlNet, or of each.")
    ] = None
    control_guidance_start: Annotated[
        float, Field(ge=0, le=1, description="Share of the steps at which the ControlNet begins.")
    ] = 0.0
    control_guidance_end: Annotated[
        float, Field(ge=0, le=1, description="Share of the steps at which the ControlNet ends.")
    ] = 1.0
    lora: Annotated[
        dict[str, float] | None,
        Field(description="LoRA file -> scale, in place of those given at launch."),
    ] = None
    upscaler: Annotated[
        str | None,
        Field(
            description="Enlarge the image by the factor of this upscaler of the host. With "
            "init_image and strength 0 that image, at its own size."
        ),
    ] = None
    num_frames: Annotated[int | None, Field(ge=1, le=512, description="Frames of a video.")] = None
    fps: Annotated[
        int | None,
        Field(
            ge=1, le=MAX_FPS, description="Frames per second of a video, in its file and for svd."
        ),
    ] = None
    decode_chunk_size: Annotated[
        int | None, Field(ge=1, le=512, description="Frames decoded at once.")
    ] = None
    motion_bucket_id: Annotated[
        int | None, Field(ge=0, le=1023, description="Amount of motion (svd).")
    ] = None
    noise_aug_strength: Annotated[
        float | None, Field(ge=0, le=10, description="Noise on the conditioning image (svd).")
    ] = None
    compel: Annotated[
        bool | None,
        Field(description="Whether Compel reads prompt weights, on a host that has it (--compel)."),
    ] = None
    prompt_syntax: Annotated[
        Literal["a1111"] | None,
        Field(
            description="'a1111': read (word:1.2), [word], BREAK and \\( in prompts as that "
            "program does, and all of a long prompt. Absent: plain text."
        ),
    ] = None
    arguments: Annotated[
        dict[str, Any] | None,
        Field(
            description="Arguments of the pipeline's own call that have no field here, for a type "
            'without a row: numbers, texts, {"image": PNG}, {"npy": array}, {"object": {...}} with '
            "these, and lists of these."
        ),
    ] = None
    warmup_steps: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_STEPS,
            description="Steps run synchronously at the start, for approximate methods.",
        ),
    ] = None
    quality: Annotated[
        Quality | None,
        Field(
            description="How close to the image of one device: 'exact' (the same), 'high' (no "
            "visible difference) or 'fast' (similar). Absent: the host's --quality."
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _default_strength(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("init_image") is not None:
            return {"strength": IMAGE_STRENGTH, **values}
        return values


def why_loras_are_fixed(load: LoadRequest, plan: ParallelPlan | None) -> str:
    """Return why requests cannot choose LoRAs, for a message; empty if they can.

    plan: None for one rank.
    """
    is_compiled = load.compile is not None and "denoiser" in load.compile.targets
    if is_compiled and load.can_be_fused:
        return (
            "compiles its denoiser: LoRAs given at launch are part of the weights. Leave it out, "
            "or start the host without --compile_unet"
        )
    if plan is not None and not plan.keeps_widths:
        return (
            f"runs {plan.describe()} with sharded weights. Give the LoRA at launch, or start the "
            "host without sharding"
        )
    return ""


NEUTRAL = {"num_frames": 1, "compel": False, "clip_skip": 0}
"""Values besides the defaults that have no effect."""
HARMLESS = frozenset({"latent_space"})
"""Fields that only modify the meaning of another field."""


def asks(field: str, value: Any) -> bool:
    """Return whether this value of a field asks for something that a model may not be able to."""
    default = NEUTRAL.get(field, GenerateRequest.model_fields[field].default)
    is_default = isinstance(value, int | float | str) and value == default
    is_nothing = value is None or (isinstance(value, str | list | dict) and len(value) == 0)
    return not (is_default or is_nothing or field in HARMLESS)


def enlarges_only(request: GenerateRequest) -> bool:
    """Whether the request has its own image enlarged, and generates none."""
    is_kept = request.init_image is not None and request.strength == 0
    return request.upscaler is not None and is_kept


MAX_ENLARGED_PIXELS = 128 * 10**6
"""Of an upscaler's result: the host's memory."""


def require_room(width: int, height: int, scale: int) -> None:
    """Raise RequestError if an upscaler of this factor would make too large an image."""
    large = width * scale, height * scale
    if large[0] * large[1] > MAX_ENLARGED_PIXELS:
        raise RequestError(
            f"upscaler: an image of {width}x{height} would become one of {large[0]}x{large[1]}. "
            f"Allowed: up to {MAX_ENLARGED_PIXELS // 10**6} megapixels. Send a smaller one.",
            field="upscaler",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Audio:
    """A video's sound."""

    samples: Array  # float32 (channels, number of samples), within -1..1
    sampling_rate: int  # Hz


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """One image or video, on the CPU."""

    # uint8 (N, H, W, 3): the frames of a video, or the images that one call made, mostly one.
    # Images with transparency have four channels.
    frames: Array
    # float32 (1, C, h, w) in unscaled VAE space; None for types that do not return them.
    latents: Array | None
    audio: Audio | None = None
    seed: int
    num_steps: int  # scheduler steps executed
    exactness: Exactness
    seconds: float  # of the whole generation
    report: dict[str, Any] = field(default_factory=dict)  # statistics for logs and benchmarks
    # The request with every default filled in, without images and arrays.
    resolved: dict[str, Any] = field(default_factory=dict)
