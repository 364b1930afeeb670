"""The launch options of DistriFuser. Imports no torch."""

from backends.distrifuser.modes import SYNC_MODES
from backends.options import Option, one_of, switch, weights

PARALLELISMS = ("patch", "naive_patch", "tensor")
SPLIT_SCHEMES = ("row", "col", "alternate")
OPTIONS = (
    Option(
        name="parallelism",
        text=(
            "`patch` (default): ranks exchange what their patches need of each other. "
            "`naive_patch`: no exchange. `tensor`: split weights."
        ),
        parse=one_of(*PARALLELISMS),
    ),
    Option(
        name="sync_mode",
        text=(
            "How patches exchange values: corrected_async_gn (default), stale_gn, separate_gn, "
            "sync_gn, full_sync, no_sync or rotate (docs/distrifuser.md)."
        ),
        parse=one_of(*SYNC_MODES),
    ),
    Option(
        name="split_scheme",
        text="Cut of naive patches: row, col or alternate. Default: row.",
        parse=one_of(*SPLIT_SCHEMES),
    ),
    Option(
        name="patch_weights",
        text="Relative speed of each patch's rank, such as 1,0.6. Default: equal.",
        parse=weights,
        metavar="W,W",
    ),
    switch(
        "no_split_batch", "Use all ranks for patches, instead of splitting the halves of guidance."
    ),
)
READS = ("extrapolate",)
"""Options that another backend declares and this one reads too."""
