"""One case of several GPUs, and the options that many of them share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
