"""What is rehearsed on one GPU."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from backends.model_table import FEATURES, ModelSpec
from backends.quantization_spec import parse_quantization
from tests.backends.features import combined
from tests.checkpoints import sample_image

STEPS = 3
NOT_REHEARSED = ("compile",)
"""Inductor would compile for a GPU that is not there."""
NOT_IN_GROUPS = ("hy",)
"""diffusers refuses to offload its layers in groups, and so does the host."""


@dataclass(frozen=True, kw_only=True)
class OneRank:
    """A pipeline on one GPU. previews: whether somebody looks on. split_at: the step at which one
    job ends and another one goes on with its latents; 0 for one job.
    """

    label: str
    load: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    previews: bool = False
    split_at: int = 0


def cases_on_one_rank(spec: ModelSpec) -> Iterator[OneRank]:
    """Everything that one rank can do with this type."""
    yield OneRank(label="plain", previews=spec.returns_latents)
    if spec.returns_latents:
        yield OneRank(label="img2img", request={"init_image": sample_image(48), "strength": 0.7})
    if spec.has_clip_prompts:
        yield OneRank(label="emphasis", request={"prompt": "a (cat:1.2)", "prompt_syntax": "a1111"})
    yield OneRank(
        label="VAE in parts", load={"enable_vae_tiling": True, "enable_vae_slicing": True}
    )
    for name in FEATURES:
        if name in NOT_REHEARSED or spec.supports("single", name).status == "unsupported":
            continue
        if name == "offload":
            yield from offloads(spec)
            continue
        switched_on = combined([name], spec)
        yield OneRank(label=name, load=switched_on.load, request=switched_on.request)
        if name == "lora":
            asked = {"lora": switched_on.load["lora"]}
            yield OneRank(label="lora in a request", request=asked)
            yield OneRank(
                label="lora in a request, offload model", load={"offload": "model"}, request=asked
            )
        if name == "quantization":
            yield from (_quantized(kind) for kind in ("float8", "int8"))


def offloads(spec: ModelSpec) -> Iterator[OneRank]:
    for kind in ("model", "sequential", "group"):
        if kind != "group" or spec.name not in NOT_IN_GROUPS:
            yield OneRank(
                label=f"offload {kind}", load={"offload": kind}, previews=spec.returns_latents
            )


def _quantized(kind: str) -> OneRank:
    choice = parse_quantization(kind, option="quantize_to")
    return OneRank(
        label=f"all in {kind}",
        load={"quantize": dict.fromkeys(("denoiser", "encoders", "vae"), choice)},
    )
