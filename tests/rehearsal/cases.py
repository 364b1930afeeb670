"""What is rehearsed on several GPUs. A feature that touches devices adds its case here, or to
one_rank_cases.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from backends.step_cache_spec import StepCacheSpec

Further = Literal["second pass", "another prompt", "early end", "teams", "another model"]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A method on several GPUs. feature: of the model table, switched on for the launch and the
    request.

    load, request: further fields. changes_to: other methods, each with its options, that jobs
    change to and back from. then: what comes after the first job (jobs.py). previews: whether rank
    0's client looks on. team_size: of the teams into which the ranks split, if jobs of teams come.
    asks_for_lora: the request brings one. fails_in: the part of the pipeline that one rank fails
    in. waits: part of a place -> how often a step makes the host wait there, which is never but
    where a value decides. queues_in: steps in which something that is waited for queues behind
    something else.
    """

    label: str
    type: str
    backend: str
    options: Mapping[str, object] = field(default_factory=dict)
    ranks: int = 2
    feature: str = ""
    load: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    changes_to: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    then: tuple[Further, ...] = ()
    previews: bool = False
    team_size: int = 0
    asks_for_lora: bool = False
    fails_in: str = "denoiser"
    waits: Mapping[str, int] = field(default_factory=dict)
    queues_in: tuple[str, ...] = ()


