"""What is rehearsed. A feature that touches devices adds its case here."""

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


@dataclass(frozen=True, kw_only=True)
class OneRank:
    """A pipeline on one GPU. previews: whether somebody looks on."""

    label: str
    load: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    previews: bool = False


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A method on several GPUs. feature: of the model table, switched on for the launch and the
    request.

    load, request: further fields. asks_for_lora: the request brings one. fails_in: the part of the
    pipeline that one rank fails in.
    """

    label: str
    type: str
    backend: str
    options: Mapping[str, object] = field(default_factory=dict)
    ranks: int = 2
    feature: str = ""
    load: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    asks_for_lora: bool = False
    fails_in: str = "denoiser"


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
            yield from offloads()
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


def offloads() -> Iterator[OneRank]:
    for kind in ("model", "sequential", "group"):
        yield OneRank(label=f"offload {kind}", load={"offload": kind}, previews=True)


def _quantized(kind: str) -> OneRank:
    choice = parse_quantization(kind, option="quantize_to")
    return OneRank(
        label=f"all in {kind}",
        load={"quantize": dict.fromkeys(("denoiser", "encoders", "vae"), choice)},
    )


DIVIDED: Mapping[str, object] = {"divided": ("denoiser", "encoders")}
PATCH: Mapping[str, object] = {"no_split_batch": True}
SEGMENTS: Mapping[str, object] = {"use_cfg_parallel": False}


def stages(degree: int, patches: int, **others: object) -> dict[str, object]:
    return {
        "pipefusion_parallel_degree": degree,
        "num_pipeline_patch": patches,
        "warmup_steps": 1,
        **others,
    }


SHORT = (
    Ranks(label="patches", type="sdxl", backend="distrifuser", options=PATCH),
    Ranks(
        label="segments with sharded weights",
        type="sdxl",
        backend="asyncdiff",
        options={**SEGMENTS, "shard_weights": True},
    ),
    Ranks(label="stages", type="sd3", backend="xdit", options=stages(2, 3)),
)
"""In every run of the tests."""

LONG = (
    Ranks(label="cfg", type="sdxl", backend="distrifuser"),
    Ranks(
        label="full sync",
        type="sdxl",
        backend="distrifuser",
        options={**PATCH, "sync_mode": "full_sync"},
    ),
    Ranks(
        label="sync gn",
        type="sd1",
        backend="distrifuser",
        options={**PATCH, "sync_mode": "sync_gn"},
    ),
    Ranks(
        label="rotate", type="sd1", backend="distrifuser", options={**PATCH, "sync_mode": "rotate"}
    ),
    Ranks(
        label="naive",
        type="sd1",
        backend="distrifuser",
        options={**PATCH, "parallelism": "naive_patch", "split_scheme": "alternate"},
    ),
    Ranks(
        label="tensor of a unet",
        type="sdxl",
        backend="distrifuser",
        options={"parallelism": "tensor"},
    ),
    Ranks(label="cfg x patch", type="sdxl", backend="distrifuser", ranks=4),
    Ranks(
        label="three patches",
        type="sd2",
        backend="distrifuser",
        options=PATCH,
        ranks=3,
        request={"height": 192},
    ),
    Ranks(label="patches of sd3", type="sd3", backend="distrifuser", options=PATCH),
    Ranks(label="patches of flux", type="flux", backend="distrifuser"),
    Ranks(label="patches of ad", type="ad", backend="distrifuser", options=PATCH),
    Ranks(
        label="patches with controlnet",
        type="sdxl",
        backend="distrifuser",
        ranks=4,
        feature="controlnet",
    ),
    Ranks(
        label="patches, offload group",
        type="pixa",
        backend="distrifuser",
        options=PATCH,
        load={"offload": "group"},
    ),
    Ranks(label="segments", type="sdxl", backend="asyncdiff", options=SEGMENTS),
    Ranks(label="three segments", type="sd1", backend="asyncdiff", options=SEGMENTS, ranks=3),
    Ranks(label="four segments", type="sd1", backend="asyncdiff", options=SEGMENTS, ranks=4),
    Ranks(
        label="stride 2",
        type="sd1",
        backend="asyncdiff",
        options={**SEGMENTS, "model_n": 2, "stride": 2, "time_shift": True},
        ranks=3,
    ),
    Ranks(
        label="three segments with sharded weights",
        type="sd1",
        backend="asyncdiff",
        options={**SEGMENTS, "shard_weights": True},
        ranks=3,
    ),
    Ranks(
        label="cfg x segment",
        type="sdxl",
        backend="asyncdiff",
        options={"use_cfg_parallel": True},
        ranks=4,
    ),
    Ranks(label="segments of flux", type="flux", backend="asyncdiff"),
    Ranks(label="segments of zimage", type="zimage", backend="asyncdiff", options=SEGMENTS),
    Ranks(label="segments of qwenimage", type="qwenimage", backend="asyncdiff", options=SEGMENTS),
    Ranks(
        label="segments of wan",
        type="wan_t2v",
        backend="asyncdiff",
        options=SEGMENTS,
        request={"num_frames": 5},
    ),
    Ranks(
        label="segments, offload model",
        type="pixa",
        backend="asyncdiff",
        options=SEGMENTS,
        load={"offload": "model"},
    ),
    Ranks(
        label="ulysses, divided weights",
        type="sd3",
        backend="xdit",
        options={"ulysses_degree": 2},
        load=DIVIDED,
    ),
    Ranks(label="cfg, divided weights", type="sdxl", backend="distrifuser", load=DIVIDED),
    *(
        Ranks(
            label=f"cfg, encoders {placement}",
            type="sdxl",
            backend="distrifuser",
            load={"encoder_placement": placement},
        )
        for placement in ("one", "spread", "cpu")
    ),
    Ranks(label="cfg of xdit", type="sdxl", backend="xdit", options={"use_cfg_parallel": True}),
    Ranks(label="ulysses", type="sd3", backend="xdit", options={"ulysses_degree": 2}),
    Ranks(label="ring", type="flux", backend="xdit", options={"ring_degree": 2}),
    Ranks(label="ring of three", type="sd3", backend="xdit", options={"ring_degree": 3}, ranks=3),
    Ranks(
        label="ulysses x ring",
        type="sd3",
        backend="xdit",
        options={"ulysses_degree": 2, "ring_degree": 2},
        ranks=4,
    ),
    Ranks(
        label="cfg x ulysses",
        type="sd3",
        backend="xdit",
        options={"ulysses_degree": 2, "use_cfg_parallel": True},
        ranks=4,
    ),
    Ranks(label="three stages", type="flux", backend="xdit", options=stages(3, 6), ranks=3),
    Ranks(label="four stages", type="sd3", backend="xdit", options=stages(4, 8), ranks=4),
    Ranks(
        label="cfg x stages",
        type="sd3",
        backend="xdit",
        options=stages(2, 3, use_cfg_parallel=True),
        ranks=4,
    ),
    Ranks(
        label="stages x ulysses",
        type="sd3",
        backend="xdit",
        options=stages(2, 3, ulysses_degree=2),
        ranks=4,
    ),
    Ranks(
        label="tensor of flux", type="flux", backend="xdit", options={"tensor_parallel_degree": 2}
    ),
    Ranks(
        label="tensor x ulysses",
        type="flux",
        backend="xdit",
        options={"tensor_parallel_degree": 2, "ulysses_degree": 2},
        ranks=4,
    ),
    *(
        Ranks(label=f"ulysses of {name}", type=name, backend="xdit", options={"ulysses_degree": 2})
        for name in ("flux", "hy", "pixa", "zimage", "qwenimage", "flux2")
    ),
    Ranks(
        label="ulysses of wan",
        type="wan_t2v",
        backend="xdit",
        options={"ulysses_degree": 2},
        request={"num_frames": 5},
    ),
    Ranks(label="cfg pairs", type="qwenimage", backend="xdit", options={"use_cfg_parallel": True}),
    *(
        Ranks(
            label=f"ulysses with {name}",
            type=type_name,
            backend="xdit",
            options={"ulysses_degree": 2},
            feature=name,
        )
        for name, type_name in (("controlnet", "sd3"), ("step_cache", "flux"), ("lora", "flux"))
    ),
    *(
        Ranks(
            label=f"ulysses, offload {kind}",
            type="sd3",
            backend="xdit",
            options={"ulysses_degree": 2},
            load={"offload": kind},
        )
        for kind in ("model", "sequential", "group")
    ),
    Ranks(
        label="ulysses, offload model, lora in a request",
        type="sd3",
        backend="xdit",
        options={"ulysses_degree": 2},
        load={"offload": "model"},
        asks_for_lora=True,
    ),
)
"""All methods, and what goes through other code on the way to the device."""

FAILING_SHORT = (
    Ranks(label="patches under ddim", type="sd2", backend="distrifuser", options=PATCH),
)
FAILING_LONG = (
    Ranks(label="patches under euler", type="sdxl", backend="distrifuser", options=PATCH),
    Ranks(label="patches under pndm", type="sd1", backend="distrifuser", options=PATCH),
    Ranks(
        label="three patches",
        type="sd2",
        backend="distrifuser",
        options=PATCH,
        ranks=3,
        request={"height": 192},
    ),
    Ranks(
        label="tensor of a unet",
        type="sdxl",
        backend="distrifuser",
        options={"parallelism": "tensor"},
    ),
    Ranks(label="ulysses", type="sd3", backend="xdit", options={"ulysses_degree": 2}),
    Ranks(
        label="ulysses, divided weights",
        type="sd3",
        backend="xdit",
        options={"ulysses_degree": 2},
        load=DIVIDED,
    ),
    Ranks(label="ring", type="flux", backend="xdit", options={"ring_degree": 2}),
    Ranks(
        label="tensor of flux", type="flux", backend="xdit", options={"tensor_parallel_degree": 2}
    ),
    Ranks(label="segments", type="sdxl", backend="asyncdiff", options=SEGMENTS),
    Ranks(
        label="segments with sharded weights",
        type="sdxl",
        backend="asyncdiff",
        options={**SEGMENTS, "shard_weights": True},
    ),
    Ranks(label="stages", type="sd3", backend="xdit", options=stages(2, 3)),
    Ranks(label="three stages", type="flux", backend="xdit", options=stages(3, 6), ranks=3),
    Ranks(
        label="step cache",
        type="flux",
        backend="xdit",
        options={"ulysses_degree": 2},
        feature="step_cache",
    ),
    Ranks(
        label="decode of sdxl", type="sdxl", backend="distrifuser", options=PATCH, fails_in="vae"
    ),
    Ranks(
        label="decode of flux",
        type="flux",
        backend="xdit",
        options={"ulysses_degree": 2},
        fails_in="vae",
    ),
)
"""One rank fails: wherever the others may wait then."""
