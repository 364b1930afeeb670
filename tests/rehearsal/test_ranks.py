"""Every method on several GPUs, rehearsed: the image is that of the same ranks on the CPU, and no
order of calls can deadlock NCCL.
"""

import pytest

from tests.backends.features import TABLE, prepare
from tests.rehearsal.cases import FAILING_LONG, FAILING_SHORT, LONG, SHORT
from tests.rehearsal.order import problems
from tests.rehearsal.runs import fail_on_last_rank, rehearse_ranks

SAME = 0.1
TOLD_WITHIN_S = 2.0


def _rehearse(rank, world_size, case):
    off, alone, journals = rehearse_ranks(case, rank)
    print(f"{case.label}: off {off:.3f}, alone {alone:.3f}", flush=True)
    assert off <= SAME
    assert alone <= SAME
    for streams in ("pairs", "groups"):
        assert problems(journals, streams=streams) == [], streams


def _fail(rank, world_size, case):
    took_s = fail_on_last_rank(case, rank)
    print(f"{case.label}: rank {rank} told after {took_s:.2f} s", flush=True)
    assert took_s < TOLD_WITHIN_S


def _run(run_on_ranks, check, case):
    prepare(TABLE[case.type], [case.feature] if case.feature else [])
    run_on_ranks(check, case.ranks, case)


def _named(cases):
    return {"argvalues": cases, "ids": [case.label for case in cases]}


@pytest.mark.parametrize("case", **_named(SHORT))
def test_method_by_the_rules_of_cuda_and_nccl(run_on_ranks, case):
    _run(run_on_ranks, _rehearse, case)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", **_named(LONG))
def test_every_method_by_the_rules_of_cuda_and_nccl(run_on_ranks, case):
    _run(run_on_ranks, _rehearse, case)


@pytest.mark.parametrize("case", **_named(FAILING_SHORT))
def test_failure_of_one_rank_reaches_the_others_and_the_next_job_does_well(run_on_ranks, case):
    _run(run_on_ranks, _fail, case)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", **_named(FAILING_LONG))
def test_failure_of_one_rank_wherever_the_others_wait(run_on_ranks, case):
    _run(run_on_ranks, _fail, case)
