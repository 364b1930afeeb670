"""After a failure on one rank, on CPUs: the next job does well, and a method that failed when it
was tried leaves whole weights.
"""

from contextlib import nullcontext

import pytest
import torch

from backends.autotune.candidates import Candidate
from backends.autotune.trials import PipelineSubject, Trials
from backends.plan import ParallelPlan
from tests.backends.features import CPU, TABLE, loaded, request_for
from tests.checkpoints import checkpoint
from tests.rehearsal.cases import PATCH, Ranks, stages
from tests.rehearsal.runs import Rank, distance

DISPLACED = ("corrected_async_gn", "stale_gn", "sync_gn")


def _fail_and_go_on(rank, world_size, mode):
    case = Ranks(
        label=mode, type="sdxl", backend="distrifuser", options={**PATCH, "sync_mode": mode}
    )
    here = Rank(case, rank, CPU)
    before = here.image()
    if rank == 1:
        with here.failing("denoiser"):
            _, outcome = here.attempt()
    else:
        _, outcome = here.attempt()
    assert "out of luck" in outcome.failure.message
    assert distance(here.image(), before) <= 0.01
    here.mesh.destroy()


@pytest.mark.parametrize(
    "mode", [DISPLACED[0], *(pytest.param(mode, marks=pytest.mark.slow) for mode in DISPLACED[1:])]
)
def test_job_after_a_failure_in_a_displaced_mode_does_well(run_on_ranks, mode):
    run_on_ranks(_fail_and_go_on, 2, mode)


def _fail_on_four(rank, world_size):
    case = Ranks(label="cfg x patch", type="sdxl", backend="distrifuser", ranks=4)
    here = Rank(case, rank, CPU)
    before = here.image()
    with here.failing("denoiser") if rank == 3 else nullcontext():
        _, outcome = here.attempt()
    assert (outcome.failure.rank, "out of luck" in outcome.failure.message) == (3, True)
    assert distance(here.image(), before) <= 0.01
    here.mesh.destroy()


@pytest.mark.slow
def test_failure_reaches_ranks_that_share_no_group_with_the_one_that_failed(run_on_ranks):
    """On CPUs: in the rehearsal gloo, which carries the messages, would wait for itself here."""
    run_on_ranks(_fail_on_four, 4)


def _try_what_fails(rank, world_size, name, backend, options):
    spec = TABLE[name]
    pipe = loaded(spec)
    weights = {name: tensor.clone() for name, tensor in pipe.pipe.transformer.state_dict().items()}
    case = Ranks(label="a trial", type=name, backend=backend, options=options)
    plan = _plan(case)
    trials = Trials(
        PipelineSubject(pipe, *[request_for(spec, num_inference_steps=4)] * 2),
        spec=spec,
        rank=rank,
        world_size=2,
        halves=2,
    )
    if rank == 1:
        decode = pipe.pipe.transformer.forward

        def fail(*args, **kwargs):
            raise RuntimeError("out of luck")

        pipe.pipe.transformer.forward = fail
    _, why = trials.trial(Candidate(name="a trial", backend=backend, ranks=2, plan=plan))
    assert "out of luck" in why
    if rank == 1:
        pipe.pipe.transformer.forward = decode
    for name, tensor in pipe.pipe.transformer.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0, msg=name)


def _plan(case: Ranks) -> ParallelPlan:
    from backends import planner

    return planner(case.backend)(
        TABLE[case.type], {**case.options, "checkpoint": str(checkpoint(case.type))}, case.ranks
    )


@pytest.mark.parametrize(
    ("name", "backend", "options"),
    [
        ("sd3", "xdit", stages(2, 2)),
        ("flux", "xdit", {"tensor_parallel_degree": 2}),
        ("sd3", "distrifuser", {"parallelism": "tensor"}),
    ],
    ids=["stages", "tensor of xdit", "tensor of distrifuser"],
)
def test_method_that_fails_when_it_is_tried_leaves_whole_weights(
    run_on_ranks, name, backend, options
):
    checkpoint(name)
    run_on_ranks(_try_what_fails, 2, name, backend, options)
