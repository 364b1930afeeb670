"""naive_patch: each rank's patch as an image of its own, put together."""

import torch

from backends.parallel.base import RunInfo
from backends.request import GenerateRequest
from tests.backends.distrifuser.driving import assert_same, attached, build, load_wide
from tests.backends.distrifuser.test_stale import flux_call, sdxl_call

DIMS = {"row": (-2, -2), "col": (-1, -1), "alternate": (-2, -1)}
NAIVE = {"parallelism": "naive_patch", "no_split_batch": True}
RUN = RunInfo(request=GenerateRequest(), height=128, width=64, num_inference_steps=2)


@torch.no_grad()
def check_unet(rank: int, world_size: int) -> None:
    pipe = load_wide("sdxl")
    inputs, call = sdxl_call(pipe.unet)
    for scheme, dims in DIMS.items():
        wanted = [
            torch.cat([call(part, step) for part in inputs[step].chunk(2, dim)], dim)
            for step, dim in enumerate(dims)
        ]
        with attached(pipe, "sdxl", rank, world_size, split_scheme=scheme, **NAIVE) as backend:
            backend.begin(RUN)
            for step, want in enumerate(wanted):
                assert_same(call(inputs[step], step), want, f"{scheme} step {step}")
                backend.step_done()
            backend.end()


@torch.no_grad()
def check_transformer(rank: int, world_size: int) -> None:
    pipe = load_wide("flux")
    inputs, call = flux_call(pipe.transformer)
    patches = slice(0, 20), slice(20, 32)
    want = torch.cat([call(inputs[0][:, patch], 0, patch) for patch in patches], dim=1)
    with attached(pipe, "flux", rank, world_size, patch_weights="5,3", **NAIVE) as backend:
        backend.begin(RUN)
        assert_same(call(inputs[0], 0), want)
        backend.end()


def check_both(rank: int, world_size: int) -> None:
    check_unet(rank, world_size)
    check_transformer(rank, world_size)


def test_naive_patches_are_images_of_their_own(run_on_ranks):
    build(["sdxl", "flux"])
    run_on_ranks(check_both, 2)
