"""Methods on several GPUs beside an option of the launch or the request, and with other jobs, other
models or teams between.
"""

from backends.step_cache_spec import StepCacheSpec
from tests.rehearsal.case import DIVIDED, PATCH, SEGMENTS, Ranks, stages


def there_and_back(tensors: int) -> dict[str, int]:
    """Waits of a step with group offloading that does not prefetch: diffusers then moves each
    weight and buffer of the denoiser to the device and, although nothing has changed it, back.
    """
    where = "diffusers/hooks/group_offloading.py"
    return {f"copy from the CPU at {where}": tensors, f"copy to the CPU at {where}": tensors}


OPTIONS = (
    Ranks(
        label="methods that change",
        type="sdxl",
        backend="distrifuser",
        options=PATCH,
        changes_to={"asyncdiff": SEGMENTS, "xdit": {"use_cfg_parallel": True}},
    ),
    Ranks(
        label="patches, offload group",
        type="pixa",
        backend="distrifuser",
        options=PATCH,
        load={"offload": "group"},
        waits=there_and_back(100),
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
            label=f"cfg, encoders {placement}",
            type="sdxl",
            backend="distrifuser",
            load={"encoder_placement": placement},
            then=("another prompt",),
        )
        for placement in ("one", "spread", "cpu")
    ),
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
            waits=waits,
        )
        for kind, waits in (
            ("model", {}),
            # its weights stay in main memory, and each is copied when its layer computes
            ("sequential", {"copy from the CPU at accelerate/utils/modeling.py": 122}),
            ("group", there_and_back(123)),
        )
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
