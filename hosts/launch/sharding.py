"""--shard and --encoder_placement: which weights are not whole on every rank. Imports no torch.

What the ranks do then is backends/parallel/gathered_weights.py's; asyncdiff, PipeFusion and tensor
parallelism divide the denoiser in ways of their own, and then only the text encoders are gathered.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from backends.autotune.cost import Work, divided_bytes
from backends.errors import ConfigError
from backends.plan import ParallelPlan
from hosts.launch.load_options import OFFLOADS, compile_settings, quantization
from hosts.launch.settings import Settings

USABLE = 0.92
"""Fraction of a GPU's memory that the model may take: CUDA, NCCL and gaps take the rest."""
CHANGES_SIZES = (
    "gguf_model",
    "unet",
    "transformer",
    "quantize_to",
    "quantize_unet_to",
    "quantize_encoder_to",
    *OFFLOADS,
)
"""Options with which the sizes of the checkpoint's files do not predict the device's memory."""

Placement = Literal["every", "one", "spread", "cpu"]
Groups = tuple[Literal["denoiser", "encoders"], ...]
ALL: Groups = ("denoiser", "encoders")
ENCODERS: Groups = ("encoders",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Which weights are not whole on every rank."""

    groups: Groups = ()
    """Divided among the ranks, where the method does not cut them itself."""
    placement: Placement = "every"
    why: str = ""
    """Why, or why not if the model does not fit; empty if everything was asked for."""


def decide_division(
    settings: Settings, world_size: int, work: Work, *, memory_bytes: int | None
) -> Division:
    """Return what --shard and --encoder_placement mean here: nothing, if the model fits.

    Otherwise the first that fits of what costs least: text encoders divided, in main memory, the
    denoiser divided, both.

    work: by the checkpoint's files. memory_bytes: of the smallest GPU; None without one, or if it
    is unknown. ConfigError if an option excludes what was asked for.
    """
    problem, placement = _problem(settings), _asked_placement(settings, world_size)
    for is_asked, option in (
        (settings.shard == "always", "--shard=always"),
        (placement != "every", f"--encoder_placement={placement}"),
    ):
        if is_asked and problem:
            raise ConfigError(f"{option} is not available with {problem}. Leave out one of them.")
    is_idle = settings.shard == "always" and world_size == 1
    idle = "--shard=always has no effect: there is one rank" if is_idle else ""
    kinds = _kinds(settings, world_size, placement)
    first = Division(groups=kinds[0][0], placement=kinds[0][1], why=idle)
    if memory_bytes is None or any(name in settings.given for name in CHANGES_SIZES):
        return first
    needs = [_needed_bytes(work, world_size, *kind) for kind in kinds]
    fitting = [index for index, needed in enumerate(needs) if needed <= USABLE * memory_bytes]
    if fitting[:1] == [0]:
        return first
    index = fitting[0] if fitting else min(range(len(needs)), key=needs.__getitem__)
    why = (
        f"the model needs about {needs[0] / 1e9:.0f} GB on each GPU, which has "
        f"{memory_bytes / 1e9:.0f} GB"
    )
    if index:
        why += f"; with {_described(*kinds[index], world_size)} {needs[index] / 1e9:.0f} GB"
    if problem:
        return replace(first, why=f"{why}, but that is not available with {problem}")
    if not fitting:
        why += ". It may not fit: --quantize_to=int8 and --enable_model_cpu_offload take less"
    why = "; ".join(filter(None, (idle, why)))
    return Division(groups=kinds[index][0], placement=kinds[index][1], why=why)


def _asked_placement(settings: Settings, world_size: int) -> Placement:
    """Return where the text encoders are if the model fits."""
    asked = settings.encoder_placement
    return "every" if asked == "auto" or (asked != "cpu" and world_size == 1) else asked


def _kinds(
    settings: Settings, world_size: int, placement: Placement
) -> list[tuple[Groups, Placement]]:
    """Return what may be done, in the order of its cost: first what was asked for."""
    groups: dict[str, list[Groups]] = {"always": [ALL], "never": [()], "auto": [(), ENCODERS, ALL]}
    own = groups[settings.shard if world_size > 1 else "never"]
    kinds = [(group, placement) for group in own]
    if settings.encoder_placement == "auto":  # seconds for a new prompt, nothing in a step
        kinds += [(group, "cpu") for group in own if group != ENCODERS]
    return sorted(kinds, key=lambda kind: "denoiser" in kind[0])


def _needed_bytes(work: Work, world_size: int, groups: Groups, placement: Placement) -> float:
    """Return the bytes on the GPU that holds most."""
    other = work.other_bytes - (work.encoder_bytes if placement == "cpu" else 0)
    if "denoiser" in groups:
        return divided_bytes(replace(work, other_bytes=other), world_size) + work.activation_bytes
    return work.weight_bytes + work.activation_bytes + other / (world_size if groups else 1)


def _described(groups: Groups, placement: Placement, world_size: int) -> str:
    divided = [group for group in groups if group == "denoiser" or placement == "every"]
    texts = [f"{' and '.join(divided)} divided among {world_size} ranks"] if divided else []
    texts += ["the text encoders in main memory"] if placement == "cpu" else []
    return " and ".join(texts)


def divided_groups(plan: ParallelPlan, placement: Placement, wanted: Groups) -> Groups:
    """Return which of the wanted weights the ranks gather when they are used.

    A plan that splits the denoiser's weights itself leaves the text encoders, and these may be on
    some of the ranks.
    """
    return tuple(
        group
        for group in (wanted if plan.world_size > 1 else ())
        if not (plan.splits_weights_by if group == "denoiser" else placement != "every")
    )


def require_all_ranks(plan: ParallelPlan, world_size: int) -> None:
    """ConfigError for a candidate of --backend=auto with fewer ranks than the weights are on."""
    if plan.world_size != world_size:
        raise ConfigError(
            f"with --shard or --encoder_placement the weights are spread over {world_size} ranks."
        )


def require_same_blocks(plan: ParallelPlan) -> None:
    """ConfigError for a candidate of --backend=auto that cannot gather its weights."""
    if not plan.runs_every_block:
        raise ConfigError("with --shard all ranks must run the same blocks at the same time.")


def _problem(settings: Settings) -> str:
    """Return the options that exclude it and why; empty if there are none."""
    compiled = compile_settings(settings)
    kinds: Mapping[str, object] = quantization(settings)
    found = [
        *(
            f"--{name}, which keeps the weights in main memory"
            for name in OFFLOADS
            if getattr(settings, name)
        ),
        *(
            f"torch.compile of the {target}, whose graphs hold whole weights"
            for target in (compiled.targets if compiled else ())
            if target != "vae"
        ),
        *(
            "bitsandbytes, which keeps its own references to whole weights"
            for choice in kinds.values()
            if str(getattr(choice, "kind", "")).startswith("bnb")
        ),
    ]
    if settings.mode == "throughput":
        found.append("--mode=throughput, in which each rank works alone")
    return found[0] if found else ""
