"""--shard: whether the ranks divide the weights of denoiser and text encoders. Imports no torch.

What the ranks do then is backends/parallel/gathered_weights.py's; asyncdiff, PipeFusion and tensor
parallelism divide the denoiser in ways of their own, and then only the text encoders are gathered.
"""

from collections.abc import Mapping
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


def decide_sharding(
    settings: Settings, world_size: int, work: Work, *, memory_bytes: int | None
) -> tuple[Groups, str]:
    """Return which weights to divide, and why or why not if nobody chose.

    The text encoders alone, if that is enough: they cost nothing in a step.

    work: by the checkpoint's files. memory_bytes: of the smallest GPU; None without one, or if it
    is unknown. ConfigError for --shard=always with an option that excludes it.
    """
    problem = _problem(settings)
    if settings.shard == "always" and problem:
        raise ConfigError(f"--shard=always is not available with {problem}. Leave out one of them.")
    if settings.shard == "always" and world_size == 1:
        return (), "--shard=always has no effect: there is one rank"
    is_open = settings.shard == "auto" and world_size > 1 and memory_bytes is not None
    if not is_open or any(name in settings.given for name in CHANGES_SIZES):
        return (ALL, "") if settings.shard == "always" else ((), "")
    kept = work.weight_bytes + work.activation_bytes
    whole, with_denoiser = kept + work.other_bytes, kept + work.other_bytes / world_size
    usable = USABLE * memory_bytes
    if whole <= usable:
        return (), ""
    groups: Groups = ("encoders",) if with_denoiser <= usable else ALL
    divided = divided_bytes(work, world_size) + work.activation_bytes
    needed = with_denoiser if groups != ALL else divided
    figures = (
        f"the whole model needs about {whole / 1e9:.0f} GB on each GPU, which has "
        f"{memory_bytes / 1e9:.0f} GB; with {' and '.join(groups)} divided among {world_size} "
        f"ranks it needs about {needed / 1e9:.0f} GB"
    )
    if problem:
        return (), f"{figures}, but --shard is not available with {problem}"
    return groups, f"shard: {figures}"


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


def require_placement(settings: Settings, world_size: int) -> Placement:
    """Return where the text encoders are. ConfigError for options that exclude it."""
    placement = settings.encoder_placement
    if placement == "every" or (placement != "cpu" and world_size == 1):
        return "every"
    if problem := _problem(settings):
        raise ConfigError(
            f"--encoder_placement={placement} is not available with {problem}. Leave out one of "
            "them."
        )
    return placement


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
