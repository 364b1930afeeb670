"""The launch options of DistriFuser. Imports no torch."""

from backends.distrifuser.modes import SYNC_MODES
from backends.options import Option, one_of, switch, weights

PARALLELISMS = ("patch", "naive_patch", "tensor")
SPLIT_SCHEMES = ("row", "col", "alternate")
OPTIONS = (
    Option(
        name="parallelism",
        text="patch (default), naive_patch or tensor.",
        parse=one_of(*PARALLELISMS),
    ),
    Option(
        name="sync_mode",
        text="How patches exchange (default corrected_async_gn).",
        parse=one_of(*SYNC_MODES),
    ),
    Option(name="split_scheme", text="row, col or alternate.", parse=one_of(*SPLIT_SCHEMES)),
    Option(
        name="patch_weights",
        text="Relative speed of each patch's rank.",
        parse=weights,
        metavar="W,W",
    ),
    switch("no_cuda_graph", "Accepted for old clients; no CUDA graphs are used."),
    switch("no_split_batch", "Patches instead of the CFG split."),
)
READS = ("extrapolate",)
"""Options that another backend declares and this one reads too."""
