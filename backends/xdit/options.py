"""The launch options of xdit, and which combinations are worth trying. Imports no torch."""

from collections.abc import Iterator, Mapping

from backends.model_table import ModelSpec
from backends.options import Option, counts, parse_switch, switch, whole
from backends.plan import cfg_degrees, divisors, times

OPTIONS = (
    Option(
        name="use_cfg_parallel",
        text="The two halves of guidance on two halves of the ranks.",
        parse=parse_switch,
    ),
    Option(name="ulysses_degree", text="Ranks over attention heads.", parse=whole(1, 64)),
    Option(name="ring_degree", text="Ranks in a ring over the sequence.", parse=whole(1, 64)),
    Option(name="pipefusion_parallel_degree", text="Stages of the denoiser.", parse=whole(1, 64)),
    Option(name="num_pipeline_patch", text="Patches in flight.", parse=whole(1, 64)),
    Option(
        name="attn_layer_num_for_pp",
        text="Blocks of each stage.",
        parse=counts,
        metavar="N,N",
    ),
    Option(
        name="warmup_steps",
        text="Synchronous steps of PipeFusion at the start of each image (default 1).",
        parse=whole(1, 1000),
    ),
    Option(
        name="data_parallel_degree",
        text="Groups of ranks for several images.",
        parse=whole(1, 64),
    ),
    Option(name="tensor_parallel_degree", text="Ranks over split weights.", parse=whole(1, 64)),
    switch("use_teacache", "Accepted for old clients; no cache is used."),
    switch("use_fbcache", "--step_cache=first_block by its older name."),
    switch("use_fast_attn", "Accepted for old clients; attention is always whole."),
    switch("use_fp8_t5_encoder", "Accepted for old clients; --quantize_encoder_to does this."),
    switch("no_use_resolution_binning", "Accepted for old clients; sizes are never changed."),
    Option(
        name="max_sequence_length",
        text="Accepted for old clients; prompts are as long as the pipeline allows.",
        parse=whole(1, 4096),
    ),
    Option(
        name="vae_parallel_size",
        text="Accepted for old clients; all ranks decode, or each the whole.",
        parse=whole(0, 64),
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