DIVIDED: Mapping[str, object] = {"divided": ("denoiser", "encoders")}
PATCH: Mapping[str, object] = {"no_split_batch": True}
SEGMENTS: Mapping[str, object] = {"use_cfg_parallel": False}
ALL_STEPS: Mapping[str, object] = {"strength": 1.0}
"""Of a class that begins with an image: else there would be no middle step to look at."""
WAITS_OF_A_CLASS: Mapping[str, Mapping[str, int]] = {
    "QwenImageInpaintPipeline": {
        "pipeline_qwenimage_inpaint.py": 1,
        "scheduling_flow_match_euler_discrete.py": 2,
    }
}
"""diffusers' own: after each step it adds noise to what is kept, and looks up how much."""


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
    Ranks(
        label="methods that change",
        type="sdxl",
        backend="distrifuser",
        options=PATCH,
        changes_to={"asyncdiff": SEGMENTS, "xdit": {"use_cfg_parallel": True}},
    ),
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
        request={"width": 128},  # enough columns for two patches too
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
        waits={"scheduling_unipc_multistep.py": 6},
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
    Ranks(
        label="cfg x patch, divided weights",
        type="sdxl",
        backend="distrifuser",
        ranks=4,
        load=DIVIDED,
    ),
    *(
        Ranks(
            label=f"ulysses, divided weights, {name}",
            type="flux",
            backend="xdit",
            options={"ulysses_degree": 2},
            feature=name,
            load=DIVIDED,
        )
        for name in ("lora", "gguf")
    ),
    Ranks(
        label="patches, second pass",
        type="sdxl",
        backend="distrifuser",
        options=PATCH,
        then=("second pass",),
    ),
    Ranks(
        label="stages, second pass",
        type="flux",
        backend="xdit",
        options=stages(2, 4),
        then=("second pass",),
    ),
    Ranks(
        label="cfg, others come between",
        type="sdxl",
        backend="distrifuser",
        then=("another prompt", "early end", "another model"),
        previews=True,
    ),
    Ranks(
        label="patches, others come between",
        type="sdxl",
        backend="distrifuser",
        options=PATCH,
        then=("early end", "another model"),
        previews=True,
    ),
    Ranks(
        label="ulysses, others come between",
        type="flux",
        backend="xdit",
        options={"ulysses_degree": 2},
        then=("another prompt", "early end"),
        previews=True,
    ),
    Ranks(
        label="stages, others come between",
        type="sd3",
        backend="xdit",
        options=stages(2, 3),
        then=("early end", "another model"),
        previews=True,
    ),
    Ranks(
        label="teams of two",
        type="sdxl",
        backend="distrifuser",
        ranks=4,
        then=("teams",),
        team_size=2,
    ),
    Ranks(
        label="a job on each rank",
        type="sdxl",
        backend="distrifuser",
        then=("teams",),
        team_size=1,
    ),
    *(
        Ranks(
            label=f"{name} of a class without a row",
            type=pipeline,
            backend="asyncdiff",
            options=options,
            load={"parallel_vae": False},
            request=ALL_STEPS,
            waits=WAITS_OF_A_CLASS.get(pipeline, {}),
        )
        for name, pipeline, options in (
            ("cfg in a batch", "StableDiffusion3Img2ImgPipeline", {"use_cfg_parallel": True}),
            ("cfg in two calls", "QwenImageInpaintPipeline", {"use_cfg_parallel": True}),
            ("segments", "StableDiffusion3Img2ImgPipeline", {**SEGMENTS, "model_n": 2}),
            (
                "sharded segments",
                "QwenImageInpaintPipeline",
                {**SEGMENTS, "model_n": 2, "shard_weights": True},
            ),
        )
    ),
    *(
        Ranks(
            label=f"ulysses of {pipeline}",
            type=pipeline,
            backend="xdit",
            options={"ulysses_degree": 2},
            load={"parallel_vae": False},
            request=ALL_STEPS,
            waits=WAITS_OF_A_CLASS.get(pipeline, {}),
        )
        for pipeline in ("StableDiffusion3Img2ImgPipeline", "QwenImageInpaintPipeline")
    ),
    *(
        Ranks(
            label=f"cfg, encoders {placement}",
            type="sdxl",
            backend="distrifuser",
            load={"encoder_placement": placement},
            then=("another prompt",),
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
    Ranks(
        label="stages that warm up",
        type="sd3",
        backend="xdit",
        options=stages(2, 3),
        request={"warmup_steps": 5},  # as many as there are: also the one that is looked at
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
        Ranks(
            label=f"ulysses of {name}",
            type=name,
            backend="xdit",
            options={"ulysses_degree": 2},
            # diffusers' own: a guidance of zero, made on the CPU in each call
            waits={"transformer_chroma.py": 2} if name == "chroma" else {},
        )
        for name in ("flux", "hy", "pixa", "zimage", "qwenimage", "flux2", "chroma", "ltx")
    ),
    Ranks(
        label="ulysses of wan",
        type="wan_t2v",
        backend="xdit",
        options={"ulysses_degree": 2},
        request={"num_frames": 5},
        waits={"scheduling_unipc_multistep.py": 6},
    ),
    *(
        Ranks(
            label=f"ulysses of wan 2.2{also}",
            type="wan22_t2v",
            backend="xdit",
            options={"ulysses_degree": 2},
            load=load,
            request={"num_frames": 5},
            # to choose between its two transformers, and small tables that diffusers makes anew
            waits={"pipeline_wan.py": 1, "scheduling_unipc_multistep.py": 6},
        )
        for also, load in (("", {}), (", divided weights", DIVIDED))
    ),
    Ranks(label="cfg pairs", type="qwenimage", backend="xdit", options={"use_cfg_parallel": True}),
    *(
        Ranks(
            label=f"ulysses with {name}",
            type=type_name,
            backend="xdit",
            options={"ulysses_degree": 2},
            feature=name,
            waits={"step_cache.py": 1} if name == "step_cache" else {},
        )
        for name, type_name in (
            ("controlnet", "sd3"),
            ("step_cache", "flux"),
            ("prediction", "flux"),
            ("lora", "flux"),
        )
    ),
    *(
        Ranks(
            label=f"patches beside {what}",
            type=type_name,
            backend="distrifuser",
            options=PATCH,
            load={"step_cache": StepCacheSpec(kind=kind, value=2)},
        )
        for what, type_name, kind in (
            ("a deep cache", "sdxl", "deep"),
            ("a taylor cache", "sd3", "taylor"),
            ("skipped steps", "sdxl", "prediction"),
        )
    ),
    Ranks(
        label="segments beside skipped steps",
        type="sdxl",
        backend="asyncdiff",
        options={"model_n": 2},
        feature="prediction",
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
    Ranks(
        label="decode of sdxl", type="sdxl", backend="distrifuser", options=PATCH, fails_in="vae"
    ),
)
"""In every run of the tests: the others wait between steps, where they learn of it by rank 0's word
too, and in a copy to the CPU, where only the alarm wakes them."""


def every_method() -> Iterator[Ranks]:
    """Each method once, of all that is rehearsed on two and three ranks. On four, with two axes,
    gloo would wait for itself: it carries the rehearsed messages, and its abort ends nothing.
    """
    seen = []
    for case in (*SHORT, *LONG):
        method = (
            *(case.backend, case.ranks, case.options, case.load),
            *(tuple(case.changes_to), case.team_size),
        )
        if case.ranks < 4 and "offload" not in case.load and method not in seen:
            seen.append(method)
            yield case


FAILING_LONG = (
    *every_method(),
    Ranks(label="patches under pndm", type="sd1", backend="distrifuser", options=PATCH),
    Ranks(
        label="step cache",
        type="flux",
        backend="xdit",
        options={"ulysses_degree": 2},
        feature="step_cache",
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
