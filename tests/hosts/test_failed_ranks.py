"""After a failure on one rank, on CPUs: the next job does well, and a method that failed when it
was tried leaves whole weights.
"""

import pytest
import torch

from backends.autotune.candidates import Candidate
from backends.autotune.trials import PipelineSubject, Trials
from backends.plan import ParallelPlan
from tests.backends.features import TABLE, loaded, request_for
from tests.checkpoints import checkpoint
from tests.rehearsal.case import PATCH, Ranks, stages
from tests.rehearsal.runs import fail_on_last_rank

DISPLACED = ("corrected_async_gn", "stale_gn", "sync_gn")


def _fail_and_go_on(rank, world_size, mode):
    case = Ranks(
        label=mode, type="sdxl", backend="distrifuser", options={**PATCH, "sync_mode": mode}
    )
    fail_on_last_rank(case, rank, is_rehearsed=False)


@pytest.mark.parametrize(
    "mode", [DISPLACED[0], *(pytest.param(mode, marks=pytest.mark.slow) for mode in DISPLACED[1:])]
)
def test_job_after_a_failure_in_a_displaced_mode_does_well(run_on_ranks, mode):
    run_on_ranks(_fail_and_go_on, 2, mode)


def _fail_on_four(rank, world_size):
    case = Ranks(label="cfg x patch", type="sdxl", backend="distrifuser", ranks=4)
    fail_on_last_rank(case, rank, is_rehearsed=False)


@pytest.mark.slow
def test_failure_reaches_ranks_that_share_no_group_with_the_one_that_failed(run_on_ranks):
    """On CPUs; tests/rehearsal/ has every method on GPUs."""
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
        ("sd3", "distrifuser", {"parallelism": "tensor", "no_split_batch": True}),
    ],
    ids=["stages", "tensor of xdit", "tensor of distrifuser"],
)
def test_method_that_fails_when_it_is_tried_leaves_whole_weights(
    run_on_ranks, name, backend, options
):
    checkpoint(name)
    run_on_ranks(_try_what_fails, 2, name, backend, options)
