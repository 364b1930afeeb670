"""Sharded weights: same images, and each rank keeps its own segment's weights only."""

import pytest
import torch

from backends.parallel.weight_shards import weight_bytes
from tests.backends.asyncdiff.runs import attached, loaded, prepare, request, result
from tests.backends.reference import from_rank_zero

CLOSE = {"rtol": 0, "atol": 1e-5}
"""Weights that were sent back lie at other addresses than loaded ones, and kernels for aligned data
sum in another order.
"""


def check_sharded(rank, world_size, names, options):
    for name in names:
        pipe = loaded(name)
        denoiser = getattr(pipe.pipe, pipe.spec.denoiser)
        whole, single = weight_bytes(denoiser), from_rank_zero(lambda: result(pipe, request(name)))
        with attached(
            pipe, options | {"shard_weights": True}, rank=rank, world_size=world_size
        ) as backend:
            torch.testing.assert_close(
                result(pipe, request(name, warmup_steps=4)), single, rtol=0, atol=0
            )
            share = weight_bytes(denoiser) / whole
            assert share <= 1 / backend.segments.num_segments + 0.15, (
                f"{name}: rank {rank} keeps {share:.0%} of the weights"
            )
            hurried, smaller = (
                result(pipe, request(name, warmup_steps=1, height=side, width=64))
                for side in (64, 96)
            )
            bounds = backend.segments.bounds
        assert weight_bytes(denoiser) == whole
        torch.testing.assert_close(
            result(pipe, request(name)), single, **CLOSE
        )  # the weights are back
        with attached(pipe, options, rank=rank, world_size=world_size) as backend:
            backend.costs_of = lambda hooks, call, layout, device: [
                float(weight_bytes(hooks.modules[unit.name])) for unit in layout.units
            ]
            torch.testing.assert_close(
                result(pipe, request(name, warmup_steps=1)), hurried, **CLOSE
            )
            torch.testing.assert_close(
                result(pipe, request(name, warmup_steps=1, height=96)), smaller, **CLOSE
            )
            assert backend.segments.bounds == bounds


@pytest.mark.parametrize(
    ("world_size", "names", "options"),
    [
        (2, ["sdxl"], {}),
        pytest.param(2, ["sd3", "flux"], {}, marks=pytest.mark.slow),
        pytest.param(3, ["sdxl"], {"model_n": 3}, marks=pytest.mark.slow),
        pytest.param(3, ["sdxl"], {"model_n": 2, "stride": 2}, marks=pytest.mark.slow),
    ],
)
def test_sharded_weights_give_the_same_and_fit(run_on_ranks, world_size, names, options):
    prepare(*names)
    run_on_ranks(check_sharded, world_size, names, options)
