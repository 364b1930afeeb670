"""The launch options of AsyncDiff. Imports no torch."""

from backends.options import Option, number, parse_switch, switch, weights, whole

OPTIONS = (
    Option(name="model_n", text="Number of denoiser segments.", parse=whole(1, 64)),
    Option(name="stride", text="Run the denoiser every 1 or 2 steps.", parse=whole(1, 2)),
    switch("time_shift", "Shift the timestep of stale segments."),
    Option(
        name="warm_up",
        text="Synchronous steps at the start of each image (default 3).",
        parse=whole(0, 1000),
        aliases=("synced_steps",),
    ),
    Option(
        name="synced_percent",
        text="The same as a share of the steps; wins when above 0.",
        parse=number(0, 100),
    ),
    Option(
        name="segment_weights",
        text="Relative speed of each segment's rank.",
        parse=weights,
        metavar="W,W",
    ),
    switch("shard_weights", "Each rank keeps only its own segment's weights."),
    Option(
        name="extrapolate",
        text=(
            "Extrapolate stale values from the last two steps; on if not given where it comes "
            "closer."
        ),
        parse=parse_switch,
    ),
)
READS = ("use_cfg_parallel",)
"""Options that another backend declares and this one reads too."""
