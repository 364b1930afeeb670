"""With a warm-up over all steps, every rank computes what one device computes, bit for bit."""

import pytest
import torch

from tests.backends.asyncdiff.runs import attached, loaded, prepare, request, result
from tests.backends.reference import from_rank_zero
from tests.checkpoints import NAMES

STEPS = 3


def check_equals_single(rank, world_size, names, many_options):
    for name in names:
        pipe = loaded(name)
        asked = request(name, num_inference_steps=STEPS, warmup_steps=STEPS)
        want = from_rank_zero(lambda: result(pipe, asked))
        for options in many_options:
            with attached(pipe, options, rank=rank, world_size=world_size) as backend:
                got = result(pipe, asked)
                assert backend.segments.num_segments > 1, f"{name}: nothing was cut"
                assert backend.report()["stale_evaluations"] == 0
                hurried = result(pipe, request(name, num_inference_steps=STEPS, warmup_steps=1))
                assert backend.report()["stale_evaluations"] > 0
            torch.testing.assert_close(
                got, want, rtol=0, atol=0, msg=lambda text: f"{name} {options}: {text}"
            )
            assert not torch.equal(hurried, want), (
                f"{name}: stale values changed nothing, so this test proves nothing"
            )
            torch.testing.assert_close(
                result(pipe, asked), want, rtol=0, atol=0
            )  # detached: the pipeline is as it was found


FAST = (
    "sd1",
    "sd3",
)  # a UNet and a transformer; sdxl with all kinds of requests is in test_requests.py
OTHERS = [name for name in NAMES if name not in FAST]


@pytest.mark.parametrize(
    "names",
    [
        FAST,
        *(
            pytest.param(OTHERS[start : start + 4], marks=pytest.mark.slow)
            for start in range(0, len(OTHERS), 4)
        ),
    ],
    ids=",".join,
)
def test_full_warmup_matches_single_on_two_ranks(run_on_ranks, names):
    prepare(*names)
    run_on_ranks(check_equals_single, 2, names, [{}])


@pytest.mark.slow
def test_full_warmup_matches_single_on_three_ranks(run_on_ranks):
    prepare("sdxl")
    run_on_ranks(check_equals_single, 3, ["sdxl"], [{"model_n": 3}, {"model_n": 2, "stride": 2}])


@pytest.mark.slow
def test_full_warmup_matches_single_on_four_ranks(run_on_ranks):
    prepare("sdxl")
    run_on_ranks(check_equals_single, 4, ["sdxl"], [{"model_n": 4}, {"model_n": 3, "stride": 2}])
