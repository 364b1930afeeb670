"""The launch options of xdit, and which combinations are worth trying. Imports no torch."""

from collections.abc import Iterator, Mapping

from backends.model_table import ModelSpec
from backends.options import Option, counts, parse_switch, switch, whole
from backends.plan import cfg_degrees, divisors, times

OPTIONS = (
    Option(
        name="use_cfg_parallel",
        text=(
            "Compute the two halves of guidance on two halves of the ranks (also asyncdiff). "
            "Default: where the ranks allow it."
        ),
        parse=parse_switch,
    ),
    Option(
        name="ulysses_degree",
        text="Ranks that share the attention heads. Default: as many as divide them.",
        parse=whole(1, 64),
    ),
    Option(
        name="ring_degree",
        text="Ranks that pass keys and values round a ring. Default: what Ulysses leaves.",
        parse=whole(1, 64),
    ),
    Option(
        name="pipefusion_parallel_degree",
        text="PipeFusion stages of the denoiser. Default: 1.",
        parse=whole(1, 64),
    ),
    Option(
        name="num_pipeline_patch",
        text="PipeFusion patches in flight. Default: 1 or 2 per stage.",
        parse=whole(1, 64),
    ),
    Option(
        name="attn_layer_num_for_pp",
        text="Transformer blocks of each PipeFusion stage, such as 10,9. Default: an even cut.",
        parse=counts,
        metavar="N,N",
    ),
    Option(
        name="data_parallel_degree",
        text="Groups of ranks with the whole model, which share the images of a batch. Default: 1.",
        parse=whole(1, 64),
    ),
    Option(
        name="tensor_parallel_degree",
        text="Ranks that share each layer's weights. Default: 1.",
        parse=whole(1, 64),
    ),
    switch(
        "use_fbcache",
        "Older name of --step_cache=first_block; has no effect where that is not available.",
    ),
)
READS = ()
"""Options that another backend declares and this one reads too."""
SETTINGS = {
    "data": "data_parallel_degree",
    "cfg": "use_cfg_parallel",
    "stage": "pipefusion_parallel_degree",
    "ring": "ring_degree",
    "ulysses": "ulysses_degree",
    "tensor": "tensor_parallel_degree",
}
"""Axis, outermost first -> the setting that gives its degree. Ulysses talks most, so its ranks are
neighbours.
"""


def candidates(
    spec: ModelSpec, ranks: int, *, is_guided: bool
) -> Iterator[tuple[str, dict[str, object]]]:
    """Stages, ring and Ulysses in all degrees, within each half of guidance or over all ranks."""
    if ranks == 1:
        return
    for cfg in cfg_degrees(ranks, has_halves=is_guided and spec.guidance == "cfg"):
        rest = ranks // cfg
        if spec.denoiser != "transformer" and rest > 1:
            continue
        for stage in divisors(rest):
            for ring in divisors(rest // stage):
                ulysses = rest // stage // ring
                degrees = {"cfg": cfg, "ulysses": ulysses, "ring": ring, "stage": stage}
                name = times(cfg=cfg, pipefusion=stage, ring=ring, ulysses=ulysses)
                yield name, _as_options(degrees)


def _as_options(degrees: Mapping[str, int]) -> dict[str, object]:
    """Return the launch options that ask for these degrees."""
    return {
        SETTINGS[axis]: True if axis == "cfg" else degree
        for axis, degree in degrees.items()
        if degree > 1
    }
