"""The launch options of AsyncDiff. Imports no torch."""

from backends.options import Option, number, parse_switch, switch, weights, whole

OPTIONS = (
    Option(
        name="model_n", text="Segments of the denoiser. Default: one per rank.", parse=whole(1, 64)
    ),
    Option(
        name="stride",
        text=(
            "Steps per turn of the segments: 1, or 2 with one more rank. Default: what fits the "
            "ranks."
        ),
        parse=whole(1, 2),
    ),
    switch("time_shift", "Give each segment the timestep of its stale input instead of its own."),
    Option(
        name="synced_percent",
        text="Synchronous steps as a percentage of all steps. Above 0 it replaces --warmup_steps.",
        parse=number(0, 100),
    ),
    Option(
        name="segment_weights",
        text="Relative speed of each segment's rank, such as 1,0.6. Default: equal.",
        parse=weights,
        metavar="W,W",
    ),
    switch(
        "shard_weights", "Keep on each rank only its segment's weights, as --shard=always does."
    ),
    Option(
        name="extrapolate",
        text=(
            "Extrapolate stale values from the last two steps (also distrifuser). Default: where "
            "it comes closer to the exact image."
        ),
        parse=parse_switch,
    ),
)
READS = ("use_cfg_parallel",)
"""Options that another backend declares and this one reads too."""
