"""Every method on several GPUs, with the types that make it do something else."""

from collections.abc import Mapping

from tests.rehearsal.case import (
    ALL_STEPS,
    PATCH,
    SEGMENTS,
    WAITS_OF_A_CLASS,
    Ranks,
    stages,
)

WAITS_OF_A_TYPE: Mapping[str, Mapping[str, int]] = {
    # a guidance of zero, made on the CPU in each call
    "chroma": {"transformer_chroma.py": 2},
    # it makes a tensor of timesteps, which it reads one by one; the sampler's noise is of the CPU
    "hy": {"pipeline_hunyuandit.py": 3, "scheduling_ddpm.py": 1},
    # for how many tokens each expert gets, and for the sizes of its images, which are a tensor
    "hidream": {"transformer_hidream_image.py": 19},
}
"""diffusers' own."""

METHODS = (
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
        options={"parallelism": "tensor", "no_split_batch": True},
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
    *(
        Ranks(
            label=f"{name} that warm up",
            type="sd1",
            backend=backend,
            options=options,
            request={"warmup_steps": 5},  # as many as there are
        )
        for name, backend, options in (
            ("patches", "distrifuser", PATCH),
            ("segments", "asyncdiff", SEGMENTS),
            ("sharded segments", "asyncdiff", {**SEGMENTS, "shard_weights": True}),
        )
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
        label="stages x ulysses that warm up",
        type="sd3",
        backend="xdit",
        options=stages(2, 3, ulysses_degree=2),
        ranks=4,
        request={"warmup_steps": 5},
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
            waits=WAITS_OF_A_TYPE.get(name, {}),
        )
        for name in (
            *("flux", "hy", "pixa", "zimage", "qwenimage", "flux2", "chroma", "ltx"),
            "hidream",
        )
    ),
    Ranks(
        label="ulysses of wan",
        type="wan_t2v",
        backend="xdit",
        options={"ulysses_degree": 2},
        request={"num_frames": 5},
        waits={"scheduling_unipc_multistep.py": 6},
    ),
    Ranks(label="cfg pairs", type="qwenimage", backend="xdit", options={"use_cfg_parallel": True}),
)
