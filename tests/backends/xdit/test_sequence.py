"""CFG, Ulysses and ring on real pipelines equal plain diffusers, whatever divides by what."""

import pytest
import torch

from backends.model_table import read_table
from backends.parallel import hooks
from tests.backends.reference import from_rank_zero
from tests.backends.xdit.ranks import assert_close, attached, generated, latents_of
from tests.checkpoints import SD35_MEDIUM, checkpoint, load, sample_image

TYPES = {
    "sd3": ("sd3", {}),
    "sd3.5-medium": ("sd3", SD35_MEDIUM),
    "flux": ("flux", {}),
    "pixa": ("pixa", {}),
    "pixs": ("pixs", {}),
    "hy": ("hy", {}),  # its scheduler draws noise
    "zimage": ("zimage", {}),
    "qwenimage": ("qwenimage", {}),
    "flux2": ("flux2", {}),
    "wan_t2v": ("wan_t2v", {}),
}
LONG = (
    "a detailed painting of a small castle in the mountain forest at night, with snow, and a "
    "robot on a high red horse"
)
# 83, 13, 61 and 400 text tokens; the long one has more than its negative prompt, also when padded
# to a multiple of 32
ODD_TEXT = {
    "sd3": {"max_sequence_length": 6},
    "flux": {"max_sequence_length": 13},
    "flux2": {"max_sequence_length": 401},
    "zimage": {"prompt": LONG, "guidance_scale": 3.0},
}
WITH_IMAGES = {"flux2": [sample_image(64), sample_image(80, seed=1)]}
LATE = (
    "pixs",
    "qwenimage",
    "flux2",
    "wan_t2v",
)  # in the long tail: what they need is needed by others too, or tested for itself
RUNS = [
    {"size": 64},  # 16 image tokens
    {"size": 80, "num_images_per_prompt": 2, "steps": 2},  # 25: uneven shards
    {"size": 64, "guidance_scale": 1.0, "steps": 2, "prompt": "a red house"},
]
ON_2 = [{"use_cfg_parallel": True}, {"ulysses_degree": 2}, {"ring_degree": 2}]
ON_4 = [
    {"use_cfg_parallel": True, "ulysses_degree": 2},
    {"use_cfg_parallel": True, "ring_degree": 2},
    {"ulysses_degree": 2, "ring_degree": 2},
]


def check_matches_single(rank, world_size, name, variant, sets):
    pipe = load(name, **variant)
    runs = [RUNS[0] | ODD_TEXT.get(name, {}), *RUNS[1:]]
    if name in WITH_IMAGES:
        runs.append({"size": 64, "steps": 2, "image": WITH_IMAGES[name]})
    wanted = from_rank_zero(lambda: [latents_of(pipe, name, **run) for run in runs])
    for options in sets:
        if options.get("use_cfg_parallel") and read_table()[name].guidance != "cfg":
            continue
        with attached(pipe, name, rank, world_size, **options) as backend:
            for run, want in zip(runs, wanted, strict=True):
                assert_close(generated(backend, pipe, name, **run), want, (options, run))
    assert not hooks.attached(pipe.transformer)
    assert_close(latents_of(pipe, name, **runs[0]), wanted[0], "detached", relative=1e-9)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in LATE else case for case in TYPES]
)
def test_two_ranks_match_single(run_on_ranks, case):
    name, variant = TYPES[case]
    checkpoint(name, **variant)  # built here, since ranks save only a part
    run_on_ranks(check_matches_single, 2, name, variant, ON_2)


@pytest.mark.parametrize(
    "case",
    ["sd3", *(pytest.param(case, marks=pytest.mark.slow) for case in TYPES if case != "sd3")],
)
def test_four_ranks_match_single(run_on_ranks, case):
    name, variant = TYPES[case]
    checkpoint(name, **variant)
    run_on_ranks(check_matches_single, 4, name, variant, ON_4)


@pytest.mark.slow
def test_three_ranks_match_single_with_four_heads(run_on_ranks):
    checkpoint("flux")
    run_on_ranks(check_matches_single, 3, "flux", {}, [{"ulysses_degree": 3}, {"ring_degree": 3}])


def check_data_parallelism(rank, world_size, sets):
    """Two prompts and two images of each, every one with a seed of its own, in the order in which
    they were asked for.
    """
    pipe = load("sd3")

    def arguments():
        seeds = [torch.Generator().manual_seed(seed) for seed in (3, 5, 7, 11)]
        return {
            "prompt": ["a red car", "a blue bird"],
            "negative_prompt": ["dark", ""],
            "num_images_per_prompt": 2,
            "generator": seeds,
        }

    want = from_rank_zero(lambda: latents_of(pipe, "sd3", steps=2, **arguments()))
    assert all((want[0] - other).abs().max() > 1e-2 for other in want[1:])
    for options in sets:
        with attached(pipe, "sd3", rank, world_size, **options) as backend:
            backend.mesh.traffic.reset()
            assert_close(generated(backend, pipe, "sd3", steps=2, **arguments()), want, options)
            assert backend.mesh.traffic.sent_bytes > 0


def test_images_of_several_prompts_are_spread_and_gathered_in_order(run_on_ranks):
    checkpoint("sd3")
    run_on_ranks(check_data_parallelism, 2, [{"data_parallel_degree": 2}])


@pytest.mark.slow
def test_data_parallelism_with_every_other_method_matches_single(run_on_ranks):
    checkpoint("sd3")
    others = (
        {"use_cfg_parallel": True},
        {"ulysses_degree": 2},
        {"ring_degree": 2},
        {"pipefusion_parallel_degree": 2, "warmup_steps": 2},
    )
    run_on_ranks(
        check_data_parallelism, 4, [{"data_parallel_degree": 2, **other} for other in others]
    )


def check_two_calls_a_step(rank, world_size):
    """FLUX with true guidance calls its denoiser twice a step; what is remembered of one call is
    not for the other.
    """
    pipe = load("flux")
    run = {"true_cfg_scale": 3.0, "negative_prompt": "a dark house", "size": 64}
    want, other = from_rank_zero(
        lambda: (latents_of(pipe, "flux", **run), latents_of(pipe, "flux", size=64))
    )
    assert (want - other).abs().max() > 1e-2
    for options in (
        {"ulysses_degree": 2},
        {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 1, "warmup_steps": 1},
    ):
        with attached(
            pipe, "flux", rank, world_size, **options
        ) as backend:  # one patch: nothing is stale
            assert_close(generated(backend, pipe, "flux", **run), want, options)


@pytest.mark.slow
def test_true_guidance_of_flux_matches_single(run_on_ranks):
    checkpoint("flux")
    run_on_ranks(check_two_calls_a_step, 2)
